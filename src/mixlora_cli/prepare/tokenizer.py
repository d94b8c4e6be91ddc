"""A LLaMA's tokenizer with the image token, that reads every text as sentencepiece itself does.

transformers 5 joins pieces in the order of their ids and adds no space before a text that begins with one. In
LLaMA's model the runs of spaces have the first ids and the lowest scores, so "a  b" would get other tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined] # made at import
from tokenizers import AddedToken, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.prepare.parts import Part

_MULTIPLE = 64  # widths that are a multiple of it multiply fastest on GPUs
_SENTENCEPIECE = "tokenizer.model"
_TOKENIZER_FILES = (_SENTENCEPIECE, "tokenizer.json")
_SPACE = "▁"
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_PROBES = (
    "a b",
    "a  b",
    "a" + 5 * " " + "b",
    "a" + 18 * " " + "b",
    "def f(x):\n    return x\n\n\tpass",
    "1,000 x 23",
    "naïve 猫 😀\r\n",
    "</",
    "<0x41>",
    "A chat between a curious user. USER: <image> What?",
)
_PROBES_BEHIND_A_SPACE = (" ", "  a", "    return x")


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of the assembled model."""

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    num_rows: int
    """Rows of embedding and head: the tokens and, up to a multiple of 64, rows that no token has."""
    never_generated: list[int]
    """The image token and every row without a token."""


def build_vocabulary(part: Part, num_rows: int) -> Vocabulary:
    """The language model's tokenizer with `<image>` behind its tokens; pads with `<unk>`, as LLaVA does.

    Args:
        part: the language model.
        num_rows: rows that its embedding has on disk.

    Raises:
        UserError: the tokenizer cannot be read, or has more tokens than the model.
    """
    if not any((part.path / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer of three tokens.
        raise part.refuse(f"{part.path} has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)}")
    behaviour = _behaviour(part.path / "tokenizer_config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(part.path, **behaviour)
    except (OSError, ValueError, ImportError) as error:
        raise part.refuse(f"its tokenizer cannot be read: {' '.join(str(error).split())[:160]}") from error
    model = part.path / _SENTENCEPIECE
    if model.is_file():
        try:
            tokenizer = as_sentencepiece_reads(tokenizer, model)
        except ValueError as error:
            raise part.refuse(str(error)) from error
    tokenizer.init_kwargs.update(behaviour)  # what is saved; transformers drops it otherwise
    if len(tokenizer) > num_rows:
        raise part.refuse(f"its tokenizer has {len(tokenizer)} tokens, its embedding only {num_rows} rows")
    tokenizer.add_tokens([AddedToken(IMAGE_MARKER, normalized=False, special=True)], special_tokens=True)
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    assert isinstance(image_token_id, int)  # of one token
    rows = -(-max(num_rows, len(tokenizer)) // _MULTIPLE) * _MULTIPLE
    return Vocabulary(tokenizer, image_token_id, rows, [image_token_id, *range(len(tokenizer), rows)])


def _behaviour(settings: Path) -> dict[str, bool]:
    """A tokenizer of Vicuna's time does not say `legacy`, and meant yes.

    Then text behind a special token gets a leading space: LLaVA was trained to read "▁", newline after a picture.
    """
    try:
        says = "legacy" in json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        says = False
    return {} if says else {"legacy": True}


def as_sentencepiece_reads(tokenizer: PreTrainedTokenizerBase, file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers made, with the merges and the leading space of `file`.

    Raises:
        ValueError: the file is no BPE model with the tokenizer's ids, or reads otherwise than can be rebuilt.
    """
    try:
        original = SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error
    model = ModelProto()
    model.ParseFromString(file.read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    if model.trainer_spec.model_type != _BPE or vocabulary.items() - tokenizer.get_vocab().items():
        raise ValueError(f"{file.name} is no BPE model, or one with other ids than the files beside it")
    backend = tokenizer.backend_tokenizer
    backend.model = BPE(vocabulary, merges_by_score(model), fuse_unk=True, byte_fallback=True)
    probes = list(_PROBES)
    if getattr(tokenizer, "legacy", False):  # each part between special tokens gets its space
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        backend.pre_tokenizer = None
        tokenizer = _of_no_model(tokenizer)
        probes += _PROBES_BEHIND_A_SPACE
    for text in probes:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != original.encode(text):
            raise ValueError(f"{file.name} reads {text!r} otherwise than a tokenizer of LLaMA's kind can")
    return tokenizer


def merges_by_score(model: ModelProto) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which sentencepiece joins them: the best piece first.

    Pieces that the model's author defined come before all others. Among equal scores (LLaMA's runs of spaces)
    sentencepiece takes the leftmost pair; the longest left half first has the same effect.
    """
    joined = {
        p.piece: (p.type == _USER_DEFINED, p.score)
        for p in model.pieces
        if p.type in (_NORMAL, _USER_DEFINED)
    }
    found = [
        (order, cut, len(piece) - cut, piece[:cut], piece[cut:])
        for piece, order in joined.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _of_no_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer of a class that loads `tokenizer.json` as it is; LLaMA's puts its own parts back."""
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    kept = (*special, "model_max_length", "padding_side", "model_input_names")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in kept},
    )
