"""Random stand-ins for the parts of LLaVA-v1, in the file layouts of the published ones, a thousand times smaller."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 320
IMAGE_SIZE, PATCH_SIZE = 16, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
WIDTH, VISION_WIDTH = 32, 24
SPREAD = 0.2  # with the usual 0.02 so small a model hardly reacts to its input

_TEXT = """A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions.
USER: What is in the picture? ASSISTANT: a red circle, a blue square and the number 7
Which colour is it? Look well. Say white. red green blue yellow black white"""

_LLAMA = {
    "hidden_size": WIDTH,
    "initializer_range": SPREAD,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
_AS_PUBLISHED = {
    "_name_or_path": "vicuna-7b-v1.3",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "model_type": "llama",
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
}
_LLAMA_PIECES = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "hard_vocab_limit": False,
    "num_threads": 1,
    "minloglevel": 2,
}


@dataclass(frozen=True)
class Parts:
    """Folders of the three parts, and what is in them."""

    language_model: Path
    vision_tower: Path
    projector: Path
    llama: LlamaForCausalLM
    clip: CLIPModel
    weight: Tensor
    bias: Tensor

    @property
    def options(self) -> dict[str, str]:
        """As keys of `prepare`."""
        return {key: str(getattr(self, key)) for key in ("language_model", "vision_tower", "projector")}


def make_parts(root: Path) -> Parts:
    """Write all three below `root`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        llama = make_vicuna(root / "vicuna")
        clip = make_clip(root / "clip")
        weight, bias = torch.randn(WIDTH, VISION_WIDTH) * SPREAD, torch.randn(WIDTH) * SPREAD
    (root / "projector").mkdir()
    file = root / "projector" / "mm_projector.bin"
    torch.save({"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}, file)
    return Parts(root / "vicuna", root / "clip", root / "projector", llama, clip, weight, bias)


def make_vicuna(folder: Path) -> LlamaForCausalLM:
    """Two pickled shards with an index, rotary frequencies as old checkpoints have them, and `tokenizer.model`."""
    folder.mkdir(parents=True)
    model = LlamaForCausalLM(LlamaConfig(**_LLAMA)).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = list(weights)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, chosen in shards.items():
        torch.save({name: weights[name] for name in chosen}, folder / file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in weights.values())},
        "weight_map": {name: file for file, chosen in shards.items() for name in chosen},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_LLAMA | _AS_PUBLISHED))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )
    make_tokenizer(folder)
    return model


def train_sentencepiece(folder: Path, text: str, vocabulary: int, **options: object) -> None:
    """Write `tokenizer.model` with LLaMA's settings."""
    file = folder / "text.txt"
    file.write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(file),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocabulary,
        **{**_LLAMA_PIECES, **options},
    )
    for made in (file, folder / "tokenizer.vocab"):
        made.unlink()


def make_tokenizer(folder: Path) -> None:
    """A sentencepiece model, and the settings files of Vicuna's time."""
    train_sentencepiece(folder, "\n".join([_TEXT] * 4), VOCABULARY)

    def token(content: str) -> dict[str, object]:
        options = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **options}

    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("</s>"),
        "model_max_length": 2048,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": token("<unk>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def make_clip(folder: Path) -> CLIPModel:
    """A whole CLIP with both towers, as openai/clip-vit-large-patch14 ships."""
    side = {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 20}
    side["hidden_size"] = VISION_WIDTH
    text = {**side, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**side, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * SPREAD + (parameter == 1))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    positions = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "vision_model.embeddings.position_ids": torch.arange(NUM_PATCHES + 1)[None],
    }
    save_file({**load_file(file), **positions}, file, metadata={"format": "pt"})
    preprocessor = {
        "crop_size": IMAGE_SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": IMAGE_SIZE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
