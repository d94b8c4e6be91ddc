"""Tokenizers of today's families, trained on the spot: real classes and control tokens, a few hundred words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)

_CORPUS = (
    "What is in the picture? A red circle, a blue square and the number 7.",
    "user assistant system model User: Assistant: USER: ASSISTANT:",
    "How many dots are in the two pictures? There are five dots. yes no left right",
)


def _byte_level(
    kind: type[PreTrainedTokenizerBase], special: Sequence[str], **names: Any
) -> PreTrainedTokenizerBase:
    """BPE over bytes: GPT-2, Qwen, Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=336, initial_alphabet=alphabet, show_progress=False)
    return _trained(kind, tokenizer, trainer, special, names)


def _sentencepiece(
    kind: type[PreTrainedTokenizerBase], first: Sequence[str], special: Sequence[str], **names: Any
) -> PreTrainedTokenizerBase:
    """BPE over characters, bytes for what is unknown, a low line for a space: Llama, Mistral, Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    reserved = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=reserved, show_progress=False)
    return _trained(kind, tokenizer, trainer, special, names)


def _trained(
    kind: type[PreTrainedTokenizerBase],
    tokenizer: Tokenizer,
    trainer: Any,
    special: Sequence[str],
    names: dict[str, Any],
) -> PreTrainedTokenizerBase:
    """The words that the trainer finds, in a tokenizer of the real class."""
    tokenizer.train_from_iterator(_CORPUS, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    complete = kind(vocab=learnt["vocab"], merges=merges, **names)
    complete.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return complete


def qwen(*more: str, **names: Any) -> PreTrainedTokenizerBase:
    """Qwen 2 and later; `more` control tokens."""
    special = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>", *more),
    )
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    return _byte_level(Qwen2Tokenizer, special, **ends, **names)


def onevision() -> PreTrainedTokenizerBase:
    """LLaVA-OneVision on Qwen 2."""
    return qwen("<image>", "<video>")


def internvl() -> PreTrainedTokenizerBase:
    """InternVL on Qwen 2."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return qwen(*named.values(), extra_special_tokens=named)


def utterances(begin: str, end: str) -> PreTrainedTokenizerBase:
    """SmolVLM and Idefics 3: a picture is written tile by tile, each under its row and column."""
    tiles = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    special = (
        begin,
        end,
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *tiles,
    )
    return _byte_level(
        GPT2Tokenizer, special, bos_token=begin, eos_token="<end_of_utterance>", pad_token=end, unk_token=end
    )


def smollm() -> PreTrainedTokenizerBase:
    """SmolLM 2."""
    begin, end = "<|im_start|>", "<|im_end|>"
    return _byte_level(
        GPT2Tokenizer, ("<|endoftext|>", begin, end), bos_token=begin, eos_token=end, pad_token=end
    )


def llama3() -> PreTrainedTokenizerBase:
    """Llama 3: no token that pads."""
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    special = (begin, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", end)
    names = {"bos_token": begin, "eos_token": end, "unk_token": "<|end_of_text|>", "add_bos_token": True}
    return _byte_level(GPT2Tokenizer, special, **names)


def llama(*special: str, **names: Any) -> PreTrainedTokenizerBase:
    """Llama 1 and 2, Mistral, Phi 3; without names, no token that pads."""
    return _sentencepiece(
        LlamaTokenizer, ("<unk>", "<s>", "</s>"), special, legacy=False, add_bos_token=True, **names
    )


def gemma() -> PreTrainedTokenizerBase:
    """Gemma 3: runs of newlines are tokens, so that what stands around a picture merges with the text around it."""
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    special = ("<start_of_turn>", "<end_of_turn>", *named.values(), *("\n" * count for count in (2, 3, 4)))
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return _sentencepiece(GemmaTokenizer, first, special, add_bos_token=True, extra_special_tokens=named)
