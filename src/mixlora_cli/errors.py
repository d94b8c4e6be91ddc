"""Errors that a person can act on."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: one line that says what was wrong, what was expected and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def cut(name: object, most: int = 80) -> str:
    """A name that a user gave, for messages and tables: at most `most` characters, all of them Unicode."""
    text = str(name)
    shown = text if len(text) <= most else f"{text[: most - 3]}..."
    return shown.encode("utf-8", "backslashreplace").decode()


class WorkerFailed(Exception):
    """One of several processes of a command failed; the message says which and how, with its traceback.

    The command line prints the message alone and exits with code 1.
    """
