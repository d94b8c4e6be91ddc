"""The whole model in the forms that are compared: base, LoRA on it, MixLoRA on it, all around one set of weights."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from mixlora_cli.analysis.bench.published import into_published_form
from mixlora_cli.config import AdapterConfig, BenchConfig, OptimConfig, RoutingConfig, TrainConfig
from mixlora_cli.data.encode import EncodedDataset, Item, encode_prompts, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.evaluation.generate import Generator
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.base import Base
from mixlora_cli.models.build import build_base
from mixlora_cli.models.features import FeatureCache
from mixlora_cli.training.arguments import build_arguments
from mixlora_cli.training.loss import label_positions
from mixlora_cli.training.precision import choose_dtype, matrix_products_in
from mixlora_cli.training.run import build_trainer
from mixlora_cli.training.run_folder import RunFolder

AdapterName = Literal["lora", "mixlora", "none"]
NUM_BATCHES = 4
"""Batches that the training steps take in turn."""


class WholeModel:
    """The base with its data; `adapted` gives as many models as are asked for, which share the frozen weights."""

    def __init__(self, config: BenchConfig, device: torch.device) -> None:
        self._config = config
        self.device = device
        self.dtype = choose_dtype(config.bench.precision)

    @cached_property
    def base(self) -> Base:
        """Loaded when it is first needed."""
        base = build_base(self._config.model, self.dtype)
        module: nn.Module = base.model
        module.to(self.device)
        return base

    @cached_property
    def features(self) -> FeatureCache:
        """Pictures through the frozen tower, kept on disk as in training."""
        return FeatureCache(self.base)

    def adapted(self, name: AdapterName) -> PreTrainedModel | PeftModel:
        """A new adapter on the base; untrained, so that it answers what the base answers."""
        _ = self.features  # changes the base, so it comes first
        set_seed(self._config.seed)
        return attach_adapter(
            sharing_weights(self.base.model),
            AdapterConfig(name=name),
            RoutingConfig(name="instance"),
            self._config.rank,
            self._config.factors,
        )

    def training_items(self, count: int) -> EncodedDataset:
        """A seeded sample of the training records."""
        records = load_records(self._config.data, "train", self._config.seed)
        chosen = _sample(records, count, self._config.seed)
        return encode_records(chosen, self.base, self._config.data.max_length, self._config.data.on_error)

    def prompts(self, count: int) -> list[Item]:
        """A seeded sample of the held-out records, as prompts; of the training records where there are none."""
        data = self._config.data
        split: Literal["heldout", "train"] = (
            "train" if data.source == "json" and data.heldout is None else "heldout"
        )
        chosen = _sample(load_records(data, split), count, self._config.seed)
        return list(encode_prompts(chosen, self.base, data.on_error).items)

    def step(self, name: AdapterName, batch_size: int) -> TrainingStep:
        """Training of a new adapter, step by step."""
        dataset = self.training_items(NUM_BATCHES * batch_size)
        config = TrainConfig(
            model=self._config.model,
            adapter=AdapterConfig(name=name),
            routing=RoutingConfig(name="instance"),
            data=self._config.data,
            train=OptimConfig(batch_size=batch_size),
            rank=self._config.rank,
            factors=self._config.factors,
            output_dir="",
            seed=self._config.seed,
        )
        return TrainingStep(self, self.adapted(name), dataset, config)

    def generator(self, name: AdapterName, max_new_tokens: int, published: bool = False) -> Answering:
        """Answers of a new adapter; `published`: in the published code's form, for one instance at a time."""
        model = self.adapted(name)
        if published:
            into_published_form(model)
        return Answering(model, Generator(model, self.base, self.features, max_new_tokens), self.dtype)


class TrainingStep:
    """Called, it makes one optimizer step on the next batch: forward, loss, backward, clipping, AdamW."""

    def __init__(
        self, whole: WholeModel, model: nn.Module, dataset: EncodedDataset, config: TrainConfig
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the Trainer insists on one; nothing is written to it
            arguments = build_arguments(config, RunFolder(Path(folder)), whole.dtype)
            trainer = build_trainer(model, whole.base, dataset, whole.features, arguments, [])
        self.model = model.train()
        self.trainer = trainer
        self.optimizer = trainer.create_optimizer()
        self._max_norm = config.train.max_grad_norm
        self._dtype = whole.dtype
        self._device = whole.device
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = config.train.batch_size
        starts = range(0, len(dataset) - size + 1, size) or [0]
        collate: Any = trainer.data_collator
        self._batches = [
            self._on_device(collate([dataset[at] for at in range(start, min(start + size, len(dataset)))]))
            for start in starts
        ]
        self._taken = 0

    def loss(self) -> Tensor:
        """The loss on the batch whose turn it is."""
        batch = dict(self._batches[self._taken % len(self._batches)])
        num_tokens = len(label_positions(batch["labels"])[1])
        with matrix_products_in(self.model, self._dtype, self._device.type):
            loss: Tensor = self.trainer.compute_loss(self.model, batch, num_items_in_batch=num_tokens)
        return loss

    def __call__(self) -> float:
        """One step; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self.optimizer.step()
        self._taken += 1
        return loss.item()

    def resting(self) -> list[Tensor]:
        """What is allocated between two steps: weights and the optimizer's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [value for value in state if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *tensors]

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in batch.items()}


class Answering:
    """Called with prompts, it returns the answers, as `mixlora eval` makes them."""

    def __init__(self, model: nn.Module, generator: Generator, dtype: torch.dtype) -> None:
        self._model, self._generator, self._dtype = model, generator, dtype

    def __call__(self, items: Sequence[Item]) -> list[str]:
        """Answers to one batch, in order."""
        device = next(self._model.parameters()).device
        with matrix_products_in(self._model, self._dtype, device.type):
            return self._generator(items)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same parameters and buffers: an adapter on it leaves `model` as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _sample(records: Sequence[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(list(records), min(count, len(records)))
