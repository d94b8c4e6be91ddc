"""Colours and markers of tasks: told apart by colour-blind eyes too; pairs share a hue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Marker = Literal["circle", "triangle", "square", "diamond"]

# Okabe and Ito's, the yellow darkened so that it shows on white.
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#9a8a00", "#555555")
_MARKERS: tuple[Marker, ...] = ("circle", "triangle", "square", "diamond")
_PALE = 0.5
"""Share of white in an unseen partner's colour."""


@dataclass(frozen=True)
class Style:
    """How a task's instances are drawn."""

    colour: str
    """#rrggbb."""
    marker: Marker = "circle"


def styles_of(tasks: Sequence[str], pairs: Sequence[Sequence[str]] | None) -> dict[str, Style]:
    """By task: one hue each, markers change when the hues begin again; of a pair, both take the hue of its seen task,
    which is dark and round, and the unseen one is pale and a triangle.
    """
    if pairs is None:
        return {
            task: Style(HUES[number % len(HUES)], _MARKERS[number // len(HUES) % len(_MARKERS)])
            for number, task in enumerate(tasks)
        }
    hues = {seen: HUES[number % len(HUES)] for number, seen in enumerate(dict.fromkeys(p[0] for p in pairs))}
    unseen = {pair[1]: Style(_pale(hues[pair[0]]), "triangle") for pair in reversed(pairs)}
    return unseen | {seen: Style(hue) for seen, hue in hues.items()}


def _pale(colour: str) -> str:
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * _PALE):02x}" for value in channels)


def in_legend_order(tasks: Sequence[str], pairs: Sequence[Sequence[str]] | None) -> list[str]:
    """Tasks as a legend filled column by column wants them: each seen task above its unseen partner."""
    if pairs is None:
        return list(tasks)
    return list(dict.fromkeys(task for pair in pairs for task in pair))
