"""Picture files in a folder or inside a zip archive, under one kind of name: a path.

A path may lead *through* an archive: `data/images.zip/inner/cat.png` is the member `inner/cat.png` of `data/images.zip`
where that is a file. Nothing is unpacked; a member is read when it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.errors import cut
from mixlora_cli.progress import with_bar
from mixlora_cli.store import write_text

Stamp = tuple[int, int]
"""What tells that a picture is the one seen earlier: size in bytes, and time of change in ns (of a member: CRC-32)."""

Picture = Path | bytes
"""A picture's file (or archive member), or in streaming the file's bytes."""

PIXELS = "2"
"""Part of the key of what is kept of pixels: raise when the pixels that files give become others."""
MAX_PIXELS = 64_000_000
"""Largest picture that is decoded, width times height: 192 MB as RGB."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by the value of its EXIF orientation."""


def split_archive(path: Path) -> tuple[Path, str] | None:
    """Archive and member that `path` names; None for a plain path. The member need not exist; "" is the archive."""
    for place in (path, *path.parents):
        if place.suffix.lower() == ".zip" and place.is_file():
            inner = path.relative_to(place).as_posix()
            return place, "" if inner == "." else inner
    return None


def read_picture(path: Picture) -> bytes:
    """All bytes of a picture file.

    Raises:
        OSError: it cannot be read, or a member's checksum is wrong.
    """
    if isinstance(path, bytes):
        return path
    inside = split_archive(path)
    if inside is None:
        return path.read_bytes()
    archive, member = inside
    try:
        return _opened(archive).read(member)
    except KeyError:
        raise FileNotFoundError(f"no {member} in {archive}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"{member} in {archive.name}: {error}") from None


@contextlib.contextmanager
def open_picture(path: Picture) -> Iterator[Image.Image]:
    """The opened picture: size and format are known, pixels are decoded when they are asked for.

    Raises what Pillow raises for a damaged or foreign file, and OSError when it cannot be read.
    """
    is_file = isinstance(path, Path) and split_archive(path) is None
    with Image.open(path if is_file else io.BytesIO(read_picture(path))) as image:
        yield image


def as_shown(image: Image.Image, path: Picture) -> Image.Image:
    """The decoded picture as everything here sees it: upright by its EXIF orientation, 8 bits a sample.

    Raises what Pillow raises for a damaged file, and BadRecord where no brightness is known to be white.
    """
    image.load()
    orientation = _orientation(image)
    upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
    if upright.mode not in ("I", "F") and not upright.mode.startswith("I;16"):
        return upright
    return Image.fromarray(_eight_bits(np.asarray(upright), f"{picture_name(path)} has a brightness"))


def is_upright(image: Image.Image) -> bool:
    """Whether its EXIF orientation, if it has one, leaves an opened picture as it is."""
    return _orientation(image) not in _TURNS


def _orientation(image: Image.Image) -> int:
    """How a picture lies, as EXIF numbers it from 1, which is upright."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a part of the file that nobody can read turns nothing
        return 1


def opened(picture: Picture) -> Image.Image:
    """A picture upright, in RGB.

    Raises:
        BadRecord: it is damaged, not a picture, or its brightness has no known range.
    """
    with _readable(picture), open_picture(picture) as image:
        return as_shown(image, picture).convert("RGB")


def size_as_shown(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture that is set upright, from its file's head.

    Raises:
        BadRecord: it is damaged or not a picture.
    """
    with _readable(picture), open_picture(picture) as image:
        width, height = image.size
        on_its_side = _orientation(image) >= 5
    return (height, width) if on_its_side else (width, height)


@contextlib.contextmanager
def _readable(picture: Picture) -> Iterator[None]:
    """Inside, whatever a decoder raises becomes a BadRecord."""
    name = picture_name(picture)
    try:
        yield
    except BadRecord:
        raise
    except Image.DecompressionBombError:
        raise BadRecord(Kind.HUGE_IMAGE, f"{name}: more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()).replace(str(picture), name)
        raise BadRecord(Kind.CORRUPT_IMAGE, f"{name}: {reason or type(error).__name__}") from None


def _eight_bits(samples: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    """Grey samples (H, W) of more than 8 bits, scaled: 16-bit integers from 0..65535, floats from 0..1.

    32-bit integers have no white of their own: those up to 255 stay, those up to 65535 are 16-bit ones.
    """
    low, high = samples.min(), samples.max()
    is_float = samples.dtype.kind == "f"
    most = 1 if is_float else 65535
    if not (low >= 0 and high <= most):  # nor where there is a NaN
        raise BadRecord(
            Kind.UNKNOWN_RANGE, f"{what} from {low:g} to {high:g}, expected 0 to {most}; save it as 8 bits"
        )
    is_eight_bits = samples.dtype.itemsize == 4 and not is_float and high <= 255
    scaled: npt.NDArray[np.uint8] = np.rint(samples * (1 if is_eight_bits else 255 / most)).astype(np.uint8)
    return scaled


def picture_name(picture: Picture) -> str:
    """What messages call a picture."""
    return "a picture in the data" if isinstance(picture, bytes) else cut(picture.name)


def stamp(path: Picture) -> Stamp | None:
    """Size and mark of a picture file's content; None when it is not there."""
    if isinstance(path, bytes):
        return len(path), zlib.crc32(path)
    inside = split_archive(path)
    try:
        if inside is not None:
            info = _opened(inside[0]).getinfo(inside[1])
            return info.file_size, info.CRC
        status = path.stat()
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
    return status.st_size, status.st_mtime_ns


def locate_picture(name: str, images: Path) -> Path:
    """Path of the picture `name` in `images`, a resolved folder (links are followed) or a folder in an archive.

    Raises:
        BadRecord: the picture is outside `images`, does not exist or is not a file.
    """
    if os.path.isabs(name):
        raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} is absolute, expected a path relative to {images}")
    inside = split_archive(images)
    if inside is None:
        real = os.path.realpath(images / name)
        if not Path(real).is_relative_to(images):
            raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} leads to {cut(real, 255)}, outside {images}")
        path, is_file, is_folder = images / name, os.path.isfile(real), os.path.exists(real)
    else:
        archive, folder = inside
        member = posixpath.normpath(name)
        if member.split("/")[0] == "..":
            raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} leads outside {images}")
        member = posixpath.normpath(f"{folder}/{member}").lstrip("/")
        known = _opened(archive).NameToInfo
        path, is_file, is_folder = archive / member, member in known, f"{member}/" in known
    if not is_file:
        raise BadRecord(Kind.MISSING_IMAGE, f"{cut(name)} is not a file" if is_folder else cut(name))
    return path


class _Archive(zipfile.ZipFile):
    owner = os.getpid()
    """The process whose place in the open file `fp` is."""


def _opened(archive: Path) -> zipfile.ZipFile:
    status = archive.stat()
    opened = _open(str(archive), (status.st_size, status.st_mtime_ns))
    if opened.owner != os.getpid():
        # A forked worker would share its parent's place in the file. The directory is there already: reading it
        # takes seconds and 700 bytes for each member.
        opened.fp, opened.owner = archive.open("rb"), os.getpid()
    return opened


@lru_cache(maxsize=4)
def _open(archive: str, version: Stamp) -> _Archive:
    return _Archive(archive)


def open_fully(path: Picture) -> None:
    """Decode a picture to its last pixel.

    Raises:
        BadRecord: it is too large, damaged, not a picture, or its brightness has no known range.
    """
    with _readable(path):
        with open_picture(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                name = picture_name(path)
                detail = f"{name} has {width} x {height} pixels, at most {MAX_PIXELS} allowed"
                raise BadRecord(Kind.HUGE_IMAGE, detail)
            image.verify()  # checksums, without decoding; leaves the image unusable
        with open_picture(path) as image:
            as_shown(image, path)


def check_images(paths: Iterable[Path], folder: Path, cache: Path) -> dict[Path, BadRecord]:
    """Open all distinct pictures in parallel; the bad ones with what is wrong.

    Pictures that opened well are remembered in the folder `cache` by size and time of change, so that the
    next start only looks at files that are new or have changed. `folder` is the image folder, which names the
    memory's file.
    """
    memory = Memory(cache / "checked-images", f"{folder} {PIXELS}")
    marks = {path: stamp(path) for path in dict.fromkeys(paths)}
    names = {path: os.path.relpath(path, folder) for path in marks}
    unseen = [
        path for path, mark in marks.items() if mark is None or memory.known.get(names[path]) != [*mark]
    ]
    bad: dict[Path, BadRecord] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = zip(unseen, pool.map(_mistake_in, unseen), strict=True)
        for path, problem in with_bar(results, "checking images", total=len(unseen)):
            if problem is not None:
                bad[path] = problem
            elif (mark := marks[path]) is not None:
                memory.known[names[path]] = [*mark]
    if unseen:
        memory.save()
    return bad


def _mistake_in(path: Path) -> BadRecord | None:
    try:
        open_fully(path)
    except BadRecord as problem:
        return problem
    return None


class Memory:
    """What was found out about pictures, by name; JSON in one file for each `subject` (a picture folder).

    Losing it costs only time: a file that cannot be read is as good as none, and one that cannot be written no error.
    """

    def __init__(self, folder: Path, subject: str) -> None:
        self._file = folder / f"{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._file.read_text("utf-8"))
            self.known = content if isinstance(content, dict) else {}

    def save(self) -> None:
        """Write all that is known."""
        with contextlib.suppress(OSError):
            write_text(self._file, json.dumps(self.known))
