"""Loss and gradients of one batch: the training's own loss, in eval mode, so that dropout adds no noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mixlora_cli.analysis.interference.groups import Factors
from mixlora_cli.data.collate import Collator
from mixlora_cli.data.encode import IGNORE, Item
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.training.loss import head_sees_only, label_positions, token_loss
from mixlora_cli.training.precision import matrix_products_in

Gradient = Sequence[Tensor]
"""One flat vector (d,) for each group of parameters."""


@dataclass(frozen=True)
class GradientTaker:
    """An adapted model in eval mode whose factors alone require gradients."""

    model: PeftModel
    factors: Factors
    collate: Collator
    dtype: torch.dtype
    seed: int

    def loss(self, task: str, number: int, items: Sequence[Item]) -> Tensor:
        """Mean cross entropy of the batch's answer tokens, with its graph where gradients are enabled.

        Args:
            task: whose batch it is.
            number: of the batch. With the task it seeds what routing=random draws, so that the batch meets the same
                factors whenever it is read, in whichever process.
            items: the batch's instances.
        """
        device = self.model.device
        batch = {name: tensor.to(device) for name, tensor in self.collate(items).items()}
        with _seeded(self.seed, task, number), matrix_products_in(self.model, self.dtype, device.type):
            return batch_loss(self.model, batch)

    def selected(self) -> list[Tensor]:
        """The factors that each instance of the last batch got, A's and B's in each layer; nothing for LoRA."""
        tuner = self.model.base_model
        if not isinstance(tuner, MixLoraModel):
            return []
        return [index for s in tuner.selections().values() for index in (s.index_a, s.index_b)]

    def gradient(self, task: str, number: int, items: Sequence[Item]) -> list[Tensor]:
        """Gradient of `loss` for each group, flat and in fp32; zero for parameters that took no part."""
        with torch.enable_grad():
            loss = self.loss(task, number, items)
            found = torch.autograd.grad(loss, self.factors.parameters, allow_unused=True)
        return [
            torch.zeros_like(parameter).flatten() if gradient is None else gradient.detach().float().flatten()
            for gradient, parameter in zip(found, self.factors.parameters, strict=True)
        ]


def batch_loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """What training minimises on this batch, taken as a whole optimizer step: see `AdapterTrainer.compute_loss`.

    Args:
        batch: of a training `Collator`, on the model's device; it is emptied of its labels.
    """
    labels = batch.pop("labels")
    if isinstance(model.base_model, MixLoraModel):
        batch["prompt_mask"] = labels == IGNORE
    predicts, targets = label_positions(labels)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    head: torch.nn.Module = base.get_output_embeddings()
    with head_sees_only(head, predicts):
        logits = model(**batch, use_cache=False).logits
    return token_loss(logits, targets, len(targets))


@contextmanager
def _seeded(seed: int, task: str, number: int) -> Iterator[None]:
    """Inside, torch draws as it always does for this batch; outside, its generators are what they were."""
    digest = hashlib.sha256(f"{seed}/{number}/{task}".encode()).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        yield
