"""Whole training steps beside those of others: the loop that people write, TRL's trainer, PEFT's own mixtures.

All take the same ready batches in the same order, with the features of the frozen picture tower in the place of the
pictures where they can be kept, train fp32 weights with AdamW (fused by the trainers, plain in the loops), and clip the
same norm; none checkpoints gradients. Only the pass through the model and its loss differ otherwise.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import peft
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, PolyConfig, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from mixlora_cli.analysis.bench.counters import free_bytes
from mixlora_cli.analysis.bench.layers import LORA, PUBLISHED, into_published_form
from mixlora_cli.analysis.bench.whole import TrainingStep, WholeModel, sharing_weights
from mixlora_cli.method.layer import MixLoraLayer
from mixlora_cli.method.targets import decoder_linears
from mixlora_cli.models.forward import label_positions

PEFT_LOOP, TRL, POLY, LILY, TRAINED = "peft_loop", "trl", "poly", "lily", "mixlora_trained"
PEERS = {
    PEFT_LOOP: "PEFT's LoRA in a plain loop",
    TRL: "PEFT's LoRA, TRL's SFTTrainer",
    POLY: "PEFT's Poly in a plain loop",
    LILY: "PEFT's Lily in a plain loop",
    PUBLISHED: "MixLoRA, published form, in a plain loop",
    LORA: "PEFT's LoRA, mixlora train",
    "mixlora": "MixLoRA, mixlora train",
    TRAINED: "MixLoRA with routers that learn, mixlora train",
}
"""What is compared, in the order in which it is shown; all times are told in those of the first."""
LEFT_OUT = {
    TRL: "it is not installed (pip install 'mixlora-cli[peers]')",
    LILY: "this PEFT has no such tuner",
    PUBLISHED: "the update matrices of its instances do not fit into memory",
}
"""Why one of them may be missing."""


class PlainStep(TrainingStep):
    """One optimizer step of the loop that people write, whose loss is the model's own of all logits."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.optimizer = torch.optim.AdamW(self._trained, lr=self.trainer.args.learning_rate)

    @property
    def batch(self) -> dict[str, Tensor]:
        """That of the next step, without what only our Trainer reads."""
        return {name: tensor for name, tensor in super().batch.items() if name != "indices"}

    def loss(self) -> Tensor:
        with self.whole.autocast():
            loss: Tensor = self.model(**self.batch).loss
        return loss


class PolyStep(PlainStep):
    """Poly mixes its adapters by the task of an instance; each is of its own here."""

    @property
    def batch(self) -> dict[str, Tensor]:
        batch = super().batch
        size = len(batch["input_ids"])
        return batch | {"task_ids": torch.arange(size, device=self.whole.device)}


class TrlStep(PlainStep):
    """One optimizer step by TRL's SFTTrainer: its loss, its metrics, and its way to bf16."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from trl import SFTConfig, SFTTrainer

        with tempfile.TemporaryDirectory() as folder:
            ours = {**self.trainer.args.to_dict(), "output_dir": folder}
            settings = SFTConfig(**ours, dataset_kwargs={"skip_prepare_dataset": True})
            settings._n_gpu = min(settings.n_gpu, 1)  # no DataParallel
            self._sft = SFTTrainer(
                self.model,
                settings,
                self.trainer.data_collator,
                Dataset.from_dict({"input_ids": [[0]]}),  # it insists on one
                processing_class=self.whole.base.tokenizer,
            )
        self.model, self.optimizer = self._sft.accelerator.prepare(self.model, self._sft.create_optimizer())

    def backward(self) -> Tensor:
        num_tokens = len(label_positions(self.batch["labels"])[1])
        loss: Tensor = self._sft.training_step(self.model, self.batch, num_tokens)
        return loss


def peers(whole: WholeModel, batch_size: int) -> dict[str, TrainingStep]:
    """The steps of all that can be compared here, by their names in `PEERS`."""
    # Adapters of rank r that have together as many factors as a pool of MixLoRA.
    skills = max(2, whole.factors // whole.rank)
    poly = PolyConfig(r=whole.rank, n_skills=skills, n_tasks=batch_size, task_type="CAUSAL_LM")
    steps = {
        PEFT_LOOP: whole.step("lora", batch_size, PlainStep),
        POLY: whole.step("lora", batch_size, PolyStep, _tuner(whole, poly)),
        **{name: whole.step(name, batch_size) for name in ("lora", "mixlora", "mixlora_trained")},
    }
    if trl_version():
        steps[TRL] = whole.step("lora", batch_size, TrlStep)
    if hasattr(peft, "LilyConfig"):
        lily = peft.LilyConfig(r=whole.rank, num_B=skills)
        steps[LILY] = whole.step("lora", batch_size, PlainStep, _tuner(whole, lily))
    published = whole.adapted("mixlora")
    # What else a step allocates gets the other half.
    if batch_size * _matrices(published, whole.dtype) < free_bytes(whole.device) / 2:
        into_published_form(published)
        steps[PUBLISHED] = whole.step("lora", batch_size, PlainStep, published)
    return {name: steps[name] for name in PEERS if name in steps}


def trl_version() -> str:
    """That of the TRL which is installed; nothing where there is none."""
    return version("trl") if find_spec("trl") else ""


def _tuner(whole: WholeModel, config: PeftConfig) -> PeftModel:
    """One of PEFT's own adapters on the layers that MixLoRA adapts, trained in fp32 as PEFT leaves it."""
    _ = whole.features  # changes the base, so it comes first
    set_seed(whole.seed)
    base = sharing_weights(whole.base.model)
    config.target_modules = whole.targets or decoder_linears(base)  # type: ignore[attr-defined]
    return get_peft_model(base, config)


def _matrices(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the update matrices of one instance, which the published form keeps for the backward pass."""
    layers = (layer for layer in model.modules() if isinstance(layer, MixLoraLayer))
    return sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
