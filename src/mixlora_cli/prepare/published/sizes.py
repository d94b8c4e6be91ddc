"""Check the tensors of a published checkpoint against one another, and read off them what they tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora_cli.errors import UserError
from mixlora_cli.prepare.published.names import AdaptedLinear, Place, Published

INDEPENDENT = frozenset({"router_a", "router_b"})
CONDITIONAL = frozenset({"router_a", "conditional_router_b", "router_ab"})


@dataclass(frozen=True)
class Sizes:
    """What the tensors tell of the adapter as a whole."""

    num_layers: int
    linears: tuple[str, ...]
    """Adapted linear layers of each decoder layer, sorted."""
    hidden_size: int | None
    """d_in of the attention's projections, if they are adapted."""
    factors: int
    """E."""
    routers: frozenset[str]
    """Kinds of routers: none of them, `INDEPENDENT` or `CONDITIONAL`."""
    rank: int | None
    """r, which only the CFS router's shape tells."""
    task_width: int | None
    """Width of the routers' input where it cannot be the layer's own input; None where it can."""


@dataclass(frozen=True)
class _Linear:
    d_in: int
    d_out: int
    factors: int
    routers: frozenset[str]
    rank: int | None
    width: int | None


def measure(published: Published) -> Sizes:
    """Check every layer and compare them.

    Raises:
        UserError: a factor, router or layer is missing, or shapes contradict one another; names the tensor.
    """
    places = sorted(published.linears)
    measured = {place: _measure_linear(place, published.linears[place]) for place in places}
    first = measured[places[0]]
    for place in places:
        _compare(place, measured[place], places[0], first)
        like = Place(places[0].layer, place.linear)
        if like in measured and measured[like] != measured[place]:
            raise UserError(f"{place}: {_shape(measured[place])}, but {like}: {_shape(measured[like])}")
    num_layers, linears = _check_complete(places)
    return Sizes(
        num_layers=num_layers,
        linears=linears,
        hidden_size=next((m.d_in for p, m in measured.items() if p.linear.endswith(".q_proj")), None),
        factors=first.factors,
        routers=first.routers,
        rank=first.rank,
        task_width=_task_width(measured),
    )


def _compare(place: Place, this: _Linear, other: Place, that: _Linear) -> None:
    """What has to be the same in all layers."""
    for what in ("factors", "routers", "rank"):
        mine, theirs = getattr(this, what), getattr(that, what)
        if mine != theirs:
            if isinstance(mine, frozenset):
                mine, theirs = ", ".join(sorted(mine)) or "none", ", ".join(sorted(theirs)) or "none"
            raise UserError(f"{place}: {what} {mine}, but {theirs} in {other}; all layers must have the same")


def _shape(linear: _Linear) -> str:
    return f"d_in={linear.d_in} d_out={linear.d_out}"


def _check_complete(places: list[Place]) -> tuple[int, tuple[str, ...]]:
    """Number of decoder layers and names of the adapted linear layers, the same in each."""
    num_layers = places[-1].layer + 1
    linears = sorted({place.linear for place in places})
    missing = [
        Place(layer, linear)
        for layer in range(num_layers)
        for linear in linears
        if Place(layer, linear) not in set(places)
    ]
    if missing:
        raise UserError(
            f"{missing[0]}: no factors, though other layers have some ({len(missing)} such places); "
            "the checkpoint is not complete"
        )
    return num_layers, tuple(linears)


def _measure_linear(place: Place, linear: AdaptedLinear) -> _Linear:
    d_in = _pool_width(f"{place}.lora_A", linear.factors_a)
    d_out = _pool_width(f"{place}.lora_B", linear.factors_b)
    factors = len(linear.factors_a)
    if len(linear.factors_b) != factors:
        raise UserError(f"{place}: {factors} factors of A, but {len(linear.factors_b)} of B")
    kinds = frozenset(linear.routers)
    if kinds not in (frozenset(), INDEPENDENT, CONDITIONAL):
        raise UserError(f"{place}: {_odd_routers(kinds)}")
    for kind, router in linear.routers.items():
        _check_values(f"{place}: {kind}", router)
        if router.dim() != 2 or len(router) != factors:
            raise UserError(f"{place}: {kind} has shape {tuple(router.shape)}, expected ({factors}, width)")
    width = linear.routers["router_a"].shape[1] if kinds else None
    other = "conditional_router_b" if kinds == CONDITIONAL else "router_b"
    if kinds and linear.routers[other].shape[1] != width:
        raise UserError(
            f"{place}: the selectors of A and B read {width} and {linear.routers[other].shape[1]} features; "
            "they must read the same"
        )
    rank = _rank(place, linear.routers["router_ab"], d_in, width) if kinds == CONDITIONAL else None
    return _Linear(d_in, d_out, factors, kinds, rank, width)


def _odd_routers(kinds: frozenset[str]) -> str:
    if kinds == {"router_a"}:
        return (
            "a selector of A alone: B takes the same numbers as A (independent_rank=False) or the file is not "
            "complete; neither can be imported"
        )
    return (
        f"selectors {', '.join(sorted(kinds))}; expected {', '.join(sorted(INDEPENDENT))}, or with CFS "
        f"{', '.join(sorted(CONDITIONAL))}"
    )


def _pool_width(name: str, pool: dict[int, Tensor]) -> int:
    """Features of a pool's factors (1, features), which must be numbered 0, 1, 2, ..."""
    if not pool:
        raise UserError(
            f"{name}: no factors, though the layer has other parts; the checkpoint is not complete"
        )
    missing = sorted(set(range(max(pool) + 1)) - set(pool))
    if missing:
        raise UserError(
            f"{name}: factor {missing[0]} is missing, though factor {max(pool)} is there; "
            "the checkpoint is not complete"
        )
    features = pool[0].shape[-1] if pool[0].dim() else 0
    for number, factor in sorted(pool.items()):
        _check_values(f"{name}.{number}", factor)
        if len(pool) == 1 and factor.dim() == 2 and len(factor) > 1:
            raise UserError(
                f"{name}.{number} has shape {tuple(factor.shape)}: a layer with plain LoRA (mix_start_layer or "
                "mix_loraA=False), which cannot be imported"
            )
        if factor.shape != (1, features):
            raise UserError(f"{name}.{number} has shape {tuple(factor.shape)}, expected (1, {features})")
    return features


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise UserError(f"{name} has type {tensor.dtype}, expected floating-point numbers (quantised?)")
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} has values that are no finite numbers; the training diverged or the file is damaged"
        )


def _rank(place: Place, router_ab: Tensor, d_in: int, width: int | None) -> int:
    """The rank r, from the shape of W_AB (E, r * d_in)."""
    columns = router_ab.shape[1]
    if width != d_in or columns % d_in:
        raise UserError(
            f"{place}: router_ab has {columns} columns and the selectors read {width} features; expected a multiple "
            f"of d_in={d_in}, and {d_in}"
        )
    return columns // d_in


def _task_width(measured: dict[Place, _Linear]) -> int | None:
    """The common width of the routers' input, if it is not that of the layers' own input."""
    odd = [place for place, linear in measured.items() if linear.width not in (None, linear.d_in)]
    if not odd:
        return None
    widths = {linear.width for linear in measured.values()}
    if len(widths) > 1:
        place = odd[0]
        raise UserError(
            f"{place}: its selectors read {measured[place].width} features, its input has {measured[place].d_in}; "
            "selectors that read several things (cond_type with input and instr, task_def or attr) cannot be imported"
        )
    return widths.pop()
