"""JSON-lines logs: a kill at any byte costs the line it was in, other settings never mix, and damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.store import Log, open_log, read_log, resume_log

HEADER = {"format": "test/1", "fingerprint": {"model": "a", "seed": 1}}
ADVICE = "move it away"


def opened(path: Path, said: list[str] | None = None, **fingerprint: object) -> Log:
    header = {**HEADER, "fingerprint": {**HEADER["fingerprint"], **fingerprint}}
    return open_log(path, header, ADVICE, (said if said is not None else []).append)


def test_killed_at_every_byte_it_goes_on_with_the_complete_lines(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    with opened(whole) as log:
        log.append([{"n": 1}, {"n": 2}])
    content = whole.read_bytes()
    starts = [content.index(b"\n", content.index(b"}}")) + 1]
    for cut in range(len(content) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(content[:cut])
        with opened(path) as log:
            kept = [record["n"] for record in log.records]
            assert kept == [1, 2][: content[starts[0] : cut].count(b"\n")]
            log.append([{"n": 3}])
        assert [record["n"] for record in read_log(path, "test/1", ADVICE).records] == [*kept, 3]


def test_another_fingerprint_is_moved_aside_and_said(tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", []
    with opened(path) as log:
        log.append([{"n": 1}])
    with opened(path, said, seed=2, adapter="x") as log:
        assert log.records == []
    assert said == [
        "log.jsonl was made with other settings (seed, adapter changed): kept as log.1.jsonl, starting anew"
    ]
    assert json.loads((tmp_path / "log.1.jsonl").read_text().splitlines()[1]) == {"n": 1}
    with resume_log(path, "test/1", ADVICE) as log:
        assert log.records == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "test/1"}\nbroken\n{"n": 1}\n', "line 2 cannot be read: move it away"),
        ('{"format": "other"}\n', "expected a first line with format test/1"),
        ('[1]\n{"n": 1}\n', "line 1 cannot be read"),
    ],
)
def test_damage_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_log(path, "test/1", ADVICE)
