"""What makes no sense is refused in one line, before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interference_data import TASKS, MakeConfig, MakeRun

from mixlora_cli.analysis.interference import run
from mixlora_cli.analysis.interference.run import interference
from mixlora_cli.config import DataConfig, InterferenceConfig, ModelConfig, parse
from mixlora_cli.errors import UserError


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "build_base", loaded)


def refusal(config: InterferenceConfig) -> str:
    with pytest.raises(UserError) as caught:
        interference(config)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["countng", "reading"]}, "tasks=countng: no such task in .*did you mean counting"),
        (
            {"tasks": ["rare", "reading"]},
            "tasks: rare has 1 instances in the train data, too few for two batches",
        ),
        ({"split": "heldout"}, "interference.split=heldout needs held-out records"),
        ({"compare": "/nowhere"}, "compare=/nowhere: no interference.json there; measure that run first"),
        ({"draw_only": True}, "draw_only=true: nothing was measured in"),
    ],
)
def test_tasks_and_data(
    make_run: MakeRun, make_config: MakeConfig, values: dict[str, Any], message: str
) -> None:
    import re

    assert re.match(message, refusal(make_config(make_run("lora").root, **values)))


def test_data_with_a_single_task(make_run: MakeRun, make_config: MakeConfig, data: DataConfig) -> None:
    config = make_config(make_run("lora").root, tasks=None, data=replace(data, tasks=[TASKS[0]]))
    assert "has no other task" in refusal(config)


def test_runs_without_a_low_rank_adapter(make_run: MakeRun, make_config: MakeConfig, tmp_path: Path) -> None:
    assert "trained the model's own weights" in refusal(make_config(make_run("full").root))
    unfinished = make_run("lora")
    unfinished.result.unlink()
    assert "has not finished" in refusal(make_config(unfinished.root))
    assert "is no run folder" in refusal(make_config(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": None}, "run=null: .*untuned base has no adapter"),
        ({"tasks": ["counting"]}, r"tasks=\[counting\]: must name at least two"),
        ({"tasks": ["counting", "counting"]}, "must name at least two"),
        ({"seed": None}, "seed=null: must be an integer"),
        ({"interference": {"batches": 1}}, "interference.batches=1: must be >= 2"),
        ({"draw": {"score": "max"}}, "draw.score=max: must be one of"),
        ({"measure": {"lambdas": [0.1, 0.0]}}, "measure.lambdas=0.0: must be > 0"),
    ],
)
def test_configuration(values: dict[str, Any], message: str) -> None:
    model, data = ModelConfig("tiny", "tiny"), DataConfig("mini", "mini")
    whole = {"run": "somewhere", "output_dir": "x", "model": model, "data": data, **values}
    with pytest.raises(UserError, match=message):
        parse(InterferenceConfig, {key: vars(v) if hasattr(v, "__dict__") else v for key, v in whole.items()})
