"""A server on this machine with OpenAI's interface that misbehaves as told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Body = dict[str, Any]
Action = Callable[["Handler", Body], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Listening"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.fake.handle(self, body)

    def do_GET(self) -> None:
        models = self.server.fake.models
        self.reply(404 if models is None else 200, {"object": "list", "data": models})

    def reply(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def say(self, text: Any, why: str = "stop") -> None:
        message = {"role": "assistant", "content": text}
        self.reply(200, {"choices": [{"text": text, "message": message, "finish_reason": why}]})

    def log_message(self, *_: Any) -> None:
        pass


class Listening(ThreadingHTTPServer):
    daemon_threads = True
    fake: "FakeServer"

    def handle_error(self, *_: Any) -> None:
        pass


def status(code: int, **headers: str) -> Action:
    return lambda handler, _: handler.reply(code, {"error": "as told"}, **headers)


def hang_up(handler: Handler, _: Body) -> None:
    handler.close_connection = True
    handler.connection.close()


def sleepy(handler: Handler, _: Body) -> None:
    time.sleep(1.0)
    handler.say("Yes")


@dataclass
class FakeServer:
    """Takes its next actions from `plan`, then does `then`."""

    then: Action
    plan: list[Action] = field(default_factory=list)
    models: list[Body] | None = None
    """None: the server has no list of them."""
    bodies: list[Body] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: Handler, body: Body) -> None:
        with self._lock:
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.keys.append(handler.headers["Authorization"])
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            action = self.plan.pop(0) if self.plan else self.then
        try:
            action(handler, body)
        finally:
            with self._lock:
                self._now -= 1

    @contextmanager
    def listening(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Inside, `url` is its address; the environment has no key and no proxy in the way."""
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server = Listening(("127.0.0.1", 0), Handler)
        server.fake, self.url = self, f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield
        server.shutdown()
        server.server_close()
        thread.join()
