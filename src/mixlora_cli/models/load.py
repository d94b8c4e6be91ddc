"""From a `ModelConfig` to a base model that is ready to be adapted: a checkpoint of transformers, `mini` or `tiny`."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar
from transformers.video_processing_utils import VideoProcessorMixin

from mixlora_cli.config import ModelConfig
from mixlora_cli.config.groups import Quantization
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.template import CHOICES, TEMPLATES, V1, Template
from mixlora_cli.data.text_files import read_text
from mixlora_cli.errors import UserError
from mixlora_cli.models.networks import register_models
from mixlora_cli.models.quantization import load_weights, require_bitsandbytes
from mixlora_cli.paths import cache_root

_HEAD_BYTES = 1 << 20
"""Of each weight file: enough for a safetensors header with every tensor's name, shape and place."""


@dataclass(frozen=True)
class LoadedModel:
    """A language or vision-language model with every parameter frozen, in eval mode, and how it is talked to."""

    model: PreTrainedModel
    chat: Chat
    name: str
    fingerprint: str
    """Hex digest that identifies weights and preprocessing, for caches and prediction files."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The chat's."""
        return self.chat.tokenizer


def build_base(model: ModelConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the base model with frozen weights of `dtype`, in eval mode.

    Raises:
        UserError: weights or packages are missing, a model is not prepared, the checkpoint is of another kind, or there
            is no chat template.
    """
    # Bars of loading parts say nothing to a person, and PEFT's use of an old name is not the user's to mend.
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    if model.source == "mini":
        from mixlora_cli.models.mini import mini_base

        return _told_apart(mini_base(dtype, model.quantization), model.quantization)
    if model.source == "tiny":
        from mixlora_cli.models.tiny import build_tiny

        return build_tiny(model.chat_template or V1.name, dtype)
    require_prepared(model)
    loaded = _load_checkpoint(model, checkpoint_source(model), dtype)
    if model.source == "smollm":
        from mixlora_cli.models.mini import text_digest

        loaded = replace(loaded, name=model.name, fingerprint=text_digest())
    return _told_apart(loaded, model.quantization)


def _told_apart(loaded: LoadedModel, quantization: Quantization) -> LoadedModel:
    """With a fingerprint of its own where the weights are quantised."""
    if quantization == "none":
        return loaded
    digest = hashlib.sha256(f"{loaded.fingerprint} {quantization}".encode()).hexdigest()
    return replace(loaded, fingerprint=digest)


def checkpoint_source(model: ModelConfig) -> str:
    """The hub id or folder that a model's checkpoint is loaded from; that of `smollm` is written on first use."""
    if model.source == "smollm":
        from mixlora_cli.models.mini import text_folder

        return str(text_folder())
    return str(prepared_folder(model)) if model.source == "prepared" else str(model.name_or_path)


def prepared_folder(model: ModelConfig) -> Path:
    """`model.name_or_path` where it is given, else `models/<name>` under the cache: `models/llava-v1-7b`."""
    if model.name_or_path is not None:
        return Path(model.name_or_path).expanduser()
    return cache_root() / "models" / model.name.replace("_", "-")


def require_prepared(model: ModelConfig) -> None:
    """Do nothing for a model that needs no preparation, or whose preparation is complete.

    Raises:
        UserError: it has not been prepared, or the package that quantises is missing; names the command that does it.
    """
    require_bitsandbytes(model.quantization)
    if model.source != "prepared":
        return
    folder = prepared_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={model.name} is not in {folder}: assemble it once with `mixlora prepare model={model.name}`; "
            "if it is somewhere else, give model.name_or_path=<that folder> (or set MIXLORA_CACHE)"
        )


def _load_checkpoint(model: ModelConfig, source: str, dtype: torch.dtype) -> LoadedModel:
    """A checkpoint of transformers with its own processor."""
    revision = model.revision or "main"
    config = read_config(source, revision)
    auto = auto_class(config, source)
    chat = _read_chat(model, source, config)  # what it can refuse, before the weights
    try:
        network = load_weights(
            auto,
            source,
            config,
            model.quantization,
            dtype,
            revision=revision,
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_unreadable(source, error)) from error
    # The image processors of PIL and torchvision give slightly different pixels.
    by = type(getattr(chat.processor, "image_processor", None)).__name__
    options = json.dumps(model.picture_options, sort_keys=True) if model.picture_options else ""
    fingerprint = checkpoint_fingerprint(network.config, source, by + options)
    return LoadedModel(network.requires_grad_(False).eval(), chat, source, fingerprint)


def read_config(source: str, revision: str = "main") -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UserError: it cannot be read, or transformers does not know the kind of model.
    """
    register_models()  # a saved copy of the small model is a checkpoint like any other
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(_unreadable(source, error)) from error
    return config


def auto_class(config: PreTrainedConfig, source: str) -> type[Any]:
    """The class of transformers that builds a model of pictures and text, or of text alone.

    Raises:
        UserError: the checkpoint holds something else: an encoder, a model of sound, a classifier.
    """
    known = [
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    ]
    held = config.architectures or []
    for mapping, auto in known:
        if type(config) in mapping and not config.is_encoder_decoder:
            builds: Any = mapping[type(config)]
            classes = builds if isinstance(builds, tuple) else (builds,)
            if not held or {each.__name__ for each in classes} & set(held):
                return auto
    what = f"{', '.join(held)} (model_type {config.model_type})" if held else f"a {config.model_type} model"
    raise UserError(
        f"model.name_or_path={source} holds {what}; expected a vision-language model (AutoModelForImageTextToText) or "
        "a language model that writes its answer (AutoModelForCausalLM), such as Qwen/Qwen2.5-VL-3B-Instruct or "
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def build_chat(model: ModelConfig) -> Chat:
    """Tokenizer, processor and chat template alone, without the weights; only the built-in models are built whole.

    Raises:
        UserError: they cannot be read, there is no chat template, or the checkpoint holds a model of another kind.
    """
    if model.source in ("mini", "tiny"):
        return build_base(model).chat
    require_prepared(model)
    source = checkpoint_source(model)
    return _read_chat(model, source, read_config(source, model.revision or "main"))


def _read_chat(model: ModelConfig, source: str, config: PreTrainedConfig) -> Chat:
    revision = model.revision or "main"
    try:
        if auto_class(config, source) is AutoModelForImageTextToText:
            found = _load_processor(source, revision, config)
        else:
            found = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(_unreadable(source, error)) from error
    processor = found if isinstance(found, ProcessorMixin) else None
    tokenizer: PreTrainedTokenizerBase = found if processor is None else processor.tokenizer
    own = getattr(processor, "chat_template", None) or tokenizer.chat_template
    chat = Chat(tokenizer, choose_template(model, own), processor, model.picture_options or {})
    try:
        _ = model.picture_options and chat.probe
    except BadRecord as bad:
        raise UserError(f"model.picture_options={model.picture_options}: {bad.detail}") from bad
    return chat


class NoFilms(VideoProcessorMixin):
    """In the place of a processor's part for films, which needs torchvision; keeps that part's settings for saving."""

    num_frames = fps = None  # some processors read both

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return dict(self.settings)


def _load_processor(source: str, revision: str, config: PreTrainedConfig) -> Any:
    """`AutoProcessor`'s; where torchvision is missing and the processor also takes films, one for pictures alone."""
    values, _ = ProcessorMixin.get_processor_dict(source, revision=revision)
    named = getattr(transformers, str(values.get("processor_class")), None)
    kind: Any = named or PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(source, revision=revision)

    def check(self: Any, name: str, part: Any) -> Any:
        """Transformers looks for the part's class among those that it can import."""
        return (
            type(part)
            if name == "video_processor"
            else kind.check_argument_for_proper_class(self, name, part)
        )

    films, _ = VideoProcessorMixin.get_video_processor_dict(source, revision=revision)
    loaders: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    parts = [
        NoFilms(**films)
        if name == "video_processor"
        else loaders[name].from_pretrained(source, revision=revision)
        for name in kind.get_attributes()
    ]
    for_pictures: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    return for_pictures.from_args_and_dict(parts, values)


def choose_template(model: ModelConfig, own: str | dict[str, str] | None) -> Template:
    """The template that `model.chat_template` names; null is the model's own.

    Raises:
        UserError: a file cannot be read, or the model has no template of its own.
    """
    name, options = model.chat_template, model.template_options or {}
    if name is None:
        source = own.get("default") if isinstance(own, dict) else own
        if source is None:
            raise UserError(
                f"model.name_or_path={model.name_or_path} has no chat template of its own: give "
                f"{CHOICES}, the one that it was trained with"
            )
        return Template("of the model", source, options)
    if name in TEMPLATES:
        return replace(TEMPLATES[name], options=options)
    return Template(name, read_text(Path(name).expanduser(), "a chat template in Jinja"), options)


def checkpoint_fingerprint(config: PreTrainedConfig, source: str, *others: str) -> str:
    """Of a hub checkpoint its commit; of a local folder all settings and the heads of its weight files.

    `others` is what else its results depend on.
    """
    digest = hashlib.sha256("\n".join([config.to_json_string(), *others]).encode())
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    folder = Path(source)
    if folder.is_dir():
        for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in a line; of torch's lists of mismatches the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def _unreadable(source: str, error: Exception) -> str:
    if isinstance(error, ImportError):  # its first sentence names the package
        missing = " ".join(str(error).split()).partition(". ")[0]
        return f"model.name_or_path={source} cannot be loaded: {missing}; install it with pip"
    return (
        f"model.name_or_path={source} cannot be loaded: {first_line(error)} Give a Hugging Face id that this machine "
        "can reach, or a local folder with config.json, weights and processor files"
    )
