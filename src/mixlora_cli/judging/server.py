"""The judge `openai`: any server with OpenAI's interface, vLLM for one, asked many questions at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any

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

from mixlora_cli.config import JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.judging import prompt
from mixlora_cli.judging.judge import Questions
from mixlora_cli.judging.replies import Identity

REFUSED = "(refused by the server)"
"""Stored as the reply where `judge.on_refusal=unparsed`."""
KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT = 60.0
"""Seconds; also what is kept of a longer `Retry-After`."""
_PASSING = {408, 409, 425, 429}
_ABOUT_THE_QUESTION = {400, 413, 422}
_HINTS = {
    401: f"; is {KEY_VARIABLE} set to this server's key?",
    403: f"; is {KEY_VARIABLE} set to this server's key?",
    404: "; check judge.base_url (it ends in /v1), judge.model and judge.api",
}
_SHOWN = 200
"""Characters of a server's own message that are passed on."""


class _Passing(Exception):
    """A failure that may pass: the message says what happened."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class _Refused(Exception):
    """The server will not answer this one question, however often it is asked."""


@dataclass
class ServerJudge:
    """Keeps `concurrency` requests under way; gives up when the server answers none any more."""

    settings: JudgeConfig
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        body: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_new_tokens, **settings.extra}
        self._decoding = {name: value for name, value in body.items() if value is not None}
        decoding = {"api": settings.api, **self._decoding}
        self.identity = Identity(
            "openai", str(settings.model), settings.revision or "", prompt.DIGEST, decoding
        )

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """Replies one by one.

        Raises UserError when a question was not answered after all retries, once the others are; at once when the
        server answers none any more, or refuses them all alike.
        """
        settings, stop, lock = self.settings, Event(), Lock()
        failures: list[_Passing | _Refused] = []
        before_last_reply = 0  # failures until the last question that had a reply
        client = self._client()
        place = str(client.base_url.copy_with(username=None, password=None))
        again = _retrying(settings.retries, settings.first_wait, stop)

        def answer(asked: Prediction) -> str | None:
            nonlocal before_last_reply
            if stop.is_set():
                return None
            try:
                text = again(self._ask, client, place, asked)
            except UserError:
                stop.set()
                raise
            except (_Passing, _Refused) as error:
                if isinstance(error, _Passing) or settings.on_refusal == "stop":
                    with lock:
                        failures.append(error)
                        if len(failures) - before_last_reply >= max(settings.concurrency, 3):
                            stop.set()
                    return None
                text = REFUSED
            with lock:
                before_last_reply = len(failures)
            return text

        with ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge") as pool:
            try:
                keys = {pool.submit(answer, asked): key for key, asked in questions.items()}
                for future in as_completed(keys):
                    if (text := future.result()) is not None:
                        yield {keys[future]: text}
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                client.close()
        self._report(failures, place)

    def _client(self) -> httpx.Client:
        settings, key = self.settings, os.environ.get(KEY_VARIABLE)
        parallel = settings.concurrency
        try:
            return httpx.Client(
                base_url=settings.base_url.rstrip("/") + "/",
                timeout=settings.timeout,
                limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"judge.base_url={settings.base_url}: {error}; expected http://host:port/v1"
            ) from error

    def _ask(self, client: httpx.Client, place: str, asked: Prediction) -> str:
        """Text of the reply to one request.

        Raises _Passing, _Refused, or UserError for what fails every request alike (key, model, address).
        """
        body: dict[str, Any] = {"model": self.identity.model, **self._decoding}
        texts = asked.question, asked.target, asked.prediction
        if self.settings.api == "completions":  # the prompt reaches the model as it stands
            path, body["prompt"] = "completions", prompt.fill(prompt.TEMPLATE, *texts)
        else:
            user = {"role": "user", "content": prompt.fill(prompt.USER, *texts)}
            path, body["messages"] = "chat/completions", [{"role": "system", "content": prompt.SYSTEM}, user]
        try:
            response = client.post(path, json=body)
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"judge.base_url={place}: expected http://host:port/v1") from error
        except httpx.TransportError as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        shown = " ".join(response.text[:_SHOWN].split()) or "nothing"
        status, said = response.status_code, f"HTTP {response.status_code}: {shown}"
        if status in _PASSING or status >= 500:
            raise _Passing(said, _retry_after(response.headers.get("Retry-After")))
        if status in _ABOUT_THE_QUESTION:
            raise _Refused(said)
        if not response.is_success:
            raise UserError(f"the judge at {place} replied {said}{_HINTS.get(status, '')}")
        try:
            choice = response.json()["choices"][0]
            text = choice["text"] if self.settings.api == "completions" else choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Passing(f"a reply without its text: {shown}") from error
        if not isinstance(text, str | None):
            raise _Passing(f"a reply whose text is none: {shown}")
        return text or ""  # None: a model that spent its tokens before it said anything

    def _report(self, failures: Sequence[_Passing | _Refused], place: str) -> None:
        failed = sum(isinstance(error, _Passing) for error in failures)
        if failed:
            raise UserError(
                f"the judge at {place} left {failed} questions unanswered after up to {self.settings.retries} retries "
                f"each; the last said: {failures[-1]}. All other replies are kept: the same command asks only what is "
                "missing"
            )
        if failures:
            raise UserError(
                f"the judge at {place} refused {len(failures)} questions; the last said: {failures[-1]}. Mend that, "
                "or count them as unparsed with judge.on_refusal=unparsed. All other replies are kept"
            )


def _retrying(retries: int, first_wait: float, stop: Event) -> Retrying:
    """Try `retries` times more while `_Passing` is raised, and raise the last one.

    Waits double from `first_wait` seconds, with jitter, and are never shorter than the server asks. Setting `stop`
    ends every wait and every further try.
    """
    growing = wait_exponential_jitter(multiplier=first_wait, max=_LONGEST_WAIT, jitter=first_wait)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(growing(state), error.retry_after if isinstance(error, _Passing) else 0.0)

    sleep: Callable[[float], None] = sleep_using_event(stop)
    return Retrying(
        sleep=sleep,
        stop=stop_any(stop_after_attempt(retries + 1), stop_when_event_set(stop)),
        wait=pause,
        retry=retry_if_exception_type(_Passing),
        reraise=True,
    )


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
