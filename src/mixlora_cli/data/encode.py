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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER, Template, Turn, segments
from mixlora_cli.errors import UserError, cut

IGNORE = -100
"""Label of a token without loss: what `torch.nn.functional.cross_entropy` ignores by default."""


class TextSide(Protocol):
    """What encoding needs of a base model; `models.load.Base` has it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def template(self) -> Template: ...
    @property
    def num_image_tokens(self) -> int: ...
    @property
    def image_token_id(self) -> int: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids (S,) and labels (S,) of one instance: `labels[t]` is `input_ids[t]`, or -100 without loss."""

    input_ids: list[int]
    labels: list[int]
    num_dropped: int = 0
    """Tokens that truncation took from the end."""


@dataclass(frozen=True)
class _Piece:
    """Text to tokenise as the continuation of `anchor`; `image` pieces stand for the image's tokens."""

    text: str
    anchor: str
    is_answer: bool
    is_image: bool = False


def place_image(conversation: Sequence[Turn], has_image: bool) -> list[Turn]:
    """Put the image marker at the front of the first question: "<image>" newline question; other markers go
    away.
    """
    turns = [Turn(turn.role, turn.text.replace(IMAGE_MARKER, "").strip()) for turn in conversation]
    if has_image:
        turns[0] = Turn(turns[0].role, f"{IMAGE_MARKER}\n{turns[0].text}")
    return turns


def encode(record: Record, base: TextSide, max_length: int | None = None) -> Encoded:
    """Ids and labels for training: every answer and its end token carry loss, nothing else does.

    At most `max_length` tokens, expanded image tokens included: the end of the last answer goes, and with it
    its end token, so that the model does not learn to stop there. An image is never cut: it comes before
    every answer.

    Raises BadRecord when the text contains a control token, or when no answer token is left after truncation.
    """
    full = _tokenise(record, base, with_answer=True)
    length = len(full.input_ids)
    if max_length is None or length <= max_length:
        return full
    labelled = [position for position, label in enumerate(full.labels[:max_length]) if label != IGNORE]
    if not labelled:
        raise BadRecord(
            Kind.NO_LABEL, f"the prompt alone fills the {max_length} tokens allowed (all: {length})"
        )
    kept = labelled[-1] + 1  # a question that lost its answer teaches nothing
    return Encoded(full.input_ids[:kept], full.labels[:kept], num_dropped=length - kept)


def encode_prompt(record: Record, base: TextSide) -> Encoded:
    """Ids of everything up to the last answer, for generation: a prefix of `encode`'s ids. All labels are
    -100.

    Raises BadRecord when the text contains a control token.
    """
    prompt = _tokenise(record, base, with_answer=False)
    return Encoded(prompt.input_ids, [IGNORE] * len(prompt.input_ids))


def verify_labels(encoded: Encoded, record: Record, base: TextSide) -> None:
    """Check that the unmasked text is the answers and their end tokens, that labels stand where their tokens
    are, and that the prompt is what generation will see.

    Text is compared after a round trip of the expected text through the tokenizer, so that one that cannot
    spell everything (unknown words, lower-casing) is not blamed. A truncated last answer must be the
    beginning of the expected one.

    Raises UserError that names the record; training must not start.
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
    expected = [_round_trip(tokenizer, text) for text in answers]
    found = [_decode(tokenizer, run) for run in _label_runs(encoded.labels)]
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


def _tokenise(record: Record, base: TextSide, *, with_answer: bool) -> Encoded:
    turns = place_image(record.conversation, record.image is not None)
    for turn in record.conversation:
        if base.template.end in turn.text:
            raise BadRecord(Kind.CONTROL_TEXT, f"{base.template.end!r} in a {turn.role} turn")
    pieces = list(_pieces(base.template, turns, with_answer=with_answer))
    # one call: a fast tokenizer spends most of its time on the way in and out
    batch = [text for piece in pieces for text in (piece.anchor, piece.anchor + piece.text)]
    rows: list[list[int]] = base.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    bos = base.tokenizer.bos_token_id if base.template.bos else None
    input_ids: list[int] = [] if bos is None else [int(bos)]
    labels = [IGNORE] * len(input_ids)
    for piece, anchor_ids, joint_ids in zip(pieces, rows[::2], rows[1::2], strict=True):
        if piece.is_image:
            ids = [base.image_token_id] * base.num_image_tokens
        else:
            ids = _continuation(base.tokenizer, piece.text, anchor_ids, joint_ids)
            if base.image_token_id in ids:
                raise BadRecord(Kind.CONTROL_TEXT, "the image token in a turn's text")
        input_ids += ids
        labels += ids if piece.is_answer else [IGNORE] * len(ids)
    return Encoded(input_ids, labels)


def _pieces(template: Template, turns: Sequence[Turn], *, with_answer: bool) -> Iterator[_Piece]:
    """Segments, the first one cut at the image marker."""
    anchor = ""
    for segment in segments(template, turns, with_answer=with_answer):
        text = segment.text
        if IMAGE_MARKER in text:
            before, text = text.split(IMAGE_MARKER, 1)
            yield _Piece(before, anchor, is_answer=False)
            yield _Piece("", "", is_answer=False, is_image=True)
            anchor = IMAGE_MARKER
        yield _Piece(text, anchor, segment.is_answer)
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


def _label_runs(labels: Sequence[int]) -> list[list[int]]:
    """Unmasked stretches of labels, in order."""
    runs: list[list[int]] = []
    previous = IGNORE
    for label in labels:
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of `ids` with control tokens; a leading space is the tokenizer's business (LLaMA's drops it)."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).lstrip(" ")


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return _decode(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
