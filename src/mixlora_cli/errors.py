"""Errors that a person can act on."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: one line that says what was wrong, what was expected and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class WorkerFailed(Exception):
    """One of several processes of a command failed; the message says which and how, with its traceback.

    The command line prints the message alone and exits with code 1.
    """
