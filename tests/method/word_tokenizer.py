"""A tokenizer for the tests' language models: a word for each of their ids."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 64
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Ids 3 to 63 are the words w3 to w63, separated by spaces."""
    made = Tokenizer(models.WordLevel(SPECIAL | {f"w{i}": i for i in range(3, SIZE)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<s>",
        chat_template=chat_template,
    )


def random_words(seed: int, length: int) -> str:
    """Words w5 to w63."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(5, SIZE, (length,), generator=generator).tolist())
