"""What the two processes of test_finite.py run: numbers that break in the second one alone, at its second batch."""

from __future__ import annotations

import math
import os
from typing import Any

from mixlora_cli.config import TrainConfig
from mixlora_cli.training import trainer
from mixlora_cli.training.train import train

RANK = 1
BATCH = 2


def broken_loss(config: TrainConfig) -> Any:
    """Train; one loss is NaN."""
    return _train(config, lambda loss: loss * math.nan)


def broken_gradient(config: TrainConfig) -> Any:
    """Train; one loss is finite, and its gradient is not."""

    def break_gradient(loss: Any) -> Any:
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    return _train(config, break_gradient)


def _train(config: TrainConfig, change: Any) -> Any:
    token_loss = trainer.token_loss
    num_calls = 0

    def changed(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        loss = token_loss(*arguments)
        return change(loss) if num_calls == BATCH and int(os.environ.get("RANK", RANK)) == RANK else loss

    trainer.token_loss = changed
    try:
        return train(config)
    finally:
        trainer.token_loss = token_loss
