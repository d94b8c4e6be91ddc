"""From a conversation to token ids and labels whose mask is exact by construction.

Each segment is tokenised on its own, so no token can straddle prompt and answer, and the ids of a prompt do
not depend on the answer: the prompt that generation starts from is, id for id, the one that training saw.
What a tokenizer does at the start of a text (LLaMA's adds a space there) would make the pieces differ from
the text tokenised as a whole; so each piece is tokenised right after the text that precedes it (its anchor: a
character or a control token) and the anchor's tokens are dropped. Tokenising the whole text and cutting by
character offsets would give the same ids where tokens do not cross the cut, but it needs a fast tokenizer and
leaves the prompt's last token to chance where they do.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER, Template, Turn, segments
from mixlora_cli.errors import UserError, cut
from mixlora_cli.progress import say, with_bar

IGNORE = -100
"""Label of a token without loss: what `torch.nn.functional.cross_entropy` ignores by default."""


class TextSide(Protocol):
    """What encoding needs of a base model; `models.load.LoadedModel` has it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def template(self) -> Template: ...
    @property
    def num_image_tokens(self) -> int: ...
    @property
    def image_token_id(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded instance, its picture and where it came from."""

    input_ids: Sequence[int]
    """(S,) tokens, those of the picture included."""
    labels: Sequence[int]
    """(S,): `labels[t]` is `input_ids[t]`, or -100 without loss."""
    image: Path | None
    task: str
    index: int
    """`Record.index`, for messages."""
    num_dropped: int = 0
    """Tokens that truncation took from the end."""

    @property
    def length(self) -> int:
        """S, image tokens included."""
        return len(self.input_ids)


class EncodedDataset(Dataset[Item]):
    """Items in the order of their records: what the Trainer and the evaluation iterate over."""

    def __init__(self, items: Iterable[Item]) -> None:
        # arrays: lists of integers take some 40 bytes a token, these take 8
        self.items = [
            replace(item, input_ids=array("i", item.input_ids), labels=array("i", item.labels))
            for item in items
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Item:
        return self.items[position]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item, for length-grouped batches."""
        return [item.length for item in self.items]

    @property
    def num_truncated(self) -> int:
        """Items that lost the end of their last answer."""
        return sum(item.num_dropped > 0 for item in self.items)


def encode_records(
    records: Sequence[Record],
    base: TextSide,
    max_length: int,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
    verified_per_task: int = 2,
) -> EncodedDataset:
    """Training items of all records; the label masks of the first `verified_per_task` of each task are checked.

    How many were truncated, and how many had to be left out, is printed.

    Raises:
        UserError: a checked label mask is wrong, whatever `on_error` is; a record cannot be encoded and `on_error` is
            "stop".
    """
    verified: Counter[str] = Counter()

    def encode_one(record: Record) -> Item:
        item = encode(record, base, max_length)
        if verified[record.task] < verified_per_task:
            verified[record.task] += 1
            verify_labels(item, record, base)
        return item

    dataset = _encode_all(records, encode_one, on_error, source)
    if dataset.num_truncated:
        say(
            f"{dataset.num_truncated} of {len(dataset)} instances of {source} are longer than "
            f"data.max_length={max_length} tokens and lost the end of their last answer"
        )
    return dataset


def encode_prompts(
    records: Sequence[Record],
    base: TextSide,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
) -> EncodedDataset:
    """Generation prompts of all records, never truncated; labels are all -100.

    Raises:
        UserError: a record cannot be encoded and `on_error` is "stop".
    """
    return _encode_all(records, lambda record: encode_prompt(record, base), on_error, source)


def _encode_all(
    records: Sequence[Record],
    encode_one: Callable[[Record], Item],
    on_error: Literal["stop", "skip"],
    source: str,
) -> EncodedDataset:
    problems: list[Problem] = []

    def good() -> Iterator[Item]:
        for record in with_bar(records, "tokenising"):
            try:
                yield encode_one(record)
            except BadRecord as bad:
                problems.append(Problem(record.index, bad.kind, bad.detail))

    dataset = EncodedDataset(good())
    settle(problems, source, len(records), on_error)
    return dataset


def encode(record: Record, base: TextSide, max_length: int | None = None) -> Item:
    """Ids and labels for training: every answer and its end token carry loss, nothing else does.

    At most `max_length` tokens, expanded image tokens included: the end of the last answer goes, and with it
    its end token, so that the model does not learn to stop there. An image is never cut: it comes before
    every answer.

    Raises:
        BadRecord: the text contains a control token, or no answer token is left after truncation.
    """
    ids, labels = _tokenise(record, base, with_answer=True)
    length = kept = len(ids)
    if max_length is not None and length > max_length:
        labelled = [position for position, label in enumerate(labels[:max_length]) if label != IGNORE]
        if not labelled:
            raise BadRecord(
                Kind.NO_LABEL, f"the prompt alone fills the {max_length} tokens allowed (all: {length})"
            )
        kept = labelled[-1] + 1  # a question that lost its answer teaches nothing
    return Item(
        ids[:kept],
        labels[:kept],
        record.files[0] if record.files else None,
        record.task,
        record.index,
        length - kept,
    )


def encode_prompt(record: Record, base: TextSide) -> Item:
    """Ids of everything up to the last answer, for generation: a prefix of `encode`'s ids. All labels are -100.

    Raises:
        BadRecord: the text contains a control token.
    """
    ids, _ = _tokenise(record, base, with_answer=False)
    return Item(
        ids, [IGNORE] * len(ids), record.files[0] if record.files else None, record.task, record.index
    )


def _tokenise(record: Record, base: TextSide, *, with_answer: bool) -> tuple[list[int], list[int]]:
    """Ids and labels."""
    for turn in record.conversation:
        if base.template.end in turn.text:
            raise BadRecord(Kind.CONTROL_TEXT, f"{base.template.end!r} in a {turn.role} turn")
    pieces = list(_pieces(record, base.template, with_answer=with_answer))
    # one call: a fast tokenizer spends most of its time on the way in and out
    batch = [text for anchor, text, _ in pieces for text in (anchor, anchor + text)]
    rows: list[list[int]] = base.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    bos = base.tokenizer.bos_token_id if base.template.bos else None
    input_ids: list[int] = [] if bos is None else [int(bos)]
    labels = [IGNORE] * len(input_ids)
    for (anchor, text, is_answer), anchor_ids, joint_ids in zip(pieces, rows[::2], rows[1::2], strict=True):
        if anchor == IMAGE_MARKER:
            input_ids += [base.image_token_id] * base.num_image_tokens
            labels += [IGNORE] * base.num_image_tokens
        ids = _continuation(base.tokenizer, text, anchor_ids, joint_ids)
        if base.image_token_id in ids:
            raise BadRecord(Kind.CONTROL_TEXT, "the image token in a turn's text")
        input_ids += ids
        labels += ids if is_answer else [IGNORE] * len(ids)
    return input_ids, labels


def _pieces(record: Record, template: Template, *, with_answer: bool) -> Iterator[tuple[str, str, bool]]:
    """(anchor, the text to tokenise as its continuation, whether it is an answer); after the anchor "<image>" comes
    what follows the picture, whose tokens come before it.

    The picture opens the first question ("<image>" newline question), wherever the marker stood.
    """
    turns = [Turn(turn.role, turn.text.replace(IMAGE_MARKER, "").strip()) for turn in record.conversation]
    if record.images:
        turns[0] = Turn(turns[0].role, f"{IMAGE_MARKER}\n{turns[0].text}")
    anchor = ""
    for segment in segments(template, turns, with_answer=with_answer):
        text = segment.text
        if IMAGE_MARKER in text:
            before, text = text.split(IMAGE_MARKER, 1)
            yield anchor, before, False
            anchor = IMAGE_MARKER
        yield anchor, text, segment.is_answer
        anchor = template.end if segment.is_answer else text[-1]


def _continuation(
    tokenizer: PreTrainedTokenizerBase, text: str, anchor_ids: list[int], joint_ids: list[int]
) -> list[int]:
    """Ids of `text` as they follow its anchor; on its own where a token crosses the border.

    An unknown anchor proves nothing: the anchor and the first letters of the text may be one unknown word.
    """
    if joint_ids[: len(anchor_ids)] == anchor_ids and tokenizer.unk_token_id not in anchor_ids:
        return joint_ids[len(anchor_ids) :]
    alone: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return alone


def verify_labels(encoded: Item, record: Record, base: TextSide) -> None:
    """Check that the unmasked text is the answers and their end tokens, that labels stand where their tokens
    are, and that the prompt is what generation will see.

    Text is compared after a round trip of the expected text through the tokenizer, so that one that cannot
    spell everything (unknown words, lower-casing) is not blamed. A truncated last answer must be the
    beginning of the expected one.

    Raises:
        UserError: something differs; it names the record, and training must not start.
    """
    tokenizer, template = base.tokenizer, base.template
    where = f"record {record.index} (task {cut(record.task)})"
    if len(tokenizer(template.end, add_special_tokens=False)["input_ids"]) != 1:
        raise UserError(
            f"template {template.name} ends answers with {template.end!r}, which is not one token of this "
            "model's tokenizer; choose the template that the model was trained with (model.template=...)"
        )
    for position, (token, label) in enumerate(zip(encoded.input_ids, encoded.labels, strict=True)):
        if label not in (IGNORE, token):
            raise UserError(
                f"label mask of {where} is wrong: at position {position} the label is {label}, the token {token}"
            )
    answers = [segment.text for segment in segments(template, record.conversation) if segment.is_answer]
    expected = [
        _decode(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in answers
    ]
    runs = groupby(encoded.labels, key=lambda label: label != IGNORE)
    found = [_decode(tokenizer, list(run)) for has_loss, run in runs if has_loss]
    if encoded.num_dropped:
        found[-1] = found[-1].rstrip("\N{REPLACEMENT CHARACTER}")  # truncation may split a character's bytes
        expected = [*expected[: len(found) - 1], expected[len(found) - 1][: len(found[-1])]]
    if found != expected:
        raise UserError(f"label mask of {where} is wrong: the loss would be on {found}, expected {expected}")
    if len(found) == len(answers):
        prompt = encode_prompt(record, base).input_ids
        if encoded.input_ids[: len(prompt)] != prompt:
            raise UserError(
                f"prompt of {where} differs between training and generation; this tokenizer is not supported"
            )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of `ids` with control tokens; a leading space is the tokenizer's business (LLaMA's drops it)."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).lstrip(" ")
