"""Files and folders that are complete or not there at all, and JSON-lines logs that go on where they were."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mixlora_cli.errors import UserError

TEMP = ".partial"
_REPLACED = ".replaced"
_LFS_POINTER = b"version https://git-lfs"
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Error numbers of writing alone: a full or failing disk, a quota, a limit, a read-only file system."""
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""What the messages of `torch.save` contain when a file cannot be written; it keeps no error number."""


@contextmanager
def atomic(path: Path, synced: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name once the block has filled it; folders are made.

    The name is this process's own, so that several may write the same file. Where the block fails, nothing is left.

    Args:
        path: the file.
        synced: wait until the disk has it; a cache of many small files does without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}{TEMP}")
    try:
        yield temp
        if synced:
            sync(temp)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    if synced:
        sync(path.parent)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file in one step.

    Args:
        path: the file.
        text: its contents.
        errors: what `open` does with characters that UTF-8 cannot hold.
    """
    with atomic(path) as temp:
        temp.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def temp_of(folder: Path) -> Path:
    """The name beside `folder` under which it is filled before `publish_folder` gives it its own."""
    return folder.with_name(folder.name + TEMP)


def publish_folder(temp: Path, folder: Path) -> None:
    """Give a folder, all on the disk already (`sync_files`), the name that counts; one that has it goes.

    A folder cannot be replaced in one step: for a moment there is none of this name, but never half a one.
    """
    replaced = folder.with_name(folder.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temp.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def folder_beside(root: Path) -> Iterator[Path]:
    """A new folder on the disk of `root`, to be filled and renamed; removed again unless it was."""
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    folder.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from everybody else
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rename_unless_there(folder: Path, root: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename `folder` to `root`; where another process was faster with the same files, theirs stay.

    Raises:
        OSError: it cannot be renamed, and what is at `root` is not `is_complete`.
    """
    try:
        folder.rename(root)
    except OSError:
        if not is_complete(root):
            raise


def move_aside(path: Path) -> Path:
    """Rename a file to the first free `<name>.<number>.<suffix>` and return that."""
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)


def remove_temporary(folder: Path) -> None:
    """Delete what a killed process left in `folder` under temporary names."""
    for path in [*folder.glob(f"*{TEMP}"), *folder.glob(f"*{_REPLACED}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def readable_as_usual(file: Path) -> None:
    """Give a file that safetensors wrote, for its owner alone, the permissions that the user's umask says."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def sync_files(folder: Path) -> None:
    """Return when the disk has all files below `folder`, and the folders that name them."""
    for inside, _, files in os.walk(folder):
        for name in files:
            sync(Path(inside) / name)
        sync(Path(inside))


def sync(path: Path) -> None:
    """Return when the disk has a file's contents, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_lfs_pointer(path: Path) -> bool:
    """Whether git left a few lines about the file in its place: it was cloned without Git LFS."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def digest_of(parts: Any) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def changed_parts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of the parts in which two fingerprints differ."""
    return [name for name in dict.fromkeys([*theirs, *ours]) if ours.get(name) != theirs.get(name)]


@dataclass(frozen=True)
class LogContents:
    """A JSON-lines log as it was read."""

    header: dict[str, Any] | None
    """The first line; None where a kill left less than that."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """The complete lines behind the header, in order."""
    end: int = 0
    """Offset behind the last complete line, in bytes."""
    cut: bool = False
    """Whether a last line was left out because a kill cut it short."""


def read_log(path: Path, format: str, what_to_do: str, header_only: bool = False) -> LogContents:
    """Read a JSON-lines log whose first line is a header with `format`; a last line that was cut short is left out.

    Args:
        path: the file.
        format: what the header's key "format" must hold.
        what_to_do: the end of the message about a file that cannot be read, as in "move it away and evaluate again".
        header_only: read the first line alone.

    Raises:
        UserError: the file is of another kind, or a line that is not the last one cannot be read.
    """
    lines: list[dict[str, Any]] = []
    end, cut = 0, False
    with path.open("rb") as file:
        rest = iter(file)
        for number, line in enumerate(rest, start=1):
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if not isinstance(content, dict):
                if next(rest, None) is None:
                    cut = True
                    break
                raise UserError(f"{path}, line {number} cannot be read: {what_to_do}")
            if number == 1 and content.get("format") != format:
                raise UserError(
                    f"{path} is no file of this version (expected a first line with format {format}): {what_to_do}"
                )
            lines.append(content)
            end += len(line)
            if header_only:
                break
    return LogContents(lines[0] if lines else None, lines[1:], end, cut)


class Log:
    """A JSON-lines log that is open for writing; what `append` was given is on the disk when it returns."""

    def __init__(self, file: BinaryIO, records: Sequence[dict[str, Any]] = ()) -> None:
        self._file = file
        self.records = list(records)
        """What was there when it was opened."""

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write complete lines in one go and wait until the disk has them."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if lines:
            self._file.write(lines.encode(errors="replace"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def open_log(
    path: Path,
    header: Mapping[str, Any],
    what_to_do: str,
    announce: Callable[[str], None] = print,
    what_now: str = "starting anew",
) -> Log:
    """Go on with the log at `path` where its fingerprint is the same, else start a new one.

    A log with another fingerprint is moved aside and `announce`d with what changed. A line cut short is cut off.

    Args:
        path: the file.
        header: its first line: at least "format", and a mapping "fingerprint" that names what the records depend on.
        what_to_do: as in `read_log`.
        announce: told what became of a file with another fingerprint.
        what_now: the end of what it is told.

    Raises:
        UserError: what is there cannot be read.
    """
    found = read_log(path, header["format"], what_to_do) if path.exists() else LogContents(None)
    if found.header is not None:
        changed = changed_parts(header["fingerprint"], found.header["fingerprint"])
        if not changed:
            return _append_to(path, found)
        aside = move_aside(path)
        announce(
            f"{path.name} was made with other settings ({', '.join(changed)} changed): kept as {aside.name}, {what_now}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    log = Log(path.open("wb"))
    log.append([header])
    return log


def resume_log(path: Path, format: str, what_to_do: str) -> Log:
    """Go on with the log at `path` whatever its fingerprint.

    Raises:
        UserError: it cannot be read.
    """
    return _append_to(path, read_log(path, format, what_to_do))


def _append_to(path: Path, found: LogContents) -> Log:
    file = path.open("r+b")
    file.truncate(found.end)
    file.seek(found.end)
    return Log(file, found.records)


@contextmanager
def write_errors(folder: Path, what_now: Callable[[], str]) -> Iterator[None]:
    """Turn a full or failing disk into a line for people.

    Args:
        folder: what is written.
        what_now: what to do; asked for when the error is there.

    Raises:
        UserError: something inside could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        raise UserError(
            f"{folder}: cannot be written: {reason} ({free / 1e6:,.0f} MB free there); {what_now()}"
        ) from error


def _reason(error: OSError | RuntimeError | SafetensorError) -> str | None:
    """Why writing failed; None for errors of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in WRITE_ERRORS else None
    if isinstance(error, SafetensorError):
        text = str(error)
        return text.rpartition("I/O error: ")[2] if "I/O error" in text else None
    return "a file came out incomplete" if any(name in str(error) for name in _TORCH_WRITER) else None
