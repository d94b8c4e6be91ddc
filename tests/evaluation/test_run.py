"""The whole way on a tiny model: answer, score, write; resume; run folders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mixlora_cli.config import AdapterConfig, EvalConfig, OptimConfig, RoutingConfig, TrainConfig
from mixlora_cli.data.encode import Item
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.generate import Generator
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.evaluation.results import Results, read_results
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.store import changed_parts
from mixlora_cli.training.run_folder import RunFolder

NUM_UNSEEN = 41
"""Records of the fixture `data`."""


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model is asked to answer."""
    sizes: list[int] = []
    call = Generator.__call__

    def counting(self: Generator, items: Sequence[Item]) -> list[str]:
        sizes.append(len(items))
        return call(self, items)

    monkeypatch.setattr(Generator, "__call__", counting)
    return sizes


def numbers(results: Results) -> dict[str, float]:
    return {score.column: score.value for score in results.scores}


def test_base_on_all_benchmarks(
    config: EvalConfig, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(config)
    assert sum(generated) == NUM_UNSEEN
    assert max(generated) == 8
    folder = Path(config.output_dir)
    assert list(numbers(results)) == [
        "MME", "Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE"
    ]  # fmt: skip
    assert results.mean is not None
    assert {score.column: score.n for score in results.scores}["MME"] == 8
    assert read_results(folder) == results == score(folder)
    contents = read_predictions(folder / "predictions.jsonl")
    assert contents.header is not None
    assert contents.header.count == NUM_UNSEEN
    assert contents.header.fingerprint["adapter"] == "none"
    assert results.about["label"] == "base"
    first = next(p for p in contents.predictions if p.index == 0)
    assert (first.benchmark, first.question, first.target) == ("mini_mme", "Is it yes?", "yes")
    assert (first.category, first.image_id) == ("count", "m0")
    shown = capsys.readouterr()
    assert "MMAvg" in shown.out
    assert f"answered {NUM_UNSEEN}/{NUM_UNSEEN}" in shown.err


def test_a_killed_evaluation_continues_where_it_was(config: EvalConfig, generated: list[int]) -> None:
    whole = evaluate(config)
    path = Path(config.output_dir) / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:21]) + lines[21][:-9])  # header, 20 answers, and most of another
    generated.clear()
    again = evaluate(replace(config, eval=replace(config.eval, batch_size=5)))
    assert sum(generated) == NUM_UNSEEN - 20
    assert again.scores == whole.scores
    assert again.mean == whole.mean
    assert {p.key: p for p in read_predictions(path).predictions} == {
        prediction.key: prediction for prediction in _predictions_of(lines, path.with_name("whole.jsonl"))
    }
    generated.clear()
    evaluate(config)
    assert generated == []


def _predictions_of(lines: list[bytes], path: Path) -> list:  # type: ignore[type-arg]
    path.write_bytes(b"".join(lines))
    return read_predictions(path).predictions


def test_changed_decoding_starts_anew_and_says_so(
    config: EvalConfig, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(config, eval=replace(config.eval, benchmarks=["mini_mnist"]))
    evaluate(few)
    generated.clear()
    evaluate(replace(few, eval=replace(few.eval, max_new_tokens=2)))
    assert sum(generated) == 4
    assert "(decoding changed): kept as predictions.1.jsonl" in capsys.readouterr().err


def test_changed_data_starts_anew(config: EvalConfig, generated: list[int], tmp_path: Path) -> None:
    assert config.data.unseen is not None
    records = json.loads(Path(config.data.unseen).read_text())
    path = tmp_path / "unseen.json"
    path.write_text(json.dumps(records))
    few = replace(
        config,
        data=replace(config.data, unseen=str(path)),
        eval=replace(config.eval, benchmarks=["mini_mnist"]),
    )
    evaluate(few)
    records[-1]["conversations"][1]["value"] = "9"
    path.write_text(json.dumps(records))
    generated.clear()
    results = evaluate(few)
    assert sum(generated) == 4
    assert (Path(config.output_dir) / "predictions.1.jsonl").exists()
    assert results.scores[0].n == 4


def test_limit_filter_and_seen(config: EvalConfig) -> None:
    settings = replace(config.eval, limit=2, benchmarks=["mini_pope", "mini_mme"], seen=True)
    results = evaluate(replace(config, eval=settings))
    assert {score.column: score.n for score in results.scores} == {
        "MME": 2,
        "POPE": 3,
    }  # POPE: one image whole
    assert results.mean is None
    assert results.seen is not None
    assert {task: part["n"] for task, part in results.seen.parts.items()} == {"counting": 2.0, "naming": 2.0}
    assert results.about["limit"] == 2


def finished_run(folder: Path, name: str, evaluation: EvalConfig, seed: int = 0) -> RunFolder:
    """What `mixlora train` leaves, without the training."""
    adapter, routing = AdapterConfig(name=name, dropout=0.0), RoutingConfig("instance")  # type: ignore[arg-type]
    model = attach_adapter(build_tiny().model, adapter, routing, rank=2, factors=4)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    run = RunFolder(folder)
    save_adapter(model, run.adapter)
    train = OptimConfig(precision="fp32")
    config = TrainConfig(evaluation.model, adapter, routing, evaluation.data, train, 2, 4, str(folder))
    OmegaConf.save(OmegaConf.create(asdict(config)), run.config)
    run.result.write_text("{}")
    return run


@pytest.mark.parametrize(("name", "label"), [("lora", "LoRA r=2"), ("mixlora", "MixLoRA E=4 r=2")])
def test_a_run_folder_is_evaluated_with_its_adapter(
    config: EvalConfig, generated: list[int], tmp_path: Path, name: str, label: str
) -> None:
    run = finished_run(tmp_path / "run", name, config)
    adapter = AdapterConfig(name="mixlora")  # `mixlora eval`'s default: the run folder knows better
    tuned = replace(config, run=str(run.root), adapter=adapter, output_dir=str(tmp_path / "eval"))
    results = evaluate(tuned)
    assert results.label == label
    evaluate(config)
    of_base, of_run = (read_predictions(Path(c.output_dir) / "predictions.jsonl") for c in (config, tuned))
    assert {p.key: p.prediction for p in of_base.predictions} != {
        p.key: p.prediction for p in of_run.predictions
    }
    assert of_base.header is not None
    assert of_run.header is not None
    assert changed_parts(of_run.header.fingerprint, of_base.header.fingerprint) == ["adapter"]
    generated.clear()
    finished_run(tmp_path / "run", name, config, seed=1)  # the adapter's files change
    evaluate(tuned)
    assert sum(generated) == NUM_UNSEEN


def test_mistakes_are_said_before_a_model_is_built(
    config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.evaluation.evaluate.build_base", no_model)
    unfinished = finished_run(tmp_path / "unfinished", "lora", config)
    unfinished.result.unlink()
    garbled = finished_run(tmp_path / "garbled", "lora", config)
    garbled.config.write_text("model: 3\n")
    tuned = replace(config, run=str(garbled.root), adapter=AdapterConfig(name="mixlora"))
    cases = {
        r"give one of the two": replace(config, run=str(garbled.root)),
        r"no such folder": replace(tuned, run=str(tmp_path / "nowhere")),
        r"is no run folder: expected config.yaml": replace(tuned, run=str(tmp_path)),
        r"has not finished: continue it": replace(tuned, run=str(unfinished.root)),
        r"not a configuration that `mixlora train` wrote": replace(tuned, run=str(garbled.root)),
        r"Did you mean mini_cifar10\?": replace(
            config, eval=replace(config.eval, benchmarks=["mini_cifar1"])
        ),
    }
    for message, mistaken in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            evaluate(mistaken)
        assert "\n" not in str(caught.value)
