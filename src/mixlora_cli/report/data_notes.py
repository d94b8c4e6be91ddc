"""Notes on incomplete sources, for the head of a report."""

from __future__ import annotations

from collections.abc import Sequence

from mixlora_cli.evaluation.instances import source_notes
from mixlora_cli.evaluation.results import Row


def data_notes(rows: Sequence[Row]) -> list[str]:
    """Each note on the sources once; with the labels of the evaluations that it is about unless these are all."""
    labels: dict[str, list[str]] = {}
    for label, results in rows:
        for note in source_notes(results.about.get("sources") or {}):
            labels.setdefault(note, []).append(label)
    return [
        f"{note}." if len(which) == len(rows) else f"{note}: {', '.join(which)}."
        for note, which in labels.items()
    ]
