"""What a record gives as a picture, as every tool writes it, to a `Picture`: a path, base64, bytes or an object."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mixlora_cli.data.images import Picture, locate_picture
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.errors import cut
from mixlora_cli.paths import cache_root, unusable
from mixlora_cli.store import atomic

CONTENT_KEYS = ("bytes", "base64", "data")
"""Keys of an object that hold a picture itself, bytes or base64."""
PICTURE_KEYS = (*CONTENT_KEYS, "path", "url", "image_url", "image")
"""All keys of an object that say which picture it is, the first with a value first."""
_LONGEST_PATH = 4096
_DATA_URI = re.compile(r"data:[^,;]*(;[^,;]*)*;base64,")
_BASE64 = re.compile(
    r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[A-Za-z0-9+/]{6}AAAA|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}=*\s*"
)
"""Base64 without a header: how PNG, JPEG, GIF, WebP, BMP and TIFF files begin, and no sign that a file's name has."""


def picture_store() -> Path:
    """Folder in the cache for pictures that records hold in themselves, each under the digest of its bytes."""
    return cache_root() / "pictures"


def picture_from(value: Any, images: Path | None, store: Path | None) -> Picture:
    """The picture that a value of a record means.

    Args:
        value: a relative path, base64 with or without `data:image/...`, bytes, or an object with one of `PICTURE_KEYS`.
        images: the resolved folder that paths are relative to.
        store: folder where a picture that is in the record is written once; None: its bytes are returned.

    Raises:
        BadRecord: it is none of these, leads out of `images`, is not there, or is no picture.
        UserError: the picture cannot be written.
    """
    is_content, shown = False, value
    while isinstance(value, Mapping):
        key = next((key for key in PICTURE_KEYS if value.get(key) not in (None, "")), None)
        is_content, value = key in CONTENT_KEYS, None if key is None else value[key]
    if isinstance(value, str) and value:
        if value.startswith(("http://", "https://")):
            detail = f"{cut(value)}: a web address; download the picture and give its path"
            raise BadRecord(Kind.MALFORMED, detail)
        header = _DATA_URI.match(value[:200])
        if header or is_content or _BASE64.fullmatch(value):
            value = _decoded(value, header.end() if header else 0)
        elif value.startswith("data:") or len(value) > _LONGEST_PATH:
            raise BadRecord(Kind.CORRUPT_IMAGE, f"{cut(value)}: neither a path nor base64 of a picture")
    if isinstance(value, bytes):
        return _kept(value, store)
    if not isinstance(value, str) or not value or "\0" in value:
        detail = f"a picture must be a relative path, base64 or bytes, got {cut(repr(shown))}"
        raise BadRecord(Kind.MALFORMED, detail)
    if images is None:
        raise BadRecord(Kind.MISSING_IMAGE, f"{cut(value)}: no image folder is set (data.images=<folder>)")
    return locate_picture(value.removeprefix("file://"), images)


def _decoded(text: str, start: int) -> bytes:
    try:
        return base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(Kind.CORRUPT_IMAGE, f"{cut(text)}: not base64 ({error})") from None


def _kept(content: bytes, store: Path | None) -> Picture:
    """The bytes of a picture, or the file in `store` that has them."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            form = (opened.format or "bin").lower()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, a warning as an error, ...
        size = f"{len(content):,} bytes in the record that are no picture"
        raise BadRecord(Kind.CORRUPT_IMAGE, f"{size} ({type(error).__name__})") from None
    if store is None:
        return content
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    path = store / name[:2] / f"{name}.{form}"
    try:
        if not path.is_file() or path.stat().st_size != len(content):
            with atomic(path, synced=False) as temp:
                temp.write_bytes(content)
    except OSError as error:
        raise unusable(store, error, ", or read the records as they come (data.streaming=true)") from error
    return path
