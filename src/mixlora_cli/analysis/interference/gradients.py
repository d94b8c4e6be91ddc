"""Gradients of the adapter's factors, the two streaming passes of Eq. 2 and 3 over them, and real steps.

With P parameters and T tasks the passes hold T mean directions u_j of P numbers and the gradient of the present batch,
whatever the number of batches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from mixlora_cli.data.encode import Item
from mixlora_cli.method.layer import MixLoraLayer
from mixlora_cli.models.session import ADAPTER, Session

Floats = NDArray[np.float64]
Gradient = Sequence[Tensor]
"""One flat vector (d,) for each group of parameters."""
MATRICES = ("A", "B")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
"""Of a layer; what is numbered within it, such as a mixture's experts, comes later."""
_MLP = ("mlp", "feed_forward", "ffn")
"""What models call it."""


@dataclass(frozen=True)
class Group:
    """One matrix of one adapted layer, whose gradients are compared; for MixLoRA the pool of all its E factors."""

    layer: str
    """Name of the adapted linear layer in the base model."""
    matrix: str
    """"A" or "B"."""

    @property
    def number(self) -> int | None:
        """Number of the transformer layer that it is in, counted from 0."""
        found = _NUMBER.search(self.layer)
        return None if found is None else int(found[1])

    @property
    def block(self) -> str:
        """The part of a transformer layer that it belongs to: "attention", "mlp" or "other"."""
        parts = self.layer.split(".")
        if any("attn" in part or "attention" in part for part in parts):
            return "attention"
        return "mlp" if any(name in part for part in parts for name in _MLP) else "other"

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.matrix}"


Factors = Mapping[Group, nn.Parameter]
"""LoRA: A (r, d_in) and B (d_out, r). MixLoRA: A (E, d_in) and B (E, d_out)."""


def require_gradients(model: PeftModel) -> Factors:
    """Freeze everything but the factors of the adapter, which stay in fp32, and return these.

    Routers, and a projector that was trained too, are shared by all tasks but are no factors: they stay frozen.
    """
    model.requires_grad_(False)
    factors = {}
    for name, module in model.named_modules():
        for matrix, parameter in zip(MATRICES, _factors_of(module), strict=False):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            factors[Group(name.removeprefix("base_model.model."), matrix)] = parameter
    return factors


def _factors_of(module: nn.Module) -> Sequence[nn.Parameter]:
    """A and B of an adapted layer; nothing for other modules."""
    pools: Any = ()
    if isinstance(module, MixLoraLayer):
        pools = module.mixlora_factors_a, module.mixlora_factors_b
    elif isinstance(module, LoraLayer):
        pools = module.lora_A, module.lora_B
    return [pool[ADAPTER].weight for pool in pools if ADAPTER in pool]


@dataclass(frozen=True)
class GradientTaker:
    """An adapted model in eval mode, so that dropout adds no noise, whose factors alone require gradients."""

    session: Session
    factors: Factors
    seed: int

    def loss(self, task: str, number: int, items: Sequence[Item]) -> Tensor:
        """The training's loss of a batch, with its graph where gradients are enabled.

        Args:
            task: whose batch it is.
            number: of the batch. With the task it seeds what routing=random draws, so that the batch meets the same
                factors whenever it is read, in whichever process.
            items: the batch's instances.
        """
        with _seeded(self.seed, task, number):
            return self.session.loss(items)

    def selected(self) -> list[Tensor]:
        """The factors that each instance of the last batch got, A's and B's in each layer; nothing for LoRA."""
        tuner = self.session.tuner
        found = () if tuner is None else tuner.selections().values()
        return [index for selection in found for index in (selection.index_a, selection.index_b)]

    def gradient(self, task: str, number: int, items: Sequence[Item]) -> list[Tensor]:
        """Gradient of `loss` for each group, flat and in fp32; zero for parameters that took no part."""
        parameters = [*self.factors.values()]
        with torch.enable_grad():
            loss = self.loss(task, number, items)
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return [gradient.detach().float().flatten() for gradient in found]


@contextmanager
def _seeded(seed: int, task: str, number: int) -> Iterator[None]:
    """Inside, torch draws as it always does for this batch; outside, its generators are what they were."""
    digest = hashlib.sha256(f"{seed}/{number}/{task}".encode()).digest()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        yield


@dataclass(frozen=True)
class Products:
    """Second pass over the n batches of one task i, with G groups and T tasks."""

    projections: Floats
    """(n, G, T): u_j . g / |g|, between -1 and 1; 0 where g is zero."""
    norms: Floats
    """(n, G): |g|."""


def mean_unit_gradient(gradients: Iterable[Gradient]) -> list[Tensor]:
    """First pass: u_j = mean over batches of g / |g| in each group, in fp32. A gradient of zero adds a zero."""
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
        units = [_unit(vector) for vector in gradient]
        rows = zip(directions, units, strict=True)
        projections.append([(toward.double() @ unit).tolist() for toward, (unit, _) in rows])
        norms.append([norm for _, norm in units])
    return Products(np.array(projections, dtype=np.float64), np.array(norms, dtype=np.float64))


def _unit(vector: Tensor) -> tuple[Tensor, float]:
    """The unit vector g / |g| in double precision, and |g|; zero stays zero."""
    wide = vector.double()
    norm = float(wide.norm())
    return (wide / norm if norm > 0 else torch.zeros_like(wide)), norm


@dataclass(frozen=True)
class Step:
    """Eq. 2's first line: a real step on a batch of task j, seen from the batch of task i with the same number.

    The step is lambda g_j / |g_j| over all A together, or all B together. It may also change which factors are
    selected; gradients know nothing of that jump, so such steps are marked.
    """

    matrix: str
    length: float
    """lambda."""
    task_i: str
    task_j: str
    batch: int
    before: float
    """Loss of task i."""
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
    batches: Mapping[str, Sequence[Sequence[Item]]],
    lengths: Sequence[float],
    num_batches: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Take and undo every step; the weights are afterwards what they were, bit for bit.

    Memory: the gradients of one batch of each task, and a copy of the weights that are moved.

    Args:
        batches: by task.
        lengths: of the steps.
        num_batches: so many batches of each task, no more than each has.
        advance: called after each step.
    """
    steps: list[Step] = []
    for matrix in dict.fromkeys(group.matrix for group in taker.factors):
        for number in range(num_batches):
            items = {task: b[number] for task, b in batches.items()}
            steps += _steps_of_batch(taker, matrix, number, items, lengths, advance)
    return steps


def _steps_of_batch(
    taker: GradientTaker,
    matrix: str,
    number: int,
    items: Mapping[str, Sequence[Item]],
    lengths: Sequence[float],
    advance: Callable[[], None],
) -> list[Step]:
    def moved(of_groups: Iterable[Tensor]) -> list[Tensor]:
        return [one for group, one in zip(taker.factors, of_groups, strict=True) if group.matrix == matrix]

    @torch.no_grad()
    def losses() -> dict[str, tuple[float, list[Tensor]]]:
        """By task: the loss of its batch, and what its instances selected."""
        return {i: (float(taker.loss(i, number, batch)), taker.selected()) for i, batch in items.items()}

    gradients = {task: moved(taker.gradient(task, number, batch)) for task, batch in items.items()}
    before = losses()
    parameters = moved(taker.factors.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    steps = []
    for j, gradient in gradients.items():
        norm = _dot(gradient, gradient) ** 0.5
        for length in lengths:
            try:
                _move(parameters, kept, gradient, length / norm if norm > 0 else 0.0)
                after = losses()
            finally:
                _move(parameters, kept, gradient, 0.0)
            for i, (loss, selected) in after.items():
                estimated = length * _dot(gradient, gradients[i]) / norm if norm > 0 else 0.0
                rerouted = not all(map(torch.equal, selected, before[i][1]))
                steps.append(Step(matrix, length, i, j, number, before[i][0], loss, estimated, rerouted))
            advance()
    return steps


@torch.no_grad()
def _move(
    parameters: Sequence[Tensor], kept: Sequence[Tensor], gradient: Sequence[Tensor], factor: float
) -> None:
    """Set kept - factor * gradient; the kept values themselves for a factor of zero."""
    for parameter, value, vector in zip(parameters, kept, gradient, strict=True):
        parameter.copy_(value if factor == 0 else value - factor * vector.view_as(value))


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
