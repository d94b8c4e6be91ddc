"""What the commands that measure a run, or the machine, refuse in one line, before they read anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.config import BenchConfig, ExportConfig, InterferenceConfig, MapConfig, TsneConfig, load
from mixlora_cli.errors import UserError

GROUPS = {
    BenchConfig: "bench",
    ExportConfig: "export",
    InterferenceConfig: "interference",
    TsneConfig: "tsne",
}
TINY = {"model": {"name": "tiny", "source": "tiny"}, "data": {"name": "mini", "source": "mini"}}
TWO_TASKS, PAIRS = "must name two different tasks or more", "must be [[seen,unseen],...]"
REFUSED = [
    (BenchConfig, {"bench.shapes": ["12y"]}, "bench.shapes=12y: a width, or two joined by x"),
    (BenchConfig, {"bench.shapes": []}, "bench.shapes=[]: give at least one, or null"),
    (BenchConfig, {"bench.batches": [0]}, "bench.batches=0: must be > 0"),
    (BenchConfig, {"bench.rounds": 0}, "bench.rounds=0: must be > 0 or null"),
    (BenchConfig, {"bench.min_seconds": -1}, "bench.min_seconds=-1: must be >= 0 or null"),
    (BenchConfig, {"bench.parts": []}, "choose of layer, operations"),
    (BenchConfig, {"bench.pools": [2]}, "rank=4: must be <= 2, the smallest pool"),
    (
        ExportConfig,
        {"run": None},
        "run=null: give run=<folder of a finished `mixlora train adapter=mixlora`>",
    ),
    (ExportConfig, {"run": "nowhere"}, "run=nowhere: must be an existing folder"),
    (ExportConfig, {"export.rank": 0}, "export.rank=0: must be > 0 or null"),
    (ExportConfig, {"export.limit": 0}, "export.limit=0: must be > 0 or null"),
    (ExportConfig, {"export.instances": 0}, "export.instances=0: must be > 0"),
    (ExportConfig, {"export.batch_size": 0}, "export.batch_size=0: must be > 0"),
    (ExportConfig, {"export.max_new_tokens": 0}, "export.max_new_tokens=0: must be > 0"),
    (ExportConfig, {"export.tasks": []}, "export.tasks=[]: must name at least one task"),
    (ExportConfig, {"export.split": "test"}, "export.split=test: must be one of train, heldout, unseen"),
    (ExportConfig, {"export.pertask": True}, "did you mean export.per_task?"),
    (InterferenceConfig, {"run": None}, "untuned base has no adapter"),
    (InterferenceConfig, {"tasks": ["a"]}, "tasks=[a]: must name at least two"),
    (InterferenceConfig, {"tasks": ["a", "a"]}, "must name at least two"),
    (InterferenceConfig, {"seed": None}, "seed=null: must be an integer"),
    (InterferenceConfig, {"interference.batches": 1}, "interference.batches=1: must be >= 2"),
    (InterferenceConfig, {"draw.score": "max"}, "draw.score=max: must be one of"),
    (InterferenceConfig, {"measure.lambdas": [0.1, 0.0]}, "measure.lambdas=0.0: must be > 0"),
    (TsneConfig, {"run": None}, "run=null: give run=<folder"),
    (TsneConfig, {"seed": -1}, "seed=-1"),
    *((TsneConfig, {"tasks": tasks}, TWO_TASKS) for tasks in (["a"], ["a", "a"], [])),
    *((TsneConfig, {"pairs": pairs}, PAIRS) for pairs in ([["a"]], [["a", "a"]], [])),
    (TsneConfig, {"tasks": ["a", "b"], "pairs": [["a", "b"]]}, "not both"),
    *(
        (TsneConfig, {f"tsne.{key}": value}, f"tsne.{key}=")
        for key, value in {
            "instances": 1,
            "neighbours": 0,
            "batch_size": 0,
            "perplexity": 0.5,
            "permutations": 19,
            "page_mb": -1.0,
            "sides": [],
            "layers": [],
            "routing_seed": -1,
        }.items()
    ),
]


def given(kind: type, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration as plain values, with some dotted keys changed."""
    values: dict[str, Any] = {**TINY, "output_dir": "out", GROUPS[kind]: {}}
    if kind is not BenchConfig:
        values["run"] = "here"
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = value
    return values


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_refused_in_one_line(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(kind, given(kind, changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_defaults() -> None:
    config = load(TsneConfig, given(TsneConfig, {}))
    assert (config.tsne, config.seed) == (MapConfig(), 0)
