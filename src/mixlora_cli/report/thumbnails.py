"""Small pictures inside the page: WebP data URIs, until a limit of bytes is reached."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixlora_cli.data.images import as_shown, locate_picture, open_picture
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.evaluation.predictions import Prediction

SIDE = 192
"""Longest side in pixels; the page shows them half as large again at most."""
QUALITY = 72


def picture_folder(prediction: Prediction, about: Mapping[str, Any], given: str | None) -> Path | None:
    """Folder that a prediction's picture is relative to: `given`, else where the evaluation found it."""
    known = about.get("images") or {}
    place = given or known.get(prediction.benchmark) or known.get(prediction.split)
    return None if place is None else Path(str(place)).expanduser().resolve()


class Thumbnails:
    """Makes data URIs and keeps count of them."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of all of them together."""
        self._left = limit
        self.missing = 0
        """Pictures that were not found or cannot be read."""
        self.left_out = 0
        """Pictures for which there was no room; behind the first of them none is tried any more."""

    def __call__(self, prediction: Prediction, folder: Path | None) -> str | None:
        """Data URI of a prediction's picture; None without a picture, and counted, where there should be one."""
        if not prediction.image:
            return None
        if self.left_out:
            self.left_out += 1
            return None
        try:
            if folder is None:
                raise FileNotFoundError
            uri = data_uri(locate_picture(prediction.image, folder))
        except (OSError, ValueError, SyntaxError, BadRecord, Image.DecompressionBombError):
            self.missing += 1
            return None
        if len(uri) > self._left:
            self.left_out += 1
            return None
        self._left -= len(uri)
        return uri


def data_uri(path: Path) -> str:
    """A picture file, turned upright and made small, on white where it is transparent.

    Raises what `as_shown` raises, and OSError when it cannot be read.
    """
    with open_picture(path) as opened:
        opened.draft("RGB", (SIDE, SIDE))  # JPEG: decode no more than is shown
        picture = as_shown(opened, path).convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    return encoded(flat, "WEBP", quality=QUALITY)


def encoded(picture: Image.Image, form: str, **options: Any) -> str:
    """A picture as a data URI in one of Pillow's formats."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
