import random

from mixlora_cli.evaluation.done import Done


def test_it_is_a_set_of_keys() -> None:
    rng = random.Random(0)
    keys = [(rng.choice(("unseen", "heldout")), rng.choice("ab"), rng.randrange(300)) for _ in range(500)]
    done, plain = Done(), set()
    for key in keys:
        assert done.add(key) is (key not in plain)
        plain.add(key)
        assert len(done) == len(plain)
    assert set(done) == plain
    assert all(
        (key in done) == (key in plain)
        for key in ((s, b, i) for s in ("unseen", "x") for b in "ab" for i in range(320))
    )
    assert ("unseen", 1) not in done


def test_it_costs_an_eighth_of_a_byte_each() -> None:
    done = Done(("unseen", "mnist", index) for index in range(80_000))
    assert len(done) == 80_000
    assert sum(len(bits) for bits in done._bits.values()) == 10_000
