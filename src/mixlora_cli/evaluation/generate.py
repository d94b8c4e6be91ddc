"""Greedy answers to prompts, in left-padded batches with a KV cache.

What is in a batch changes no answer: padding is masked, and an adapter chooses its factors from the
instance's own prompt. So batches are made by prompt length, which wastes least on padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mixlora_cli.data.collate import Collator, Features, generation_collator
from mixlora_cli.data.encode import Item
from mixlora_cli.models.forward import with_head_input
from mixlora_cli.models.load import LoadedModel


def longest_first(items: Sequence[Item]) -> list[Item]:
    """Items by the length of their prompts: a batch too large for the memory fails at once."""
    return sorted(items, key=lambda item: (-item.length, item.index))


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Batches of similar prompt length, the longest first."""
    ordered = longest_first(items)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


class Generator:
    """Answers batches of prompts with one model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        base: LoadedModel,
        features: Features,
        max_new_tokens: int,
        use_cache: bool = True,
        embeddings: Mapping[str, Tensor] | None = None,
        routing_seed: int | None = None,
    ) -> None:
        """`model` is `base.model` or an adapter on it; `features` is where pictures come from.

        `embeddings` (d,) by task are what an adapter with routing=task selects by; with a `routing_seed`
        each instance's draws under routing=random follow from it and the instance's own prompt.
        """
        self._model, self._tokenizer = model, base.tokenizer
        self._head: nn.Module = base.model.get_output_embeddings()
        self._ends = base.chat.ends
        self._collate: Collator = generation_collator(base.chat, features, embeddings, routing_seed)
        # Spelt out, because what is left open here is taken from the checkpoint's own settings.
        self._settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=base.chat.pad,
            use_cache=use_cache,
        )

    def __call__(self, items: Sequence[Item]) -> list[str]:
        """Answers to one batch, in order, without control tokens and the white space around them."""
        device = next(self._model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self._collate(items).items()}
        # After the prompts the head reads the last token's states, a slice.
        with _inference(self._model), with_head_input(self._head, Tensor.contiguous):
            tokens: Tensor = self._model.generate(**batch, generation_config=self._settings)  # type: ignore[operator]
        return [self._decode(row) for row in tokens[:, batch["input_ids"].shape[1] :].tolist()]

    def _decode(self, row: list[int]) -> str:
        answer = list(takewhile(lambda token: token not in self._ends, row))
        return str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()
