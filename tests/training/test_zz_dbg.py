
from .test_faults import run_jobs, again, assert_same_end
def test_dbg(make_config, run_jobs):
    numbers = {"steps": 3, "save_every": 1, "keep_checkpoints": 1}
    whole = make_config("whole", steps=3, save_every=1, keep_checkpoints=5)
    two = make_config("two", **numbers)
    cut = make_config("cut0", **numbers)
    cut2 = make_config("cut2", **numbers)
    print(run_jobs({"config": whole}, {"config": two}, {"config": cut, "at_save": (2, 0)}, {"config": again(cut)}, {"config": cut2, "at_step": 2}, {"config": again(cut2)}))
    for c in (two, cut2, cut):
        try:
            assert_same_end(whole, c); print("SAME")
        except AssertionError as e: print("DIFF", str(e)[:50])
