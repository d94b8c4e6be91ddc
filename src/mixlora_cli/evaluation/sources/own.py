"""A benchmark of the user's own: one YAML file that names JSON lines, a picture folder and a scorer."""

from __future__ import annotations

from pathlib import Path

import yaml

from mixlora_cli.config import Settings, Text, parse
from mixlora_cli.data.text_files import TOO_DEEP, lone_surrogate, numbered_lines, read_text
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.metrics import METRICS
from mixlora_cli.evaluation.references import label_set, reference, references, text_of
from mixlora_cli.evaluation.sources.build import Instances, keep_records, record
from mixlora_cli.evaluation.sources.origin import Question, Row
from mixlora_cli.evaluation.sources.tables import json_lines

COLUMNS = ("image", "question", "answer")


class OwnBenchmark(Settings):
    """What the YAML file says."""

    records: Text
    """JSON lines: {"image", "question", "answer"} and, where the scorer reads them, "answers", "labels", "category",
    "image_id", "id"; relative to the YAML file. Questions and answers are texts, see `_question`."""
    images: Text
    """Folder that "image" is relative to; relative to the YAML file."""
    scorer: Text = "labels"
    column: Text | None = None
    """Heading in tables; null = the benchmark's name."""
    labels: list[Text] | None = None
    """The closed set that every answer is one of, where records do not bring their own."""
    prompt: Text = "{question}"
    """What the model reads behind the picture."""

    def __post_init__(self) -> None:
        if self.scorer not in METRICS:
            raise ValueError(f"scorer={cut(self.scorer)}: must be one of {', '.join(METRICS)}")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt={cut(self.prompt)}: must contain {{question}}")


def read_own(path: Path) -> OwnBenchmark:
    """Read a benchmark's YAML file. Raises UserError that says which key is wrong."""
    try:
        values = yaml.safe_load(read_text(path, "a YAML file that describes a benchmark"))
        if not isinstance(values, dict):
            raise ValueError("expected keys such as records, images and scorer")
        if found := lone_surrogate(values):
            raise ValueError(f"text that is no Unicode: {found}")
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return parse(OwnBenchmark, values)
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
            f"{path}: records={cut(own.records)}: no such file; expected JSON lines beside {path.name}"
        )
    if not images.is_dir():
        raise UserError(f"{path}: images={cut(own.images)}: no such folder; expected the pictures' folder")
    lines = []
    for index, (number, row) in enumerate(json_lines(file, COLUMNS, benchmark)):
        try:
            lines.append(record(benchmark, index, text_of(row["image"], "image"), _question(row, own)))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    return Instances(keep_records(benchmark, lines), images.resolve(), str(path), len(lines), 0)


def _question(row: Row, own: OwnBenchmark) -> Question:
    """A row's question. Raises ValueError that names a key whose value is of no use."""
    return Question(
        own.prompt.replace("{question}", text_of(row["question"], "question")),
        reference(row["answer"], "answer"),
        _name(row, "id"),
        category=_name(row, "category"),
        image_id=_name(row, "image_id"),
        answers=references(row, METRICS[own.scorer]),
        labels=label_set(row) or tuple(own.labels or ()),
    )


def place_in(path: Path, index: int) -> str:
    """File and line of the row that record `index` of the benchmark in `path` was made of."""
    file = path.parent / read_own(path).records
    lines = [number for number, _ in numbered_lines(read_text(file, "JSON lines"))]
    return f"{file}, line {lines[index]}"


def _name(row: Row, key: str) -> str:
    """A text or a number as its digits; "" where there is none."""
    value = row.get(key)
    if value is None:
        return ""
    return str(value) if type(value) in (int, float) else text_of(value, key)
