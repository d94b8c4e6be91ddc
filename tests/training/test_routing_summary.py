"""When a look at the routing makes a warning, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from mixlora_cli.training.routing_stats import has_collapsed, routing_result, summarise


def look(
    collapsed: list[float], instances: int = 32, variety: float | None = 0.5, **values: Any
) -> dict[str, Any]:
    """A line of routing.jsonl with the same measures in all layers."""
    layers = [f"layer{number}" for number in range(len(collapsed))]
    same = {"entropy": 0.8, "unused": 0.25, "variety": variety, "information": 0.3, "churn": 0.1}
    return {
        "instances": instances,
        "tasks": 2,
        "agreement_by_chance": 0.25,
        "layers": layers,
        **{f"{name}_{side}": [value] * len(layers) for name, value in same.items() for side in "ab"},
        "agreement": [0.3] * len(layers),
        "collapsed": collapsed,
        **values,
    }


@pytest.mark.parametrize(("num_collapsed", "warns"), [(0, False), (2, False), (3, True), (4, True)])
def test_more_than_half_of_the_layers_make_a_collapse(num_collapsed: int, warns: bool) -> None:
    summary = summarise(look([1.0] * num_collapsed + [0.0] * (4 - num_collapsed)))
    assert summary["collapsed_layers"] == num_collapsed
    assert has_collapsed(summary) == warns


def test_few_instances_and_one_task_are_not_judged() -> None:
    few, one_task = look([1.0, 1.0], instances=31), look([0.0, 0.0], variety=None)
    for summary in map(summarise, (few, one_task)):
        assert summary["collapsed_layers"] is None
        assert not has_collapsed(summary)
    assert summarise(one_task)["variety_a"] is None


def test_means_and_worst_layers() -> None:
    summary = summarise(
        look([0.0, 0.0], entropy_a=[0.5, 1.0], unused_b=[0.0, 0.75], churn_a=None, churn_b=None)
    )
    assert (summary["entropy_a"], summary["entropy_a_min"]) == (0.75, 0.5)
    assert (summary["unused_b"], summary["unused_b_max"]) == (0.375, 0.75)
    assert (summary["churn_a"], summary["layers"], summary["agreement"]) == (None, 2, 0.3)


def test_the_warning_names_the_first_collapse_and_the_end() -> None:
    def row(step: int, num_collapsed: int) -> dict[str, Any]:
        summary = summarise(look([1.0] * num_collapsed + [0.0] * (4 - num_collapsed)))
        return {"step": step, "routing": summary}

    rows = [{"step": 10}, row(50, 1), row(100, 3), row(150, 4), row(200, 2), {"step": 210, "routing": {}}]
    warning = routing_result(rows)["routing_warning"]
    assert warning is not None
    assert warning.startswith("routing has collapsed in 3 of 4 layers at step 100: ")
    assert "all 32 instances of 2 tasks" in warning
    assert warning.endswith("; at step 200: 2 of 4 layers")
    assert routing_result([row(50, 1), row(100, 2)])["routing_warning"] is None
    assert routing_result([{"step": 10}]) == {}
