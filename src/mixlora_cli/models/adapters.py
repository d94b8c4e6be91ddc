"""Attach what is trained to a frozen base, save it, and find it again.

LoRA and MixLoRA are PEFT methods and live in `adapter_config.json` + `adapter_model.safetensors`. Weights of the base
itself (`adapter=full`, a trained projector without adapter) live in `trained_weights.safetensors`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.targets import decoder_linears, output_layer
from mixlora_cli.models.load import first_line
from mixlora_cli.models.quantization import count_numbers
from mixlora_cli.store import is_lfs_pointer, readable_as_usual

TRAINED_WEIGHTS = "trained_weights.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    routing: RoutingConfig,
    rank: int,
    factors: int,
    train_also: Sequence[str] = (),
    task_embedding_dim: int | None = None,
    picture_tokens: Sequence[int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Make exactly the wanted parameters trainable; everything else is frozen.

    Args:
        model: the base, changed in place.
        rank: r, factors selected for an instance (MixLoRA) or rank of the update (LoRA).
        factors: E, factors in each pool; MixLoRA only.
        train_also: also train these modules outside of the decoder, by name or regular expression, such as a projector.
        task_embedding_dim: width of the definitions' embeddings (routing=task); None = the model's hidden size.
        picture_tokens: ids of tokens that stand for pictures (routing.pool=text); None = those of the model's config.

    Returns:
        A `PeftModel` for `lora` and `mixlora`, the model itself for `full` and `none`. Trainable parameters are in
        fp32 whatever the base's type is: an update of 1e-5 is lost in a bf16 weight.

    Raises:
        UserError: `adapter.target_modules` names no layer of the model, or `train_also` no module beside its decoder.
    """
    model.requires_grad_(False)
    also = modules_named(model, train_also)
    adapted: PreTrainedModel | PeftModel = model
    if adapter.name in ("lora", "mixlora"):
        ids = None if picture_tokens is None else list(picture_tokens)
        settings = _peft_config(adapter, routing, rank, factors, also, task_embedding_dim, ids)
        settings.target_modules = adapter.target_modules or decoder_linears(model)  # type: ignore[attr-defined]
        try:
            with _without_warning_of_old_name():
                adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(
                f"adapter.target_modules={adapter.target_modules}: {first_line(error)}"
            ) from error
    else:
        if adapter.name == "full":
            model.get_decoder().requires_grad_(True)
        for name in also:
            model.get_submodule(name).requires_grad_(True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def _without_warning_of_old_name() -> Iterator[None]:
    """PEFT asks transformers for gradient checkpointing under an old name, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _peft_config(
    adapter: AdapterConfig,
    routing: RoutingConfig,
    rank: int,
    factors: int,
    train_also: list[str],
    task_embedding_dim: int | None,
    picture_tokens: list[int] | None,
) -> PeftConfig:
    shared: dict[str, Any] = {
        "r": rank,
        "modules_to_save": train_also or None,
    }
    if adapter.name == "lora":
        alpha = 2 * rank if adapter.alpha is None else adapter.alpha
        return LoraConfig(lora_alpha=alpha, lora_dropout=adapter.dropout, **shared)  # type: ignore[arg-type]
    encoder = routing.encoder
    if encoder is not None and Path(encoder).is_dir():
        encoder = str(Path(encoder).resolve())  # the adapter finds it whatever the working directory
    return MixLoraConfig(
        factors=factors,
        alpha=2 * factors if adapter.alpha is None else adapter.alpha,
        dropout=adapter.dropout,
        cfs=adapter.cfs,
        router_grad=adapter.router_grad,
        pairing=adapter.pairing,
        routing=routing.name,
        pool=routing.pool,
        picture_tokens=picture_tokens if routing.pool == "text" else None,
        normalize=routing.normalize,
        router_init=routing.router_init,
        per=routing.per,
        decode=routing.decode,
        task_embedding_dim=task_embedding_dim,
        task_encoder=encoder,
        **shared,
    )


def outside_of_decoder(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The largest modules of a model that hold no part of its decoder: towers, projectors, the output layer."""
    decoder = model.get_decoder()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if child is decoder:
                continue
            if any(each is decoder for each in child.modules()):
                yield from walk(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", child

    return dict(walk(model, ""))


def frozen_towers(model: PreTrainedModel) -> list[nn.Module]:
    """What lies outside of the decoder and is not trained, the output layer aside."""
    return [
        module
        for module in outside_of_decoder(model).values()
        if module is not output_layer(model) and not any(p.requires_grad for p in module.parameters())
    ]


def modules_named(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Full names of the modules outside of the decoder whose name, or its end, a pattern matches.

    Raises:
        UserError: a pattern matches none.
    """
    names = [
        f"{outer}.{inner}".rstrip(".")
        for outer, module in outside_of_decoder(model).items()
        for inner, _ in module.named_modules()
    ]
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)]
        if not matching:
            raise UserError(
                f"model.train_also={pattern}: no such module outside of the language model; it has "
                f"{', '.join(outside_of_decoder(model))}"
            )
        # What lies in a module that is named is trained with it.
        found += [name for name in matching if not any(name.startswith(f"{each}.") for each in matching)]
    return list(dict.fromkeys(found))


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; a shared one counts once, and one of which little is left here is whole."""
    sizes = [(count_numbers(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def save_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write what was trained, and nothing of the frozen base, into `folder`.

    Args:
        state_dict: the model's gathered weights where they are sharded over processes (ZeRO-3); else read from `model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # "auto" would ask the model hub whether the vocabulary grew; embeddings are never trained here.
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        readable_as_usual(folder / ADAPTER_WEIGHTS)
        return
    weights = model.state_dict() if state_dict is None else state_dict
    trained = {
        name: weights[name].detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_file(trained, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})
    readable_as_usual(folder / TRAINED_WEIGHTS)


_KEPT_TOWER = ".vision_tower.tower."
"""In the names of a tower's weights where its features are kept (`FeatureTower`)."""
_FOR_PIXELS = "give eval.cache_features=false where the tower was trained"


def load_adapter(
    model: PreTrainedModel, folder: Path, config: PeftConfig | None = None
) -> PreTrainedModel | PeftModel:
    """Load what `save_adapter` wrote onto a fresh base, for inference: nothing requires a gradient.

    Args:
        config: stands in for the one in `folder`, where an adapter is to be used otherwise than it was trained.

    Raises:
        UserError: the folder holds no adapter, a damaged one, or one that was trained on another model.
    """
    if not (folder / "adapter_config.json").is_file():
        load_trained_weights(model, folder)
        model.requires_grad_(False).eval()
        return model
    weights = folder / ADAPTER_WEIGHTS
    # PEFT reads pickled weights where they are alone.
    if weights.is_file() or not (folder / _PICKLED_WEIGHTS).is_file():
        _require_weights(weights)
    does_not_fit = f"{folder}: this adapter does not fit the model"
    try:
        settings = PeftConfig.from_pretrained(str(folder)) if config is None else config
        settings.inference_mode = True
        with _without_warning_of_old_name():
            adapted = PeftModel(model, settings)
        found = adapted.load_adapter(str(folder), "default", is_trainable=False)
    except KeyError as error:
        way_out = f"; {_FOR_PIXELS}" if _KEPT_TOWER in str(error.args[0]) else ""
        raise UserError(f"{does_not_fit}: it lacks {error.args[0]}{way_out}") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{does_not_fit}: {first_line(error)}") from error
    # PEFT goes on with a warning, or with nothing: such layers would be untrained ones, or be left out.
    for keys, what in (
        (found.missing_keys, "it has no weights for"),
        (found.unexpected_keys, "the model has no layer for"),
    ):
        if keys:
            layer = re.split(r"\.(?:lora_|mixlora_|modules_to_save)", keys[0])[0]
            way_out = _FOR_PIXELS if _KEPT_TOWER in layer else "give the base that it was trained on"
            raise UserError(
                f"{does_not_fit}: {what} {layer.removeprefix('base_model.model.')} "
                f"({len(keys)} weights in all); {way_out}"
            )
    return adapted.eval()


def _require_weights(path: Path) -> None:
    """Do nothing where a file holds weights.

    Raises:
        UserError: it is missing, only a pointer to it, damaged, or holds names without numbers.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent}: {path.name} is missing: the adapter was not saved to its end, or not copied "
            "whole; copy the folder again, or give another run"
        )
    if is_lfs_pointer(path):
        raise UserError(f"{path}: only a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            empty = [name for name in names if 0 in file.get_slice(name).get_shape()]
    except SafetensorError as error:
        raise UserError(
            f"{path}: the adapter's file is damaged: {first_line(error)}; copy or download it again"
        ) from error
    if empty:
        raise UserError(
            f"{path}: {len(empty)} of {len(names)} weights have size 0, the first is {empty[0]}: "
            "ZeRO-3 had spread them over the processes, and they were saved without being gathered; "
            "save them gathered, as `mixlora train` does"
        )


def unload_adapter(model: PeftModel) -> None:
    """Take an adapter that `load_adapter` put on off again: the base is what it was, its own projector included.

    PEFT's `unload` alone would leave modules that were trained whole in the place of the base's, and fails on those
    that, like a projector, have no `weight` of their own (seen in 0.21.2).
    """
    base = model.get_base_model()
    trained_whole = [(name, m) for name, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, module in trained_whole:
        base.set_submodule(name, module.original_module)
    model.unload()


def load_trained_weights(model: nn.Module, folder: Path) -> None:
    """Copy `trained_weights.safetensors` into a bare model, keeping the model's own floating-point type.

    Raises:
        UserError: the file is missing or damaged, or its names or shapes are not the model's.
    """
    path = folder / TRAINED_WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{folder}: no adapter here; expected adapter_config.json (lora, mixlora) or {TRAINED_WEIGHTS} (full). "
            "Give the run folder that `mixlora train` printed."
        )
    _require_weights(path)
    own = dict(model.named_parameters())
    weights = load_file(path)
    alien = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    if alien:
        raise UserError(
            f"{path}: trained on another model: {len(alien)} weights do not fit, the first is {alien[0]}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
