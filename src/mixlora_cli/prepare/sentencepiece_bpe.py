"""LLaMA's `tokenizer.model` as a fast tokenizer that reads every text as sentencepiece itself does.

transformers 5 joins pieces in the order of their ids and adds no space before a text that begins with one. In
LLaMA's model the runs of spaces have the first ids and the lowest scores, so "a  b" would get other tokens.
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined] # made at import
from tokenizers import normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPACE = "▁"
_NORMAL, _USER_DEFINED = 1, 4
_BPE = 2
_PROBES = (
    *(
        "a b",
        "a  b",
        "a" + 5 * " " + "b",
        "a" + 18 * " " + "b",
        "def f(x):\n    return x\n\n\tpass",
        "1,000 x 23",
    ),
    *("naïve 猫 😀\r\n", "</", "<0x41>", "A chat between a curious user. USER: <image> What?"),
)
_PROBES_BEHIND_A_SPACE = (" ", "  a", "    return x")


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


def _of_no_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer of a class that loads `tokenizer.json` as it is; LLaMA's puts its own parts back."""
    kept = (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "model_max_length",
        "padding_side",
        "model_input_names",
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in kept},
    )
