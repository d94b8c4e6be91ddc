"""A benchmark of the user's own: one YAML file that names JSON lines, a picture folder and a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mixlora_cli.config.parse import parse
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.metrics import METRICS
from mixlora_cli.evaluation.sources.build import Instances, keep_records, record
from mixlora_cli.evaluation.sources.origin import Question, Row
from mixlora_cli.evaluation.sources.tables import json_lines

COLUMNS = ("image", "question", "answer")


@dataclass(frozen=True)
class OwnBenchmark:
    """What the YAML file says."""

    records: str
    """JSON lines: {"image", "question", "answer"} and, where the scorer reads them, "answers", "labels", "category",
    "image_id", "id"; relative to the YAML file."""
    images: str
    """Folder that "image" is relative to; relative to the YAML file."""
    scorer: str = "labels"
    column: str | None = None
    """Heading in tables; null = the benchmark's name."""
    labels: list[str] | None = None
    """The closed set that every answer is one of, where records do not bring their own."""
    prompt: str = "{question}"
    """What the model reads behind the picture."""

    def __post_init__(self) -> None:
        if self.scorer not in METRICS:
            raise ValueError(f"scorer={self.scorer}: must be one of {', '.join(METRICS)}")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt}: must contain {{question}}")


def read_own(path: Path) -> OwnBenchmark:
    """Read a benchmark's YAML file. Raises UserError that says which key is wrong."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected keys such as records, images and scorer")
        return parse(OwnBenchmark, values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def open_own(path: Path, benchmark: str) -> Instances:
    """Records of the benchmark that `path` describes; its pictures are not copied.

    Raises UserError when the YAML file, the records or the folder are missing or wrong.
    """
    own = read_own(path)
    file, images = path.parent / own.records, path.parent / own.images
    if not file.is_file():
        raise UserError(
            f"{path}: records={own.records}: no such file; expected JSON lines beside {path.name}"
        )
    if not images.is_dir():
        raise UserError(f"{path}: images={own.images}: no such folder; expected the pictures' folder")
    lines = [
        record(benchmark, index, str(row["image"]), _question(row, own))
        for index, row in enumerate(json_lines(file, COLUMNS, benchmark))
    ]
    return Instances(keep_records(benchmark, lines), images.resolve(), str(path), len(lines), 0)


def _question(row: Row, own: OwnBenchmark) -> Question:
    def texts(value: Any) -> tuple[str, ...]:
        return tuple(map(str, value or ()))

    return Question(
        own.prompt.replace("{question}", str(row["question"])),
        str(row["answer"]),
        str(row.get("id", "")),
        category=str(row.get("category", "")),
        image_id=str(row.get("image_id", "")),
        answers=texts(row.get("answers")),
        labels=texts(row.get("labels")) or texts(own.labels),
    )
