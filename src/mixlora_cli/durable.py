"""Files and folders that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mixlora_cli.errors import UserError

DRAFT = ".partial"
_LFS_POINTER = b"version https://git-lfs"
_REPLACED = ".replaced"
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Error numbers of writing alone: a full or failing disk, a quota, a limit, a read-only file system."""
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""What the messages of `torch.save` contain when a file cannot be written; it keeps no error number."""


def is_lfs_pointer(path: Path) -> bool:
    """Whether git left a few lines about the file in its place: it was cloned without Git LFS."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def draft_of(path: Path) -> Path:
    """The name beside `path` under which it is written first."""
    return path.with_name(path.name + DRAFT)


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file in one step.

    Args:
        errors: what `open` does with characters that UTF-8 cannot hold.
    """
    draft = draft_of(path)
    with draft.open("w", encoding="utf-8", errors=errors) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync(path.parent)


def put_in_place(draft: Path, folder: Path) -> None:
    """Give a folder, all on the disk already (`sync_files`), the name that counts; one that has it goes.

    A folder cannot be replaced in one step: for a moment there is none of this name, but never half a one.
    """
    replaced = folder.with_name(folder.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    draft.rename(folder)
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


def move_unless_there(folder: Path, root: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename `folder` to `root`; where another process was faster with the same files, theirs stay.

    Raises:
        OSError: it cannot be renamed, and what is at `root` is not `is_whole`.
    """
    try:
        folder.rename(root)
    except OSError:
        if not is_whole(root):
            raise


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


def remove_leftovers(folder: Path) -> None:
    """Delete the drafts that a killed process left in `folder`."""
    for path in [*folder.glob(f"*{DRAFT}"), *folder.glob(f"*{_REPLACED}")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def write_errors(folder: Path, what_now: Callable[[], str]) -> Iterator[None]:
    """Turn a full or failing disk into a line for people.

    Args:
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
