"""The layer of the paper written out: plain loops over instances, tokens, factors and features, nothing vectorised.

Written from equations 5 to 9 and the rule for the routers' gradient, not from the implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Choice:
    """What goes beyond the paper."""

    tied: bool = False  # B gets A's factors
    statistics: tuple[Tensor, Tensor] | None = None  # mean and deviation (d_in,) of what routers read


@dataclass
class Parameters:
    weight: Tensor  # (d_out, d_in), frozen
    factors_a: Tensor  # (E, d_in)
    factors_b: Tensor  # (E, d_out)
    router_a: Tensor  # (E, d_in)
    router_b: Tensor  # (E, d_in)
    router_ab: Tensor  # (r, d_in, E)


@dataclass
class Result:
    output: list[list[list[Tensor]]]  # instance, token, feature
    index_a: list[list[int]]
    index_b: list[list[int]]
    weights: list[Tensor]  # leaves equal to one, one for each selected factor of each side
    probabilities: list[Tensor]  # of the same factors


def dot(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros((), dtype=left.dtype)
    for position in range(len(left)):
        total = total + left[position] * right[position]
    return total


def softmax(values: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(value) for value in values]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def best(values: list[Tensor], rank: int) -> list[int]:
    return sorted(range(len(values)), key=lambda position: -values[position].item())[:rank]


def conditional(p: Parameters, chosen: list[int], form: str) -> list[Tensor]:
    """R_CFS(A), Eq. 7."""
    features, num_factors = p.router_ab.shape[1:]
    scores = [torch.zeros((), dtype=p.factors_a.dtype) for _ in range(num_factors)]
    for i, factor in enumerate(chosen):
        row, matrix = p.factors_a[factor], p.router_ab[i]
        if form == "paper":
            logits = [dot(row, matrix[:, e]) for e in range(num_factors)]
        else:
            row_sum = sum(row[d] for d in range(features))
            logits = [row_sum * sum(matrix[d, e] for d in range(features)) for e in range(num_factors)]
        for e, probability in enumerate(softmax(logits)):
            scores[e] = scores[e] + probability
    return scores


def select(
    p: Parameters, mean: Tensor, rank: int, form: str, choice: Choice
) -> tuple[list[int], list[int], list[Tensor], list[Tensor]]:
    """Eq. 6 for A; Eq. 8 for B, or Eq. 6 where form is none."""
    if choice.statistics is not None:
        mean = torch.stack([(x - m) / s for x, m, s in zip(mean, *choice.statistics, strict=True)])
    routed = len(p.router_a)
    p_a = softmax([dot(p.router_a[e], mean) for e in range(routed)])
    p_b = softmax([dot(p.router_b[e], mean) for e in range(routed)])
    index_a = best(p_a, rank)
    if form != "none":
        p_cfs = softmax(conditional(p, index_a, form))
        p_b = [p_b[e] + p_cfs[e] for e in range(routed)]
    index_b = best(p_b, rank)
    if choice.tied:
        return index_a, index_a, p_a, p_a
    return index_a, index_b, p_a, p_b


def layer(
    p: Parameters,
    hidden: Tensor,
    mask: Tensor | None,
    rank: int,
    alpha: float,
    form: str,
    task: Tensor | None = None,
    picked: list[tuple[list[int], list[int]]] | None = None,
    choice: Choice | None = None,
) -> Result:
    """y = W h + (alpha / r) sum_k w_k b_k (a_k . h), with w_k = 1 x 1 (a leaf for each of the two factors).

    The routers read `task` (instances, width) if it is given; `picked` takes the place of their choice.
    """
    result, choice = Result([], [], [], [], []), choice or Choice()
    for n in range(len(hidden)):
        counted = [t for t in range(hidden.shape[1]) if mask is None or bool(mask[n, t])]
        mean = torch.zeros(hidden.shape[2], dtype=hidden.dtype)
        for t in counted:
            mean = mean + hidden[n, t] / len(counted)
        if picked is None:
            index_a, index_b, p_a, p_b = select(p, mean if task is None else task[n], rank, form, choice)
        else:
            (index_a, index_b), p_a, p_b = (
                picked[n],
                [mean.sum()] * len(p.factors_a),
                [mean.sum()] * len(p.factors_a),
            )
        ones = [
            [torch.ones((), dtype=hidden.dtype, requires_grad=True) for _ in range(rank)] for _ in range(2)
        ]
        rows = []
        for t in range(hidden.shape[1]):
            row = [dot(p.weight[o], hidden[n, t]) for o in range(len(p.weight))]
            for k in range(rank):
                inner = dot(p.factors_a[index_a[k]], hidden[n, t]) * ones[0][k]
                for o in range(len(row)):
                    row[o] = row[o] + alpha / rank * p.factors_b[index_b[k], o] * ones[1][k] * inner
            rows.append(row)
        result.output.append(rows)
        result.index_a.append(index_a)
        result.index_b.append(index_b)
        # A tied pair has one probability, of which the weight is one factor.
        result.weights += ones[0] if choice.tied else ones[0] + ones[1]
        result.probabilities += [p_a[e] for e in index_a] + ([] if choice.tied else [p_b[e] for e in index_b])
    return result


def gradients(
    result: Result, probe: Tensor, wanted: dict[str, Tensor], straight_through: bool
) -> dict[str, Tensor | None]:
    """Gradients of sum(output * probe).

    With `straight_through`, a selected factor's probability receives what its weight, were it free, would receive.
    """
    loss = torch.zeros((), dtype=probe.dtype)
    for n, rows in enumerate(result.output):
        for t, row in enumerate(rows):
            for o, value in enumerate(row):
                loss = loss + value * probe[n, t, o]
    if straight_through:
        per_weight = torch.autograd.grad(loss, result.weights, retain_graph=True)
        for gradient, probability in zip(per_weight, result.probabilities, strict=True):
            loss = loss + gradient.detach() * probability
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def parameters(
    d_in: int, d_out: int, num_factors: int, rank: int, seed: int, width: int | None = None
) -> Parameters:
    """Random parameters whose routers have opinions; `width` is what they read, the layer's input without it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return Parameters(
        weight=(normal(d_out, d_in) / math.sqrt(d_in)).detach(),
        factors_a=normal(num_factors, d_in),
        factors_b=normal(num_factors, d_out),
        router_a=normal(num_factors, width or d_in),
        router_b=normal(num_factors, width or d_in),
        router_ab=normal(rank, d_in, num_factors),
    )
