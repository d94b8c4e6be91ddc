"""Batches without a picture: the projector takes part, and nothing else notices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.data.collate import Collator, DummyImage, PixelLoader, build_dummy_image
from mixlora_cli.data.encode import IGNORE, EncodedDataset, Item
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.models.tiny import NUM_IMAGE_TOKENS, build_tiny
from mixlora_cli.training.train import dummy_image_for_text

TEXTS = [
    Item([1, 20, 30, 40, 2], [IGNORE, IGNORE, 30, 40, 2], (), "t", 0),
    Item([1, 25, 2], [IGNORE, 25, 2], (), "t", 1),
]
PROJECTOR = "multi_modal_projector"


def adapted(adapter: str, train_projector: bool = True) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    base = build_tiny()
    settings = AdapterConfig(name=adapter, dropout=0.0)  # type: ignore[arg-type]
    model = attach_adapter(
        base.model, settings, RoutingConfig(name="instance"), 2, 4, [PROJECTOR] if train_projector else []
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "factors_b" in name:
            nn.init.normal_(
                parameter, std=0.1
            )  # else the gradients of the other factor are zero by construction
    return base, model


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    model.zero_grad()
    batch = {name: tensor for name, tensor in batch.items() if name != "indices"}
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_the_stand_in_lies_behind_the_first_row() -> None:
    dummy_image = DummyImage([4, 4], {"pixel_values": torch.ones(1, 3, 1, 1)})
    batch = Collator(build_tiny().chat, lambda rows: {}, dummy_image=dummy_image)(TEXTS)
    assert batch["input_ids"].tolist() == [[1, 20, 30, 40, 2, 4, 4], [1, 25, 2, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 3 + [0] * 4]
    assert batch["labels"].tolist() == [
        [IGNORE, IGNORE, 30, 40, 2, IGNORE, IGNORE],
        [IGNORE, 25, 2] + [IGNORE] * 4,
    ]
    assert batch["pixel_values"].shape == (1, 3, 1, 1)


def test_a_batch_with_a_picture_is_left_alone(tmp_path: Path) -> None:
    pictured = Item([1, 4, 4, 9], [IGNORE] * 3 + [9], (tmp_path / "a.png",), "t", 2)
    dummy_image = DummyImage([4, 4], {"pixel_values": torch.zeros(1, 1)})
    batch = Collator(
        build_tiny().chat, lambda rows: {"pixel_values": torch.ones(len(rows), 1)}, dummy_image=dummy_image
    )([*TEXTS, pictured])
    assert (batch["input_ids"].shape, batch["pixel_values"].tolist()) == ((3, 5), [[1.0]])


@pytest.mark.parametrize("adapter", ["lora", "mixlora", "none"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_projector_gets_a_gradient_of_zero_and_nothing_else_changes(
    adapter: str, cached: bool, tmp_path: Path
) -> None:
    base, model = adapted(adapter)
    features = FeatureCache(base, tmp_path) if cached else PixelLoader(base.chat)
    plain = Collator(build_tiny().chat, features)(TEXTS)
    if adapter == "none":
        with pytest.raises(RuntimeError, match="does not require grad"):
            gradients(model, plain)
    else:
        loss, before = gradients(model, plain)
        assert [name for name, gradient in before.items() if gradient is None and PROJECTOR not in name] == [
            name for name in before if "router" in name
        ]
    dummy_image = build_dummy_image(base.chat, features)
    joined, after = gradients(model, Collator(build_tiny().chat, features, dummy_image=dummy_image)(TEXTS))
    projector = {name: gradient for name, gradient in after.items() if PROJECTOR in name}
    assert len(projector) == 4
    assert [name for name, gradient in projector.items() if gradient is None or gradient.any()] == []
    if adapter != "none":
        assert joined == pytest.approx(loss, rel=1e-6)
        for name, gradient in after.items():
            if PROJECTOR not in name and before[name] is not None:
                torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6)


def needed(train_projector: bool = False, texts: bool = True, zero: int = 0) -> DummyImage | None:
    base, model = adapted("lora", train_projector)
    pictured = Item([4] * NUM_IMAGE_TOKENS, [IGNORE] * NUM_IMAGE_TOKENS, (Path("a.png"),), "t", 2)
    deepspeed = SimpleNamespace(is_zero3=lambda: zero == 3) if zero else None
    arguments: Any = SimpleNamespace(hf_deepspeed_config=deepspeed)
    dataset = EncodedDataset([pictured, *(TEXTS if texts else [])])
    return dummy_image_for_text(model, base, dataset, PixelLoader(base.chat), arguments)


def test_a_stand_in_only_where_it_is_needed() -> None:
    assert needed() is None
    assert needed(zero=2) is None
    assert needed(train_projector=True, texts=False) is None
    for dummy_image in (needed(train_projector=True), needed(zero=3)):
        assert dummy_image is not None
        assert (len(dummy_image.tokens), dummy_image.features["pixel_values"].shape) == (
            NUM_IMAGE_TOKENS,
            (1, 3, 16, 16),
        )
