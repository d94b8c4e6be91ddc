"""An evaluation folder, and a judge server that misbehaves as told."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from judging_server import FakeJudge, eval_folder, prediction


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve answers, every third one wrong."""
    return eval_folder(tmp_path, [prediction(n, "dog" if n % 3 == 0 else "cat") for n in range(12)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    fake = FakeJudge()
    with fake.listening(monkeypatch):
        yield fake
