"""Factors in a terminal: which ones a prompt selected, in blocks and linear layers, and which tasks select alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import ceil

from mixlora_cli.models.generate import Factors
from mixlora_cli.serving.factors import TaskFactors

_NUMBERED = re.compile(r".*?\.(\d+)\.(?:.*\.)?(\w+)")
_BRAILLE = 0x2800
_DOTS = {"a": (0x03, 0x18), "b": (0x44, 0xA0)}
"""The left and the right column's dots of a character: the upper two are A's, the lower two B's."""
_BAR = 20


def picture_of(factors: Factors, num_factors: int, width: int) -> str:
    """Blocks x linear layers; in each place the pools' factors from 0 on, two in a character, A above B.

    Linear layers that do not fit beside the others stand below them.

    Args:
        factors: what a prompt selected.
        num_factors: E.
        width: characters of a line.
    """
    cells: dict[tuple[str, str], str] = {}
    for name, a, b in zip(factors.layers, factors.a, factors.b, strict=True):
        found = _NUMBERED.fullmatch(name)
        place = (found[1], found[2]) if found else ("", name.rpartition(".")[2])
        cells[place] = _cell(a, b, num_factors)
    blocks = list(dict.fromkeys(block for block, _ in cells))
    linears = list(dict.fromkeys(linear for _, linear in cells))
    label = max(map(len, ["block", *blocks]))
    columns = {linear: max(len(_short(linear)), ceil(num_factors / 2)) for linear in linears}
    lines = [
        f"factors 0 to {num_factors - 1} from left to right, two in a character: "
        f"{chr(_BRAILLE + sum(_DOTS['a']))} of A, {chr(_BRAILLE + sum(_DOTS['b']))} of B"
    ]
    for group in _that_fit(linears, columns, width - label):
        lines.append(" ".join(["block".rjust(label), *(_short(each).ljust(columns[each]) for each in group)]))
        lines += [
            " ".join(
                [block.rjust(label), *(cells.get((block, each), "").ljust(columns[each]) for each in group)]
            )
            for block in blocks
        ]
    return "\n".join(line.rstrip() for line in lines)


def _short(linear: str) -> str:
    return linear.removesuffix("_proj")


def _cell(a: Sequence[int], b: Sequence[int], num_factors: int) -> str:
    dots = [0] * ceil(num_factors / 2)
    for chosen, columns in ((a, _DOTS["a"]), (b, _DOTS["b"])):
        for factor in chosen:
            dots[factor // 2] |= columns[factor % 2]
    return "".join(chr(_BRAILLE + each) for each in dots)


def _that_fit(linears: Iterable[str], columns: dict[str, int], width: int) -> list[list[str]]:
    """Linear layers in order, in groups that are not wider than a line, or one alone."""
    groups: list[list[str]] = []
    left = 0
    for linear in linears:
        needed = columns[linear] + 1
        if not groups or needed > left:
            groups.append([])
            left = width
        groups[-1].append(linear)
        left -= needed
    return groups


def likeness(factors: Factors, known: TaskFactors, most: int = 5) -> str:
    """The tasks of the training that select most alike, each with a bar, and what chance would give."""
    alike = known.alike(factors.layers, factors.a, factors.b)
    shown = alike[:most]
    label = max(len(task) for task, _ in shown)
    lines = [
        f"tasks of the training by the share of these factors that they select, too (unrelated: {known.by_chance:.2f})"
    ]
    for task, share in shown:
        lines.append(f"  {task.ljust(label)}  {share:.2f}  {'█' * round(share * _BAR)}".rstrip())
    if len(alike) > most:
        lines.append(f"  and {len(alike) - most} more, down to {alike[-1][1]:.2f}")
    return "\n".join(lines)
