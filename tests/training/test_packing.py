"""Packed rows give the loss and the gradients of padded ones, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import make_family
from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.data import collate as module
from mixlora_cli.data.collate import Collator, PixelLoader
from mixlora_cli.data.encode import Item, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.forward import labelled_pass, token_loss
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import MakeConfig, adapter_weights

TEXTS = [
    {
        "conversations": [
            {"from": "human", "value": f"Say {word}."},
            {"from": "gpt", "value": word * (1 + n % 3)},
        ]
    }
    for n, word in enumerate(("red", "a", "two", "blue", "yes", "no"))
]


@pytest.fixture
def items(make_config: MakeConfig) -> list[Item]:
    """Eight with a picture and one without."""
    records = load_records(make_config("run").data, "train")
    return encode_records(records[:9], build_tiny().chat, 1792).items


@pytest.mark.parametrize(
    ("adapter", "routing", "pool"),
    [
        ("lora", "instance", "all"),
        ("mixlora", "instance", "all"),
        ("mixlora", "instance", "prompt"),
        ("mixlora", "task", "all"),
        ("mixlora", "random", "all"),
        ("full", "instance", "all"),
    ],
)
def test_gradients_are_those_of_padded_rows(items: list[Item], adapter: str, routing: str, pool: str) -> None:
    base = build_tiny()
    torch.manual_seed(0)
    model = attach_adapter(
        base.model,
        AdapterConfig(name=adapter, dropout=0.0),  # type: ignore[arg-type]
        RoutingConfig(name=routing, pool=pool),  # type: ignore[arg-type]
        rank=2,
        factors=6,
        train_also=["multi_modal_projector"],
        task_embedding_dim=32,
    )
    if adapter != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    embeddings = {task: torch.randn(32) for task in ("task0", "task1")} if routing == "task" else None
    collate = Collator(base.chat, PixelLoader(base.chat), embeddings=embeddings, routing_seed=3)

    def gradients(packed: bool) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        batch = replace(collate, packed=packed)(items)
        if adapter != "mixlora":
            del batch["routing_seeds"]
        head = base.model.get_output_embeddings()
        outputs, _, targets = labelled_pass(model, batch, head, adapter == "mixlora")
        loss = token_loss(outputs.logits, targets, len(targets))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (loss, padded), (packed_loss, packed) = gradients(False), gradients(True)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in padded.values()) > 1e-3


def test_a_packed_row_has_no_padding(items: list[Item]) -> None:
    chat = build_tiny().chat
    batch = Collator(chat, PixelLoader(chat), packed=True)(items[:3])
    lengths = [item.length for item in items[:3]]
    assert set(batch) == {"input_ids", "labels", "position_ids", "pixel_values"}
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert len(batch["pixel_values"]) == 3


@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_a_training_is_the_same_with_packed_rows(make_config: MakeConfig, adapter: str) -> None:
    settings = {"steps": 3, "batch_size": 4, "dropout": 0.0}
    padded = train(make_config("padded", adapter, **settings))
    packed = train(make_config("packed", adapter, **settings, packing=True))
    rows = [read_metrics(RunFolder(root).metrics) for root in (padded, packed)]
    for one, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["tokens"] == one["tokens"]
    weights = adapter_weights(packed)
    for name, weight in adapter_weights(padded).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-4, msg=name)


def test_a_model_that_mixes_the_instances_of_a_row_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = module._packed

    def running_on(items: list[Item]) -> dict[str, Tensor]:
        batch = own(items)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(module, "_packed", running_on)
    with pytest.raises(UserError, match="does not keep the instances of a row apart"):
        train(make_config("run", "lora", steps=1, packing=True))


def test_a_blank_picture_has_no_place_in_a_packed_row(make_config: MakeConfig) -> None:
    config = make_config("run", "lora", steps=1, packing=True)
    config = replace(config, model=replace(config.model, train_also=["multi_modal_projector"]))
    with pytest.raises(UserError, match=r"train\.packing=true: batches without pictures get a blank one"):
        train(config)


@pytest.mark.parametrize(
    ("family", "refused"), [("internvl", False), ("gemma3", True), ("qwen2_5_vl", True), ("llama3", False)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_families_are_packed_right_or_refused(
    make_config: MakeConfig, tmp_path: Path, family: str, refused: bool, precision: str
) -> None:
    """Gemma 3 looks both ways inside a picture, and Qwen's positions have three axes: packed rows break both."""
    folder = make_family(family, tmp_path / family)

    def run(name: str, packing: bool) -> float:
        config = make_config(
            name, "lora", steps=1, batch_size=4, dropout=0.0, packing=packing, precision=precision
        )
        model = ModelConfig(name=family, source="hub", name_or_path=str(folder))
        data = config.data
        if family == "llama3":
            (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
            data = replace(data, train=str(tmp_path / "texts.json"), images=None)
        root = train(replace(config, model=model, data=data))
        return float(read_metrics(RunFolder(root).metrics)[0]["loss"])

    if refused:
        with pytest.raises(UserError, match="does not keep the instances of a row apart"):
            run("packed", True)
    else:
        tolerance = 1e-5 if precision == "fp32" else 1e-2
        assert run("packed", True) == pytest.approx(run("padded", False), rel=tolerance)
