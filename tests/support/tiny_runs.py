"""Finished runs of the tiny model, with adapters so large that routing decides their output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.models.adapters import attach_adapter, save_adapter
from mixlora_cli.models.load import build_base
from mixlora_cli.training.run_folder import RunFolder

TINY = ModelConfig(name="tiny", source="tiny")
NUM_FACTORS, RANK = 6, 2


def finished_run(
    folder: Path,
    data: DataConfig,
    adapter: str = "mixlora",
    routing: str = "instance",
    train_also: Sequence[str] = (),
    router_spread: float = 1.0,
    model: ModelConfig = TINY,
    **fields: Any,
) -> RunFolder:
    """What `mixlora train` leaves in `folder`, without the training.

    Args:
        adapter: name of the group's option.
        router_spread: standard deviation of the routers' weights.
        model: the base.
        fields: further keys of `RoutingConfig`.
    """
    trained = AdapterConfig(name=adapter, dropout=0.1)  # type: ignore[arg-type]
    chosen = RoutingConfig(name=routing, **fields)  # type: ignore[arg-type]
    torch.manual_seed(0)
    adapted = attach_adapter(
        build_base(model).model,
        trained,
        chosen,
        RANK,
        NUM_FACTORS,
        train_also,
    )
    for name, parameter in adapted.named_parameters():
        if "mixlora_router" in name:
            parameter.data = router_spread * torch.randn(parameter.shape)
        elif parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    run = RunFolder(folder)
    save_adapter(adapted, run.adapter)
    train = OptimConfig(precision="fp32")
    config = TrainConfig(model, trained, chosen, data, train, RANK, NUM_FACTORS, str(run.root))
    OmegaConf.save(OmegaConf.create(asdict(config)), run.config)
    run.result.write_text("{}")
    return run
