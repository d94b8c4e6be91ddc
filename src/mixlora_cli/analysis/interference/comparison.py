"""Two adapters on the same batches: how much of the negative interference of one the other has not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.analysis.interference.files import NUMBER_FORMAT, RESULT, Stored, read_stored
from mixlora_cli.analysis.interference.passes import Floats
from mixlora_cli.analysis.interference.scores import Scores, negative_interference
from mixlora_cli.analysis.interference.summary import number
from mixlora_cli.errors import UserError

_SEED = 4_210


def open_other(path: str) -> Stored:
    """The measurement of another run, given as its run folder or as the interference folder itself.

    Raises:
        UserError: there is none.
    """
    root = Path(path).expanduser()
    for folder in (root, root / "interference"):
        stored = read_stored(folder)
        if stored is not None:
            return stored
    raise UserError(
        f"compare={path}: no {RESULT} there; measure that run first with `mixlora interference run={path}` and the "
        "same tasks and settings"
    )


def check_comparable(path: str, other: Stored, samples: Mapping[str, str], number_format: str) -> None:
    """Raise UserError unless the other adapter was measured on the same batches and in the same number format.

    `samples`: digest by task.
    """
    if other.about[NUMBER_FORMAT] != number_format:
        raise UserError(
            f"compare={path} was measured in {other.about[NUMBER_FORMAT]}, this one in {number_format}; measure both "
            "with the same interference.precision"
        )
    theirs = other.samples
    if list(theirs) != list(samples):
        raise UserError(
            f"compare={path} was measured on other tasks ({', '.join(theirs)}); expected the same ones in the same "
            f"order: {', '.join(samples)}"
        )
    changed = [task for task in samples if samples[task] != theirs[task]]
    if changed:
        raise UserError(
            f"compare={path} was measured on other instances of {', '.join(changed)}; measure both with the same data, "
            "seed, interference.split, interference.batches and interference.batch_size"
        )


def compare_scores(
    ours: Mapping[str, Mapping[str, Scores]], theirs: Mapping[str, Mapping[str, Scores]]
) -> dict[str, dict[str, Any]]:
    """For A and B and each variant: negative interference of both, and what of it has gone.

    Args:
        ours: of `summary.averages`, of the adapter that is measured.
        theirs: the same of the adapter that it is compared with.
    """
    return {
        matrix: {variant: _removed(scores, theirs[matrix][variant]) for variant, scores in by.items()}
        for matrix, by in ours.items()
        if matrix in theirs
    }


def _removed(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """`removed` is 1 - ours / theirs; below 0 where there is more than before, null where there was none.

    Two intervals: over batches (these pairs of tasks, other instances), and over batches and pairs of tasks together
    (other tasks too). Both adapters get the same draws.
    """
    before, after = negative_interference(theirs.value), negative_interference(ours.value)
    found: dict[str, Any] = {
        "before": number(before),
        "after": number(after),
        "difference": number(before - after),
        "removed": number(_share(before, after)),
    }
    if ours.samples is None or theirs.samples is None:
        return found
    pairs = _draw_pairs(ours.samples.shape)
    for name, (b, a) in {
        "batches": (negative_interference(theirs.samples), negative_interference(ours.samples)),
        "batches_and_pairs": (_of_pairs(theirs.samples, pairs), _of_pairs(ours.samples, pairs)),
    }.items():
        found[f"difference_over_{name}"] = _interval(b - a)
        found[f"removed_over_{name}"] = _interval(_share(b, a))
    return found


def _share(before: Floats, after: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Floats = np.where(before > 0, 1 - after / before, np.nan)
    return share


def _interval(samples: Floats) -> list[float] | None:
    defined = samples[np.isfinite(samples)]
    if len(defined) == 0:
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return [float(low), float(high)]


def _draw_pairs(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(R, T (T - 1)) draws of pairs i != j."""
    num_pairs = shape[1] * (shape[1] - 1)
    return np.random.default_rng(_SEED).integers(num_pairs, size=(shape[0], num_pairs))


def _of_pairs(samples: Floats, pairs: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
    apart = samples[:, ~np.eye(samples.shape[-1], dtype=bool)]
    mean: Floats = np.nanmean(np.clip(-np.take_along_axis(apart, pairs, axis=1), 0, None), axis=1)
    return mean
