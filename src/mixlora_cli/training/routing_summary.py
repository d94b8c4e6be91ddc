"""One look at the routing in a few numbers, and what to say when it has collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JUDGED_FROM = 32
"""Instances in a window from which on its variety says anything."""


def summarise(table: Mapping[str, Any]) -> dict[str, float | None]:
    """One look's means over layers, the worst layers, and how many have collapsed (None: nothing to judge by)."""
    summary: dict[str, float | None] = {
        name: table[name] for name in ("instances", "tasks", "agreement_by_chance")
    }
    summary["layers"] = len(table["layers"])
    for name in ("entropy", "unused", "variety", "churn"):
        for side in "ab":
            summary[f"{name}_{side}"] = _mean(table[f"{name}_{side}"])
    summary["agreement"] = _mean(table["agreement"])
    for side in "ab":
        summary[f"entropy_{side}_min"] = min(table[f"entropy_{side}"])
        summary[f"unused_{side}_max"] = max(table[f"unused_{side}"])
    judged = table["instances"] >= JUDGED_FROM and None not in table["variety_a"]
    summary["collapsed_layers"] = sum(table["collapsed"]) if judged else None
    return summary


def has_collapsed(summary: Mapping[str, Any]) -> bool:
    """More than half of the layers have a router that gives all instances nearly the same factors."""
    collapsed = summary["collapsed_layers"]
    return collapsed is not None and collapsed > summary["layers"] / 2


def collapse_warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What a finished run says if its routing ever collapsed: when first, and how it ended.

    Args:
        rows: of `metrics.jsonl`.
    """
    looks = [row for row in rows if (row.get("routing") or {}).get("collapsed_layers") is not None]
    first = next((row for row in looks if has_collapsed(row["routing"])), None)
    if first is None:
        return None
    last = looks[-1]
    end = f"{last['routing']['collapsed_layers']:.0f} of {last['routing']['layers']:.0f} layers"
    return f"{describe_collapse(first['step'], first['routing'])}; at step {last['step']}: {end}"


def describe_collapse(step: int, summary: Mapping[str, Any]) -> str:
    """The warning, without its colour: where, how much, what helps."""
    return (
        f"routing has collapsed in {summary['collapsed_layers']:.0f} of {summary['layers']:.0f} layers at step {step}: "
        f"a router gives nearly the same factors to all {summary['instances']:.0f} instances of "
        f"{summary['tasks']:.0f} tasks (routing.jsonl has the layers); routers that learn "
        "(adapter.router_grad=straight_through) with a higher routing.balance_loss, say 0.01, spread the use"
    )


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return round(sum(known) / len(known), 6) if known else None
