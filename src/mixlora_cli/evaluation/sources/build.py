"""Turn a benchmark's rows into what every evaluation reads: JSON lines of records and a folder of pictures.

Done once and kept in the cache folder; a source that has changed is turned again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import lone_surrogate
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.sources.origin import Question, Row, question_of
from mixlora_cli.paths import cache_root

RECORDS, PICTURES, ABOUT = "records.jsonl", "images", "about.json"
_VERSION = "1"
"""Of the form of the records: another one, and they are made again."""
_SUFFIXES = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"))


@dataclass(frozen=True)
class Instances:
    """A benchmark ready to be loaded."""

    records: Path
    images: Path
    source: str
    rows: int
    """Rows of the source, those left out included."""
    left_out: int
    """Rows without a usable label or picture."""


def record(
    benchmark: str, index: int, image: str, question: Question, with_hint: bool = False
) -> dict[str, Any]:
    """LLaVA's form of one question; keys that are empty are left away."""
    prompt = f"{IMAGE_MARKER}\n{question.prompt(with_hint)}"
    extra: dict[str, Any] = {
        "category": question.category,
        "image_id": question.image_id,
        "answers": list(question.answers),
        "labels": list(question.labels),
    }
    return {
        "id": question.id or str(index),
        "task_name": benchmark,
        "benchmark": benchmark,
        "image": image,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}],
        **{key: value for key, value in extra.items() if value},
    }


def build(
    benchmark: str,
    rows: Iterable[Row],
    identity: str,
    source: str,
    ask: Callable[[Row], Question | None],
    picture: str,
    with_hint: bool = False,
) -> Instances:
    """Records and picture files of rows that carry their pictures in column `picture`.

    Equal pictures are kept once. Raises UserError when a row has no picture, or nothing is left.
    """
    folder = _folder(benchmark, json.dumps([_VERSION, identity, with_hint]))
    if not (folder / ABOUT).is_file():
        with Replacing(folder) as draft:
            count, left_out = _write(draft, benchmark, rows, ask, picture, with_hint)
            about = {"source": source, "rows": count, "left_out": left_out}
            (draft / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return Instances(folder / RECORDS, folder / PICTURES, source, about["rows"], about["left_out"])


class Replacing:
    """A new folder that becomes `folder` when all went well; where another process was first, its one stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))

    def __enter__(self) -> Path:
        return self._draft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._folder.exists():
            try:
                os.replace(self._draft, self._folder)
            except OSError:
                if not self._folder.exists():
                    raise
        shutil.rmtree(self._draft, ignore_errors=True)


def _write(
    draft: Path,
    benchmark: str,
    rows: Iterable[Row],
    ask: Callable[[Row], Question | None],
    picture: str,
    with_hint: bool,
) -> tuple[int, int]:
    """Rows read and rows left out."""
    count = left_out = 0
    with (draft / RECORDS).open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):
            question = question_of(ask, row, f"{benchmark}, row {count - 1}")
            if question is None:
                left_out += 1
                continue
            name = _keep(draft / PICTURES, row.get(picture), f"{benchmark}, row {count - 1}")
            file.write(_line(record(benchmark, count - 1, name, question, with_hint)))
    if count == left_out:
        raise UserError(f"{benchmark}: no usable row; expected at least one")
    return count, left_out


def keep_records(benchmark: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Records over pictures that stay where they are, as a file in the cache folder named by their content."""
    text = "".join(_line(record) for record in records)
    folder = _folder(benchmark, text)
    if not (folder / RECORDS).is_file():
        with Replacing(folder) as draft:
            (draft / RECORDS).write_text(text, encoding="utf-8")
    return folder / RECORDS


def _folder(benchmark: str, content: str) -> Path:
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return cache_root() / "benchmarks" / benchmark / digest


def _line(record: Mapping[str, Any]) -> str:
    """A record that holds half a character is written in escapes: whoever reads it counts it as a bad one."""
    return json.dumps(record, ensure_ascii=lone_surrogate(record) is not None) + "\n"


def _keep(folder: Path, picture: Any, where: str) -> str:
    """Write an encoded picture under a name made of its content; the path inside `folder`."""
    content = picture.get("bytes") if isinstance(picture, Mapping) else None
    path = picture.get("path") if isinstance(picture, Mapping) else None
    if content is None and path and Path(path).is_file():
        content = Path(path).read_bytes()
    if not content:
        raise UserError(f"{where} has no picture; expected an encoded image in its column")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    suffix = next((suffix for start, suffix in _SUFFIXES if content.startswith(start)), ".img")
    file = folder / digest[:2] / f"{digest}{suffix}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return f"{digest[:2]}/{file.name}"
