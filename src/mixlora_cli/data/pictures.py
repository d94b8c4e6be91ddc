"""Picture files in a folder or inside a zip archive, under one kind of name: a path.

A path may lead *through* an archive: `data/images.zip/inner/cat.png` is the member `inner/cat.png` of `data/images.zip`
where that is a file. Nothing is unpacked; a member is read when it is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.errors import cut

Stamp = tuple[int, int]
"""What tells that a picture is the one seen earlier: size in bytes, and time of change in ns (of a member: CRC-32)."""

PIXELS = "2"
"""Part of the key of what is kept of pixels: raise when the pixels that files give become others."""
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


def read_picture(path: Path) -> bytes:
    """All bytes of a picture file.

    Raises OSError when it cannot be read; of a member also when its checksum is wrong.
    """
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
def open_picture(path: Path) -> Iterator[Image.Image]:
    """The opened picture: size and format are known, pixels are decoded when they are asked for.

    Raises what Pillow raises for a damaged or foreign file, and OSError when it cannot be read.
    """
    source: Path | IO[bytes] = path if split_archive(path) is None else io.BytesIO(read_picture(path))
    with Image.open(source) as image:
        yield image


def as_shown(opened: Image.Image, path: Path) -> Image.Image:
    """The decoded picture as everything here sees it: upright by its EXIF orientation, 8 bits a sample.

    Raises what Pillow raises for a damaged file, and BadRecord where no brightness is known to be white.
    """
    opened.load()
    turn = _TURNS.get(_orientation(opened))
    upright = opened if turn is None else opened.transpose(turn)
    if upright.mode not in ("I", "F") and not upright.mode.startswith("I;16"):
        return upright
    return Image.fromarray(_eight_bits(np.asarray(upright), f"{cut(path.name)} has a brightness"))


def _orientation(opened: Image.Image) -> int:
    try:
        return int(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a part of the file that nobody can read turns nothing
        return 1


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


def stamp(path: Path) -> Stamp | None:
    """Size and mark of a picture file's content; None when it is not there."""
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

    Raises BadRecord when the picture is outside `images`, does not exist or is not a file.
    """
    if os.path.isabs(name):
        raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} is absolute, expected a path relative to {images}")
    inside = split_archive(images)
    return _in_folder(name, images) if inside is None else _in_archive(name, images, *inside)


def _in_folder(name: str, images: Path) -> Path:
    real = os.path.realpath(images / name)
    if not Path(real).is_relative_to(images):
        raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} leads to {cut(real, 255)}, outside {images}")
    if not os.path.isfile(real):
        shown = cut(name)
        raise BadRecord(Kind.MISSING_IMAGE, shown if not os.path.exists(real) else f"{shown} is not a file")
    return images / name


def _in_archive(name: str, images: Path, archive: Path, folder: str) -> Path:
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise BadRecord(Kind.ESCAPING_IMAGE, f"{cut(name)} leads outside {images}")
    member = "/".join([folder, *parts] if folder else parts)
    known = _opened(archive).NameToInfo
    if member not in known:
        is_folder = f"{member}/" in known
        raise BadRecord(Kind.MISSING_IMAGE, f"{cut(name)} is not a file" if is_folder else cut(name))
    return archive / member


def _opened(archive: Path) -> zipfile.ZipFile:
    status = archive.stat()
    return _open(str(archive), (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=4)
def _open(archive: str, version: Stamp) -> zipfile.ZipFile:
    return zipfile.ZipFile(_PositionedFile(archive) if hasattr(os, "pread") else archive)


class _PositionedFile(io.RawIOBase):
    """A file to read whose place is this object's own, not the open file's that forked workers share.

    So workers need not read the archive's directory again, which takes seconds and 700 bytes for each member.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = open(path, "rb")  # noqa: SIM115  # closed with this object
        self._size = os.fstat(self._file.fileno()).st_size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._file.fileno(), len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
