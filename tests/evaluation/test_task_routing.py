"""Evaluating an adapter that routes by task: definitions of the evaluated tasks decide its factors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixlora_cli.config import AdapterConfig, EvalConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import Header, read_predictions
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.store import changed_parts

TASKS = ("mme", "pope", "textvqa", "vsr", "snli_ve", "cifar10", "cifar100", "mnist")
DEFINITIONS = {task: f"This is the task called {task}; read the picture and answer." for task in TASKS}
SEEN = {"naming": "Name the number.", "counting": "Count, and answer with a number."}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with an adapter whose factors matter so much that the task's text decides the answers."""
    settings = AdapterConfig(name="mixlora", dropout=0.0)
    model = attach_adapter(build_tiny().model, settings, RoutingConfig("task"), rank=2, factors=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mixlora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def tuned(config: EvalConfig, adapter: Path, tmp_path: Path) -> EvalConfig:
    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps(DEFINITIONS))
    return replace(
        config,
        run=str(adapter),
        adapter=AdapterConfig("mixlora"),
        data=replace(config.data, metadata=str(metadata)),
    )


def answers(config: EvalConfig) -> tuple[Header, dict[tuple[str, int], str]]:
    contents = read_predictions(Path(config.output_dir) / "predictions.jsonl")
    assert contents.header is not None
    return contents.header, {p.key: p.prediction for p in contents.predictions}


def test_answers_do_not_depend_on_the_batch(tuned: EvalConfig, tmp_path: Path) -> None:
    evaluate(tuned)
    alone = replace(
        tuned, output_dir=str(tmp_path / "alone"), eval=replace(tuned.eval, batch_size=1, limit=2)
    )
    evaluate(alone)
    header, together = answers(tuned)
    one_by_one = answers(alone)[1]
    assert len(together) == 41
    assert len(one_by_one) >= 16
    assert one_by_one == {key: together[key] for key in one_by_one}
    assert len(header.fingerprint["task definitions"]) == 16


def test_a_changed_definition_starts_anew_and_changes_answers(
    tuned: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = replace(tuned, eval=replace(tuned.eval, benchmarks=["mini_vsr", "mini_textvqa"]))
    evaluate(tuned)
    before = answers(tuned)
    assert tuned.data.metadata is not None
    evaluate(tuned)
    assert answers(tuned) == before
    # Only definitions of evaluated tasks count.
    Path(tuned.data.metadata).write_text(json.dumps({**DEFINITIONS, "mnist": "Something else."}))
    evaluate(tuned)
    assert answers(tuned) == before
    Path(tuned.data.metadata).write_text(json.dumps({**DEFINITIONS, "textvqa": "Read what is written."}))
    capsys.readouterr()
    evaluate(tuned)
    assert "(task definitions changed): kept as predictions.1.jsonl" in capsys.readouterr().err
    after = answers(tuned)
    assert changed_parts(after[0].fingerprint, before[0].fingerprint) == ["task definitions"]
    changed = {key for key in before[1] if before[1][key] != after[1][key]}
    of_text_vqa = {p.key for p in read_predictions(Path(tuned.output_dir) / "predictions.jsonl").predictions
                   if p.benchmark == "mini_textvqa"}  # fmt: skip
    assert changed
    assert changed <= of_text_vqa


def test_seen_tasks_need_definitions_too(tuned: EvalConfig) -> None:
    few = replace(tuned, eval=replace(tuned.eval, benchmarks=["mini_vsr"], seen=True))
    with pytest.raises(UserError, match=r"2 of 3 tasks have none \(naming, counting\)"):
        evaluate(few)
    assert tuned.data.metadata is not None
    Path(tuned.data.metadata).write_text(json.dumps(DEFINITIONS | SEEN))
    results = evaluate(few)
    assert results.seen is not None
    assert results.seen.n == 10


def test_missing_definitions_are_said_before_a_model_is_built(
    tuned: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("mixlora_cli.evaluation.evaluate.build_base", no_model)
    assert tuned.data.metadata is not None
    some = {task: text for task, text in DEFINITIONS.items() if task not in ("vsr", "mme")}
    Path(tuned.data.metadata).write_text(json.dumps(some))
    with pytest.raises(UserError, match=r"2 of 8 tasks have none \(mme, vsr\): add them to .*metadata.json"):
        evaluate(tuned)
    with pytest.raises(UserError, match=r"8 of 8 tasks have none .* give data\.metadata=<file>"):
        evaluate(replace(tuned, data=replace(tuned.data, metadata=None)))
    (Path(str(tuned.run)) / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        evaluate(tuned)
    assert not Path(tuned.output_dir).exists()


def test_the_adapter_s_width_is_checked(tuned: EvalConfig) -> None:
    path = Path(str(tuned.run)) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_embedding_dim": 24}))
    with pytest.raises(UserError, match="read task embeddings of 24 features, but tiny gives 32"):
        evaluate(tuned)


def test_other_adapters_ask_for_no_definitions(config: EvalConfig, tmp_path: Path) -> None:
    settings = AdapterConfig(name="mixlora", dropout=0.0)
    model = attach_adapter(build_tiny().model, settings, RoutingConfig("instance"), rank=2, factors=4)
    save_adapter(model, tmp_path / "instance")
    few = replace(config.eval, benchmarks=["mini_mnist"])
    of_run = replace(config, run=str(tmp_path / "instance"), adapter=settings, eval=few)
    evaluate(of_run)
    assert "task definitions" not in answers(of_run)[0].fingerprint
