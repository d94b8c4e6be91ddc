"""One call of `generate`: which of its forward passes reads the prompt, and which go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixlora_cli.method.forward_info import Answer, ForwardInfo, cache_of, text_of

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass
class Generation:
    """What `generate` was called with, and the prompts that its passes have read so far."""

    model: PreTrainedModel
    task: Tensor | None
    seeds: Tensor | None
    num_inputs: int | None
    """Rows of the caller's inputs; None = not known."""
    prompt_length: int | None
    """Tokens of the caller's prompt; None = not known."""
    assisted: bool
    """The first pass also reads guesses of what comes behind the prompt."""
    assists: bool
    """This call makes guesses for another one and brings along the cache of its last guesses."""
    hands_on_nothing: bool = False
    """The model has no cache to which an answer can be tied; it keeps what it has read itself, or in a mere list."""
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def of_call(
        cls, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], outer: Generation | None
    ) -> Generation:
        """Read the arguments of `generate`, and take away those that are ours; `outer` is the call that it is part of.

        Raises:
            ValueError: guesses for the decoder of an encoder-decoder model.
        """
        task, seeds = kwargs.pop("task_embeddings", None), kwargs.pop("routing_seeds", None)
        if outer is not None:
            task, seeds = outer.task if task is None else task, outer.seeds if seeds is None else seeds
        kwargs.pop("prompt_mask", None)
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

        def option(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        sources = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        source = next((s for s in sources if isinstance(s, Tensor)), None)
        has_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        assisted = any(option(name) for name in _ASSISTED)
        if has_decoder and assisted:
            raise ValueError(
                "assisted decoding of an encoder-decoder model: the decoder's prompt is not known, from which its "
                "layers' factors are chosen; call generate without an assistant or prompt lookup"
            )
        is_text = source is not None and source.dim() > 1 and not has_decoder
        return cls(
            model=model,
            task=task,
            seeds=seeds,
            num_inputs=None if source is None else len(source),
            prompt_length=source.shape[1] if source is not None and is_text else None,
            assisted=assisted,
            assists=bool(option("is_assistant")),
        )

    def place(
        self, info: ForwardInfo, inputs: Mapping[str, Any], answer: Answer | None, has_past: bool
    ) -> tuple[ForwardInfo, Answer | None]:
        """A pass of this call: with what the call knows of it, and the answer that it goes on with, if any.

        Args:
            answer: that of the cache which the pass brings along.
            has_past: whether that cache holds tokens.
        """
        info = self._with_inputs(info)
        if self.answers and answer is None and self.hands_on_nothing and inputs.get("use_cache") is True:
            answer = self.answers[-1]
        elif self.answers and not has_past:
            # One that brings an empty cache reads a new prompt.
            answer = self._read_before(inputs) if cache_of(inputs) is None else None
        elif not self.answers:
            info = self._first(info, has_past)
            if not self.assists:
                answer = None
        if answer is None:
            info.answer.prompt = _ids(inputs)
            self.answers.append(info.answer)
        elif not self.answers:
            self.answers.append(answer)
        return info, answer

    def _with_inputs(self, info: ForwardInfo) -> ForwardInfo:
        """`generate` repeats each input for its beams or returned sequences before it reads the prompt."""
        num_inputs = self.num_inputs or info.rows
        copies = info.rows // num_inputs if num_inputs and info.rows % num_inputs == 0 else 1

        def repeated(given: Tensor | None) -> Tensor | None:
            if given is None or len(given) * copies != info.rows:
                return given
            return given.repeat_interleave(copies, dim=0)

        names = info.adapters
        if names is not None and len(names) * copies == info.rows:
            names = [name for name in names for _ in range(copies)]
        return replace(
            info, copies=copies, task=repeated(self.task), seeds=repeated(self.seeds), adapters=names
        )

    def _first(self, info: ForwardInfo, has_past: bool) -> ForwardInfo:
        """The call's first pass; where it does not read the whole prompt, and nothing else, it says so."""
        if self.prompt_length is None or self.assists:
            return info
        if has_past:
            return replace(
                info,
                not_a_prompt="generate was given past_key_values that hold tokens already, and an instance's factors "
                "are chosen from its whole prompt: call generate with all tokens and without past_key_values",
            )
        if info.length < self.prompt_length:
            return replace(
                info,
                not_a_prompt=f"generate reads the first {info.length} of the prompt's {self.prompt_length} tokens by "
                "themselves (prefill_chunk_size), and an instance's factors are chosen from its whole prompt: leave "
                "prefill_chunk_size out",
            )
        if self.assisted and info.length > self.prompt_length:
            counted = (
                torch.ones(info.rows, info.length, dtype=torch.bool) if info.tokens is None else info.tokens
            )
            counted = counted.clone()
            counted[:, self.prompt_length :] = False
            return replace(info, tokens=counted)
        return info

    def _read_before(self, inputs: Mapping[str, Any]) -> Answer | None:
        """Of a pass without a cache: the answer whose prompt stands at the beginning of its rows."""
        ids = _ids(inputs)
        for answer in self.answers:
            prompt = answer.prompt
            if ids is None or prompt is None:
                continue
            if len(ids) == len(prompt) and torch.equal(ids[:, : prompt.shape[1]], prompt):
                return answer
        return None


def _ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, S) ids that a pass reads; None where it reads embeddings."""
    source = text_of(inputs)
    return source if source is not None and source.dim() == 2 else None
