"""The commands that run in several processes, as the command line calls them; nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from mixlora_cli.config import EvalConfig, InterferenceConfig, TrainConfig
from mixlora_cli.launch.workers import run_workers


def train(config: TrainConfig) -> Any:
    """`mixlora train`, in the processes that `launch` asks for. DeepSpeed never shares a process with another job."""
    uses_deepspeed = config.deepspeed.config is not None
    return run_workers("mixlora_cli.training.run:train", config, config.launch, own_process=uses_deepspeed)


def evaluate(config: EvalConfig) -> Any:
    """`mixlora eval`, in the processes that `launch` asks for; each answers its share of the instances."""
    return run_workers("mixlora_cli.evaluation.run:evaluate", config, config.launch)


def interference(config: InterferenceConfig) -> Any:
    """`mixlora interference`; the processes share the tasks. Figures alone need no second process."""
    if config.draw_only:
        from mixlora_cli.analysis.interference.run import interference as run_here

        return run_here(config)
    return run_workers("mixlora_cli.analysis.interference.run:interference", config, config.launch)
