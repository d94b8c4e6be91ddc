"""What one forward pass tells its layers: which tokens are whose, which count, and whether a prompt goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixlora_cli.method.packing import Segments, find_segments, visible
from mixlora_cli.method.pooling import OwnTokens, own_tokens
from mixlora_cli.method.selection import Selection

IGNORE = -100
"""Label of a token without loss."""
CACHES = ("past_key_values", "cache_params", "state")
"""Arguments and outputs in which transformers models hand on what they have read before."""
_OF_A_SERVER = ("write_index", "read_index", "block_table")
CONTINUOUS_BATCHING = (
    "continuous batching reads parts of many requests in one pass, and an instance's factors are chosen from its "
    "whole prompt: call generate on padded batches instead, or unload the adapter"
)


@dataclass
class CachedSelection:
    """What a layer chose for the instances of a pass."""

    selection: Selection
    rows: tuple[Tensor, Tensor] | None = None
    """The selected factors themselves, where an answer's next passes will want them again."""


@dataclass(eq=False)
class Answer:
    """What the passes that read a prompt and write its answer share."""

    kept: dict[tuple[int, str, int], CachedSelection] = field(default_factory=dict)
    """Choices by (layer, adapter, which of its calls in a pass)."""
    steps: int = 0
    """Passes after the first."""
    prompt: Tensor | None = None
    """Ids of the prompt (B, S), by which passes without a cache are known to belong to it; None = not known."""


@dataclass(eq=False)
class ForwardInfo:
    """One forward pass. `ForwardInfo()` is that of a bare layer: every token counts, nothing came before."""

    text: Tensor | None = None
    """What the pass reads, ids (B, S) or embeddings (B, S, d)."""
    rows: int = 0
    """B, rows of the batch; 0 = not known."""
    length: int = 0
    """S, tokens that this pass reads in each row; 0 = not known."""
    tokens: Tensor | None = None
    """(B, S) bool, False at padding; None = no padding known."""
    prompt: Tensor | None = None
    """(B, S) bool, True at tokens that carry no loss; None = not known, as when a prompt is read to be answered."""
    pictures: Tensor | None = None
    """(B, S) bool, True at tokens that stand for pictures; None = not known."""
    segments: Segments | None = None
    """Which instance each token belongs to, where rows hold several; None = a row is an instance."""
    memory: tuple[Tensor, Tensor | None] | None = None
    """What cross-attention reads (B, S', d) and which of its tokens count (B, S')."""
    task: Tensor | None = None
    """(B, d) task embeddings for routing=task, one for each instance."""
    seeds: Tensor | None = None
    """(B,) int64, what routing=random draws each instance's factors from; None = torch's generator."""
    adapters: list[str] | None = None
    """The adapter of each row; None = the active ones for all."""
    copies: int = 1
    """Consecutive rows that `generate` made of each input (beams, returned sequences)."""
    answer: Answer = None  # type: ignore[assignment]  # one of its own: see `__post_init__`
    step: int = 0
    """How many passes of the same answer came before this one."""
    continues: bool = False
    """This pass goes on with a prompt read before: its rows keep the answer's choices under decode=prefill."""
    not_a_prompt: str | None = None
    """Why no factors can be chosen from this pass's tokens; None = they can."""
    orphan: bool = False
    """The cache that this pass goes on with was not filled by a pass of this model, so its prompt is not known."""
    bare: bool = False
    """There is no pass: a layer, or a part of the model that is not watched, was called by itself."""
    watched: bool = False
    """The pass is a transformers model's, of whose layers' inputs rows are known to be instances or tokens."""
    strict: bool = False
    """Layers here read exactly the tokens of the pass; anything else is not understood."""
    halves: bool = False
    """The pass is an encoder-decoder model's, of which each half reads tokens of its own."""
    own_rows: bool = True
    """False within a tower of the model: its rows are pictures, say, and not the batch's."""
    has_prompts: bool | None = None
    """Whether `check_prompts` has looked."""
    text_mask: Tensor | None = None
    """Kept by `words`."""
    blocks: dict[tuple[str, str, int], Selection] = field(default_factory=dict)
    """Of this pass by (block, adapter, which call): what a block's first layer has selected for all (per=block)."""
    calls: dict[tuple[int, str], int] = field(default_factory=dict)
    """How often each (layer, adapter) was called in this pass; blocks may share a layer."""
    own: dict[tuple[int, torch.Size], OwnTokens] = field(default_factory=dict)
    """Found once for all layers: see `own_tokens_of`."""

    def __post_init__(self) -> None:
        # Not by a default factory, which `torch.compile` cannot trace.
        if self.answer is None:
            self.answer = Answer()  # type: ignore[unreachable]

    def count_of(self, hidden: Tensor) -> int:
        """N, instances in a layer's input by instance (B, ..., d)."""
        return hidden.shape[0] if self.segments is None else self.segments.count

    def by_instance(self, hidden: Tensor, layer: str) -> Tensor:
        """A layer's input with its rows apart: (tokens, d) of all rows becomes (B, S, d), others stay as they are.

        Args:
            hidden: (B, ..., d), (B, d) or (B * S, d).
            layer: the layer's name, for the message.

        Raises:
            ValueError: the input's tokens are not those of the pass, so which instance they belong to is not known.
        """
        if hidden.dim() == 3 and hidden.shape[0] == self.rows and hidden.shape[1] == self.length:
            return hidden
        if hidden.dim() > 2:
            # A layer may read cached tokens again (latent attention); an answer's factors are known by then.
            goes_on = self.continues and len(hidden) == self.rows
            if not self.strict or goes_on or self.is_memory(hidden) or self._reads_all(hidden):
                return hidden
        elif not self.watched:
            return hidden
        elif self.rows:
            if self.length and len(hidden) == self.rows * self.length:
                return hidden.reshape(self.rows, self.length, -1)
            if len(hidden) == self.rows and self.segments is None:
                return hidden
        raise self.mismatch(hidden, layer)

    def _reads_all(self, hidden: Tensor) -> bool:
        return (len(hidden), hidden.shape[1:-1].numel()) == (self.rows, self.length)

    def mismatch(self, hidden: Tensor, layer: str) -> ValueError:
        """What to raise where a layer reads other tokens than those of the pass."""
        known = (
            f"{self.rows} x {self.length} tokens" if self.length else f"{self.rows or 'unknown'} instances"
        )
        numbers = re.sub(r"\d+", r"\\d+", re.escape(layer))
        return ValueError(
            f"{layer}: this layer reads {tuple(hidden.shape)} where the pass has {known}, so which instance a row "
            "belongs to is not known and factors cannot be chosen for it; leave the layer out of target_modules "
            f"(exclude_modules=r'{numbers}')"
        )

    def check_choice(self, hidden: Tensor, layer: str) -> None:
        """Raise ValueError where factors cannot be chosen from these tokens, though kept ones could be used."""
        if self.strict and hidden.dim() > 2 and not (self.is_memory(hidden) or self._reads_all(hidden)):
            raise self.mismatch(hidden, layer)

    def check_prompts(self, prompt: Tensor | None = None, pool: str = "prompt") -> None:
        """Raise ValueError where an instance has tokens, but none that is its prompt; looked at once in a pass.

        `prompt` (B, S) are the tokens that `pool` counts.
        """
        prompt = self.prompt if prompt is None else prompt
        if prompt is None or prompt.is_meta or self.has_prompts or torch.compiler.is_compiling():
            return
        own = torch.ones_like(prompt) if self.tokens is None else self.tokens
        if self.segments is not None:
            ids = self.segments.ids.flatten()
            both = torch.stack([mask.flatten().to(ids.device).long() for mask in (own, prompt)], dim=1)
            counts = both.new_zeros(self.segments.count, 2).index_add(0, ids, both)
        else:
            counts = torch.stack([own.sum(1).to(prompt.device), prompt.sum(1)], dim=1)
        empty = ((counts[:, 0] > 0) & (counts[:, 1] == 0)).nonzero().flatten().tolist()
        if empty:
            why = (
                "all their tokens have labels" if pool == "prompt" else "or one that is nothing but pictures"
            )
            raise ValueError(
                f"pool={pool}: instances {empty[:5]} of the batch have no prompt, {why}; label the "
                "prompt's tokens -100 (or give prompt_mask), or use pool=all"
            )
        self.has_prompts = True

    def words(self) -> Tensor:
        """(B, S) bool, True at the prompt's tokens, or where no prompt is known all tokens, that stand for no picture.

        Raises:
            ValueError: which tokens stand for pictures is not known, or an instance has no others.
        """
        if self.text_mask is None:
            if self.pictures is None:
                raise ValueError(
                    "pool=text: which tokens stand for pictures is known of input_ids alone, and this pass has none; "
                    "hand the ids to the whole model, or use pool=prompt"
                )
            own = self.tokens if self.prompt is None else self.prompt
            words = ~self.pictures if own is None else own.to(self.pictures.device) & ~self.pictures
            self.check_prompts(words, "text")
            self.text_mask = words
        return self.text_mask

    def own_tokens_of(self, mask: Tensor | None, shape: torch.Size) -> OwnTokens:
        """`own_tokens` of a mask (B, S) that this pass holds; None as the mask counts every token."""
        key = (id(mask), shape)
        if key not in self.own:
            counted = torch.ones(shape, dtype=torch.bool) if mask is None else mask
            self.own[key] = own_tokens(counted, self.segments)
        return self.own[key]

    def is_memory(self, hidden: Tensor) -> bool:
        """Whether a layer reads what cross-attention looks at, and not the pass's own tokens."""
        if self.memory is None:
            return False
        states = self.memory[0]
        # Checkpointing hands on a detached twin, which lies at the same place.
        return hidden is states or (
            hidden.shape == states.shape
            and not torch.compiler.is_compiling()
            and hidden.data_ptr() == states.data_ptr()
        )


def read_inputs(inputs: Mapping[str, Any], picture_tokens: Sequence[int] | None = None) -> ForwardInfo:
    """Make a `ForwardInfo` of a transformers model's keyword arguments; what it cannot find there stays unknown.

    Args:
        picture_tokens: ids that stand for pictures; None = nobody asks which tokens do.
        inputs: arguments of the model by name; `prompt_mask` or `completion_mask` (B, S), `task_embeddings` (B, d) and
            `routing_seeds` (B,) are ours.

    Raises:
        ValueError: a mask does not have one entry for each token, is of an unknown kind, or this is one of the passes
            of continuous batching.
    """
    info = ForwardInfo(task=inputs.get("task_embeddings"), seeds=inputs.get("routing_seeds"))
    if any(inputs.get(name) is not None for name in _OF_A_SERVER):
        raise ValueError(CONTINUOUS_BATCHING)
    source = text_of(inputs)
    if source is None or source.dim() != (3 if source.is_floating_point() else 2):
        return info  # several texts a row (multiple choice) are apart only in the model within
    info.text, (info.rows, info.length) = source, source.shape[:2]
    if picture_tokens is not None and not source.is_floating_point():
        info.pictures = torch.isin(
            source, torch.tensor(picture_tokens, dtype=source.dtype, device=source.device)
        )
    elif picture_tokens is not None and (source.is_meta or not picture_tokens):
        info.pictures = torch.zeros(source.shape[:2], dtype=torch.bool, device=source.device)
    past = cached_length(cache_of(inputs))
    mask = one_mask(inputs.get("attention_mask"))
    info.tokens = token_mask(mask, past, info.length)
    info.prompt = _prompt(inputs, info)
    if past == 0 and info.length > 1:
        info.segments = find_segments(inputs, mask, info.tokens, (info.rows, info.length))
    states = inputs.get("encoder_hidden_states")
    if isinstance(states, Tensor):
        info.memory = states, token_mask(one_mask(inputs.get("encoder_attention_mask")), 0, states.shape[1])
    return info


def text_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The tokens that a model reads: ids (B, S) or embeddings (B, S, d); None where it reads no text."""
    given = (inputs.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds"))
    return next((source for source in given if isinstance(source, Tensor)), None)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """What a model has read before, out of its arguments or outputs; None where there is nothing."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def cached_length(cache: Any) -> int | None:
    """Tokens that a cache already holds; None where it does not count them, as one of state-space layers alone."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def one_mask(mask: Any) -> Tensor | None:
    """An attention mask as a tensor; of several by kind of layer the first, since they agree on what is padding.

    Raises:
        ValueError: a mask that is no tensor, from which padding cannot be read.
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise ValueError(
        f"attention_mask is a {type(mask).__name__}, which does not say where padding is: pass the two-dimensional "
        "mask (B, S), or use another attn_implementation"
    )


def token_mask(mask: Tensor | None, past: int | None, length: int) -> Tensor | None:
    """(B, length) bool mask of the tokens read now, from an attention mask of any shape.

    Of a mask of queries and keys (B, ..., queries, keys), which holds True or 0 where a query may look, the diagonal
    counts: every token looks at itself, padding is looked at by nobody. With a pre-allocated cache the keys go on
    beyond the present.
    """
    if mask is None:
        return None
    if mask.dim() > 2:
        return visible(mask, past or 0, length)
    tokens: Tensor = mask[:, -length:].bool()
    return tokens


def _prompt(inputs: Mapping[str, Any], info: ForwardInfo) -> Tensor | None:
    """(B, S) bool, True at tokens without loss, from whatever says so; None where nothing does."""
    shape = (info.rows, info.length)
    prompt = inputs.get("prompt_mask")
    if prompt is not None and tuple(prompt.shape) != shape:
        raise ValueError(
            f"prompt_mask has shape {tuple(prompt.shape)}: expected one entry for each token, {shape}"
        )
    completion, labels, kept = (inputs.get(n) for n in ("completion_mask", "labels", "logits_to_keep"))
    if prompt is None and completion is not None:
        if completion.dim() != 2 or len(completion) != info.rows or completion.shape[1] > info.length:
            raise ValueError(
                f"completion_mask has shape {tuple(completion.shape)}: expected an entry for each token, {shape}, or "
                "for each of the last ones"
            )
        # Reinforcement learning masks the answers alone, which stand at the end.
        before = completion.new_zeros(info.rows, info.length - completion.shape[1])
        prompt = torch.cat([before, completion], dim=1) == 0
    elif prompt is None and labels is not None:
        # Labels of whole sequences, (B,), say nothing about tokens.
        prompt = labels == IGNORE if tuple(labels.shape) == shape else None
    elif prompt is None and isinstance(kept, int) and kept > 1:
        # The last logits that are asked for are those that predict the answer, but for the very last.
        source = text_of(inputs)
        assert source is not None
        prompt = (torch.arange(info.length, device=source.device) < info.length - kept + 1).expand(shape)
    if prompt is None:
        return None
    own: Tensor = prompt.bool() if info.tokens is None else prompt.bool() & info.tokens
    return own
