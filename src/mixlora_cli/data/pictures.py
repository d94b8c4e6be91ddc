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

from PIL import Image

from mixlora_cli.data.problems import BadRecord, Kind

Stamp = tuple[int, int]
"""What tells that a picture is the one seen earlier: size in bytes, and time of change in ns (of a member: CRC-32)."""


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
        raise BadRecord(Kind.ESCAPING_IMAGE, f"{name} is absolute, expected a path relative to {images}")
    inside = split_archive(images)
    return _in_folder(name, images) if inside is None else _in_archive(name, images, *inside)


def _in_folder(name: str, images: Path) -> Path:
    real = os.path.realpath(images / name)
    if not Path(real).is_relative_to(images):
        raise BadRecord(Kind.ESCAPING_IMAGE, f"{name} leads to {real}, outside {images}")
    if not os.path.isfile(real):
        raise BadRecord(Kind.MISSING_IMAGE, name if not os.path.exists(real) else f"{name} is not a file")
    return images / name


def _in_archive(name: str, images: Path, archive: Path, folder: str) -> Path:
    parts: list[str] = []
    for part in PurePosixPath(name).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise BadRecord(Kind.ESCAPING_IMAGE, f"{name} leads outside {images}")
    member = "/".join([folder, *parts] if folder else parts)
    known = _opened(archive).NameToInfo
    if member not in known:
        is_folder = f"{member}/" in known
        raise BadRecord(Kind.MISSING_IMAGE, f"{name} is not a file" if is_folder else name)
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
