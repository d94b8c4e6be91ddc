"""The two streaming passes of Eq. 2 and 3: directions first, then what each batch loses or gains along them.

With P parameters and T tasks the passes hold T mean directions u_j of P numbers and the gradient of the present batch,
whatever the number of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixlora_cli.analysis.interference.gradients import Gradient

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Products:
    """Second pass over the n batches of one task i, with G groups and T tasks."""

    projections: Floats
    """(n, G, T): u_j . g / |g|, between -1 and 1; 0 where g is zero."""
    norms: Floats
    """(n, G): |g|."""


def mean_unit_gradient(gradients: Iterable[Gradient]) -> list[Tensor]:
    """First pass: u_j = mean over batches of g / |g| in each group, in fp32. A gradient of zero adds a zero.

    Raises:
        ValueError: there is no batch.
    """
    total: list[Tensor] = []
    count = 0
    for gradient in gradients:
        units = [_unit(vector)[0] for vector in gradient]
        if count == 0:
            total = [unit.float() for unit in units]
        else:
            for summed, unit in zip(total, units, strict=True):
                summed.add_(unit)
        count += 1
    if count == 0:
        raise ValueError("mean_unit_gradient: expected at least one batch")
    return [summed.div_(count) for summed in total]


def stack_directions(by_task: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """u_j of every task j -> for each group (T, d)."""
    return [torch.stack(list(directions)) for directions in zip(*by_task, strict=True)]


def products(gradients: Iterable[Gradient], directions: Sequence[Tensor]) -> Products:
    """Second pass: every batch's gradient against every task's direction.

    Args:
        gradients: of the batches of one task.
        directions: for each group (T, d), of `stack_directions`.
    """
    projections, norms = [], []
    for gradient in gradients:
        rows = [_project(vector, units) for vector, units in zip(gradient, directions, strict=True)]
        projections.append([row for row, _ in rows])
        norms.append([norm for _, norm in rows])
    return Products(np.array(projections, dtype=np.float64), np.array(norms, dtype=np.float64))


def _unit(vector: Tensor) -> tuple[Tensor, float]:
    """The unit vector g / |g| in double precision, and |g|; zero stays zero."""
    wide = vector.double()
    norm = float(wide.norm())
    return (wide / norm if norm > 0 else torch.zeros_like(wide)), norm


def _project(vector: Tensor, directions: Tensor) -> tuple[list[float], float]:
    unit, norm = _unit(vector)
    return (directions.double() @ unit).tolist(), norm
