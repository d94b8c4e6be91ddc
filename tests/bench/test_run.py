"""The command end to end on narrow layers and `model=tiny`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_cli.analysis.bench import measure, run
from mixlora_cli.analysis.bench.run import bench
from mixlora_cli.analysis.bench.whole import WholeModel, sharing_weights
from mixlora_cli.config import PARTS
from mixlora_cli.models.tiny import build_tiny


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts of the cases that are really measured."""
    parts: list[str] = []

    def counting(case: Any, whole: WholeModel) -> Any:
        parts.append(case.part)
        return measure.measure(case, whole)

    monkeypatch.setattr(run, "measure", counting)
    return parts


@pytest.mark.slow
def test_everything_is_measured_and_written(
    make_config: Any, counted: list[str], tmp_path: Path, capsys: Any
) -> None:
    findings = bench(make_config())
    assert counted == ["layer"] * 2 + ["operations"] * 2 + [
        "memory",
        "step",
        "generation",
        "evaluation",
        "scoring",
    ]
    folder = tmp_path / "bench"
    results = json.loads((folder / "results.json").read_text())
    assert results["format"] == "mixlora-bench/1"
    assert tuple(dict.fromkeys(case["part"] for case in results["cases"])) == PARTS
    verdicts = {goal["goal"]: goal["verdict"] for goal in results["goals"]}
    assert [v == "not measured" for v in verdicts.values()] == [True] * 4 + [False] * 4 + [True]
    layer = results["cases"][0]
    assert layer["seconds"]["lora"]["rounds"] == 3 and layer["seconds"]["lora"]["median"] > 0
    assert set(layer["extra_seconds"]) == {"lora", "mixlora_e4", "mixlora_e8", "published"}
    generation = next(case for case in results["cases"] if case["part"] == "generation")
    assert {tuple(c.items()) for c in generation["counts"].values()} == {(("same_answers", 2),)}
    assert {"ratio.png", "ratio.svg"} <= {path.name for path in folder.iterdir()}
    markdown = (folder / "performance.md").read_text()
    assert markdown.count("\n### ") == 7 and "](ratio.svg)" in markdown and "mixlora" in markdown
    assert "whole training step <= 1.05x of LoRA's" in capsys.readouterr().out
    assert len(findings.measurements) == 9


def test_the_same_command_measures_nothing_twice(
    make_config: Any, counted: list[str], tmp_path: Path
) -> None:
    bench(make_config(parts=["operations"], shapes=["32"]))
    bench(make_config(parts=["operations"]))
    assert len(counted) == 2
    bench(make_config(parts=["operations"], overwrite=True))
    assert len(counted) == 4 and (tmp_path / "bench" / "measurements-1.jsonl").is_file()


def test_an_interrupted_benchmark_continues(
    make_config: Any, counted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_at_second = run.measure

    def interrupted(case: Any, whole: WholeModel) -> Any:
        if len(counted) == 1:
            raise KeyboardInterrupt
        return stop_at_second(case, whole)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "measure", interrupted)
        bench(make_config(parts=["operations"]))
    assert "stopped at 1/2 cases: the same command continues" in capsys.readouterr().err
    bench(make_config(parts=["operations"]))
    assert len(counted) == 2


def test_a_matrix_for_each_instance_needs_room(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 4 * 2 * 32 * 40 * 4)
    findings = bench(make_config(parts=["operations"]))
    assert ["published" in done.counts for done in findings.measurements] == [True, False]


def test_threads_are_put_back(make_config: Any) -> None:
    findings = bench(make_config(parts=["operations"], shapes=["32"], threads=2))
    assert findings.machine["torch_threads"] == 2
    assert torch.get_num_threads() == 1


def test_models_share_the_frozen_weights_and_nothing_else(make_config: Any) -> None:
    whole = WholeModel(make_config(), torch.device("cpu"))
    _ = whole.features  # wraps the tower
    before = {name: tensor.clone() for name, tensor in whole.base.model.state_dict().items()}
    lora, mixlora = whole.step("lora", 2), whole.step("mixlora", 2)
    losses = [(lora(), mixlora()) for _ in range(3)]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)  # untrained, on the same batch
    assert losses[2][0] != losses[2][1]
    assert {name for name, _ in whole.base.model.named_modules() if "lora" in name} == set()
    for name, tensor in whole.base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    own = {tensor.data_ptr() for tensor in whole.base.model.parameters()}
    assert own <= {tensor.data_ptr() for tensor in lora.model.parameters()}
    trained = [p.data_ptr() for step in (lora, mixlora) for p in step.model.parameters() if p.requires_grad]
    assert len(trained) == len(set(trained)) and not own & set(trained)


def test_sharing_weights_copies_modules() -> None:
    model = build_tiny().model
    twin = sharing_weights(model)
    assert twin is not model and type(twin) is type(model)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert {id(module) for module in twin.modules()}.isdisjoint(id(module) for module in model.modules())
