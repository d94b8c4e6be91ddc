"""What one forward pass of the whole model tells its layers: which tokens count, and whether a prompt goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mixlora_cli.method.selection import Selection

IGNORE = -100
"""Label of a token without loss."""


@dataclass
class Kept:
    """What a layer chose for the instances of a pass."""

    selection: Selection
    rows: tuple[Tensor, Tensor] | None = None
    """The selected factors themselves, where an answer's next passes will want them again."""


@dataclass
class Reading:
    """One forward pass. `Reading()` is that of a bare layer: every token counts, nothing came before."""

    tokens: Tensor | None = None
    """(B, S) bool, False at padding; None = no padding known."""
    prompt: Tensor | None = None
    """(B, S) bool, True at tokens that carry no loss; None = not known, as when a prompt is read to be answered."""
    task: Tensor | None = None
    """(B, d) task embeddings for routing=task."""
    seeds: Tensor | None = None
    """(B,) int64, what routing=random draws each instance's factors from; None = torch's generator."""
    step: int = 0
    """How many passes of the same answer came before this one."""
    length: int = 0
    """S, tokens that this pass reads."""
    copies: int = 1
    """Consecutive rows that `generate` made of each input (beams, returned sequences)."""
    continues: bool = False
    """This pass goes on with a prompt read before: its rows keep `kept` under decode=prefill."""
    kept: dict[tuple[int, str], Kept] = field(default_factory=dict)
    """Choices by (layer, adapter); shared by all passes of one answer."""


def read_inputs(inputs: Mapping[str, Any]) -> Reading:
    """Make a `Reading` of a transformers model's keyword arguments; what it cannot find there stays unknown.

    Args:
        inputs: arguments of the model by name; `prompt_mask` (B, S) `task_embeddings` (B, d) and `routing_seeds`
            (B,) are ours.

    Raises:
        ValueError: `prompt_mask` or `labels` does not have one entry for each token.
    """
    source = inputs.get("input_ids")
    source = inputs.get("inputs_embeds") if source is None else source
    reading = Reading(task=inputs.get("task_embeddings"), seeds=inputs.get("routing_seeds"))
    if source is None or source.dim() < 2:
        return reading
    rows, reading.length = source.shape[:2]
    past = cached_length(inputs.get("past_key_values"))
    reading.tokens = _token_mask(inputs.get("attention_mask"), past, reading.length)
    prompt = inputs.get("prompt_mask")
    if prompt is None and inputs.get("labels") is not None:
        prompt = inputs["labels"] == IGNORE
    if prompt is not None:
        if tuple(prompt.shape) != (rows, reading.length):
            raise ValueError(
                f"prompt_mask or labels has shape {tuple(prompt.shape)}: "
                f"expected one entry for each token, {(rows, reading.length)}"
            )
        reading.prompt = prompt.bool() if reading.tokens is None else prompt.bool() & reading.tokens
    return reading


def cached_length(cache: Any) -> int:
    """Tokens that a key-value cache already holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def _token_mask(mask: Any, past: int, length: int) -> Tensor | None:
    """(B, length) bool mask of the tokens read now, from a two- or four-dimensional attention mask, or one by layer.

    A four-dimensional one (B, heads, queries, keys) holds True or 0 where a query may look. Its last query may look at
    every token that is not padding; with a pre-allocated cache the keys go on beyond the present.
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return None
    if mask.dim() == 4:
        seen: Tensor = mask[:, 0, -1, past : past + length]
        return seen if not seen.is_floating_point() else seen == 0
    tokens: Tensor = mask[:, -length:].bool()
    return tokens
