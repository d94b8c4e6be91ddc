"""A grid of real processes: what is there stays, what failed is tried again, what was interrupted resumes."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mixlora_cli.reproduce.jobs import Job, Step, read_record
from mixlora_cli.reproduce.runner import (
    GridView,
    Outcome,
    Runner,
    StopRequest,
    in_words,
    last_line,
    locked,
    time_left,
    total,
)

STANDIN = (sys.executable, str(Path(__file__).with_name("standin.py")))


def cell(
    root: Path,
    name: str,
    train: str = "ok",
    evaluate: str = "ok",
    limit: int = 5,
    rank: int = 4,
    after: Path | None = None,
) -> Job:
    """A training and an evaluation that behave as they are told."""
    folder = root / name
    config = {"rank": rank}

    def part(kind: str, behaviour: str, result: str, asked: dict[str, Any]) -> Step:
        arguments = (kind, str(folder), behaviour, json.dumps({**config, "resume": "auto"}))
        return Step(kind, arguments, folder / result, asked, 10.0, {"steps": 3} if kind == "train" else {})

    parts = (
        part("train", train, "result.json", config),
        part("eval", evaluate, "eval/results.json", {"limit": limit}),
    )
    return Job(name, 0, None, folder, parts, after)


def run(*cells: Job, keep: bool = False, jobs: int = 1) -> tuple[Outcome, list[str]]:
    """The outcome, and the lines that were printed."""
    printed, stop = io.StringIO(), StopRequest()
    with stop.listening(), GridView(cells, Console(file=printed, width=200), jobs) as view:
        outcome = Runner(view, stop, STANDIN, keep, jobs).run(cells)
    return outcome, printed.getvalue().splitlines()


def calls(cell: Job) -> list[str]:
    return (cell.folder / "calls").read_text().split() if (cell.folder / "calls").exists() else []


def test_a_finished_cell_is_not_run_again(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b")]
    outcome, lines = run(*cells)
    assert outcome.done == cells and not outcome.failed and not outcome.stopped
    assert [line.split("  ")[0] for line in lines][:2] == [
        "[1/2] a seed 0: running, train",
        "[1/2] a seed 0: running, eval",
    ]
    assert lines[2].startswith("[1/2] a seed 0: done, in 0:00:0")
    outcome, lines = run(*cells)
    assert outcome.done == cells
    assert lines == ["[1/2] a seed 0: there", "[2/2] b seed 0: there"]
    assert [calls(each) for each in cells] == [["train", "eval"]] * 2


def test_a_failure_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    broken, fine = cell(tmp_path, "broken", train="fail"), cell(tmp_path, "fine")
    outcome, lines = run(broken, fine)
    assert outcome.done == [fine]
    (failure,) = outcome.failed
    assert (failure.job, failure.step.name) == (broken, "train")
    assert failure.reason == "exit code 2: error: no luck today"
    assert failure.log.read_text().splitlines()[1:] == ["this is train", "error: no luck today"]
    assert any(
        "broken seed 0: failed, train, exit code 2" in line and str(failure.log) in line for line in lines
    )
    assert calls(broken) == ["train"]  # nothing to evaluate

    (broken.folder / "mended").touch()
    outcome, _ = run(broken, fine)
    assert outcome.done == [broken, fine]
    assert calls(broken) == ["train", "train", "eval"] and calls(fine) == ["train", "eval"]


def test_an_evaluation_that_failed_does_not_train_again(tmp_path: Path) -> None:
    one = cell(tmp_path, "a", evaluate="fail")
    assert run(one)[0].failed[0].step.name == "eval"
    (one.folder / "mended").touch()
    assert run(one)[0].done == [one]
    assert calls(one) == ["train", "eval", "eval"]


def test_success_without_a_result_is_a_failure(tmp_path: Path) -> None:
    one = cell(tmp_path, "a", evaluate="empty")
    (failure,) = run(one)[0].failed
    assert failure.reason.startswith("exit code 0, but ")


def test_a_changed_evaluation_is_made_anew_and_a_changed_training_too(tmp_path: Path) -> None:
    run(cell(tmp_path, "a", limit=5))
    assert run(cell(tmp_path, "a", limit=6, evaluate="fail"))[0].failed
    assert not (tmp_path / "a" / "eval" / "results.json").exists()  # of other settings
    (tmp_path / "a" / "mended").touch()
    changed = cell(tmp_path, "a", limit=6)
    assert run(changed)[0].done == [changed]
    assert calls(changed) == ["train", "eval", "eval", "eval"]
    assert read_record(changed.folder)["parts"]["eval"]["asked"] == {"limit": 6}
    # In the real grid another rank is another folder; here it shows that a result alone is not trusted.
    run(cell(tmp_path, "a", limit=6, rank=8))
    assert calls(changed) == ["train", "eval", "eval", "eval", "train", "eval"]


def test_another_adapter_does_not_keep_the_scores_of_the_one_before(tmp_path: Path) -> None:
    one = cell(tmp_path, "a")
    run(one)
    (one.folder / "result.json").unlink()
    assert run(cell(tmp_path, "a", train="fail"))[0].failed
    assert not (one.folder / "eval" / "results.json").exists()
    (one.folder / "mended").touch()
    assert run(one)[0].done == [one]
    assert calls(one) == ["train", "eval", "train", "train", "eval"]


def test_what_was_asked_survives_a_kill_after_the_result(tmp_path: Path) -> None:
    """cell.json says what is asked before the command runs, so nothing is lost between its end and ours."""
    one = cell(tmp_path, "a")
    run(one)
    record = read_record(one.folder)
    record["parts"]["eval"]["seconds"] = None
    (one.folder / "cell.json").write_text(json.dumps(record))
    assert run(one)[1] == ["[1/1] a seed 0: there"]


def interrupt_when(*ready: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(each.exists() for each in ready) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_stops_all_with_a_checkpoint_and_the_next_run_resumes(tmp_path: Path, jobs: int) -> None:
    slow = [cell(tmp_path, name, train="slow") for name in "ab"[:jobs]]
    later = cell(tmp_path, "later")
    helper = threading.Thread(target=interrupt_when, args=[each.folder / "ready" for each in slow])
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it for what runs in the background
    helper.start()
    outcome, lines = run(*slow, later, jobs=jobs)
    helper.join()
    assert outcome.stopped and not outcome.done and not outcome.failed
    assert all((each.folder / "checkpoints" / "checkpoint-1").is_dir() for each in slow)
    assert f"[1/{jobs + 1}] a seed 0: stopped, in train" in lines
    assert calls(later) == []
    assert signal.getsignal(signal.SIGINT) is before  # given back

    outcome, _ = run(*slow, later)
    assert outcome.done == [*slow, later] and not outcome.stopped


def test_a_cell_that_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    busy, free = cell(tmp_path, "busy"), cell(tmp_path, "free")
    with locked(busy.folder) as lock:
        assert lock is not None
        outcome, _ = run(busy, free)
    assert outcome.elsewhere == [busy] and outcome.done == [free]
    assert calls(busy) == []
    assert run(busy, free)[0].done == [busy, free]


def test_two_jobs_run_at_the_same_time_and_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mixlora_cli.reproduce.runner.threads_each", lambda jobs: 6 // jobs)
    cells = [cell(tmp_path, "a", train="meet"), cell(tmp_path, "b", train="meet"), cell(tmp_path, "c")]
    outcome, _ = run(*cells, jobs=2)
    assert outcome.done == cells  # in the grid's order, whichever came first
    assert [(each.folder / "train.threads").read_text() for each in cells] == ["3"] * 3
    alone = cell(tmp_path, "alone")
    run(alone)
    assert (alone.folder / "train.threads").read_text() == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    told = cell(tmp_path, "told")
    run(told, jobs=2)
    assert (told.folder / "train.threads").read_text() == "5"


def moment(file: Path) -> float:
    return float(file.read_text())


@pytest.mark.parametrize("fails", [False, True])
def test_a_cell_waits_for_the_one_that_it_comes_after_if_that_does_not_fail(
    tmp_path: Path, fails: bool
) -> None:
    first = cell(tmp_path, "first", train="fail" if fails else "ok")
    second = cell(tmp_path, "second", after=first.folder)
    outcome, _ = run(first, second, jobs=2)
    assert outcome.done == ([second] if fails else [first, second])
    assert [failure.job for failure in outcome.failed] == ([first] if fails else [])
    if not fails:
        assert moment(second.folder / "train.start") > moment(first.folder / "eval.end")


def test_a_cell_whose_files_cannot_be_written_has_failed(tmp_path: Path) -> None:
    full, fine = cell(tmp_path, "full"), cell(tmp_path, "fine")
    (full.folder / "train.log").mkdir(parents=True)
    outcome, lines = run(full, fine, jobs=2)
    assert outcome.done == [fine]
    assert outcome.failed[0].reason == f"{full.folder / 'train.log'}: Is a directory"
    assert any("full seed 0: failed" in line for line in lines)


def test_a_mistake_of_ours_ends_the_other_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, broken, later = (
        cell(tmp_path, "slow", train="slow"),
        cell(tmp_path, "broken"),
        cell(tmp_path, "later"),
    )
    real = Runner._run_step

    def run_step(self: Runner, each: Job, *rest: Any) -> str | None:
        if each is broken:
            deadline = time.monotonic() + 30
            while not (slow.folder / "ready").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            raise KeyError("nobody thought of this")
        return real(self, each, *rest)

    monkeypatch.setattr(Runner, "_run_step", run_step)
    start = time.monotonic()
    with pytest.raises(KeyError):
        run(slow, broken, later, jobs=2)
    assert time.monotonic() - start < 50  # the slow one would take 60
    assert (slow.folder / "checkpoints" / "checkpoint-1").is_dir() and calls(later) == []


def test_the_time_left_counts_jobs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell(tmp_path, name) for name in "ab"]  # four parts of 10 seconds of the whole machine
    view = GridView(cells, Console(file=io.StringIO()), at_once=2)
    assert view.time_left() == 40.0
    clock = [100.0]
    monkeypatch.setattr("mixlora_cli.reproduce.runner.time.monotonic", lambda: clock[0])
    for each in cells:
        view.start(each.steps[0])
    clock[0] += 6.0
    assert view.time_left() == 34.0  # both together had 6 seconds of the whole machine
    clock[0] += 10.0
    for each in cells:
        assert view.finish(each.steps[0], succeeded=True) == 16.0
    assert view.time_left() == 16.0  # 8 of the machine instead of 10 for each part: two are left
    view.start(cells[0].steps[1])
    clock[0] += 16.0
    view.finish(cells[0].steps[1], succeeded=True)
    assert view.time_left() == 16.0  # the last part alone has half the machine: 16 seconds, not 8


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_a_finished_training(tmp_path: Path, keep: bool) -> None:
    one = cell(tmp_path, "a")
    run(one, keep=keep)
    assert (one.folder / "checkpoints").exists() == keep


def test_live_table_in_a_terminal(tmp_path: Path) -> None:
    cells = [cell(tmp_path, f"row{number}") for number in range(30)]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    view = GridView(cells, console)
    for each in cells[:10]:
        for part in each.steps:
            view.start(part)
            view.finish(part, succeeded=True)
        view.change(each, "done", "in 0:10:00")
    view.change(cells[10], "failed", "train, exit code 2: " + "why " * 60)
    view.change(cells[11], "running", "train")
    view.look(cells[11], "train, step 3/3, loss 1.500")
    with console.capture() as capture:
        console.print(view.render())
    shown = capture.get()
    assert "row10 seed 0" in shown and "failed" in shown and "row11 seed 0" in shown and "running" in shown
    assert "step 3/3, loss 1.500" in shown and "exit code 2" in shown
    assert "row29" not in shown and "18 waiting" in shown and "more not shown" in shown
    assert len(shown.splitlines()) <= 20


def test_last_line_and_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 10_000 + "\nwhy it failed\n\n")
    assert last_line(log) == "why it failed"
    assert (in_words(3723.4), in_words(None)) == ("1:02:03", "?")
    assert total([10.0, None, 5.0]) == (15.0, 1)


@pytest.mark.parametrize(
    ("done", "rest", "left"),
    [
        ([], [100.0, 50.0], 150.0),
        ([(100.0, 200.0), (50.0, 100.0)], [10.0], 20.0),  # corrected by what steps took
        ([], [10.0, None], None),
        ([(None, 30.0), (None, 50.0)], [None, None], 80.0),  # without an estimate: as long as the others
        ([(10.0, 20.0), (None, 40.0)], [10.0, None], 20.0 + 30.0),
    ],
)
def test_time_left(
    done: list[tuple[float | None, float]], rest: list[float | None], left: float | None
) -> None:
    assert time_left(done, rest) == pytest.approx(left)
