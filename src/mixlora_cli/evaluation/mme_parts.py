"""Numbers of MME's subtasks and of sums of them, with their intervals."""

from __future__ import annotations

import numpy as np

from mixlora_cli.evaluation.statistics import RESAMPLES, Floats, Interval, percentile, wilson

MME_MOST = 200.0
"""Points that one subtask can give."""


class ResampledSum:
    """Sum of subtasks' bootstrap samples; a subtask without samples may have scored anything."""

    def __init__(self) -> None:
        self._known = np.zeros(RESAMPLES)
        self._unknown = 0

    def add(self, samples: Floats | None) -> None:
        """One more subtask's (RESAMPLES,)."""
        if samples is None:
            self._unknown += 1
        else:
            self._known += samples

    def interval(self) -> Interval:
        """Of the sum."""
        known = percentile(self._known)
        return Interval(known.low, known.high + MME_MOST * self._unknown)


def mme_part(images: Floats, samples: Floats | None) -> dict[str, float]:
    """Numbers of one subtask, from its images' (images, 2) and the bootstrap samples of its score (RESAMPLES,).

    Images that are all alike have no spread to resample, which is no certainty: as many of them as Wilson's interval
    leaves open may be of any other kind.
    """
    accuracy, plus = (float(mean) for mean in 100 * images.mean(axis=0))
    score, count = accuracy + plus, len(images)
    if samples is None:
        interval = Interval(0.0, MME_MOST)
    elif (images == images[0]).all():
        alike = wilson(count, count).low
        interval = Interval(score * alike, score + (MME_MOST - score) * (1 - alike))
    else:
        interval = percentile(samples)
    return {
        "score": score,
        "low": interval.low,
        "high": interval.high,
        "accuracy": accuracy,
        "accuracy_plus": plus,
        "images": float(count),
    }
