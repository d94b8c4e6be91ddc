"""When a request to a server is sent again, and after how long."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from threading import Event

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
)

LONGEST_WAIT = 60.0
"""Seconds; also what is kept of a longer `Retry-After`."""


class Passing(Exception):
    """A failure that may pass: the message says what happened."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


def retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date (RFC 9110, 10.2.3); 0 if unreadable."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 0.0


def retrying(retries: int, first_wait: float, stop: Event) -> Retrying:
    """Try `retries` times more while `Passing` is raised, and raise the last one.

    Waits double from `first_wait` seconds, with jitter, and are never shorter than the server asks. Setting `stop`
    ends every wait and every further try.
    """
    growing = wait_exponential_jitter(multiplier=first_wait, max=LONGEST_WAIT, jitter=first_wait)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, Passing) else 0.0
        return max(growing(state), asked)

    sleep: Callable[[float], None] = sleep_using_event(stop)
    return Retrying(
        sleep=sleep,
        stop=stop_any(stop_after_attempt(retries + 1), stop_when_event_set(stop)),
        wait=wait,
        retry=retry_if_exception_type(Passing),
        reraise=True,
    )
