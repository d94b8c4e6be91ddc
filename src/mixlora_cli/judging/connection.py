"""One request to an OpenAI-compatible server: the body, the reply's text, and which failures may pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import httpx

from mixlora_cli.errors import UserError
from mixlora_cli.judging import prompt
from mixlora_cli.judging.back_off import Passing, retry_after

Api = Literal["completions", "chat"]

KEY_VARIABLE = "OPENAI_API_KEY"
_PASSING = {408, 409, 425, 429}
_ABOUT_THE_QUESTION = {400, 413, 422}
_SHOWN = 200
"""Characters of a server's own message that are passed on."""


class Refused(Exception):
    """The server will not answer this one question, however often it is asked."""


class Connection:
    """Asks one server; may be used from several threads at once."""

    def __init__(
        self, base_url: str, api: Api, model: str, decoding: Mapping[str, Any], timeout: float, parallel: int
    ) -> None:
        """`decoding` goes into every request's body; `timeout` is in seconds."""
        self._api: Api = api
        self._body = {"model": model, **decoding}
        key = os.environ.get(KEY_VARIABLE)
        try:
            self._client = httpx.Client(
                base_url=base_url.rstrip("/") + "/",
                timeout=timeout,
                limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"judge.base_url={base_url}: {error}; expected http://host:port/v1") from error
        self.place = str(self._client.base_url.copy_with(username=None, password=None))
        """The server's address without a password that may stand in it."""

    def ask(self, question: str, answer: str, prediction: str) -> str:
        """Text of the reply.

        Raises Passing, Refused, or UserError for what fails every request alike (key, model, address).
        """
        body, path = self._request(question, answer, prediction)
        try:
            response = self._client.post(path, json=body)
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"judge.base_url={self.place}: expected http://host:port/v1") from error
        except httpx.TransportError as error:
            raise Passing(f"{type(error).__name__} {error}".strip()) from error
        _check_status(response, self.place)
        return self._text(response)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def _request(self, *texts: str) -> tuple[dict[str, Any], str]:
        if self._api == "completions":  # the prompt reaches the model as it stands
            return {**self._body, "prompt": prompt.fill(prompt.TEMPLATE, *texts)}, "completions"
        messages = [
            {"role": "system", "content": prompt.SYSTEM},
            {"role": "user", "content": prompt.fill(prompt.USER, *texts)},
        ]
        return {**self._body, "messages": messages}, "chat/completions"

    def _text(self, response: httpx.Response) -> str:
        try:
            choice = response.json()["choices"][0]
            text = choice["text"] if self._api == "completions" else choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Passing(f"a reply without its text: {_shown(response)}") from error
        if text is None:  # a model that spent its tokens before it said anything
            return ""
        if not isinstance(text, str):
            raise Passing(f"a reply whose text is none: {_shown(response)}")
        return text


def _check_status(response: httpx.Response, place: str) -> None:
    status = response.status_code
    if response.is_success:
        return
    said = f"HTTP {status}: {_shown(response)}"
    if status in _PASSING or status >= 500:
        raise Passing(said, retry_after(response.headers.get("Retry-After")))
    if status in _ABOUT_THE_QUESTION:
        raise Refused(said)
    hints = {
        401: f"; is {KEY_VARIABLE} set to this server's key?",
        403: f"; is {KEY_VARIABLE} set to this server's key?",
        404: "; check judge.base_url (it ends in /v1), judge.model and judge.api",
    }
    raise UserError(f"the judge at {place} replied {said}{hints.get(status, '')}")


def _shown(response: httpx.Response) -> str:
    return " ".join(response.text[:_SHOWN].split()) or "nothing"
