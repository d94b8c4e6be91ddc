"""An evaluation folder, and a judge server on this machine that misbehaves as told."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mixlora_cli.config import JudgeConfig
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions

Body = dict[str, Any]
Action = Callable[["Handler", Body], None]


def prediction(index: int, given: str, target: str = "cat", **more: Any) -> Prediction:
    fields = {"split": "unseen", "benchmark": "mini_cifar10", **more}
    return Prediction(
        index=index,
        id=f"i{index}",
        question=f"What is in picture {index}?",
        target=target,
        prediction=given,
        **fields,
    )


def eval_folder(root: Path, predictions: list[Prediction], count: int | None = None) -> Path:
    header = Header(
        {"model": "m"}, len(predictions) if count is None else count, {"label": "LoRA r=4", "limit": None}
    )
    with open_predictions(root / "eval" / "predictions.jsonl", header) as writer:
        writer.append(predictions)
    return root / "eval"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.judge.handle(self, body)

    def reply(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def say(self, text: Any) -> None:
        self.reply(200, {"choices": [{"text": text, "message": {"role": "assistant", "content": text}}]})

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    judge: "FakeJudge"

    def handle_error(self, *_: Any) -> None:
        pass


def honest(handler: Handler, body: Body) -> None:
    """Yes where the prediction in the prompt is "cat"."""
    text = body["prompt"] if "prompt" in body else body["messages"][1]["content"]
    handler.say(" Yes" if "Prediction: cat" in text else " No")


@dataclass
class FakeJudge:
    """Takes its next actions from `plan`, then does `then`."""

    plan: list[Action] = field(default_factory=list)
    then: Action = honest
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

    @property
    def config(self) -> JudgeConfig:
        """Settings under which a test is quick."""
        return JudgeConfig(
            "openai",
            model="some/judge",
            base_url=self.url,
            concurrency=1,
            timeout=5.0,
            retries=3,
            first_wait=0.01,
        )

    def configured(self, **changes: Any) -> JudgeConfig:
        return replace(self.config, **changes)
