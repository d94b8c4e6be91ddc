"""Eq. 2's first line with real steps: the loss of task i before and after a step of length lambda on task j.

A step is lambda g_j / |g_j| over all A together, or all B together; its estimate is lambda g_j . g_i / |g_j|.

A step may also change which factors are selected. Gradients know nothing of that jump, so such steps are marked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixlora_cli.analysis.interference.gradients import GradientTaker
from mixlora_cli.config import MeasureConfig
from mixlora_cli.data.encode import Item
from mixlora_cli.store import write_text

FILE_NAME = "measured.jsonl"
Batches = Mapping[str, Sequence[Sequence[Item]]]


@dataclass(frozen=True)
class Step:
    """One step on a batch of task j, seen from the batch of task i with the same number."""

    matrix: str
    length: float
    """lambda."""
    task_i: str
    task_j: str
    batch: int
    before: float
    after: float
    estimated: float
    """lambda g_j . g_i / |g_j|."""
    rerouted: bool = False
    """Some instance of task i got other factors in some layer after the step."""

    @property
    def measured(self) -> float:
        """By how much the loss fell."""
        return self.before - self.after


def measure_steps(
    taker: GradientTaker,
    batches: Batches,
    lengths: Sequence[float],
    num_batches: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Take and undo every step; the weights are afterwards what they were, bit for bit.

    Memory: the gradients of one batch of each task, and a copy of the weights that are moved.

    Args:
        batches: by task.
        lengths: of the steps.
        num_batches: so many batches of each task.
        advance: called after each step.
    """
    steps: list[Step] = []
    matrices = list(dict.fromkeys(group.matrix for group in taker.factors.groups))
    for matrix in matrices:
        chosen = [k for k, group in enumerate(taker.factors.groups) if group.matrix == matrix]
        for number in range(min(num_batches, *(len(b) for b in batches.values()))):
            items = {task: b[number] for task, b in batches.items()}
            steps += _steps_of_batch(taker, matrix, chosen, number, items, lengths, advance)
    return steps


def _steps_of_batch(
    taker: GradientTaker,
    matrix: str,
    chosen: Sequence[int],
    number: int,
    items: Mapping[str, Sequence[Item]],
    lengths: Sequence[float],
    advance: Callable[[], None],
) -> list[Step]:
    gradients = {}
    for task, batch in items.items():
        whole = taker.gradient(task, number, batch)
        gradients[task] = [whole[k] for k in chosen]
    losses = {task: _loss(taker, task, number, batch) for task, batch in items.items()}
    parameters = [taker.factors.parameters[k] for k in chosen]
    kept = [parameter.detach().clone() for parameter in parameters]
    steps = []
    for j, gradient in gradients.items():
        norm = _dot(gradient, gradient) ** 0.5
        for length in lengths:
            try:
                _move(parameters, kept, gradient, length / norm if norm > 0 else 0.0)
                after = {i: _loss(taker, i, number, batch) for i, batch in items.items()}
            finally:
                _move(parameters, kept, gradient, 0.0)
            for i, (loss, selected) in after.items():
                estimated = length * _dot(gradient, gradients[i]) / norm if norm > 0 else 0.0
                before, selected_before = losses[i]
                rerouted = not all(map(torch.equal, selected, selected_before))
                steps.append(Step(matrix, length, i, j, number, before, loss, estimated, rerouted))
            advance()
    return steps


@torch.no_grad()
def _move(
    parameters: Sequence[Tensor], kept: Sequence[Tensor], gradient: Sequence[Tensor], factor: float
) -> None:
    """Set kept - factor * gradient; the kept values themselves for a factor of zero."""
    for parameter, value, vector in zip(parameters, kept, gradient, strict=True):
        parameter.copy_(value if factor == 0 else value - factor * vector.view_as(value))


@torch.no_grad()
def _loss(taker: GradientTaker, task: str, number: int, items: Sequence[Item]) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and what its instances selected."""
    return float(taker.loss(task, number, items)), taker.selected()


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float(a.double() @ b.double()) for a, b in zip(one, other, strict=True))


def summarise_steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """For A and B and each length: how far the estimate is from what happened, over all pairs i, j and batches."""
    rows = []
    for matrix, length in dict.fromkeys((step.matrix, step.length) for step in steps):
        found = [step for step in steps if (step.matrix, step.length) == (matrix, length)]
        same = [step for step in found if not step.rerouted]
        rows.append(
            {
                "matrix": matrix,
                "lambda": length,
                "steps": len(found),
                "rerouted": len(found) - len(same),
                "relative_error": _relative_error(found),
                "relative_error_same_factors": _relative_error(same),
            }
        )
    return rows


def _relative_error(steps: Sequence[Step]) -> float | None:
    """Sum of |measured - estimated| over the sum of |estimated|."""
    size = sum(abs(step.estimated) for step in steps)
    return sum(abs(step.measured - step.estimated) for step in steps) / size if size > 0 else None


def write_steps(folder: Path, fingerprint: str, steps: Sequence[Step]) -> None:
    """Write `measured.jsonl`: a header, then a line for each step."""
    lines: list[dict[str, Any]] = [{"fingerprint": fingerprint}]
    lines += [{**asdict(step), "measured": step.measured} for step in steps]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE_NAME, "".join(json.dumps(line) + "\n" for line in lines))


def read_steps(folder: Path, fingerprint: str | None = None) -> list[Step] | None:
    """Steps of an earlier call; None where there are none with this fingerprint (any, if none is given)."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        header, *lines = map(json.loads, file)
    if fingerprint is not None and header.get("fingerprint") != fingerprint:
        return None
    return [Step(**{key: value for key, value in line.items() if key != "measured"}) for line in lines]


def cover(steps: Sequence[Step] | None, wanted: MeasureConfig, available: int) -> bool:
    """Whether these steps are the wanted ones, of at least as many batches; `available`: how many a task has."""
    if not steps:
        return False
    lengths = {step.length for step in steps}
    return lengths == set(wanted.lambdas or ()) and 1 + max(s.batch for s in steps) >= min(
        wanted.batches, available
    )
