"""Figures of what a study's trainings learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.reproduce import curves


def metrics(path: Path, losses: list[float], information: float | None = None) -> Path:
    """A line for every 50 steps."""
    rows: list[dict[str, Any]] = [
        {"step": 50 * (place + 1), "loss": loss, "loss_steps": 50} for place, loss in enumerate(losses)
    ]
    for row in rows:
        row["routing"] = {} if information is None else {"information_a": information}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_curves_are_means_over_windows_and_over_the_seeds_that_both_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda *given: drawn.append(given[0]) or draw(*given))
    trainings = {
        "LoRA": {0: metrics(tmp_path / "a", [3.0, 2.0, 1.0, 0.5, 0.2])},  # the last window is not whole
        "plus": {
            0: metrics(tmp_path / "b", [2.0, 2.0, 1.0, 0.25], 0.5),
            1: metrics(tmp_path / "c", [9.0, 9.0], 0.7),  # no LoRA of this seed
        },
    }
    written = curves.draw_curves(trainings, "LoRA", tmp_path / "out")
    names = ["study-loss.png", "study-loss.svg", "study-information.png", "study-information.svg"]
    assert [path.name for path in written] == names and all(path.stat().st_size > 5000 for path in written)
    (_, losses), (_, beside) = drawn[0]
    assert losses["LoRA"] == {0: {100: 2.5, 200: 0.75}}
    assert beside == {"LoRA": {0: {100: 0.0, 200: 0.0}}, "plus": {0: {100: -0.5, 200: -0.125}}}
    steps, mean = curves._over_seeds(losses["plus"])
    assert (steps, mean.tolist()) == ([100], [5.5])
    ((_, told),) = drawn[1]
    assert told["LoRA"] == {} and told["plus"][1] == {50: 0.7, 100: 0.7}
