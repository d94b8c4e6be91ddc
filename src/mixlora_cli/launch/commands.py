"""The commands that run in several processes, as the command line calls them; nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from mixlora_cli.config.schema import TrainConfig
from mixlora_cli.launch.workers import run_workers


def train(config: TrainConfig) -> Any:
    """`mixlora train`, in the processes that `launch` asks for. DeepSpeed never shares a process with another job."""
    uses_deepspeed = config.deepspeed.config is not None
    return run_workers("mixlora_cli.training.run:train", config, config.launch, own_process=uses_deepspeed)
