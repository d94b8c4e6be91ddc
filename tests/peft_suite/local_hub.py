"""A Hugging Face cache whose repositories are random models under the names that PEFT's tests load.

The layout is huggingface_hub's own, so `from_pretrained("peft-internal-testing/...")` works offline, with
nothing patched. Where PEFT's repository holds a LoRA adapter, this one holds a MixLoRA adapter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mixlora_cli import MixLoraConfig

VERSION = "3"
"""Of this file's models; another one makes the cache anew."""
VOCABULARY = 320
"""Embeddings: more than the tokenizer's 260 ids, as in many published models."""
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 100,
}
OPT_125M = {**OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 12}
ENCODER = {
    "vocab_size": 1124,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_heads": 4}
HALVES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
BART = {
    "vocab_size": 1024,
    "max_position_embeddings": 100,
    **HALVES,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
}
NEOX = {key: size for key, size in DECODER.items() if key != "num_key_value_heads"}
WHISPER = {
    "vocab_size": 1024,
    **HALVES,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "num_mel_bins": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Base:
    """A random model: names of its transformers classes, and its sizes."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    revisions: tuple[str, ...] = ("main",)


@dataclass(frozen=True)
class Adapter:
    """A MixLoRA adapter on one of the bases, read through an auto class."""

    base: str
    auto: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main",)
    extra_tokens: int = 0
    subfolder: str = ""


LLAMA = Base("LlamaForCausalLM", "LlamaConfig", DECODER)
GPT2_LM = Base("GPT2LMHeadModel", "GPT2Config", GPT2)
QWEN2 = Base("Qwen2ForCausalLM", "Qwen2Config", DECODER)
BERT = Base("BertForPreTraining", "BertConfig", ENCODER)
T5_LM = Base("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0})
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BLOOM = {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}
PEFT = "peft-internal-testing/"
TINY = f"{PEFT}tiny-random-"
BASES = {
    f"{TINY}OPTForCausalLM": Base("OPTForCausalLM", "OPTConfig", OPT),
    f"{PEFT}opt-125m": Base("OPTForCausalLM", "OPTConfig", OPT_125M),
    f"{TINY}GPT2LMHeadModel": GPT2_LM,
    "hf-internal-testing/tiny-random-gpt2": GPT2_LM,
    f"{TINY}gpt2": GPT2_LM,
    "gpt2": GPT2_LM,
    f"{TINY}GPTJForCausalLM": Base("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    f"{TINY}GPTNeoXForCausalLM": Base("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    f"{TINY}BloomForCausalLM": Base("BloomForCausalLM", "BloomConfig", BLOOM),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
    f"{TINY}LlamaForCausalLM": LLAMA,
    f"{PEFT}tiny-dummy-qwen2": QWEN2,
    "Qwen/Qwen2-0.5B": QWEN2,
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Base("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "hf-internal-testing/tiny-random-MistralForCausalLM": Base(
        "MistralForCausalLM", "MistralConfig", DECODER
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Base(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}
    ),
    f"{TINY}T5ForConditionalGeneration-calibrated": T5_LM,
    f"{TINY}T5ForConditionalGeneration": T5_LM,
    f"{TINY}t5": T5_LM,
    "google/flan-t5-small": Base(T5_LM.model, T5_LM.config, {**T5_LM.sizes, **FLAN}),
    f"{TINY}BartForConditionalGeneration": Base("BartForConditionalGeneration", "BartConfig", BART),
    f"{TINY}BertModel": replace(BERT, revisions=("main", "v2.0.0")),
    "bert-base-uncased": BERT,
    "hf-internal-testing/tiny-random-BertModel": BERT,
    f"{TINY}RobertaModel": Base("RobertaModel", "RobertaConfig", ENCODER),
    f"{TINY}DebertaModel": Base("DebertaModel", "DebertaConfig", ENCODER),
    f"{TINY}DebertaV2Model": Base("DebertaV2Model", "DebertaV2Config", ENCODER),
    f"{TINY}BertForSequenceClassification": Base("BertForSequenceClassification", "BertConfig", ENCODER),
    f"{TINY}RobertaForSequenceClassification": Base(
        "RobertaForSequenceClassification", "RobertaConfig", ENCODER
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Base(
        "LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "pad_token_id": 1}
    ),
    "openai/whisper-tiny": Base("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
ON_OPT = Adapter(f"{TINY}OPTForCausalLM", "AutoModelForCausalLM")
EXTENDED = replace(ON_OPT, extra_tokens=10)
ADAPTERS = {
    f"{PEFT}tiny-OPTForCausalLM-lora": ON_OPT,
    f"{TINY}OPTForCausalLM-extended-vocab": EXTENDED,
    f"{PEFT}opt-tokenizer-revision": replace(EXTENDED, revisions=("main", "my-revision")),
    f"{PEFT}tiny-opt-lora-revision": replace(ON_OPT, revisions=("main", "test")),
    f"{PEFT}test-lora-subfolder": replace(ON_OPT, subfolder="test"),
    f"{PEFT}tiny_OPTForFeatureExtraction-lora": Adapter(
        ON_OPT.base, "AutoModel", {"task_type": "FEATURE_EXTRACTION"}
    ),
    f"{PEFT}tiny_OPTForSequenceClassification-lora": Adapter(
        ON_OPT.base, "AutoModelForSequenceClassification", {"task_type": "SEQ_CLS"}
    ),
    f"{PEFT}tiny_OPTForQuestionAnswering-lora": Adapter(
        ON_OPT.base, "AutoModelForQuestionAnswering", {"task_type": "QUESTION_ANS"}
    ),
    f"{PEFT}tiny_GPT2ForTokenClassification-lora": Adapter(
        f"{TINY}BertForSequenceClassification",
        "AutoModelForTokenClassification",
        {"task_type": "TOKEN_CLS"},
    ),
    f"{PEFT}tiny_T5ForSeq2SeqLM-lora": Adapter(
        f"{TINY}T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", {"task_type": "SEQ_2_SEQ_LM"}
    ),
    f"{PEFT}tiny_WhisperForConditionalGeneration-lora": Adapter(
        "openai/whisper-tiny", "AutoModelForSpeechSeq2Seq"
    ),
    f"{TINY}BertModel-lora": Adapter(
        "hf-internal-testing/tiny-random-BertModel", "AutoModelForCausalLM", revisions=("main", "v1.2.3")
    ),
}
TARGETS = ["q_proj", "v_proj", "query", "value", "q", "v"]
"""Of the adapters: projections of attention that are linear layers in every base above."""


def make_hub(home: Path) -> None:
    """Fill `home`/hub, as HF_HOME would have it; what is there already stays."""
    stamp = home / "version"
    if stamp.exists() and stamp.read_text() == VERSION:
        return
    shutil.rmtree(home, ignore_errors=True)
    for name, base in BASES.items():
        for number, revision in enumerate(base.revisions):
            _save_base(base, _snapshot(home, name, revision), seed=number)
    for name, adapter in ADAPTERS.items():
        for revision in adapter.revisions:
            _save_adapter(adapter, home, _snapshot(home, name, revision))
    stamp.write_text(VERSION)


def _snapshot(home: Path, name: str, revision: str) -> Path:
    """The folder of a revision, which its name refers to; each has a commit of its own."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    number = len(list((repository / "snapshots").glob("*"))) if repository.exists() else 0
    commit = f"{number:040d}"
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def _save_base(base: Base, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = getattr(transformers, base.config)(**base.sizes)
    getattr(transformers, base.model)(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _save_adapter(adapter: Adapter, home: Path, folder: Path) -> None:
    torch.manual_seed(0)
    snapshots = home / "hub" / f"models--{adapter.base.replace('/', '--')}" / "snapshots"
    model = getattr(transformers, adapter.auto).from_pretrained(next(iter(sorted(snapshots.iterdir()))))
    tokenizer = _tokenizer()
    if adapter.extra_tokens:
        tokenizer.add_tokens([f"<extra{i}>" for i in range(adapter.extra_tokens)])
        tokenizer.save_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
    fields = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **adapter.fields}
    model = get_peft_model(model, MixLoraConfig(**fields))
    model.peft_config["default"].base_model_name_or_path = adapter.base
    model.save_pretrained(str(folder / adapter.subfolder))


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One id for each byte, behind four special ones."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


if __name__ == "__main__":
    make_hub(Path(os.environ["HF_HOME"]))
