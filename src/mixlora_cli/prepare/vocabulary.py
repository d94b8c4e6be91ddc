"""The image token: its place in the tokenizer, and its rows in the language model's embedding and head."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.sentencepiece_bpe import as_sentencepiece_reads

_MULTIPLE = 64  # widths that are a multiple of it multiply fastest on GPUs
_SENTENCEPIECE = "tokenizer.model"
_TOKENIZER_FILES = (_SENTENCEPIECE, "tokenizer.json")


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
        num_rows: rows that the language model's embedding has on disk.

    Raises:
        UserError: the tokenizer cannot be read, or has more tokens than the model.
    """
    if not any((part.path / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer of three tokens.
        raise part.refuse(f"{part.path} has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)}")
    behaviour = _behaviour(part)
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
    rows = _round_up(max(num_rows, len(tokenizer)))
    return Vocabulary(tokenizer, image_token_id, rows, [image_token_id, *range(len(tokenizer), rows)])


def _behaviour(part: Part) -> dict[str, bool]:
    """A tokenizer of Vicuna's time does not say `legacy`, and meant yes.

    Then text behind a special token gets a leading space: LLaVA was trained to read "▁", newline after a picture.
    """
    try:
        settings = json.loads((part.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    return {} if "legacy" in settings else {"legacy": True}


def _round_up(number: int) -> int:
    return -(-number // _MULTIPLE) * _MULTIPLE


def extend(weight: Tensor, num_rows: int) -> Tensor:
    """Embedding or head (vocabulary, d) -> (num_rows, d); each new row is the mean of the others.

    A new token's logit is then the mean of all logits, so it is never the largest, and the new rows together get
    at most their share, num_new / vocabulary, of the probability of the others.
    """
    missing = num_rows - len(weight)
    if missing == 0:
        return weight
    mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])
