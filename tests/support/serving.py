"""A real server of runs on the tiny model, on a free port of this machine."""

from __future__ import annotations

import base64
import io
import random
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from PIL import Image

from mixlora_cli.config import LimitsConfig
from mixlora_cli.serving.engine import Engine
from mixlora_cli.serving.factors import task_factors
from mixlora_cli.serving.models import ServedModel, open_models
from mixlora_cli.serving.server import create_app
from tiny_runs import TINY


def png(seed: int = 0, size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture of noise."""
    written = io.BytesIO()
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).save(written, "PNG")
    return written.getvalue()


def data_url(picture: bytes, kind: str = "image/png") -> str:
    """A picture as requests hold it."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    """A message with its pictures in front of the text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass
class Served:
    """What answers, and how it is asked."""

    url: str
    engine: Engine
    models: Mapping[str, ServedModel]
    client: httpx.Client

    def ask(self, *messages: Any, model: str = "base", **fields: Any) -> httpx.Response:
        """The response to one request."""
        body = {"model": model, "messages": list(messages), "max_tokens": 6, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def text(self, *messages: Any, model: str = "base", **fields: Any) -> str:
        """The answer to one request."""
        response = self.ask(*messages, model=model, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])


@contextmanager
def serving(
    runs: Sequence[Path], key: str | None = None, only_here: bool = True, **limits: Any
) -> Iterator[Served]:
    """Serve the base and these runs until the block ends."""
    models = {model.name: model for model in open_models([str(run) for run in runs], TINY)}
    with serving_models(models, key, only_here, **limits) as served:
        yield served


@contextmanager
def serving_models(
    models: Mapping[str, ServedModel], key: str | None = None, only_here: bool = True, **limits: Any
) -> Iterator[Served]:
    """Serve models that are open until the block ends."""
    profiles = {model.name: task_factors(model.run, model.session) for model in models.values()}
    known = {name: profile for name, profile in profiles.items() if profile is not None}
    settings = LimitsConfig(**limits)
    engine = Engine(settings)
    app = create_app(engine, models, known, settings, key, only_here)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Served(url, engine, models, client)
        finally:
            server.should_exit = True
            thread.join()
            engine.close()
