"""Open every picture once before training: missing bytes, unknown formats and decompression bombs show up
here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console

from mixlora_cli.data.pictures import PIXELS, Stamp, as_shown, open_picture, stamp
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.errors import cut
from mixlora_cli.progress import with_bar

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded, width times height: 192 MB as RGB."""

_Opened = tuple[Path, BadRecord | None]


def open_fully(path: Path) -> None:
    """Decode a picture to its last pixel.

    Raises BadRecord when it is too large, damaged, not a picture, or its brightness has no known range.
    """
    try:
        with open_picture(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadRecord(
                    Kind.HUGE_IMAGE,
                    f"{cut(path.name)} has {width} x {height} pixels, at most {MAX_PIXELS} allowed",
                )
            image.verify()  # checksums, without decoding; leaves the image unusable
        with open_picture(path) as image:
            as_shown(image, path)
    except BadRecord:
        raise
    except Image.DecompressionBombError:
        raise BadRecord(Kind.HUGE_IMAGE, f"{cut(path.name)}: more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        name = cut(path.name)
        reason = " ".join(str(error).split()).replace(str(path), name)
        raise BadRecord(Kind.CORRUPT_IMAGE, f"{name}: {reason or type(error).__name__}") from None


def check_images(paths: Iterable[Path], folder: Path, cache: Path) -> dict[Path, BadRecord]:
    """Open all distinct pictures in parallel; the bad ones with what is wrong.

    Pictures that opened well are remembered in the folder `cache` by size and time of change, so that the
    next start only looks at files that are new or have changed. `folder` is the image folder, which names the
    memory's file.
    """
    subject = hashlib.sha256(f"{folder} {PIXELS}".encode()).hexdigest()[:16]
    store = cache / "checked-images" / f"{subject}.json"
    known = _read_stamps(store)
    stamps = {path: stamp(path) for path in dict.fromkeys(paths)}
    unseen = [path for path, mark in stamps.items() if mark is None or known.get(_key(path, folder)) != mark]
    if not unseen:
        return {}
    bad: dict[Path, BadRecord] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = zip(unseen, pool.map(_try_open, unseen), strict=True)
        for path, problem in _progress(results, len(unseen)):
            if problem is not None:
                bad[path] = problem
    good = {_key(path, folder): mark for path in unseen if path not in bad and (mark := stamps[path])}
    _write_stamps(store, known | good)
    return bad


def _progress(results: Iterable[_Opened], total: int) -> Iterable[_Opened]:
    """A progress bar where someone is watching."""
    console = Console(stderr=True)
    return with_bar(results, "checking images", console, total)


def _try_open(path: Path) -> BadRecord | None:
    try:
        open_fully(path)
    except BadRecord as problem:
        return problem
    return None


def _key(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _read_stamps(store: Path) -> dict[str, Stamp]:
    """The memory of earlier checks; an unreadable one is as good as none."""
    try:
        return {key: (size, changed) for key, (size, changed) in json.loads(store.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_stamps(store: Path, stamps: dict[str, Stamp]) -> None:
    """Written beside and renamed, so that a second process never reads half a file. A read-only cache costs
    only time.
    """
    part = store.with_suffix(f".{os.getpid()}.part")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(stamps), encoding="utf-8")
        part.replace(store)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
