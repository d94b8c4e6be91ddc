"""Small pictures as data URIs, once for each distinct picture, within a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console

from mixlora_cli.data.images import as_shown, open_picture
from mixlora_cli.progress import with_bar
from mixlora_cli.report.thumbnails import encoded

_SIDES = (128, 96, 64, 48)
"""Longest sides in pixels that are tried, the largest first."""
_QUALITY = 75
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Thumbnails:
    """What a page shows of the pictures."""

    uris: Sequence[str]
    """Distinct pictures."""
    number: Sequence[int | None]
    """Of each instance's picture in `uris`; None without a picture, or where it was left out."""
    left_out: int
    """Distinct pictures that the budget had no room for."""


def make_thumbnails(pictures: Sequence[Path | None], megabytes: float, console: Console) -> Thumbnails:
    """Shrink all pictures as far as the budget asks; if the smallest size is too large still, the last are left out."""
    paths = list(dict.fromkeys(path for path in pictures if path is not None)) if megabytes > 0 else []
    distinct: dict[str, Image.Image] = {}
    print_of: dict[Path, str] = {}
    for path in with_bar(paths, "shrinking pictures", console):
        small = _shrunk(path)
        # Copies of one picture under several names are one picture.
        print_of[path] = hashlib.sha256(repr(small.size).encode() + small.tobytes()).hexdigest()
        distinct[print_of[path]] = small
    budget = megabytes * _MEGABYTE
    uris: dict[str, str] = {}
    for side in _SIDES:
        uris = {mark: _as_uri(picture, side) for mark, picture in distinct.items()}
        if sum(map(len, uris.values())) <= budget:
            break
    kept: list[str] = []
    for mark, uri in uris.items():
        budget -= len(uri)
        if budget < 0:
            break
        kept.append(mark)
    place = {mark: number for number, mark in enumerate(kept)}
    number = [None if path not in print_of else place.get(print_of[path]) for path in pictures]
    return Thumbnails([uris[mark] for mark in kept], number, len(uris) - len(kept))


def _shrunk(path: Path) -> Image.Image:
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
    return encoded(small, "JPEG", quality=_QUALITY)
