"""FSDP2 where more is asked of it than in test_distributed.py; two real processes (gloo).

In bf16 they are compared with two processes that each hold everything: the same batches, the same products, so the same
numbers but for the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mixlora_cli.config import DeepspeedConfig, LaunchConfig, ModelConfig, RoutingConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.launch import run_workers
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.run_folder import read_metrics
from mixlora_cli.training.train import train

from .conftest import WEIGHTS, MakeConfig, config_maker, write_data

STEPS = 4


@dataclass(frozen=True)
class Case:
    """What is trained; `values` go to `conftest.config_maker`."""

    adapter: str
    values: dict[str, Any]
    tied: bool = False
    routing: str = "instance"
    loss: float = 5e-6
    weight: float = 1e-5


CASES = {
    # One record has no picture: its batch meets one with a picture in the other process.
    # Adam divides by the size of a gradient, and some weights get hardly any: there the order of a sum shows most.
    "text": Case("mixlora", {"batch_size": 1, "accumulation": 2}, weight=2e-4),
    "tied": Case("lora", {"batch_size": 3, "gradient_checkpointing": True}, tied=True),
    "full": Case("full", {"batch_size": 3, "learning_rate": 1e-3}, tied=True),
    "bf16": Case(
        "mixlora",
        {"batch_size": 3, "precision": "bf16", "gradient_checkpointing": True, "cache_features": True},
        loss=1e-4,
        weight=1e-4,
    ),
    "balanced": Case(
        "mixlora", {"batch_size": 3, "precision": "bf16"}, routing="learned", loss=1e-4, weight=1e-4
    ),
}


def _tied(folder: Path) -> ModelConfig:
    """A checkpoint of the tiny model whose embedding is its output layer."""
    base = build_tiny()
    config = base.model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    base.chat.processor.save_pretrained(folder)
    return ModelConfig(name="hf", source="hub", name_or_path=str(folder), chat_template="v1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each case in two processes without and with FSDP: the folder, and what was seen of the processes."""
    root = tmp_path_factory.mktemp("fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLORA_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(Path(__file__).parent))
        make, tied = config_maker(root, write_data(root)), _tied(root / "tied-model")
        together = []
        for name, case in CASES.items():
            for fsdp in (False, True):
                config = make(
                    f"{name}-{'fsdp' if fsdp else 'whole'}",
                    case.adapter,
                    dropout=0.0,
                    fsdp=fsdp,
                    **{"steps": STEPS, "save_every": 2, **case.values},
                )
                config = replace(config, model=tied if case.tied else config.model)
                if case.routing == "learned":
                    config = replace(
                        config,
                        adapter=replace(config.adapter, router_grad="straight_through"),
                        routing=RoutingConfig(name="instance", balance_loss=0.1),
                    )
                together.append(config)
        yield root, run_workers("distributed_runs:run_all", together, LaunchConfig(nproc=2))


pytestmark = pytest.mark.slow
each_case = pytest.mark.parametrize("name", CASES)


def _losses(root: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_metrics(root / run / "metrics.jsonl")]


@each_case
def test_it_trains_as_processes_that_hold_everything(runs: Any, name: str) -> None:
    root, seen = runs
    case = CASES[name]
    assert seen[f"{name}-whole"]["held"] == 1
    assert 0.5 < seen[f"{name}-fsdp"]["held"] < 0.75  # the tower and the projector stay whole
    losses = _losses(root, f"{name}-fsdp")
    assert losses == pytest.approx(_losses(root, f"{name}-whole"), abs=case.loss)
    assert len(losses) == STEPS and abs(losses[-1] - losses[0]) > 100 * case.loss
    file = WEIGHTS.get(case.adapter, "adapter_model.safetensors")
    weights, expected = (load_file(root / f"{name}-{how}" / "adapter" / file) for how in ("fsdp", "whole"))
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        assert weights[key].dtype == torch.float32
        torch.testing.assert_close(
            weights[key], weight, atol=case.weight, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )


@each_case
def test_resumed_it_is_the_same_bit_for_bit(runs: Any, name: str) -> None:
    root, _ = runs
    assert _losses(root, f"{name}-fsdp-resumed") == _losses(root, f"{name}-fsdp")[2:]
    file = WEIGHTS.get(CASES[name].adapter, "adapter_model.safetensors")
    weights, again = (load_file(root / f"{name}-fsdp{end}" / "adapter" / file) for end in ("", "-resumed"))
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []


def test_one_process_has_nothing_to_spread(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"train.fsdp=true spreads weights over processes.*launch.nproc="):
        train(make_config("alone", fsdp=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: replace(c, deepspeed=DeepspeedConfig("zero2", {"zero_optimization": {"stage": 2}})),
            "deepspeed=zero2",
        ),
        (
            lambda c: replace(c, model=ModelConfig("hf", "hub", name_or_path=".", quantization="nf4")),
            "model.quantization=nf4 do not survive",
        ),
    ],
    ids=["deepspeed", "quantised"],
)
def test_what_does_not_go_with_it(
    make_config: MakeConfig, change: Callable[[TrainConfig], TrainConfig], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"train.fsdp=true: .*{reason}"):
        change(make_config("refused", fsdp=True))
