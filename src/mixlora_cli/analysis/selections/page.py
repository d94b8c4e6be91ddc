"""One HTML file that needs no network: the maps, and under the pointer each instance's picture and question."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from mixlora_cli.analysis.selections.figures import Style
from mixlora_cli.analysis.selections.maps import Map, Maps
from mixlora_cli.data.images import as_shown, open_picture
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.progress import with_bar
from mixlora_cli.report.thumbnails import encoded
from mixlora_cli.store import write_text

_QUESTION = 400
"""Characters of a question that are shown."""
_GRID = 10_000
"""Places are whole numbers from 0 to this: half the bytes of fractions."""
_SIDES = (128, 96, 64, 48)
"""Longest sides of pictures in pixels that are tried, the largest first."""


def write_page(
    maps: Maps, styles: Mapping[str, Style], megabytes: float, folder: Path, heading: str, console: Console
) -> None:
    """Write `tsne.html`; every text of the data goes in as JSON that cannot end its script element.

    Args:
        megabytes: of pictures, which get smaller, and then fewer, until they fit.
    """
    uris, numbers, left_out = make_thumbnails(
        [next(iter(record.files), None) for record in maps.records], megabytes, console
    )
    notes = [
        f"t-SNE of Jaccard distances, perplexity {maps.perplexity:.3g}. Identical selections have one place and are "
        "spread over a disc there, so that their number shows. Distances between far places mean little.",
        *maps.notes,
    ]
    if left_out:
        notes.append(f"{left_out} pictures had no room in this page (tsne.page_mb)")
    content = {
        "heading": heading,
        "notes": notes,
        "grid": _GRID,
        "tasks": [
            {
                "name": one.task,
                "seen": one.split == "heldout",
                "count": size,
                "colour": styles[one.task].colour,
                "marker": styles[one.task].marker,
            }
            for one, size in zip(maps.tasks, maps.sizes, strict=True)
        ],
        "instances": [
            {"task": int(label), "id": record.id, "question": _question(record), "picture": number}
            for label, record, number in zip(maps.labels, maps.records, numbers, strict=True)
        ],
        "pictures": uris,
        "panels": [_panel(one) for one in maps.each],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = files("mixlora_cli.analysis.selections").joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace("{{heading}}", html.escape(heading)).replace("{{content}}", text)
    write_text(folder / "tsne.html", page)


def _question(record: Record) -> str:
    """The last question, without the picture's marker, cut where it is long."""
    *_, question, _ = record.conversation
    text = question.text.replace(IMAGE_MARKER, "").strip()
    return text if len(text) <= _QUESTION else text[: _QUESTION - 1] + "…"


def _panel(one: Map) -> dict[str, Any]:
    x, y = (one.points.T * _GRID).round().astype(int).tolist()
    return {
        "title": one.title,
        "x": x,
        "y": y,
        "factors": one.index.tolist(),
        "group": one.space.group.tolist(),
        "numbers": [
            [name, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", f"{found.p:.3f}"]
            for name, found in one.separation.items()
        ],
    }


def make_thumbnails(
    pictures: Sequence[Path | None], megabytes: float, console: Console
) -> tuple[list[str], list[int | None], int]:
    """Shrink all pictures as far as the budget asks; if the smallest size is too large still, the last are left out.

    Returns:
        Data URIs of the distinct pictures, the number of each of `pictures` among them (None without one), and how
        many distinct ones were left out.
    """
    paths = list(dict.fromkeys(path for path in pictures if path is not None)) if megabytes > 0 else []
    distinct: dict[str, Image.Image] = {}
    digest_of: dict[Path | None, str] = {}
    for path in with_bar(paths, "shrinking pictures", console):
        picture = shrunk(path)
        # Copies of one picture under several names are one picture.
        digest_of[path] = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
        distinct[digest_of[path]] = picture
    budget = megabytes * 1_000_000
    uris: dict[str, str] = {}
    for side in _SIDES:
        uris = {digest: _as_uri(picture, side) for digest, picture in distinct.items()}
        if sum(map(len, uris.values())) <= budget:
            break
    kept: dict[str, int] = {}
    for digest, uri in uris.items():
        budget -= len(uri)
        if budget < 0:
            break
        kept[digest] = len(kept)
    numbers = [kept.get(digest_of.get(path, "")) for path in pictures]
    return [uris[digest] for digest in kept], numbers, len(uris) - len(kept)


def shrunk(path: Path) -> Image.Image:
    """A picture file as RGB, turned upright, on white where it is transparent, at most as large as the page shows."""
    with open_picture(path) as opened:
        opened.draft("RGB", (_SIDES[0], _SIDES[0]))
        shown = as_shown(opened, path)
        picture = shown.convert("RGBA" if shown.mode in ("LA", "P", "PA", "RGBA") else "RGB")
    if picture.mode == "RGBA":
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture).convert("RGB")
    picture.thumbnail((_SIDES[0], _SIDES[0]))
    return picture


def _as_uri(picture: Image.Image, side: int) -> str:
    small = picture.copy()
    small.thumbnail((side, side))
    return encoded(small, "JPEG", quality=75)
