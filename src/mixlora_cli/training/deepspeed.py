"""What DeepSpeed needs around the Trainer: a start that compiles nothing, a whole base, gathered weights to save."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from mixlora_cli.config import TrainConfig
from mixlora_cli.errors import UserError


def start_deepspeed(config: TrainConfig) -> dict[str, Any] | None:
    """Join the processes under DeepSpeed, before the Trainer's arguments do it otherwise.

    Returns:
        The settings for the Trainer, fit for this machine; None without DeepSpeed.

    Raises:
        UserError: DeepSpeed is not installed, nobody started the process for it, or the settings exclude one another.
    """
    settings = config.deepspeed.config
    if settings is None:
        return None
    _refuse_what_cannot_be(config, settings)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"deepspeed={config.deepspeed.name} needs the package deepspeed: pip install 'mixlora-cli[deepspeed]'"
        ) from error
    if "RANK" not in os.environ:
        raise UserError(
            f"deepspeed={config.deepspeed.name}: start it with `mixlora train`, torchrun or deepspeed; "
            "this process belongs to no group"
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed's use of old names is not the user's to mend.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    if torch.cuda.is_available():
        return dict(settings)
    # Its shared-memory kernels would be compiled for a minute or more, or fail without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    fit: dict[str, Any] = _without_pinned_memory(settings)
    return fit


def _refuse_what_cannot_be(config: TrainConfig, settings: dict[str, Any]) -> None:
    if _stage(settings) == 3 and config.train.cache_features:
        raise UserError(
            f"deepspeed={config.deepspeed.name} spreads the vision tower over the processes, which then cannot compute "
            "features one by one: set train.cache_features=false"
        )


def _stage(settings: dict[str, Any]) -> int:
    zero: Any = settings.get("zero_optimization") or {}
    return int(zero.get("stage", 0))


def _without_pinned_memory(value: Any) -> Any:
    """A machine without GPU has no memory to pin for it."""
    if isinstance(value, dict):
        return {
            key: False if key == "pin_memory" else _without_pinned_memory(child)
            for key, child in value.items()
        }
    return value


@contextmanager
def loads_whole_weights() -> Iterator[None]:
    """Inside, transformers builds models whole on every process also under ZeRO-3, which spreads them later.

    Spread from the start, neither the adapter nor a trained projector could be made from the base's weights.
    """
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole fp32 copies of the adapter's and all trained weights; every process has to ask, the first one gets them.

    DeepSpeed trains copies of the weights in fp32, of which the model's own are roundings (bf16) or parts (ZeRO-3).
    Its own gathering leaves out what is not trained: frozen routers, without which an adapter is another one.
    """
    import deepspeed

    keep = torch.distributed.get_rank() == 0
    prefix: str | None = model.base_model.prefix if isinstance(model, PeftModel) else None  # type: ignore[assignment]
    gathered = {}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or (prefix is not None and prefix in name)):
            continue
        full = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is not None:
            weight = full
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                weight = parameter.detach().clone() if keep else parameter
        if keep:
            gathered[name] = weight.detach().float().cpu().reshape(_shape(parameter)).clone()
    return gathered


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, of which ZeRO-3 leaves nothing in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
