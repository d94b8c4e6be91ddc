"""`mixlora serve`: trained runs behind OpenAI's interface, and the playground."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from mixlora_cli.config import LimitsConfig, ServeConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models.generate import Answer, Decoding
from mixlora_cli.progress import say
from mixlora_cli.serving.factors import TaskFactors, task_factors
from mixlora_cli.serving.models import ServedModel, open_models

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from mixlora_cli.serving.engine import Engine, Job, QueueFull, Stopping, TimedOut
    from mixlora_cli.serving.protocol import ApiError, Prompt, Reply, find_model, parse_request, read_prompt
except ImportError as _error:
    raise UserError(
        f"mixlora serve needs {_error.name}, which is not installed: pip install 'mixlora-cli[serve]'"
    ) from _error

KEY_VARIABLE = "MIXLORA_SERVE_KEY"
PAGE = Path(__file__).with_name("playground.html")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOK = 0.5  # seconds between two looks whether a client has gone
_RETRY = 5  # seconds after which a client should try another server than one that stops


def serve(config: ServeConfig) -> None:
    """Load the runs, answer requests until SIGTERM or Ctrl-C, and let those that run end.

    Raises:
        UserError: the port is taken, a run cannot be found, or the runs do not share one base.
    """
    console = Console(stderr=True)
    place = _bound(config)
    with place:
        say(f"loading {', '.join(config.run) or config.model.name} ...", console)
        models = {
            model.name: model for model in open_models(config.run, config.model, precision=config.precision)
        }
        profiles = {}
        for model in models.values():
            if config.serve.factors and (found := task_factors(model.run, model.session, console=console)):
                profiles[model.name] = found
            _warm_up(model)
        engine = Engine(config.serve)
        key = os.environ.get(KEY_VARIABLE) or config.key
        host, port = config.host, place.getsockname()[1]
        if host not in _LOOPBACK and key is None:
            say(f"warning: all who reach {host} may ask; {KEY_VARIABLE}=... makes them send a key", console)
        app = create_app(engine, models, profiles, config.serve, key, host in _LOOPBACK)
        shown = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        place.listen()  # whoever reads the next line may ask at once
        say(
            f"serving {', '.join(models)}: {shown} in a browser, {shown}/v1 for clients; Ctrl-C stops",
            console,
        )
        _Server(app, engine, config.serve, console).run(sockets=[place])
        engine.close()
        say("stopped", console)


def _bound(config: ServeConfig) -> socket.socket:
    """A socket on the port, before anything is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        place.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"host={config.host} port={config.port}: cannot be listened on ({reason}); give another port, "
            "or port=0 for any that is free"
        ) from error
    return place


def _warm_up(model: ServedModel) -> None:
    """Whatever is made with the first answer is made now, and what cannot answer fails now."""
    definition = "?" if model.run.selects_by == "task" else None
    model.write([model.prepare([Turn("human", "?")], definition=definition)], [Decoding(1)])


class _Server(uvicorn.Server):
    """Ends in two steps: the first signal lets running requests end and refuses new ones; the second ends at once."""

    def __init__(self, app: FastAPI, engine: Engine, limits: LimitsConfig, console: Console) -> None:
        settings: dict[str, Any] = {
            "log_level": "warning",
            "access_log": False,
            "timeout_graceful_shutdown": 5,
            # Longer than clients keep an idle connection (httpx: 5 s, which is uvicorn's own default): else the two may
            # let go of it at the same moment, and a request that was sent through it is lost.
            "timeout_keep_alive": 75,
            "ws": "none",
        }
        super().__init__(uvicorn.Config(app, **settings))
        self._engine, self._limits, self._console = engine, limits, console
        self._ends = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls for SIGTERM and SIGINT."""
        if self._ends:
            self.should_exit = self.force_exit = True
            return
        self._ends = True
        self._engine.stop_taking()
        threading.Thread(target=self._wait, name="stopping", daemon=True).start()

    def _wait(self) -> None:
        with suppress(OSError, SystemExit):  # what rich raises where nobody reads the standard error any more
            say(
                f"stopping: running requests have {self._limits.grace:g} s; once more ends at once",
                self._console,
            )
        self._engine.wait_idle(self._limits.grace)
        self.should_exit = True


def create_app(
    engine: Engine,
    models: Mapping[str, ServedModel],
    profiles: Mapping[str, TaskFactors],
    limits: LimitsConfig,
    key: str | None = None,
    only_here: bool = True,
) -> FastAPI:
    """The application.

    Args:
        engine: what answers.
        models: by the name that a request gives.
        profiles: which factors the training's tasks use, by model.
        limits: what is refused.
        key: what clients have to send; None: nothing.
        only_here: whether it is listened to on this machine alone; then no other host's name is answered to.
    """
    started = int(time.time())
    held = [0]  # bytes of the requests that are being read or answered

    async def is_from_here(request: Request) -> None:
        """Refuse what another site's page sends through somebody's browser."""
        host = (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
        if only_here and host not in _LOOPBACK:
            raise ApiError(
                403, f"this server answers on {' and '.join(_LOOPBACK[:2])} alone", code="wrong_host"
            )
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
            raise ApiError(403, "requests from another site's page are not taken", code="wrong_origin")

    async def has_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise ApiError(401, "the server wants its key: Authorization: Bearer KEY", code="invalid_api_key")

    app = FastAPI(
        title="mixlora", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(is_from_here)]
    )
    locked = [Depends(has_key)]

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        again = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error.body, error.status, again)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        what = {404: "no such page", 405: f"{request.method} is not taken here"}.get(
            error.status_code, error.detail
        )
        known = "POST /v1/chat/completions, GET /v1/models, /health, /metrics, /"
        refusal = ApiError(error.status_code, f"{request.url.path}: {what}; there is {known}")
        return JSONResponse(refusal.body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        traceback.print_exception(error)
        return JSONResponse(ApiError(500, "the server failed; its log says how").body, 500)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {
            "status": "ok" if engine.is_open else "stopping",
            "models": list(models),
            **engine.load,
            "limits": {name: getattr(limits, name) for name in ("body_mb", "pictures", "pixels")},
        }
        return JSONResponse(state, 200 if engine.is_open else 503)

    @app.get("/metrics", dependencies=locked)
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def about(model: ServedModel) -> dict[str, Any]:
        settings = model.run.settings
        own = {
            "label": model.run.label,
            "kind": model.kind,
            "routing": model.run.routing,
            "rank": settings.get("r"),
            "factors": settings.get("factors"),
            "tasks": list(model.definitions),
            "digest": model.run.digest,
        }
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "mixlora",
            "mixlora": own,
        }

    @app.get("/v1/models", dependencies=locked)
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [about(model) for model in models.values()]}

    @app.get("/v1/models/{name:path}/factors", dependencies=locked)
    async def used(name: str) -> dict[str, Any]:
        find_model(name, models)
        if name not in profiles:
            raise ApiError(404, f"model={name}: which factors its tasks use is not known", "model")
        return profiles[name].as_json()

    @app.get("/v1/models/{name:path}", dependencies=locked)
    async def one(name: str) -> dict[str, Any]:
        return about(find_model(name, models))

    @app.post("/v1/chat/completions", dependencies=locked)
    async def complete(request: Request) -> Response:
        status, name = 500, ""
        body = bytearray()
        try:
            if not engine.is_open:
                raise _as_api_error(Stopping())
            await _read(request, body, limits, held)
            asked = parse_request(bytes(body))
            model = find_model(asked.model, models)
            name = model.name
            prompt = await run_in_threadpool(read_prompt, asked, model, limits)
            reply = Reply(asked, prompt, profiles.get(name))
            exchange = _Exchange(engine, model, prompt, asked.stream)
            kind, value = await exchange.next(request)  # what is wrong until now has a status of its own
            status = 200
            if asked.stream:
                return StreamingResponse(
                    _events(exchange, reply, kind, value), media_type="text/event-stream"
                )
            return JSONResponse(reply.whole(value))
        except ApiError as error:
            status = error.status
            raise
        finally:
            engine.metrics.requests.labels(name, status).inc()
            held[0] -= len(body)

    return app


class _Exchange:
    """One request between the event loop and the engine's thread."""

    def __init__(self, engine: Engine, model: ServedModel, prompt: Prompt, streamed: bool) -> None:
        """Submit it; where it is not `streamed`, only its end is told."""
        loop = asyncio.get_running_loop()
        self._engine = engine
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def tell(kind: str, value: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

        self._job = Job(
            model,
            prompt.question,
            prompt.decoding,
            on_text=lambda piece, factors: tell("text", (piece, factors)) if streamed else None,
            on_end=lambda outcome: tell("end", outcome),
            pixels=prompt.pixels,
        )
        try:
            engine.submit(self._job)
        except (QueueFull, Stopping) as error:
            raise _as_api_error(error) from error

    async def next(self, request: Request | None = None) -> tuple[str, Any]:
        """("text", (piece, factors)) or ("end", `Answer`).

        Args:
            request: is looked at, as to whether its client has gone; None: whoever waits is told otherwise.

        Raises:
            ApiError: there is no answer.
        """
        try:
            while True:
                with suppress(asyncio.TimeoutError):
                    kind, value = await asyncio.wait_for(self._events.get(), _LOOK)
                    break
                if request is not None and await request.is_disconnected():
                    raise ApiError(499, "the client has gone")
        except BaseException:
            self._engine.cancel(self._job)
            raise
        if isinstance(value, Exception):
            raise _as_api_error(value)
        return kind, value

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._engine.cancel(self._job)


async def _events(exchange: _Exchange, reply: Reply, kind: str, value: Any) -> AsyncIterator[bytes]:
    """Server-sent events, from the first event of the exchange on."""

    def sent(content: Any) -> bytes:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()

    try:
        factors = value.factors if isinstance(value, Answer) else value[1]
        yield sent(reply.first_chunk(factors))
        while kind != "end":
            if value[0]:
                yield sent(reply.text_chunk(value[0]))
            kind, value = await exchange.next()
        for chunk in reply.last_chunks(value):
            yield sent(chunk)
    except ApiError as error:
        yield sent(error.body)
    finally:
        exchange.cancel()
    yield b"data: [DONE]\n\n"


async def _read(request: Request, body: bytearray, limits: LimitsConfig, held: list[int]) -> None:
    """Read a request's body into `body`, and add its bytes to those that are held.

    Raises:
        ApiError: it is too large, does not come, or all requests together are too large.
    """
    most = int(limits.body_mb * 1e6)
    too_large = ApiError(413, f"the request is larger than {limits.body_mb:g} MB", code="request_too_large")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise too_large

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            held[0] += len(part)
            if len(body) > most:
                raise too_large
            if held[0] > limits.total_mb * 1e6:
                raise _as_api_error(QueueFull(_RETRY))

    try:
        await asyncio.wait_for(read(), limits.timeout)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "the request's body did not come in time") from error
    except ClientDisconnect as error:
        raise ApiError(499, "the client has gone") from error


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        seconds = error.retry_after
        return ApiError(429, f"too many requests wait; try again in {seconds} s", None, "queue_full", seconds)
    if isinstance(error, Stopping):
        return ApiError(503, "the server is stopping", None, "stopping", _RETRY)
    if isinstance(error, TimedOut):
        return ApiError(504, "the answer took too long and was given up", None, "timeout")
    return ApiError(500, "the model failed on this request; the server's log says how")
