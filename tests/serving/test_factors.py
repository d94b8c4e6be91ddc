"""Which factors the training's tasks use: equal to a plain count, kept, and compared with a prompt."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixlora_cli.config import DataConfig
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import Run, Session, find_run
from mixlora_cli.serving import factors
from mixlora_cli.serving.factors import FILE, TaskFactors, task_factors
from mixlora_cli.training.run_folder import RunFolder
from tiny_runs import NUM_FACTORS, RANK, TINY, finished_run


def opened(folder: Path) -> tuple[Run, Session]:
    run = find_run(str(folder), TINY)
    return run, Session(build_base(TINY), run.dtype, False, run.adapter, run.trained_routing)


def instance_run(folder: Path, data: DataConfig) -> RunFolder:
    return finished_run(
        folder, data, router_spread=50
    )  # only large routers tell the tiny model's instances apart


def test_shares_of_instances(data: DataConfig, tmp_path: Path) -> None:
    run, session = opened(instance_run(tmp_path / "run", data).root)
    found = task_factors(run, session, instances=5)
    assert found is not None
    assert (found.tasks, found.instances.tolist()) == (["counting", "reading", "naming"], [5, 5, 5])
    assert found.rank == RANK and found.by_chance == RANK / NUM_FACTORS
    # What each prompt selects alone, counted one by one.
    records = load_records(replace(data, max_per_task=5), "train", 0)
    expected: Counter[tuple[str, str, int, str]] = Counter()
    for item in encode_prompts(records, session.base.chat):
        for layer, selection in session.selections([item]).items():
            for side, index in (("a", selection.index_a), ("b", selection.index_b)):
                expected.update((side, layer, factor, item.task) for factor in index[0].tolist())
    got = {
        (side, layer, factor, task): int(counts[number, factor, place])
        for side, counts in (("a", found.counts_a), ("b", found.counts_b))
        for number, layer in enumerate(found.layers)
        for factor in range(NUM_FACTORS)
        for place, task in enumerate(found.tasks)
    }
    assert {key: count for key, count in got.items() if count} == dict(expected)
    assert any(0 < count < 5 for count in got.values())  # not all instances select alike
    assert found.counts_a.sum() == len(found.layers) * 15 * RANK


def test_a_task_is_one_choice_and_needs_no_data(data: DataConfig, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", data, routing="task", router_spread=50)
    folder.definitions.write_text(json.dumps({"counting": "Do counting.", "reading": "Read it aloud."}))
    for file in (data.train, data.metadata):
        assert isinstance(file, str)
        Path(file).unlink()
    run, session = opened(folder.root)
    found = task_factors(run, session)
    assert found is not None
    assert (found.tasks, found.instances.tolist()) == (["counting", "reading"], [1, 1])
    assert set(np.unique(found.counts_a)) == {0, 1}
    assert (found.counts_a.sum(axis=1) == RANK).all() and (found.counts_b.sum(axis=1) == RANK).all()
    # Each task is wholly like itself, and the two are not.
    for number, task in enumerate(found.tasks):
        a, b = (
            np.stack([np.flatnonzero(row) for row in counts[..., number]])
            for counts in (found.counts_a, found.counts_b)
        )
        ((first, best), (_, other)) = found.alike(found.layers, a, b)
        assert (first, best) == (task, 1.0) and other < 1


def test_likeness_is_the_expected_overlap() -> None:
    # Two layers, three factors, two tasks of four and two instances, rank 2.
    a = np.array([[[4, 0], [4, 1], [0, 2]], [[3, 2], [1, 2], [4, 0]]])
    b = np.array([[[0, 2], [4, 2], [4, 0]], [[4, 2], [4, 0], [0, 2]]])
    known = TaskFactors(["x", "y"], np.array([4, 2]), ["one", "two"], 2, a, b)
    # x: A 4/4 + 0/4 and 3/4 + 1/4, B 4/4 + 4/4 and 4/4 + 0; over r=2, layers and sides.
    x = (1.0 + 1.0 + 2.0 + 1.0) / 8
    y = (0 / 2 + 2 / 2 + 2 / 2 + 2 / 2 + 2 / 2 + 0 / 2 + 2 / 2 + 2 / 2) / 8
    answer = known.alike(["two", "none", "one"], [[0, 1], [0, 1], [0, 2]], [[0, 2], [0, 1], [1, 2]])
    assert answer == [("y", pytest.approx(y)), ("x", pytest.approx(x))]
    assert known.as_json() == {
        "tasks": ["x", "y"],
        "instances": 4,
        "layers": ["one", "two"],
        "rank": 2,
        "factors": 3,
        "a": [
            [[[0, 1.0]], [[0, 1.0], [1, 0.5]], [[1, 1.0]]],
            [[[1, 1.0], [0, 0.75]], [[1, 1.0], [0, 0.25]], [[0, 1.0]]],
        ],
        "b": [[[[1, 1.0]], [[0, 1.0], [1, 1.0]], [[0, 1.0]]], [[[0, 1.0], [1, 1.0]], [[0, 1.0]], [[1, 1.0]]]],
    }


def test_kept_until_adapter_or_data_change(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = instance_run(tmp_path / "run", data)
    run, session = opened(folder.root)
    first = task_factors(run, session)
    assert first is not None and [path.name for path in folder.root.glob("task-*")] == [FILE]

    counted: list[int] = []
    count = factors._count
    monkeypatch.setattr(
        factors, "_count", lambda items, *rest: counted.append(len(items)) or count(items, *rest)
    )

    def again(number: int, **changes: int) -> None:
        found = task_factors(find_run(str(folder.root), TINY), session, **changes)
        assert found is not None and len(counted) == number
        if not changes:
            assert (found.tasks, found.layers) == (first.tasks, first.layers)
            np.testing.assert_array_equal(found.counts_b, first.counts_b)

    again(0)
    again(1, instances=3)
    again(2)
    assert isinstance(data.train, str)
    train = Path(data.train)
    os.utime(train, (1, 1))  # maybe others
    again(3)
    train.rename(train.with_suffix(".away"))  # the same run on another machine
    again(3)
    (folder.root / FILE).write_bytes(b"cut short")
    capsys.readouterr()
    assert task_factors(run, session) is None
    told = capsys.readouterr().err
    assert "which factors the tasks of the training use is not known" in told and str(train) in told
    assert FILE in told and told.count("\n") == 1
    train.with_suffix(".away").rename(train)
    again(4)
    config = folder.adapter / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    again(5)


def test_a_folder_that_cannot_be_written(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, session = opened(instance_run(tmp_path / "run", data).root)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(factors, "atomic", refuse)
    assert task_factors(run, session) is not None
    assert run.root is not None and not (run.root / FILE).exists()


@pytest.mark.parametrize(
    ("adapter", "routing"), [("lora", "instance"), ("full", "instance"), ("mixlora", "random")]
)
def test_nothing_to_tell(
    adapter: str, routing: str, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, session = opened(finished_run(tmp_path / "run", data, adapter, routing).root)
    assert task_factors(run, session) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("routing", "reason"),
    [
        ("instance", "does not say which data the adapter was trained on"),
        ("task", "has no definitions of its tasks"),
    ],
)
def test_a_bare_adapter_says_nothing_of_its_data(
    routing: str, reason: str, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, session = opened(finished_run(tmp_path / "run", data, routing=routing).adapter)
    assert task_factors(run, session) is None
    assert reason in capsys.readouterr().err


def test_definitions_of_the_tasks_of_a_training(data: DataConfig, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", data, routing="task")
    run = find_run(str(folder.root), TINY)
    routing = run.trained_routing  # without definitions.json: of the tasks that the records name
    assert routing is not None and routing.definitions == {
        "counting": "Do counting.",
        "reading": "Do reading.",
        "naming": "Do naming.",
    }
    assert isinstance(data.train, str)
    Path(data.train).unlink()  # nobody knows better
    assert set(find_run(str(folder.root), TINY).definitions) == {
        "counting",
        "naming",
        "reading",
        "trained alone",
    }
