"""Put the same held-out instances to several models: is the answer right, and how unlikely was the true one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from mixlora_cli.data.collate import Collator, Features, generation_collator
from mixlora_cli.data.encode import IGNORE, Item, encode, encode_prompts
from mixlora_cli.data.records import Record
from mixlora_cli.evaluation.generate import Generator, batches
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.models.base import Base
from mixlora_cli.stats import Floats
from mixlora_cli.training.loss import head_sees_only, label_positions

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Reading:
    """How models read: pictures, batches, and what routing=task selects by."""

    base: Base
    features: Features
    batch_size: int
    max_new_tokens: int
    embeddings: Mapping[str, Tensor] | None = None
    """(d,) by task; None unless the adapter routes by task."""

    @property
    def pad(self) -> int:
        """The token that pads."""
        tokenizer = self.base.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def prompts(self) -> Collator:
        """Batches to generate from."""
        return generation_collator(self.pad, self.features, self.embeddings)


@dataclass(frozen=True)
class Question:
    """One held-out instance."""

    prompt: Item
    answered: Item
    """The prompt and its true answer; the answer alone has labels."""
    prediction: Prediction
    """What is known of it before anyone answers."""


@dataclass(frozen=True)
class Answers:
    """What one model did with one task's questions, in their order."""

    predictions: list[Prediction]
    losses: Floats
    """(n, 2): summed cross entropy of the true answer's tokens in nats, and how many these are."""


def make_questions(task: str, records: Sequence[Record], base: Base, on_error: Any) -> list[Question]:
    """Questions of one task, neither prompt nor answer truncated.

    Raises:
        UserError: a record cannot be encoded and `on_error` is "stop".
    """
    known = {record.index: record for record in records}
    prompts = encode_prompts(records, base, on_error, f"the held-out data of {task}")
    return [_question(task, known[prompt.index], prompt, base) for prompt in prompts.items]


def _question(task: str, record: Record, prompt: Item, base: Base) -> Question:
    # Earlier answers of a conversation are part of the prompt, here as in generation.
    whole = encode(record, base).input_ids
    labels = [IGNORE] * prompt.length + [*whole[prompt.length :]]
    *_, asked, target = record.conversation
    prediction = Prediction("heldout", record.index, task, record.id, asked.text, target.text.strip(), "")
    return Question(prompt, replace(prompt, input_ids=whole, labels=labels), prediction)


def examine(model: Model, questions: Sequence[Question], reading: Reading) -> Answers:
    """Let `model`, in eval mode, answer the questions, and measure its loss on the true answers."""
    routed = isinstance(getattr(model, "base_model", None), MixLoraModel)
    reading = reading if routed else replace(reading, embeddings=None)
    generator = Generator(
        model, reading.base, reading.features, reading.max_new_tokens, embeddings=reading.embeddings
    )
    collate = Collator(reading.pad, reading.features, embeddings=reading.embeddings)
    answers: dict[int, str] = {}
    losses: dict[int, Floats] = {}
    for batch in batches([question.prompt for question in questions], reading.batch_size):
        answers |= zip((item.index for item in batch), generator(batch), strict=True)
    for batch in batches([question.answered for question in questions], reading.batch_size):
        rows = answer_losses(model, collate(batch), routed)
        losses |= zip((item.index for item in batch), rows, strict=True)
    given = [replace(q.prediction, prediction=answers[q.prompt.index]) for q in questions]
    return Answers(given, np.stack([losses[q.prompt.index] for q in questions]))


@torch.inference_mode()
def answer_losses(model: Model, batch: dict[str, Tensor], routed: bool) -> Floats:
    """(B, 2): each row's summed cross entropy over its labels, and how many labels it has.

    Args:
        batch: of a training `Collator`; `routed`: the model wants to know which tokens are the prompt.
    """
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    if routed:
        inputs["prompt_mask"] = labels == IGNORE
    predicts, targets = label_positions(labels)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    head: torch.nn.Module = base.get_output_embeddings()
    with head_sees_only(head, predicts):
        logits = model(**inputs, use_cache=False).logits
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    summed = torch.zeros(len(labels), device=device).index_add(0, predicts.nonzero()[:, 0], losses)
    result: Floats = torch.stack([summed, predicts.sum(dim=1).float()], dim=1).double().cpu().numpy()
    return result
