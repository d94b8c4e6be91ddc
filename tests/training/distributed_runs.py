"""What the two processes of test_distributed.py run, one training after the other."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mixlora_cli.config import TrainConfig
from mixlora_cli.method import layer
from mixlora_cli.training.train import train
from mixlora_cli.training.trainer import AdapterTrainer


def run_all(configs: list[TrainConfig]) -> dict[str, dict[str, Any]]:
    """Train each to its end, then once more from its second step on; by name of the run folder, what was seen.

    `fused`: how often a MixLoRA layer read its base weight without calling the base layer; `held`: the share of the
    model's numbers that this process held at its end (under ZeRO-3 it holds none in this sense).
    """
    fused = 0
    adapted_linear = layer.adapted_linear

    def count(*arguments: Any) -> Any:
        nonlocal fused
        fused += 1
        return adapted_linear(*arguments)

    layer.adapted_linear = count
    save_model = AdapterTrainer.save_model
    held = 1.0

    def weigh(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        nonlocal held
        assert self.model is not None
        parameters = [*self.model.parameters()]
        here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        held = here / max(sum(p.numel() for p in parameters), 1)
        save_model(self, *arguments, **more)

    AdapterTrainer.save_model = weigh  # type: ignore[method-assign]
    seen = {}
    for config in configs:
        fused = 0
        train(config)
        again = replace(
            config,
            output_dir=config.output_dir + "-resumed",
            resume=str(Path(config.output_dir) / "checkpoints" / "checkpoint-2"),
        )
        train(again)
        seen[Path(config.output_dir).name] = {
            "fused": fused,
            "held": held,
            "processes": dist.get_world_size(),
            "rank": int(os.environ["RANK"]),
        }
    return seen
