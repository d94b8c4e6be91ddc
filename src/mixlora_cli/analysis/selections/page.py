"""One HTML file that needs no network: the maps, and under the pointer each instance's picture and question."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from mixlora_cli.analysis.selections.atlas import Atlas, Panel
from mixlora_cli.analysis.selections.separation import Measured
from mixlora_cli.analysis.selections.thumbnails import Thumbnails
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER

NAME = "tsne.html"
_TEMPLATE = "page.html"
_QUESTION = 400
"""Characters of a question that are shown."""
_GRID = 10_000
"""Places are whole numbers from 0 to this: half the bytes of fractions."""


def write_page(atlas: Atlas, thumbnails: Thumbnails, folder: Path, heading: str) -> Path:
    """Write `tsne.html`; every text of the data goes in as JSON that cannot end its script element."""
    template = files("mixlora_cli.analysis.selections").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    content = json.dumps(_content(atlas, thumbnails, heading), ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    path = folder / NAME
    page = template.replace("{{heading}}", html.escape(heading)).replace("{{content}}", content)
    path.write_text(page, encoding="utf-8")
    return path


def question_of(record: Record) -> str:
    """The last question, without the picture's marker, cut where it is long."""
    *_, question, _ = record.conversation
    text = question.text.replace(IMAGE_MARKER, "").strip()
    return text if len(text) <= _QUESTION else text[: _QUESTION - 1] + "…"


def _content(atlas: Atlas, thumbnails: Thumbnails, heading: str) -> dict[str, Any]:
    notes = [
        f"t-SNE of Jaccard distances, perplexity {atlas.perplexity:.3g}. Identical selections have one place and are "
        "spread over a disc there, so that their number shows. Distances between far places mean little.",
        *atlas.notes,
    ]
    if thumbnails.left_out:
        notes.append(f"{thumbnails.left_out} pictures had no room in this page (tsne.page_mb)")
    counts = [int((atlas.labels == number).sum()) for number in range(len(atlas.tasks))]
    return {
        "heading": heading,
        "notes": notes,
        "grid": _GRID,
        "tasks": [
            {
                "name": one.task,
                "seen": one.split == "heldout",
                "count": count,
                "colour": atlas.styles[one.task].colour,
                "marker": atlas.styles[one.task].marker,
            }
            for one, count in zip(atlas.tasks, counts, strict=True)
        ],
        "instances": [
            {"task": int(label), "id": record.id, "question": question_of(record), "picture": number}
            for label, record, number in zip(atlas.labels, atlas.records, thumbnails.number, strict=True)
        ],
        "pictures": list(thumbnails.uris),
        "panels": [_panel(panel) for panel in atlas.panels],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    found = panel.separation
    return {
        "title": panel.title,
        "x": (panel.points[:, 0] * _GRID).round().astype(int).tolist(),
        "y": (panel.points[:, 1] * _GRID).round().astype(int).tolist(),
        "factors": panel.index.tolist(),
        "group": panel.space.group.tolist(),
        "numbers": [
            _row("silhouette", found.silhouette),
            _row("neighbour purity", found.purity),
            _row("mutual information", found.information),
        ],
    }


def _row(name: str, measured: Measured) -> list[str]:
    chance = f"{measured.low:.3f} to {measured.high:.3f}"
    return [name, f"{measured.value:.3f}", chance, f"{measured.p:.3f}"]
