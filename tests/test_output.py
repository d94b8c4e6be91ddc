"""One process writes into an output folder at a time, and what cannot be written is one line."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.output import LOCK, alone_in, one_line_errors, require_writable

HOLD = """
import os, sys, time
from pathlib import Path
from mixlora_cli.output import alone_in
with alone_in(Path(sys.argv[1]), "training"):
    if os.fork() == 0:  # such as a process that loads data; it outlives the other
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print("holds", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a child of its own that holds the lock of `tmp_path / "run"` until a line comes."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_second_process_stops_at_once_and_hears_who_is_there(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError) as stop, alone_in(folder, "evaluation"):
        raise AssertionError("went in")
    assert str(stop.value) == (
        f"output_dir={folder}: another training writes here (process {holder.pid} on {socket.gethostname()}); "
        "wait until it has ended, or give another output_dir="
    )
    assert (folder / LOCK).is_file()  # the other one's


def test_the_lock_of_a_killed_process_is_free_also_while_a_child_of_it_lives(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "run"
    holder.kill()
    holder.wait()
    assert (folder / LOCK).is_file()
    with alone_in(folder, "training"):
        assert (folder / LOCK).read_text() == f"training\nprocess {os.getpid()} on {socket.gethostname()}\n"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_folder_without_anything_written_goes_again_and_others_stay(tmp_path: Path) -> None:
    with alone_in(tmp_path / "runs" / "one", "training"):
        assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path / "runs" / "two", "training"):
        (tmp_path / "runs" / "two" / "result").write_text("")
    assert [path.name for path in (tmp_path / "runs" / "two").iterdir()] == ["result"]


def test_of_several_processes_only_the_first_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with alone_in(tmp_path / "run", "training"):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    with alone_in(tmp_path, "training"):
        pass
    assert capsys.readouterr().err == (
        f"note: {tmp_path} is on a file system without locks: nothing keeps others out\n"
    )


def test_a_lock_file_that_its_owner_has_just_removed_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.lockf, []

    def remove_first(*arguments: object) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(True)
        lock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with alone_in(tmp_path, "training"):
        assert (tmp_path / LOCK).is_file()


ERRORS = {
    "no space, as `write` says it": (
        OSError(errno.ENOSPC, "No space left on device"),
        "free some space there, or ",
    ),
    "no space": (OSError(errno.ENOSPC, "No space left on device", "{out}/a"), "free some space there, or "),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "{out}/a/b"), "free some space there, or "),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "{out}/a"), ""),
    "a parent is forbidden": (PermissionError(errno.EACCES, "Permission denied", "{tmp}"), ""),
    "a parent is a file": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "{out}"), ""),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_system_refuses_names_key_path_and_reason(name: str, tmp_path: Path) -> None:
    error, room = ERRORS[name]
    out = tmp_path / "out"
    path = None if error.filename is None else error.filename.format(out=out, tmp=tmp_path)
    raised = type(error)(error.errno, error.strerror, *([] if path is None else [path]))
    with pytest.raises(UserError) as stop, one_line_errors(out):
        raise raised
    assert str(stop.value) == (
        f"output_dir={out}: cannot be written ({error.strerror}); {room}give another output_dir="
    )


def test_the_cache_is_named_by_what_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as stop, one_line_errors(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache" / "mini"))
    assert str(stop.value) == (
        f"the cache in {tmp_path / 'cache'} cannot be written: Permission denied; free some space, set MIXLORA_CACHE "
        "to a folder elsewhere"
    )


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/picture.png"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "{out}/a"),
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as stop, one_line_errors(tmp_path):
        raise error
    assert stop.value is error


def test_a_name_that_the_system_cannot_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError) as stop, one_line_errors(tmp_path):
        "/pictures/猫.png".encode("ascii")
    assert str(stop.value) == (
        r"'/pictures/\u732b.png': cannot be the name of a file in this system's encoding, ascii; "
        "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    )


def test_whether_a_folder_can_be_made_is_seen_without_making_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^output_dir=.*/file/b: cannot be written \(Not a directory\); give"
    ):
        require_writable(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"^output_dir=.*/a/b: cannot be written \(Permission denied\); give"):
        require_writable(tmp_path / "a" / "b")
