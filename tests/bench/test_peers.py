"""What is compared takes the same batches and starts from the same loss; each adapter learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixlora_cli.analysis.bench import peers as module
from mixlora_cli.analysis.bench import run
from mixlora_cli.analysis.bench.layers import PublishedLayer
from mixlora_cli.analysis.bench.peers import PEERS, peers
from mixlora_cli.analysis.bench.run import bench
from mixlora_cli.analysis.bench.whole import TrainingStep, WholeModel
from mixlora_cli.config import AdapterConfig
from mixlora_cli.method.layer import MixLoraLayer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's step is looked at where TRL is: tests/libraries/test_trl.py."""
    for each in (module, run):
        monkeypatch.setattr(each, "trl_version", lambda: "")


@pytest.fixture
def steps(make_config: Any) -> Mapping[str, TrainingStep]:
    return peers(WholeModel(make_config(), CPU), 2)


def gradients(step: TrainingStep) -> dict[str, Tensor]:
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def test_all_train_the_same_tokens_from_the_same_loss(steps: Mapping[str, TrainingStep]) -> None:
    assert list(steps) == [name for name in PEERS if name != "trl"]
    for number in range(5):  # the batches come again
        ids, labels = (steps["peft_loop"].batch[name].clone() for name in ("input_ids", "labels"))
        assert (labels != -100).sum() > 2
        for step in steps.values():
            assert torch.equal(step.batch["input_ids"], ids) and torch.equal(step.batch["labels"], labels)
        losses = {name: step() for name, step in steps.items()}
        if number == 0:
            assert losses == pytest.approx(dict.fromkeys(losses, losses["peft_loop"]), abs=1e-5)


def test_the_plain_loop_trains_the_lora_that_we_train(steps: Mapping[str, TrainingStep]) -> None:
    for _ in range(3):
        losses = []
        for name in ("peft_loop", "lora"):
            torch.manual_seed(0)  # of dropout
            losses.append(steps[name]())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        plain, ours = gradients(steps["peft_loop"]), gradients(steps["lora"])
        assert plain.keys() == ours.keys() and len(plain) == 28
        torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-5)


def test_every_adapter_learns_in_fp32_and_the_base_does_not(steps: Mapping[str, TrainingStep]) -> None:
    prefixes = {"poly": "poly_", "lily": "lily_", "published": "factors_", "mixlora_trained": "mixlora_"}
    for name, prefix in prefixes.items():
        for _ in range(2):  # in the first, one side is zero
            steps[name]()
        found = gradients(steps[name])
        assert found and all(prefix in key and grad.dtype == torch.float32 for key, grad in found.items())
        assert [key for key, grad in found.items() if not grad.any()] == [], name


def test_the_published_form_has_our_loss_and_our_gradients(make_config: Any) -> None:
    """Of one instance, as in a batch its averages take in the padding."""
    config = replace(make_config(), adapter=AdapterConfig("mixlora", dropout=0.0))
    steps = peers(WholeModel(config, CPU), 1)
    ours, published = steps["mixlora"], steps["published"]
    theirs = {
        name: each for name, each in published.model.named_modules() if isinstance(each, PublishedLayer)
    }
    layers = {name: each for name, each in ours.model.named_modules() if isinstance(each, MixLoraLayer)}
    assert theirs.keys() == layers.keys() and len(layers) == 14
    pairs = [
        (parameter, theirs[name].get_parameter(own.removeprefix("mixlora_").replace(".default", "")))
        for name, layer in layers.items()
        for own, parameter in layer.named_parameters()
        if "mixlora_" in own
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, other in pairs:
            other.copy_(one.copy_(torch.randn(one.shape, generator=generator) * 0.3))
    assert ours() == pytest.approx(published(), rel=1e-5)
    learned = [(one.grad, other.grad) for one, other in pairs if one.requires_grad]
    assert len(learned) == 28 and all(one.any() for one, _ in learned)
    torch.testing.assert_close(*map(list, zip(*learned, strict=True)), rtol=1e-3, atol=1e-5)


def test_what_is_left_out_is_said(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    (done,) = bench(make_config(parts=["peers"])).measurements
    assert done.seconds.keys() == done.counts.keys() == set(PEERS) - {"trl", "published"}
    text = (tmp_path / "bench" / "performance.md").read_text()
    assert "Left out: trl, because it is not installed" in text
    assert "Left out: published, because the update matrices" in text and "Left out: lily" not in text
    peaks = {name: count["peak_bytes"] for name, count in done.counts.items()}
    assert f"{peaks['poly'] / peaks['peft_loop']:.3f} |" in text


def test_a_plain_loop_answers_what_the_base_answers(make_config: Any) -> None:
    whole = WholeModel(make_config(), CPU)
    prompts = whole.prompts(3)
    assert len({item.length for item in prompts}) > 1  # so that there is padding
    answers = [text.strip() for text in whole.plain_generator(3)(prompts)]
    assert answers == whole.generator("none", 3)(prompts) and all(answers)
