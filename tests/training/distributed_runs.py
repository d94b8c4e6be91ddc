"""What the two processes of test_distributed.py run, one training after the other."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixlora_cli.config import TrainConfig
from mixlora_cli.method import layer
from mixlora_cli.training.train import train


def run_all(configs: list[TrainConfig]) -> dict[str, dict[str, Any]]:
    """Train each to its end, then once more from its second step on; by name of the run folder, what was seen.

    `fused`: how often a MixLoRA layer read its base weight without calling the base layer.
    """
    fused = 0
    adapted_linear = layer.adapted_linear

    def count(*arguments: Any) -> Any:
        nonlocal fused
        fused += 1
        return adapted_linear(*arguments)

    layer.adapted_linear = count
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
            "processes": dist.get_world_size(),
            "rank": int(os.environ["RANK"]),
        }
    return seen
