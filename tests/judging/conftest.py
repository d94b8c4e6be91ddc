"""An evaluation folder, and a judge server that misbehaves as told."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from judging_server import FakeJudge, Handler, Server, eval_folder, prediction


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve answers, every third one wrong."""
    return eval_folder(tmp_path, [prediction(n, "dog" if n % 3 == 0 else "cat") for n in range(12)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listening = Server(("127.0.0.1", 0), Handler)
    listening.judge = FakeJudge(url=f"http://127.0.0.1:{listening.server_address[1]}/v1")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield listening.judge
    listening.shutdown()
    listening.server_close()
    thread.join()
