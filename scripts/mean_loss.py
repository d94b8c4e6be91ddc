#!/usr/bin/env python3
"""Mean training loss per answer token over the steps FIRST to LAST of each metrics.jsonl.

Usage: scripts/mean_loss.py FIRST LAST FILE [FILE ...]
"""

import sys
from pathlib import Path

from mixlora_cli.training.curves import mean_losses
from mixlora_cli.training.run_folder import read_metrics


def mean_loss(path: Path, first: int, last: int) -> tuple[float, int]:
    """Of the rows that lie within the steps, each weighted with the steps that it is the mean of; and their number."""
    loss, steps = mean_losses(read_metrics(path), first, last)
    if not steps:
        raise SystemExit(f"{path}: no row lies within the steps {first} to {last}")
    return float(loss), int(steps)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    for name in sys.argv[3:]:
        loss, steps = mean_loss(Path(name), int(sys.argv[1]), int(sys.argv[2]))
        print(f"{loss:.3f}  {steps} steps  {name}")
