"""From a benchmark's name to its instances: what `eval.sources` says about it, else the hub.

Rows become what every evaluation reads, JSON lines of records and a folder of pictures; both are made once and kept in
the cache folder. A source that has changed is read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mixlora_cli.benchmarks.benchmark import (
    Benchmark,
    Origin,
    Question,
    Row,
    label_set,
    reference,
    references,
    text_of,
)
from mixlora_cli.benchmarks.metrics import METRICS
from mixlora_cli.benchmarks.registry import BENCHMARKS, in_paper_order, with_origin
from mixlora_cli.benchmarks.rows import Rows, from_hub, from_lines, from_local, json_lines
from mixlora_cli.config import Settings, Text, parse
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import TOO_DEEP, lone_surrogate, numbered_lines, read_text
from mixlora_cli.errors import UserError, cut
from mixlora_cli.paths import cache_root
from mixlora_cli.store import folder_beside, rename_unless_there

_YAML = (".yaml", ".yml")
_RECORDS, _PICTURES, _ABOUT = "records.jsonl", "images", "about.json"
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


def sourced(wanted: list[str] | None, sources: Mapping[str, str]) -> list[str]:
    """Which of the wanted benchmarks bring their own instances, in the paper's order; the others come with the data.

    Without a wish: those that have a source. Raises UserError for a source that no benchmark can have.
    """
    known = with_origin()
    for name, path in sources.items():
        if path.endswith(_YAML):
            if name in BENCHMARKS:
                raise UserError(f"eval.sources.{name}={path}: {name} is built in; give your own another name")
        elif name not in known:
            raise UserError(
                f"eval.sources.{name}={path}: expected a YAML file that describes the benchmark {name}, or one of "
                f"the built-in names: {', '.join(known)}"
            )
    names = list(sources) if wanted is None else [name for name in wanted if name in sources or name in known]
    return in_paper_order(names)


def described(name: str, sources: Mapping[str, str]) -> Benchmark:
    """The built-in benchmark, or what a YAML file makes of it."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    own = _read_own(_existing(sources[name], f"eval.sources.{name}", "a YAML file"))
    return Benchmark(name, own.column or name, METRICS[own.scorer])


def open_benchmark(
    name: str,
    sources: Mapping[str, str],
    on_error: Literal["stop", "skip"] = "stop",
    ocr_tokens: bool = False,
) -> Instances:
    """Records and pictures of a benchmark, made on first use and kept in the cache.

    Raises UserError when they cannot be had: nothing there, the wrong thing, only a part of it, no network.
    """
    path, key = sources.get(name), f"eval.sources.{name}"
    if path is not None and path.endswith(_YAML):
        return _open_own(_existing(path, key, "a YAML file"), name)
    origin = BENCHMARKS[name].origin
    assert origin is not None
    if path is None:
        if origin.by_hand:
            raise UserError(
                f"{name}: its pictures have to be fetched by hand; make {origin.by_hand}; "
                f"then give eval.sources={{{name}: <that folder>}}"
            )
        return _build(name, from_hub(origin, name), origin, ocr_tokens)
    copy = (
        f"a copy of {origin.hub[0]} from the hub, or its {origin.split} split as parquet"
        if origin.hub
        else ""
    )
    place = _existing(path, key, origin.by_hand or copy)
    if origin.photos is not None:
        return _open_photos(place, origin, name, on_error)
    return _build(name, from_local(place, origin, name), origin, ocr_tokens)


def _existing(path: str, key: str, expected: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{key}={path}: no such file or folder; expected {expected}")
    return place


def _build(name: str, found: Rows, origin: Origin, with_hint: bool) -> Instances:
    """Records and picture files of rows that carry their pictures; equal pictures are kept once.

    Raises UserError when a row has no picture or another benchmark's category, or nothing is left.
    """
    # What was built before other categories were refused is built again.
    identity = json.dumps([found.identity, origin.categories]) if origin.categories else found.identity
    folder = _cached(name, json.dumps([_VERSION, identity, with_hint]))
    if not (folder / _ABOUT).is_file():
        with folder_beside(folder) as temp:
            count = left_out = 0
            with (temp / _RECORDS).open("w", encoding="utf-8") as file:
                for count, row in enumerate(_of_its_categories(found.rows, origin, name), start=1):
                    where = f"{name}, row {count - 1}"
                    if (question := origin.question(row, where)) is None:
                        left_out += 1
                        continue
                    picture = _keep(temp / _PICTURES, row.get(origin.picture), where)
                    file.write(_line(_record(name, count - 1, picture, question, with_hint)))
            if count == left_out:
                raise UserError(f"{name}: no usable row; expected at least one")
            about = {"source": found.described, "rows": count, "left_out": left_out}
            (temp / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
            rename_unless_there(temp, folder, lambda root: (root / _ABOUT).is_file())
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    records, pictures = folder / _RECORDS, folder / _PICTURES
    return Instances(records, pictures, found.described, int(about["rows"]), int(about["left_out"]))


def _of_its_categories(rows: Iterable[Row], origin: Origin, name: str) -> Iterator[Row]:
    """The rows. Raises UserError at one of another category: MME and POPE have the same columns."""
    for number, row in enumerate(rows):
        if origin.categories and (category := str(row["category"])) not in origin.categories:
            others = [
                other
                for other in with_origin()
                if (known := BENCHMARKS[other].origin) is not None and category in known.categories
            ]
            looks = f"; this looks like {others[0]}" if others else ""
            raise UserError(
                f"this is not {name}: row {number} has the category {cut(repr(category))}{looks}; expected "
                f"one of {', '.join(origin.categories)}"
            )
        yield row


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


def _open_photos(place: Path, origin: Origin, benchmark: str, on_error: Literal["stop", "skip"]) -> Instances:
    """Records over the pictures in `place`/images, else in `place` itself; the pictures are not copied.

    Raises UserError when the rows are nowhere, when none of the pictures is there (another folder), or when some
    are missing (a partial one) and `on_error` is "stop"; with "skip" those rows are left out and counted.
    """
    assert origin.photos is not None
    root = place if place.is_dir() else place.parent
    images = (root / "images" if (root / "images").is_dir() else root).resolve()
    table = _photo_rows(place, origin, benchmark)
    records, missing = [], []
    count = 0
    for index, row in enumerate(table.rows):
        count += 1
        if (question := origin.question(row, f"{table.described}, row {index}")) is None:
            continue
        names = origin.photos(row)
        found = next((name for name in names if (images / name).is_file()), None)
        if found is None:
            missing.append(names[0])
        else:
            records.append(_record(benchmark, index, found, question))
    key, asked = f"eval.sources.{benchmark}={place}", len(records) + len(missing)
    if missing and not records:
        raise UserError(
            f"{key} is another folder: none of the {asked} pictures is in {images} "
            f"(as {cut(missing[0])}, for one); expected {origin.by_hand}"
        )
    if missing and on_error == "stop":
        raise UserError(
            f"{key} is partial: pictures of {len(missing)} of {asked} rows are missing in {images}, "
            f"{cut(missing[0])} for one; fetch the rest, or pass data.on_error=skip to go on without them"
        )
    return Instances(_keep_records(benchmark, records), images, table.described, count, count - len(records))


def _photo_rows(place: Path, origin: Origin, benchmark: str) -> Rows:
    key = f"eval.sources.{benchmark}={place}"
    if place.is_file():
        if place.suffix not in (".jsonl", ".json"):
            raise UserError(f"{key}: expected a folder with {origin.records}, or that file")
        return from_lines(place, origin, benchmark)
    for file in (place / origin.records, place / "data" / origin.records):
        if file.is_file():
            return from_lines(file, origin, benchmark)
    if not origin.hub:
        raise UserError(f"{key} has no {origin.records}; expected {origin.by_hand}")
    return from_hub(origin, benchmark)


def _record(
    benchmark: str, index: int, image: str, question: Question, with_hint: bool = False
) -> dict[str, Any]:
    """LLaVA's form of one question; keys that are empty are left away."""
    extra: dict[str, Any] = {
        "category": question.category,
        "image_id": question.image_id,
        "answers": list(question.answers),
        "labels": list(question.labels),
    }
    prompt = f"{IMAGE_MARKER}\n{question.prompt(with_hint)}"
    return {
        "id": question.id or str(index),
        "task_name": benchmark,
        "benchmark": benchmark,
        "image": image,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}],
        **{key: value for key, value in extra.items() if value},
    }


def _keep_records(benchmark: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Records over pictures that stay where they are, as a file in the cache folder named by their content."""
    text = "".join(map(_line, records))
    folder = _cached(benchmark, text)
    if not (folder / _RECORDS).is_file():
        with folder_beside(folder) as temp:
            (temp / _RECORDS).write_text(text, encoding="utf-8")
            rename_unless_there(temp, folder, lambda root: (root / _RECORDS).is_file())
    return folder / _RECORDS


def _cached(benchmark: str, content: str) -> Path:
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return cache_root() / "benchmarks" / benchmark / digest


def _line(record: Mapping[str, Any]) -> str:
    """A record that holds half a character is written in escapes: whoever reads it counts it as a bad one."""
    return json.dumps(record, ensure_ascii=lone_surrogate(record) is not None) + "\n"


class OwnBenchmark(Settings):
    """A benchmark of the user's own, as its YAML file describes it."""

    records: Text
    """JSON lines: {"image", "question", "answer"} and, where the scorer reads them, "answers", "labels", "category",
    "image_id", "id"; relative to the YAML file."""
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


def _read_own(path: Path) -> OwnBenchmark:
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


def _open_own(path: Path, benchmark: str) -> Instances:
    """Records of the benchmark that `path` describes; its pictures are not copied.

    Raises UserError when the YAML file, the records or the folder are missing or wrong.
    """
    own = _read_own(path)
    file, images = path.parent / own.records, path.parent / own.images
    if not file.is_file():
        raise UserError(
            f"{path}: records={cut(own.records)}: no such file; expected JSON lines beside {path.name}"
        )
    if not images.is_dir():
        raise UserError(f"{path}: images={cut(own.images)}: no such folder; expected the pictures' folder")
    records = []
    for index, (number, row) in enumerate(json_lines(file, ("image", "question", "answer"), benchmark)):
        try:
            records.append(_record(benchmark, index, text_of(row["image"], "image"), _own_question(row, own)))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
    return Instances(_keep_records(benchmark, records), images.resolve(), str(path), len(records), 0)


def _own_question(row: Row, own: OwnBenchmark) -> Question:
    """A row's question. Raises ValueError that names a key whose value is of no use."""

    def name(key: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return str(value) if type(value) in (int, float) else text_of(value, key)

    return Question(
        own.prompt.replace("{question}", text_of(row["question"], "question")),
        reference(row["answer"], "answer"),
        name("id"),
        category=name("category"),
        image_id=name("image_id"),
        answers=references(row, METRICS[own.scorer]),
        labels=label_set(row) or tuple(own.labels or ()),
    )


def own_place(path: str, index: int) -> str:
    """File and line of the row that record `index` of the benchmark in a YAML file was made of."""
    place = Path(path).expanduser()
    file = place.parent / _read_own(place).records
    lines = [number for number, _ in numbered_lines(read_text(file, "JSON lines"))]
    return f"{file}, line {lines[index]}"
