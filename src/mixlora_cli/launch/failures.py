"""What went wrong in a worker, kept in a file until the launching process reads it.

When one worker fails, the others soon fail too because it is gone. The first failure is the cause, so the times are
noted exactly (torch's own error files know whole seconds).
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.store import write_text


@dataclass(frozen=True)
class Failure:
    """An exception that ended a worker."""

    time: float
    """Seconds since the epoch."""
    rank: int
    mistake: bool
    """It was a `UserError`."""
    text: str
    """Message of a user's mistake, else the traceback."""

    def as_error(self) -> UserError | WorkerFailed:
        """What the launching process raises."""
        if self.mistake:
            return UserError(self.text)
        return WorkerFailed(f"worker of rank {self.rank} failed:\n{self.text.rstrip()}")


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Note the exception that ends this worker; to be called where it is handled."""
    mistake = isinstance(error, UserError)
    text = str(error) if mistake else traceback.format_exc()
    write_text(folder / f"{rank}.json", json.dumps(asdict(Failure(time.time(), rank, mistake, text))))


def first_failure(folder: Path) -> Failure | None:
    """The earliest noted failure."""
    found = [Failure(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return min(found, key=lambda failure: failure.time, default=None)


def killed(rank: int, exit_code: int) -> WorkerFailed:
    """A worker that ended without a word.

    Args:
        exit_code: of the process; below 0 the number of the signal that killed it.
    """
    if exit_code >= 0:
        return WorkerFailed(f"worker of rank {rank} ended with exit code {exit_code} and said nothing")
    name = signal.Signals(-exit_code).name
    hint = " (where memory runs out, the system kills like this)" if name == "SIGKILL" else ""
    return WorkerFailed(f"worker of rank {rank} was killed by {name}{hint}")
