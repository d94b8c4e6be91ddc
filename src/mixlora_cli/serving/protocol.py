"""OpenAI's chat completions as JSON: what a request may say, how it becomes a question, what is sent back.

The interface is that of https://platform.openai.com/docs/api-reference/chat. What would change an answer and cannot be
done here is refused by name, not left out. Fields of ours: `task`, `definition`, `factors`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mixlora_cli.config import LimitsConfig
from mixlora_cli.data.chat import SPEAKERS
from mixlora_cli.data.images import locate_picture, opened, size_as_shown
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.data.text_files import lone_surrogate
from mixlora_cli.errors import UserError, cut, did_you_mean, hint_at
from mixlora_cli.models.generate import Answer, Decoding, Factors
from mixlora_cli.serving.factors import TaskFactors
from mixlora_cli.serving.models import Question, ServedModel

LONGEST_SIDE = 200
"""Times the shorter side of a picture: beyond, processors that scale the shorter one make it absurdly large."""
_DATA_URL = re.compile(r"data:(?P<kind>[\w/+.-]*)(?:;[\w=-]+)*?;base64,(?P<data>[A-Za-z0-9+/=\s]*)")
_ROLES = {**SPEAKERS, "developer": SPEAKERS["system"]}


class ApiError(Exception):
    """What a client is told in the place of an answer, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str
    detail: str | None = None
    """Taken and not heeded: a model has its own resolution."""


class _Picture(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[
        _Url, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)
    ]


_Part = Annotated[_Text | _Picture, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of a request."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    task: str | None = None
    definition: str | None = None
    factors: bool = False
    # Taken, and only as what changes nothing.
    n: Literal[1] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    # Taken, and of no importance to an answer.
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_new_tokens(self) -> int | None:
        """The longest answer that is asked for; None = not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
}
"""Fields that are not done here, by the values at which they change nothing."""


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
        ApiError: 400, the body is no JSON, or says something that is not understood, out of range or not done here.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {cut(error)}") from error
    if not isinstance(raw, dict):
        raise ApiError(400, f'the body is a {type(raw).__name__}, expected an object like {{"model": ...}}')
    if half := lone_surrogate([raw]):
        raise ApiError(400, f"the body holds {half}, which is no text")
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _mistake(error) from None
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deep") from error
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(request, name)) not in neutral:
            raise ApiError(400, f"{name}={cut(json.dumps(value))}: not supported here; leave it out", name)
    if request.max_tokens and request.max_completion_tokens:
        raise ApiError(
            400, "max_tokens and max_completion_tokens say the same; give one of them", "max_tokens"
        )
    if request.task is not None and request.definition is not None:
        raise ApiError(
            400, "task and definition: a definition stands for a task's; give one of the two", "task"
        )
    if any(text == "" for text in _stops(request)):
        raise ApiError(400, "stop: an empty text would end every answer at once", "stop")
    return request


def _mistake(error: ValidationError) -> ApiError:
    """What is wrong with a request, in one line; of what pydantic tried, the error that lies deepest."""
    first = max(error.errors(include_url=False, include_context=False), key=lambda each: len(each["loc"]))
    # Without the types that were tried, and a part's kind, which stands before its field of that name.
    steps = [step for step in first["loc"] if isinstance(step, int) or ("[" not in step and step != "str")]
    steps = [step for place, step in enumerate(steps) if steps[place + 1 : place + 2] != [step]]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = ChatRequest.model_fields if len(steps) == 1 else ()
        return ApiError(400, f"{param}: unknown field{did_you_mean(str(steps[-1]), known)}", param)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param)
    value, reason = first["input"], first["msg"]
    is_plain = isinstance(value, str | int | float | bool | None)
    shown = cut(json.dumps(value)) if is_plain else f"a {type(value).__name__}"
    return ApiError(400, f"{param}={shown}: {reason[0].lower()}{reason[1:]}", param)


def _stops(request: ChatRequest) -> list[str]:
    return [request.stop] if isinstance(request.stop, str) else request.stop or []


@dataclass(frozen=True)
class Prompt:
    """A request as a model takes it."""

    question: Question
    decoding: Decoding
    pixels: int
    """Of its pictures together."""


def read_prompt(request: ChatRequest, model: ServedModel, limits: LimitsConfig) -> Prompt:
    """The question that a request asks, its pictures read and checked, and how the answer is to be decoded.

    Raises:
        ApiError: a picture cannot be read or is not allowed, the text or the model's template refuse it, or it is too
            long.
    """
    turns: list[Turn] = []
    pictures: list[bytes] = []
    for number, message in enumerate(request.messages):
        role = _ROLES[message.role]
        parts = (
            [_Text(type="text", text=message.content)]
            if isinstance(message.content, str)
            else message.content
        )
        text = ""
        for place, part in enumerate(parts):
            where = f"messages[{number}].content[{place}]"
            if isinstance(part, _Picture):
                if role != "human":
                    raise ApiError(400, f"{where}: only a user's message may hold a picture", "messages")
                if len(pictures) >= limits.pictures:
                    raise ApiError(
                        400, f"{where}: more than {limits.pictures} pictures in a request", "messages"
                    )
                pictures.append(read_picture_url(part.image_url.url, where, limits))
                text += IMAGE_MARKER
                continue
            if IMAGE_MARKER in part.text:
                raise ApiError(
                    400,
                    f"{where}: the text holds {IMAGE_MARKER}, which stands for a picture; send the picture itself, "
                    "as a part of type image_url",
                    "messages",
                )
            between = "\n" if text and not text.endswith(IMAGE_MARKER) else ""
            text += between + part.text
        turns.append(Turn(role, text))
    last = turns[-1]
    if last.role == "human" and not last.text.strip():
        raise ApiError(400, "the last message is empty", "messages")
    try:
        question = model.prepare(turns, pictures, request.task, request.definition)
    except BadRecord as bad:
        raise ApiError(400, f"messages: {_without_name(bad)}", "messages") from bad
    except UserError as error:
        raise ApiError(400, str(error), "task" if request.task is not None else "messages") from error
    pixels = sum(width * height for width, height in map(size_as_shown, pictures))
    return Prompt(question, _decoding(request, question.item.length, model.context, limits), pixels)


def _decoding(request: ChatRequest, length: int, context: int | None, limits: LimitsConfig) -> Decoding:
    """How the answer to a prompt of `length` tokens is decoded by a model that knows `context` positions."""
    room = limits.max_new_tokens if context is None else min(limits.max_new_tokens, context - length)
    if length > limits.max_prompt_tokens or room < 1:
        most = limits.max_prompt_tokens if context is None else min(limits.max_prompt_tokens, context - 1)
        raise ApiError(
            400,
            f"the prompt has {length} tokens, those of its pictures included; at most {most} are taken",
            "messages",
            "context_length_exceeded",
        )
    wanted = request.num_new_tokens
    if wanted is not None and wanted > room:
        raise ApiError(
            400, f"max_tokens={wanted}: at most {room} here, behind a prompt of {length} tokens", "max_tokens"
        )
    return Decoding(
        max_new_tokens=min(limits.default_new_tokens, room) if wanted is None else wanted,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(_stops(request)),
    )


def read_picture_url(url: str, where: str, limits: LimitsConfig) -> bytes:
    """The bytes of a picture that can be opened.

    Args:
        url: data:image/png;base64,..., file:///... in `serve.images`, or https://... on one of `serve.hosts`.
        where: part of the request, for messages.
        limits: what is allowed.

    Raises:
        ApiError: it cannot be had, or is none.
    """

    def refuse(reason: str, status: int = 400) -> ApiError:
        return ApiError(status, f"{where}: {reason}", "messages", "invalid_image")

    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        found = _DATA_URL.fullmatch(url)
        try:
            data = base64.b64decode("".join(found["data"].split()), validate=True) if found else b""
        except (binascii.Error, ValueError) as error:
            raise refuse(f"its base64 is damaged ({error})") from error
        if not data:
            raise refuse("expected data:image/png;base64,... with a picture in it")
    elif scheme == "file":
        data = _local(url, refuse, limits)
    elif scheme in ("http", "https"):
        data = _fetched(url, refuse, limits)
    else:
        raise refuse(f"{cut(url, 40)}: expected a data URL (data:image/png;base64,...)")
    try:
        width, height = size_as_shown(data)
        if width * height > limits.pixels:
            raise refuse(f"a picture of {width} x {height} pixels; at most {limits.pixels} are taken", 413)
        if max(width, height) > LONGEST_SIDE * min(width, height):
            raise refuse(
                f"a picture of {width} x {height} pixels; one side may be at most {LONGEST_SIDE} times the other"
            )
        opened(data)
    except BadRecord as bad:
        raise refuse(f"not a picture that can be read ({_without_name(bad)})") from bad
    return data


def _without_name(bad: BadRecord) -> str:
    return bad.detail.removeprefix("a picture in the data: ")


def _local(url: str, refuse: Any, limits: LimitsConfig) -> bytes:
    if limits.images is None:
        raise refuse(
            "pictures in files are not taken here; send it as a data URL (server: serve.images=<folder>)"
        )
    parts = urlsplit(url)
    folder = Path(limits.images).expanduser().resolve()
    try:
        path = Path(unquote(parts.path))
        name = (
            str(path.relative_to(folder)) if path.is_relative_to(folder) else unquote(parts.path).lstrip("/")
        )
        found = locate_picture(name, folder)
        if found.stat().st_size > limits.body_mb * 1e6:
            raise refuse("the file is larger than a request may be", 413)
        return found.read_bytes()
    except (BadRecord, OSError, ValueError) as error:
        raise refuse(f"no such picture in the server's folder ({cut(Path(parts.path).name)})") from error


def _fetched(url: str, refuse: Any, limits: LimitsConfig) -> bytes:
    host = (urlsplit(url).hostname or "").lower()
    if host not in (limits.hosts or []):
        raise refuse(
            "pictures are not fetched from this host; send it as a data URL (server: serve.hosts=[...])"
            if limits.hosts
            else "pictures are not fetched from URLs here; send it as a data URL (server: serve.hosts=[...])"
        )
    most = int(limits.body_mb * 1e6)
    try:
        with httpx.stream("GET", url, timeout=min(20.0, limits.timeout), follow_redirects=False) as response:
            if not response.is_success:
                raise refuse(f"{host} answered HTTP {response.status_code}")
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > most:
                    raise refuse(f"the picture at {host} is larger than a request may be", 413)
            return data
    except httpx.HTTPError as error:
        raise refuse(f"{host} did not give the picture ({type(error).__name__})") from error


def find_model(name: str, models: Mapping[str, ServedModel]) -> ServedModel:
    """The model that a request names.

    Raises:
        ApiError: 404, there is none of that name.
    """
    if name not in models:
        hint = hint_at(name, models, "models")
        raise ApiError(404, f"model={cut(name)}: no such model here; {hint}", "model", "model_not_found")
    return models[name]


class Reply:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, request: ChatRequest, prompt: Prompt, profile: TaskFactors | None = None) -> None:
        """`profile`: which factors the training's tasks use, where that is known."""
        self._request, self._prompt, self._profile = request, prompt, profile
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(answer),
            "mixlora": self._about(answer.factors),
        }

    def first_chunk(self, factors: Factors | None) -> dict[str, Any]:
        """What a stream begins with."""
        return {**self._chunk({"role": "assistant", "content": ""}), "mixlora": self._about(factors)}

    def text_chunk(self, piece: str) -> dict[str, Any]:
        """The next piece of the answer."""
        return self._chunk({"content": piece})

    def last_chunks(self, answer: Answer) -> list[dict[str, Any]]:
        """What a stream ends with."""
        chunks = [self._chunk({}, answer.finish)]
        if self._request.stream_options is not None and self._request.stream_options.include_usage:
            chunks.append({**self._chunk({}), "choices": [], "usage": self._usage(answer)})
        return chunks

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, answer: Answer) -> dict[str, int]:
        prompt = self._prompt.question.item.length
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer.num_tokens,
            "total_tokens": prompt + answer.num_tokens,
        }

    def _about(self, factors: Factors | None) -> dict[str, Any]:
        question = self._prompt.question
        wanted = factors if self._request.factors else None
        alike = self._profile.alike(wanted.layers, wanted.a, wanted.b) if wanted and self._profile else None
        return {
            "model": self._request.model,
            "selected_by": question.selected_by,
            "task": question.task,
            "factors": wanted and asdict(wanted),
            "alike": alike,
        }
