"""A command's output folder: one process writes there at a time, and what keeps it from that is one line."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mixlora_cli.errors import UserError
from mixlora_cli.launch import global_rank
from mixlora_cli.paths import cache_root, unusable
from mixlora_cli.store import WRITE_ERRORS

LOCK = ".writing"
"""File in the folder while a process writes there; what counts is the lock on it, which dies with it."""
_TAKEN = {errno.EACCES, errno.EAGAIN}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_LONGEST_NAME = 80


@contextmanager
def alone_in(folder: Path, doing: str, key: str = "output_dir") -> Iterator[None]:
    """Hold the lock of a folder, which is made; of several processes that work together, the first holds it.

    Folders that were made here go again where nothing was written into them.

    Args:
        folder: where the block writes.
        doing: what another process is told that this one does, as in "training".
        key: of the configuration, to be named in messages.

    Raises:
        UserError: another process writes there, or the folder cannot be written; as `one_line_errors`.
    """
    with one_line_errors(folder, key):
        if global_rank() != 0:
            yield
            return
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        file = _locked(folder, doing, key)
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
            file.close()
            for each in made:
                with suppress(OSError):  # not empty
                    each.rmdir()


def _locked(folder: Path, doing: str, key: str) -> IO[str]:
    """The folder's lock file, locked. No child inherits this kind of lock, as it would that of flock."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                with file:
                    raise _somebody_else(folder, file, doing, key) from None
            print(
                f"note: {folder} is on a file system without locks: nothing keeps others out", file=sys.stderr
            )
        if _is_at(file, path):  # the last one to write here removes it, maybe after it was opened
            file.truncate(0)
            file.write(f"{doing}\nprocess {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _somebody_else(folder: Path, file: IO[str], doing: str, key: str) -> UserError:
    file.seek(0)
    what, who, *_ = [*file.read().splitlines(), "", ""]
    who = f" ({who})" if who else ""
    return UserError(
        f"{key}={folder}: another {what or doing} writes here{who}; "
        f"wait until it has ended, or give another {key}="
    )


def require_writable(folder: Path, key: str = "output_dir") -> None:
    """Do nothing where a folder, or files in it, can be made; to be asked before long work.

    Raises:
        UserError: they cannot.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise _unwritable(folder, key, errno.ENOTDIR)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(folder, key, errno.EACCES)


@contextmanager
def one_line_errors(folder: Path | None, key: str = "output_dir") -> Iterator[None]:
    """Turn what the system refuses to write, there or in the cache, into a line for people.

    Args:
        folder: where the block writes; None where that is not known.
        key: of the configuration, which says so.

    Raises:
        UserError: something could not be written, or a name cannot be said in the encoding of this system.
    """
    try:
        yield
    except OSError as error:
        mistake = _explained(error, folder, key)
        if mistake is None:
            raise
        raise mistake from error
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        raise UserError(
            f"{ascii(error.object)[:_LONGEST_NAME]}: cannot be the name of a file in this system's encoding, "
            f"{encoding}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        ) from error


def _explained(error: OSError, folder: Path | None, key: str) -> UserError | None:
    """The line for people; None for an error that has nothing to do with writing, or with other places."""
    if error.errno not in WRITE_ERRORS | _FORBIDDEN:
        return None
    path = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, (str, bytes)) else None
    if path is not None and folder is not None and _touches(path, folder):
        return _unwritable(folder, key, error.errno)
    if path is not None and _touches(path, cache_root()):
        return unusable(cache_root(), error)
    if error.errno not in WRITE_ERRORS:
        return None
    if path is None and folder is not None:  # `write` itself does not say where
        return _unwritable(folder, key, error.errno)
    return UserError(f"{path or 'a file'}: cannot be written ({error.strerror}); free some space there")


def _touches(path: Path, folder: Path) -> bool:
    """Whether `path` is the folder, inside it, or one of the folders that it is in."""
    place = folder.absolute()
    return path.is_relative_to(place) or place.is_relative_to(path)


def _unwritable(folder: Path, key: str, number: int) -> UserError:
    room = "free some space there, or " if number in WRITE_ERRORS else ""
    return UserError(f"{key}={folder}: cannot be written ({os.strerror(number)}); {room}give another {key}=")
