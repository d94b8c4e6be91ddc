"""The judge `openai`: any server with OpenAI's interface, vLLM for one, asked many questions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from threading import Event
from typing import Any

from mixlora_cli.config import JudgeConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.judging import prompt
from mixlora_cli.judging.back_off import Passing, retrying
from mixlora_cli.judging.connection import Connection, Refused
from mixlora_cli.judging.identity import Identity
from mixlora_cli.judging.judge import Questions

REFUSED = "(refused by the server)"
"""Stored as the reply where `judge.on_refusal=unparsed`."""


@dataclass
class _Tally:
    """What went wrong so far."""

    failed: int = 0
    in_a_row: int = 0
    """Questions without a reply since the last one that had one."""
    refused: int = 0
    reason: str = ""
    """What the last failure said."""


def _decoding(settings: JudgeConfig) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_new_tokens, **settings.extra}
    return {name: value for name, value in body.items() if value is not None}


@dataclass
class ServerJudge:
    """Keeps `concurrency` requests under way; gives up when the server answers none any more."""

    settings: JudgeConfig
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        decoding: Mapping[str, Any] = {"api": settings.api, **_decoding(settings)}
        self.identity = Identity(
            "openai", str(settings.model), settings.revision or "", prompt.DIGEST, decoding
        )

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """Replies as they come.

        Raises UserError when a question was not answered after all retries, once the others are; at once when the
        server answers none any more, or refuses them all alike.
        """
        settings, stop, tally = self.settings, Event(), _Tally()
        connection = Connection(
            settings.base_url,
            settings.api,
            self.identity.model,
            _decoding(settings),
            settings.timeout,
            settings.concurrency,
        )
        pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

        def ask(p: Prediction) -> str:
            again = retrying(settings.retries, settings.first_wait, stop)
            return again(connection.ask, p.question, p.target, p.prediction)

        try:
            waiting = iter(questions.items())
            running: dict[Future[str], str] = {}
            while True:
                for key, prediction in islice(waiting, 2 * settings.concurrency - len(running)):
                    running[pool.submit(ask, prediction)] = key
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                yield from self._collect({future: running.pop(future) for future in finished}, tally)
                if tally.in_a_row >= max(settings.concurrency, 3):
                    stop.set()
                    finished, _ = wait(running)  # what still comes in is kept
                    yield from self._collect({future: running.pop(future) for future in finished}, tally)
                    break
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            connection.close()
        self._report(tally, connection.place)

    def _collect(self, finished: Mapping[Future[str], str], tally: _Tally) -> Iterator[dict[str, str]]:
        """The replies among finished requests, in one portion; failures go into the tally."""
        answered: dict[str, str] = {}
        fatal: UserError | None = None
        for future, key in finished.items():
            try:
                answered[key] = future.result()
            except Passing as error:
                tally.failed, tally.in_a_row, tally.reason = tally.failed + 1, tally.in_a_row + 1, str(error)
            except Refused as error:
                if self.settings.on_refusal == "unparsed":
                    answered[key] = REFUSED
                else:
                    tally.refused, tally.in_a_row = tally.refused + 1, tally.in_a_row + 1
                    tally.reason = str(error)
            except UserError as error:
                fatal = error
        if answered:
            tally.in_a_row = 0
            yield answered
        if fatal is not None:
            raise fatal

    def _report(self, tally: _Tally, place: str) -> None:
        if tally.failed:
            raise UserError(
                f"the judge at {place} left {tally.failed} questions unanswered after up to "
                f"{self.settings.retries} retries each; the last said: {tally.reason}. All other replies are kept: "
                "the same command asks only what is missing"
            )
        if tally.refused:
            raise UserError(
                f"the judge at {place} refused {tally.refused} questions; the last said: {tally.reason}. Mend that, "
                "or count them as unparsed with judge.on_refusal=unparsed. All other replies are kept"
            )
