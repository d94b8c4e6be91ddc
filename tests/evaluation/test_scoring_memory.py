"""What scoring holds in memory hardly grows with the number of answers: counts, not predictions."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from mixlora_cli.analysis.bench.whole import write_predictions
from mixlora_cli.evaluation.folder import open_evaluation
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.judging.identity import Identity
from mixlora_cli.judging.replies import open_replies

FEW, MANY = 5_008, 20_000  # whole pairs of MME's
MOST_BYTES = 40
"""For each further answer: MME's marks of each image, a hash of each judge's reply. A prediction takes 500 or more."""
JUDGE = Identity("hf", "org/judge", "abc")


def judge_all(folder: Path) -> None:
    """Long replies, which nobody needs once they are read."""
    rng = random.Random(0)
    with open_replies(folder, JUDGE)[0] as writer:
        _, reader = open_evaluation(folder)
        writer.append(
            {JUDGE.key(p): f"{rng.choice(('Yes', 'No'))}, because of {p.id}. " * 20 for p in reader}
        )


def peak(folder: Path) -> int:
    """Bytes at most while an evaluation is scored."""
    tracemalloc.start()
    score(folder)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("judged", [False, True])
def test_memory_does_not_grow_with_the_answers(tmp_path: Path, judged: bool) -> None:
    folders = {count: tmp_path / str(count) for count in (FEW, MANY)}
    for count, folder in folders.items():
        write_predictions(folder, count, seed=0)
        if judged:
            judge_all(folder)
    score(folders[FEW])  # imports and caches
    few, many = (peak(folder) for folder in folders.values())
    assert (many - few) / (MANY - FEW) < MOST_BYTES
    assert many < 3_000_000
