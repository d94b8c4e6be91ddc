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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, groupby
from typing import Literal

from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from mixlora_cli.config import DataConfig
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.images import Picture, opened
from mixlora_cli.data.problems import BadRecord, Kind, Problem, settle
from mixlora_cli.data.records import Record
from mixlora_cli.data.streaming import stream_records
from mixlora_cli.data.template import CHOICES, IMAGE_MARKER, Segment, Turn
from mixlora_cli.errors import UserError, cut
from mixlora_cli.progress import say, with_bar

IGNORE = -100
"""Label of a token without loss: what `torch.nn.functional.cross_entropy` ignores by default."""
VERIFIED_PER_TASK = 2
"""Records of each task whose label masks are checked."""


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded instance, its pictures and where it came from."""

    input_ids: Sequence[int]
    """(S,) tokens, those of the pictures included."""
    labels: Sequence[int]
    """(S,): `labels[t]` is `input_ids[t]`, or -100 without loss."""
    images: tuple[Picture, ...]
    """In the order of their tokens."""
    task: str
    index: int
    """`Record.index`, for messages."""
    num_dropped: int = 0
    """Tokens that truncation took from the end."""

    @property
    def length(self) -> int:
        """S, image tokens included."""
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens before the last answer; S where there is no answer."""
        start = self.length
        while start and self.labels[start - 1] == IGNORE:
            start -= 1
        if not start:
            return self.length
        while start and self.labels[start - 1] != IGNORE:
            start -= 1
        return start


class StreamedDataset(IterableDataset[Item]):
    """Items of records as they come, pass after pass without an end; nothing is held.

    Each process reads its own records. Every pass has an order of its own, the same whenever it is read.
    """

    def __init__(
        self,
        data: DataConfig,
        chat: Chat,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        tasks: Collection[str] | None = None,
    ) -> None:
        """`tasks` are those that are known where a task has to be; None where it need not."""
        self._data, self._chat, self._seed = data, chat, seed
        self._rank, self._world_size, self._tasks = rank, world_size, tasks

    def __iter__(self) -> Iterator[Item]:
        """Encoded records; the label masks of the first two of each task are checked in the first pass.

        Raises:
            UserError: what `encode_records` and `stream_records` raise; no record of a pass can be encoded; a task is
                not among those that are known.
        """
        encode_one = _checked_encoding(self._chat, self._data.max_length)
        for number in count():
            seed = self._seed * 1_000_003 + number
            is_empty = True
            for record in stream_records(self._data, "train", seed, self._rank, self._world_size):
                if self._tasks is not None and record.task not in self._tasks:
                    raise UserError(
                        f"routing=task reads a definition of each task, and task {cut(record.task)} of record "
                        f"{record.index} has none; add it to data.metadata, or train with routing=instance"
                    )
                try:
                    item = encode_one(record)
                except BadRecord as bad:
                    if self._data.on_error == "stop":
                        raise UserError(
                            f"record {record.index}: {bad.kind.value} ({bad.detail}); mend it or pass "
                            "data.on_error=skip to go on without such records"
                        ) from bad
                    continue
                is_empty = False
                yield item
            if is_empty:
                raise UserError("the training data: no record can be encoded; expected at least one")


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

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

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
    chat: Chat,
    max_length: int | None,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
) -> EncodedDataset:
    """Training items of all records; the label masks of the first of each task are checked.

    How many were truncated, and how many had to be left out, is printed.

    Raises:
        UserError: a checked label mask is wrong, whatever `on_error` is; a record cannot be encoded and `on_error` is
            "stop".
    """
    dataset = _encode_all(records, _checked_encoding(chat, max_length), on_error, source)
    if dataset.num_truncated:
        say(
            f"{dataset.num_truncated} of {len(dataset)} instances of {source} are longer than "
            f"data.max_length={max_length} tokens and lost the end of their last answer"
        )
    return dataset


def _checked_encoding(chat: Chat, max_length: int | None) -> Callable[[Record], Item]:
    """`encode`, and `verify_labels` of the first records of each task."""
    verified: Counter[str] = Counter()

    def encode_one(record: Record) -> Item:
        item = encode(record, chat, max_length)
        if verified[record.task] < VERIFIED_PER_TASK:
            verified[record.task] += 1
            verify_labels(item, record, chat)
        return item

    return encode_one


def encode_prompts(
    records: Sequence[Record],
    chat: Chat,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
) -> EncodedDataset:
    """Generation prompts of all records, never truncated; labels are all -100.

    Raises:
        UserError: a record cannot be encoded and `on_error` is "stop".
    """
    return _encode_all(records, lambda record: encode_prompt(record, chat), on_error, source)


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


def encode(record: Record, chat: Chat, max_length: int | None = None) -> Item:
    """Ids and labels for training: every answer and its end token carry loss, nothing else does.

    At most `max_length` tokens, expanded image tokens included: the end of the last answer goes, and with it
    its end token, so that the model does not learn to stop there; a later question without its answer goes with its
    pictures. A picture is never cut: it comes before an answer, and the cut is in one.

    Raises:
        BadRecord: the text contains a control token, the processor refuses a picture, or no answer token is left after
            truncation.
        UserError: the chat template does not fit the model or the conversation.
    """
    ids, labels, pictures_before = _tokenise(record, chat, with_answer=True)
    length = kept = len(ids)
    if max_length is not None and length > max_length:
        labelled = [position for position, label in enumerate(labels[:max_length]) if label != IGNORE]
        if not labelled:
            raise BadRecord(
                Kind.NO_LABEL, f"the prompt alone fills the {max_length} tokens allowed (all: {length})"
            )
        kept = labelled[-1] + 1  # a question that lost its answer teaches nothing
    num_pictures = max((count for start, count in pictures_before if start < kept), default=0)
    images = record.images[:num_pictures]
    return Item(ids[:kept], labels[:kept], images, record.task, record.index, length - kept)


def encode_prompt(record: Record, chat: Chat) -> Item:
    """Ids of everything up to the last answer, for generation: a prefix of `encode`'s ids. All labels are -100.

    Raises:
        BadRecord: the text contains a control token, or the processor refuses a picture.
        UserError: the chat template does not fit the model or the conversation.
    """
    ids, _, _ = _tokenise(record, chat, with_answer=False)
    return Item(ids, [IGNORE] * len(ids), record.images, record.task, record.index)


def _tokenise(
    record: Record, chat: Chat, *, with_answer: bool
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Ids, labels, and by segment where it begins and how many pictures stand up to its end."""
    for turn in record.conversation:
        text = turn.text.replace(IMAGE_MARKER, "")
        if found := next((token for token in chat.forbidden if token in text), None):
            raise BadRecord(Kind.CONTROL_TEXT, f"{found!r} in a {turn.role} turn")
    pictures = iter(chat.picture_texts(record.images))
    pieces: list[tuple[str, str, Segment]] = []
    anchor = ""  # what precedes a segment: a character or a control token
    for segment in _segments(record, chat, with_answer=with_answer):
        pieces.append((anchor, _with_pictures(segment.text, chat, pictures), segment))
        anchor = chat.control_token_at_end(segment.text) or segment.text[-1]
    places = [segment.text.count(chat.image_token or IMAGE_MARKER) for *_, segment in pieces]
    if sum(places) != len(record.images):
        raise UserError(
            f"chat template {chat.template.name} does not write a place for each picture ({len(record.images)} in "
            f"record {record.index}); give a template of this model (model.chat_template=<file.jinja>)"
        )
    # one call: a fast tokenizer spends most of its time on the way in and out
    batch = [text for anchor, text, _ in pieces for text in (anchor, anchor + text)]
    rows: list[list[int]] = chat.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    input_ids = list(chat.begin)
    labels = [IGNORE] * len(input_ids)
    pictures_before: list[tuple[int, int]] = []
    pieces_ids = zip(pieces, rows[::2], rows[1::2], accumulate(places), strict=True)
    for (_, text, segment), anchor_ids, joint_ids, shown in pieces_ids:
        ids = _continuation(chat.tokenizer, text, anchor_ids, joint_ids)
        pictures_before.append((len(input_ids), shown))
        input_ids += ids
        labels += ids if segment.is_answer else [IGNORE] * len(ids)
    return input_ids, labels, pictures_before


def _segments(record: Record, chat: Chat, *, with_answer: bool = True) -> list[Segment]:
    """The record's text in segments, each picture at its marker, or all where the template wants them."""
    turns = list(record.conversation)
    if chat.template.pictures_first:
        turns = [Turn(turn.role, turn.text.replace(IMAGE_MARKER, "")) for turn in turns]
        first = next(number for number, turn in enumerate(turns) if turn.role == "human")
        turns[first] = Turn("human", f"{IMAGE_MARKER * len(record.images)}\n{turns[first].text}")
    return chat.segments(turns, with_answer=with_answer)


def _with_pictures(text: str, chat: Chat, pictures: Iterator[str]) -> str:
    """A segment's text with the tokens that stand for its pictures in their places."""
    if chat.image_token is None or chat.image_token not in text:
        return text
    first, *rest = text.split(chat.image_token)
    return first + "".join(next(pictures, chat.image_token) + piece for piece in rest)


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


def verify_labels(encoded: Item, record: Record, chat: Chat) -> None:
    """Check that the unmasked text is the answers and their end tokens, that labels stand where their tokens
    are, that the prompt is what generation will see, and that the pictures' tokens are those of the model's processor.

    Text is compared after a round trip of the expected text through the tokenizer, so that one that cannot
    spell everything (unknown words, lower-casing) is not blamed. A truncated last answer must be the
    beginning of the expected one.

    Raises:
        UserError: something differs; it names the record, and training must not start.
    """
    tokenizer = chat.tokenizer
    where = f"record {record.index} (task {cut(record.task)})"
    for position, (token, label) in enumerate(zip(encoded.input_ids, encoded.labels, strict=True)):
        if label not in (IGNORE, token):
            raise UserError(
                f"label mask of {where} is wrong: at position {position} the label is {label}, the token {token}"
            )
    answers = [turn.text.strip() + chat.end for turn in record.conversation if turn.role == "gpt"]
    written = [segment.text for segment in _segments(record, chat) if segment.is_answer]
    if [text.strip() for text in written] != answers:
        raise UserError(
            f"chat template {chat.template.name} changes the answers of {where}: the loss would be on {written}, "
            f"expected {answers}; give another template ({CHOICES}), or "
            "options of it (model.template_options={enable_thinking: false})"
        )
    expected = [
        _decode(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in written
    ]
    runs = groupby(encoded.labels, key=lambda label: label != IGNORE)
    found = [_decode(tokenizer, list(run)) for has_loss, run in runs if has_loss]
    if encoded.num_dropped:
        found[-1] = found[-1].rstrip("\N{REPLACEMENT CHARACTER}")  # truncation may split a character's bytes
        expected = [*expected[: len(found) - 1], expected[len(found) - 1][: len(found[-1])]]
    if found != expected:
        raise UserError(f"label mask of {where} is wrong: the loss would be on {found}, expected {expected}")
    if len(found) == len(answers):
        prompt = encode_prompt(record, chat).input_ids
        if encoded.input_ids[: len(prompt)] != prompt:
            raise UserError(
                f"prompt of {where} differs between training and generation; this tokenizer is not supported"
            )
    if encoded.images:
        _verify_pictures(encoded, record, chat)


def _verify_pictures(encoded: Item, record: Record, chat: Chat) -> None:
    """Compare with what the processor makes of the pictures themselves, not of blank ones of their sizes."""
    assert chat.image_token is not None
    (own,) = chat.process([[opened(picture) for picture in encoded.images]])[1]
    if (expected := chat.picture_texts(encoded.images)) != own:
        raise UserError(
            f"the pictures of record {record.index} (task {cut(record.task)}) take {len(''.join(own))} characters of "
            f"the text where {len(''.join(expected))} were expected of their sizes; this processor is not supported"
        )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of `ids` with control tokens; a leading space is the tokenizer's business (LLaMA's drops it)."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).lstrip(" ")
