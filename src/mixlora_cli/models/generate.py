"""Answers to prompts, in left-padded batches with a KV cache: greedy ones, or each decoded in its own way.

What is in a batch changes no answer but by rounding: padding is masked, and an adapter chooses its factors from the
instance's own prompt. So batches are made by task and prompt length, which wastes least on padding and on answers that
have ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mixlora_cli.data.collate import Collator, Features, PixelLoader, generation_collator
from mixlora_cli.data.encode import Item
from mixlora_cli.method.model import MixLoraModel, selected
from mixlora_cli.models.forward import with_head_input
from mixlora_cli.models.load import LoadedModel

_UNFINISHED = "\ufffd"
"""What tokenizers write for a character whose bytes are not all there yet."""


@dataclass(frozen=True)
class Decoding:
    """How one answer is written."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this are drawn from."""
    seed: int | None = None
    """Of the draws, which nothing else changes; None = another one each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


@dataclass(frozen=True)
class Factors:
    """What one prompt selected: r factors of A and of B in each of L layers of the decoder."""

    layers: list[str]
    a: list[list[int]]
    """(L, r)."""
    b: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What was written, and why it ended."""

    text: str
    num_tokens: int
    """Tokens that were written, that of the end included."""
    finish: Literal["stop", "length", "cancelled"]
    factors: Factors | None = None


Watch = Callable[[int, str, Factors | None], bool]
"""(row, what is new of its text, its factors) -> whether to go on with this row."""


def longest_first(items: Sequence[Item]) -> list[Item]:
    """Items by the length of their prompts, task by task: a batch too large for the memory fails at once.

    A batch is decoded until its longest answer ends, and those of a task are alike in length.
    """
    longest: dict[str, int] = {}
    for item in items:
        longest[item.task] = max(item.length, longest.get(item.task, 0))
    return sorted(items, key=lambda item: (-longest[item.task], item.task, -item.length, item.index))


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Batches of one task and of similar prompt length, as far as they go; the longest first."""
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
        self._features = features
        # Not the base's: the model may be a copy of it that shares its weights.
        self._head: Any = model.get_output_embeddings()
        self._ends = base.chat.ends
        self._collate: Collator = generation_collator(base.chat, features, embeddings, routing_seed)
        # Spelt out, because what is left open here is taken from the checkpoint's own settings.
        self._settings: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self._ends,
            "pad_token_id": base.chat.pad,
            "use_cache": use_cache,
        }

    def __call__(self, items: Sequence[Item]) -> list[str]:
        """Greedy answers to one batch, in order, without control tokens and the white space around them."""
        return self._greedy(self._collate(items))

    def each(self, groups: Sequence[Sequence[Item]]) -> Iterator[list[str]]:
        """Answers to one batch after the other; while one is written, the next one's pictures are opened."""
        if not isinstance(self._features, PixelLoader):
            # The tower computes what the cache has not, and that not beside the model.
            yield from map(self, groups)
            return
        with ThreadPoolExecutor(1) as ahead:  # opening and resizing let other threads run
            coming = [ahead.submit(self._collate, group) for group in groups[:1]]
            for number in range(len(groups)):
                batch = coming.pop().result()
                coming += [ahead.submit(self._collate, group) for group in groups[number + 1 : number + 2]]
                yield self._greedy(batch)

    def write(
        self,
        items: Sequence[Item],
        decoding: Sequence[Decoding],
        watch: Watch | None = None,
        doubt: float = 0.0,
    ) -> list[Answer]:
        """Answers to one batch, each decoded in its own way.

        Args:
            items: of the prompts.
            decoding: how each is decoded. Greedy answers are those of a call, up to their stop texts.
            watch: is told what is new of an answer as it is written; its pieces joined are the answer's text.
            doubt: how far what else is in the batch may move a logit, by rounding. A greedy answer whose two likeliest
                tokens ever come closer is written again, alone: then it is what it is alone, to the last bit.
        """
        rows = [_Row(self._tokenizer, self._ends, each) for each in decoding]
        found: list[Factors] = []

        def choose(scores: Tensor) -> Tensor:
            """The logits of a step (B, V), where a row that draws its token keeps that one's alone."""
            if not found and (tuner := getattr(self._model, "base_model", None)):
                found.extend(factors_of(tuner) if isinstance(tuner, MixLoraModel) else ())
            if doubt and len(rows) > 1:
                likeliest = scores.topk(2).values
                for row, lead in zip(rows, (likeliest[:, 0] - likeliest[:, 1]).tolist(), strict=True):
                    row.begin_doubt(lead < doubt)
            drawn = [(number, row.draw(scores[number])) for number, row in enumerate(rows) if row.draws]
            if drawn:
                scores = scores.clone()
                for number, token in drawn:
                    scores[number] = -torch.inf
                    scores[number, token] = 0.0
            return scores

        def ended(ids: Tensor) -> Tensor:
            """(B,), True where an answer has ended with the step's token."""
            for number, (row, token) in enumerate(zip(rows, ids[:, -1].tolist(), strict=True)):
                if row.finish is None:
                    piece = row.add(token, streamed=watch is not None)
                    factors = found[number] if found else None
                    if watch is not None and not watch(number, piece, factors) and row.finish is None:
                        row.finish = "cancelled"
            return torch.tensor([row.finish is not None for row in rows], device=ids.device)

        longest = max(each.max_new_tokens for each in decoding)
        self._generate(
            self._collate(items),
            max_new_tokens=longest,
            logits_processor=LogitsProcessorList([_Choose(choose)]),
            stopping_criteria=StoppingCriteriaList([_Ended(ended)]),
        )
        return [
            self._alone(items[number], row, partial(watch, number) if watch else None)
            if row.finish == "doubtful"
            else row.answer(found[number] if found else None)
            for number, row in enumerate(rows)
        ]

    def _alone(self, item: Item, row: _Row, watch: Callable[[str, Factors | None], bool] | None) -> Answer:
        """One answer of a batch written again by itself; what was told of it before is not told again."""
        untold = -len(row.told)

        def tell(_: int, piece: str, factors: Factors | None) -> bool:
            nonlocal untold
            before, untold = max(-untold, 0), untold + len(piece)
            assert watch is not None
            return watch(piece[before:], factors)

        return self.write([item], [row.decoding], tell if watch else None)[0]

    def _generate(self, batch: Mapping[str, Tensor], **settings: Any) -> Tensor:
        """Tokens behind the prompts of a collated batch (B, longest answer)."""
        device = next(self._model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        most = settings.pop("max_new_tokens", self._settings["max_new_tokens"])
        config = GenerationConfig(**self._settings | {"max_new_tokens": most})
        # After the prompts the head reads the last token's states, a slice.
        with _inference(self._model), with_head_input(self._head, Tensor.contiguous):
            tokens: Tensor = self._model.generate(**batch, generation_config=config, **settings)  # type: ignore[operator]
        return tokens[:, batch["input_ids"].shape[1] :]

    def _greedy(self, batch: Mapping[str, Tensor]) -> list[str]:
        return [self._decode(row) for row in self._generate(batch).tolist()]

    def _decode(self, row: list[int]) -> str:
        answer = list(takewhile(lambda token: token not in self._ends, row))
        return str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()


class _Choose(LogitsProcessor):
    """Transformers looks at the signature at every token, which takes long of a plain function."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self._choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._choose(scores)


class _Ended(StoppingCriteria):
    def __init__(self, ended: Callable[[Tensor], Tensor]) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._ended(input_ids)


class _Row:
    """One answer while it is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], decoding: Decoding) -> None:
        self._tokenizer, self._ends, self.decoding = tokenizer, ends, decoding
        self._tokens: list[int] = []
        self._num_tokens = 0
        self.told = ""
        """What is known of the text by whoever watches."""
        seed = random.getrandbits(63) if decoding.seed is None else decoding.seed % 2**63
        self._generator = torch.Generator().manual_seed(seed)
        self.finish: Literal["stop", "length", "cancelled", "doubtful"] | None = None

    @property
    def draws(self) -> bool:
        """Whether its next token is drawn."""
        return self.decoding.temperature > 0 and self.finish is None

    def draw(self, logits: Tensor) -> int:
        """A token by the probabilities of its logits (V,)."""
        logits = logits.double().cpu()
        scaled = (logits - logits.max()) / self.decoding.temperature
        ordered, tokens = scaled.softmax(dim=-1).sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered * (before < self.decoding.top_p)
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])

    def begin_doubt(self, is_close: bool) -> None:
        """End it here where its next token is taken greedily, but was not far ahead of the second."""
        if is_close and self.finish is None and self.decoding.temperature == 0:
            self.finish = "doubtful"

    def add(self, token: int, streamed: bool) -> str:
        """Take in the next token; what is new of the text, where that is `streamed`."""
        self._num_tokens += 1
        if token in self._ends:
            self.finish = "stop"
        else:
            self._tokens.append(token)
            if self._num_tokens >= self.decoding.max_new_tokens:
                self.finish = "length"
        if not streamed and not self.decoding.stop:
            return ""
        text = self._text()
        if self.finish is None:
            text = self._certain(text)
        piece = text[len(self.told) :] if text.startswith(self.told) else ""
        self.told += piece
        return piece

    def _text(self) -> str:
        """All that is written, up to the first stop text, which ends it."""
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        places = [place for each in self.decoding.stop if (place := text.find(each)) >= 0]
        if places:
            self.finish, text = "stop", text[: min(places)]
        return text.strip()

    def _certain(self, text: str) -> str:
        """The text without what the next tokens may change: half a character, the beginning of a stop text."""
        text = text.rstrip(_UNFINISHED)
        held = [
            size
            for each in self.decoding.stop
            for size in range(1, len(each))
            if text.endswith(each[:size].rstrip()) and each[:size].strip()
        ]
        return text[: len(text) - max(held)].rstrip() if held else text.rstrip()

    def answer(self, factors: Factors | None) -> Answer:
        """What was written; of an answer that is not wanted any more, what was told of it."""
        assert self.finish is not None and self.finish != "doubtful"
        text = self.told if self.finish == "cancelled" else self._text()
        return Answer(text, self._num_tokens, self.finish, factors)


def factors_of(tuner: MixLoraModel) -> list[Factors]:
    """What each instance of the last pass selected in the decoder's layers; nothing where none is adapted."""
    layers = tuner.decoder_layers()
    if not layers:
        return []
    a, b = (index.transpose(0, 1).tolist() for index in selected(layers.values()))
    return [Factors(list(layers), of_a, of_b) for of_a, of_b in zip(a, b, strict=True)]
