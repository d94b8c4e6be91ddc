"""The order of the records: a permutation that seed and epoch alone decide, grouped by length when asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.data.collate import PixelLoader
from mixlora_cli.data.encode import EncodedDataset, Item
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training.arguments import build_arguments
from mixlora_cli.training.run_folder import RunFolder
from mixlora_cli.training.train import build_trainer

from .conftest import MakeConfig

NUM_ITEMS, BATCH = 400, 8

Batches = Callable[..., list[list[int]]]


@pytest.fixture
def batches(make_config: MakeConfig, tmp_path: Path) -> Batches:
    """`batches(grouped, seed, epoch)`: the records of each batch, as the Trainer's own loader makes them."""
    lengths = random.Random(0).choices(range(20, 200), k=NUM_ITEMS)
    items = [Item([9] * n, [9] * n, None, "task", index) for index, n in enumerate(lengths)]

    def make(grouped: bool, seed: int = 0, epoch: int = 0) -> list[list[int]]:
        config = make_config("run", "lora", seed=seed, batch_size=BATCH, group_by_length=grouped)
        base = build_tiny()
        model = attach_adapter(base.model, AdapterConfig("lora"), RoutingConfig("instance"), 2, 4)
        arguments = build_arguments(config, RunFolder(tmp_path / "run"), torch.float32)
        trainer = build_trainer(model, base, EncodedDataset(items), PixelLoader(base.chat), arguments, [])
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        return [batch["indices"].tolist() for batch in loader]

    make.lengths = lengths  # type: ignore[attr-defined]
    return make


@pytest.mark.parametrize("grouped", [False, True])
def test_seed_and_epoch_alone_decide(batches: Batches, grouped: bool) -> None:
    first = batches(grouped)
    assert sorted(index for batch in first for index in batch) == list(range(NUM_ITEMS))
    torch.manual_seed(123)
    assert batches(grouped) == first
    assert batches(grouped, epoch=1) != first
    assert batches(grouped, seed=1) != first


def test_grouped_batches_waste_little_on_padding(batches: Batches) -> None:
    lengths: list[int] = batches.lengths  # type: ignore[attr-defined]

    def padding(grouped: bool) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches(grouped)) - sum(lengths)

    assert padding(True) < 0.3 * padding(False)
