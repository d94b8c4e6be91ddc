"""A server with OpenAI's interface, vLLM for one, asked many questions at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any, Protocol, TypeVar

import httpx
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

from mixlora_cli.errors import UserError, cut
from mixlora_cli.progress import say

K = TypeVar("K")
Q = TypeVar("Q")
Body = dict[str, Any]
KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT = 60.0
"""Seconds; also what is kept of a longer `Retry-After`."""
_PASSING = {408, 409, 425, 429}
_ABOUT_THE_QUESTION = {400, 413, 422}
_UNKNOWN = {404, 405, 501}
_HERE = ("all://127.0.0.1", "all://localhost", "all://[::1]")
_SHOWN = 200
"""Characters of a server's own message that are passed on."""
_NAMED = 20  # models that a message lists


class Patience(Protocol):
    """How many requests run at once, and how often and when they are tried again: keys of a configuration."""

    @property
    def concurrency(self) -> int:
        """Requests under way at once."""

    @property
    def timeout(self) -> float:
        """Seconds without a sign of the server after which a request counts as failed."""

    @property
    def retries(self) -> int:
        """Further tries of a request that failed in a way that may pass."""

    @property
    def first_wait(self) -> float:
        """Seconds before the first further try; they double from there."""


@dataclass(frozen=True)
class Words:
    """What messages call the server and the keys that lead to it."""

    server: str
    """As in "the judge"."""
    url: str
    """Key of its address."""
    others: str
    """Further keys that may be why it knows no such address or model."""
    asked: str
    """As in "questions"."""
    skip: str
    """What can be done with those that it refuses, as in "count them as unparsed with judge.on_refusal=unparsed"."""


class _Passing(Exception):
    """A failure that may pass: the message says what happened."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class _Refused(Exception):
    """The server will not answer this one question, however often it is asked."""


class _Unknown(Exception):
    """The server knows no such address, or no such model."""


@dataclass(frozen=True)
class Server:
    """Keeps `patience.concurrency` requests under way; gives up when the server answers none any more."""

    url: str
    """Up to and with /v1."""
    patience: Patience
    words: Words
    refused: str | None = None
    """What stands for the text that the server refuses; None: a refusal is an error, once the others are answered."""

    def __post_init__(self) -> None:
        """Raises UserError where the address is none."""
        with self._connected() as client:
            if client.base_url.scheme not in ("http", "https") or not client.base_url.host:
                raise UserError(f"{self.words.url}={self.place}: expected http://host:port/v1")

    @property
    def place(self) -> str:
        """The address without a password."""
        return str(httpx.URL(self.url).copy_with(username=None, password=None)).rstrip("/")

    def texts(self, path: str, asked: Mapping[K, Q], body: Callable[[Q], Body]) -> Iterator[tuple[K, str]]:
        """The texts of all replies, each with the key of what was asked, as they come.

        Args:
            path: "completions" or "chat/completions".
            asked: questions by key.
            body: of the request for a question; it is made when its turn comes, in a thread.

        Raises:
            UserError: a question was not answered after all retries, once the others are; at once when the server
                answers none any more, refuses them all alike, or knows neither key, address nor model.
        """
        stop, lock = Event(), Lock()
        failures: list[_Passing | _Refused] = []
        before_last_reply = 0  # failures until the last question that had a reply
        again = self._retrying(stop)

        def answer(client: httpx.Client, question: Q) -> str | None:
            nonlocal before_last_reply
            if stop.is_set():
                return None
            try:
                text: str = again(self._text, client, path, body(question))
            except (_Passing, _Refused) as error:
                if isinstance(error, _Passing) or self.refused is None:
                    with lock:
                        failures.append(error)
                        if len(failures) - before_last_reply >= max(self.patience.concurrency, 3):
                            stop.set()
                    return None
                text = self.refused
            except BaseException:
                stop.set()
                raise
            with lock:
                before_last_reply = len(failures)
            return text

        with (
            self._connected() as client,
            ThreadPoolExecutor(self.patience.concurrency, thread_name_prefix="asking") as pool,
        ):
            try:
                keys = {pool.submit(answer, client, question): key for key, question in asked.items()}
                for future in as_completed(keys):
                    if (text := future.result()) is not None:
                        yield keys[future], text
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        self._report(failures)

    def models(self) -> list[dict[str, Any]]:
        """What the server lists as its models, each with its "id"; empty where it has no such list.

        Raises:
            UserError: it cannot be reached after all retries, or wants another key.
        """
        with self._connected() as client:
            try:
                return list(self._retrying(Event())(self._listed, client))
            except _Passing as error:
                raise UserError(
                    f"{self.words.server} at {self.place} cannot be asked for its models: {error}; "
                    f"check {self.words.url}"
                ) from error
            except (_Refused, _Unknown):
                return []

    def _listed(self, client: httpx.Client) -> list[dict[str, Any]]:
        response = self._send(client, "GET", "models")
        try:
            return [dict(each) for each in response.json()["data"] if isinstance(each["id"], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise _Unknown(_shown(response)) from error

    @contextmanager
    def _connected(self) -> Iterator[httpx.Client]:
        key, parallel = os.environ.get(KEY_VARIABLE), self.patience.concurrency
        try:
            client = httpx.Client(
                base_url=self.url.rstrip("/") + "/",
                timeout=self.patience.timeout,
                limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                mounts=dict.fromkeys(_HERE),  # no proxy
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{self.words.url}={self.url}: {error}; expected http://host:port/v1") from error
        with client:
            yield client

    def _text(self, client: httpx.Client, path: str, body: Body) -> str:
        """Text of the reply to one request.

        Raises _Passing, _Refused, or UserError for what fails every request alike (key, model, address).
        """
        try:
            response = self._send(client, "POST", path, body)
        except _Unknown as error:
            known: list[dict[str, Any]] = []
            with suppress(_Passing, _Refused, _Unknown, UserError):
                known = self._listed(client)
            has = f"; its models are {', '.join(cut(each['id']) for each in known[:_NAMED])}" if known else ""
            raise UserError(
                f"{self.words.server} at {self.place} replied {error}; check {self.words.url} (it ends in /v1), "
                f"{self.words.others}{has}"
            ) from error
        shown = _shown(response)
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] if "messages" in body else choice["text"]
            why = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Passing(f"a reply without its text: {shown}") from error
        if why == "content_filter":
            raise _Refused(f"content_filter: {shown}")
        if not isinstance(text, str | None):
            raise _Passing(f"a reply whose text is none: {shown}")
        return text or ""  # None: a model that spent its tokens before it said anything

    def _send(self, client: httpx.Client, method: str, path: str, body: Body | None = None) -> httpx.Response:
        """A response that is one.

        Raises _Passing, _Refused, _Unknown, or UserError for what fails every request alike.
        """
        try:
            response = client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        status, said = response.status_code, f"HTTP {response.status_code}: {_shown(response)}"
        if status in _UNKNOWN:
            raise _Unknown(said)
        if status in _PASSING or status >= 500:
            raise _Passing(said, _retry_after(response.headers.get("Retry-After")))
        if status in _ABOUT_THE_QUESTION:
            raise _Refused(said)
        if not response.is_success:
            hint = f"; is {KEY_VARIABLE} set to this server's key?" if status in (401, 403) else ""
            raise UserError(f"{self.words.server} at {self.place} replied {said}{hint}")
        return response

    def _report(self, failures: Sequence[_Passing | _Refused]) -> None:
        failed = sum(isinstance(error, _Passing) for error in failures)
        if failed:
            raise UserError(
                f"{self.words.server} at {self.place} left {failed} {self.words.asked} unanswered after up to "
                f"{self.patience.retries} retries each; the last said: {failures[-1]}. All other replies are kept: the "
                "same command asks only what is missing"
            )
        if failures:
            raise UserError(
                f"{self.words.server} at {self.place} refused {len(failures)} {self.words.asked}; the last said: "
                f"{failures[-1]}. Mend that, or {self.words.skip}. All other replies are kept"
            )

    def _retrying(self, stop: Event) -> Retrying:
        """Try `retries` times more while `_Passing` is raised, and raise the last one.

        Waits double from `first_wait` seconds, with jitter, and are never shorter than the server asks. Setting `stop`
        ends every wait and every further try. The first wait is told.
        """
        told = Event()

        def tell(state: RetryCallState) -> None:
            if not told.is_set():
                told.set()
                error = state.outcome.exception() if state.outcome else None
                say(
                    f"{self.words.server} at {self.place}: {error}; trying again, up to {self.patience.retries} times"
                )

        first = self.patience.first_wait
        growing = wait_exponential_jitter(multiplier=first, max=_LONGEST_WAIT, jitter=first)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(growing(state), error.retry_after if isinstance(error, _Passing) else 0.0)

        sleep: Callable[[float], None] = sleep_using_event(stop)
        return Retrying(
            sleep=sleep,
            stop=stop_any(stop_after_attempt(self.patience.retries + 1), stop_when_event_set(stop)),
            wait=pause,
            retry=retry_if_exception_type(_Passing),
            before_sleep=tell,
            reraise=True,
        )


def _shown(response: httpx.Response) -> str:
    return " ".join(response.text[:_SHOWN].split()) or "nothing"


def _retry_after(value: str | None) -> float:
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
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else 0.0
