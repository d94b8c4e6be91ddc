"""Where records are: a JSON file, Parquet or Arrow files, a data set of the hub; from there to unchecked records.

JSON is read whole, everything else a batch at a time, at each pass anew, so that nothing but the batch is held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.data.problems import Kind, Problem
from mixlora_cli.data.text_files import parse_json, read_text
from mixlora_cli.errors import UserError

Raw = tuple[int, Any]
"""An unchecked record with its index in the file."""

_PLACE = re.compile(r"(.+?)(?::(\w[\w.-]*(?:\[[^\]]*\])?))?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".zip", ".gz", ".txt", ".yaml")
_ARROW_FILES = ("state.json", "dataset_dict.json")
"""Files of a data set, or of several by name, that `datasets` wrote with `save_to_disk`."""
_SPLIT_WORDS = {"valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")
_BATCH, _BATCH_OF_PICTURES = 1000, 50
"""Records that are held at once; fewer where each may have megabytes of pictures in it."""


@dataclass(frozen=True)
class Place:
    """Records as the user names them: a path, or `owner/name[/config]` on the hub, with `:split` behind it or not."""

    name: str
    split: str | None

    @property
    def path(self) -> Path:
        """Where they are if they are here."""
        return Path(self.name).expanduser()

    @property
    def on_hub(self) -> bool:
        """Whether the name is that of a data set on the hub: of its form, and of no file."""
        is_name = _HUB_NAME.fullmatch(self.name) and not self.name.lower().endswith(_FILE_SUFFIXES)
        return bool(is_name) and not self.path.exists()

    @property
    def is_records_folder(self) -> bool:
        """Whether it is a folder of Parquet or Arrow files."""
        path = self.path
        has_arrow = any((path / name).is_file() for name in _ARROW_FILES)
        return path.is_dir() and (has_arrow or next(path.rglob("*.parquet"), None) is not None)


def place_of(text: str) -> Place:
    """The place that a user names."""
    match = None if Path(text).expanduser().exists() else _PLACE.fullmatch(text)
    return Place(text, None) if match is None else Place(match[1], match[2])


@dataclass(frozen=True)
class Rows:
    """Unchecked records of a table with their indices; each pass over them reads it anew."""

    batches: Callable[[], Iterator[Any]]
    """Opens a pass: tables or record batches of Arrow."""
    count: int
    at_once: int = _BATCH
    """Records of a batch."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Raw]:
        number = 0
        for batch in self.batches():
            for row in batch.to_pylist():
                yield number, row
                number += 1


Raws = Rows | list[Raw]
"""Unchecked records of a place; may be gone through more than once."""


def read_raws(place: str) -> tuple[Raws, list[Problem]]:
    """Unchecked records of a place with their indices, and those that cannot be read.

    Raises:
        UserError: there is nothing that can be read as records, or not the split that is named.
    """
    where = place_of(place)
    if where.on_hub:
        return _of_dataset(_load_from_hub(where, streaming=False)), []
    if where.path.is_dir():
        return _of_folder(where, place), []
    if where.split is not None:
        raise UserError(f"{place}: cannot be read: a file has no splits; expected {where.name}")
    return (_of_parquet([where.path]), []) if _is_parquet(where.path) else read_annotations(where.path)


def stream_raws(place: str) -> Iterator[Raw | Problem]:
    """Unchecked records of a place one after the other, without a list of them.

    Raises:
        UserError: as `read_raws`; the file is a JSON list, which can only be read whole.
    """
    where = place_of(place)
    if where.on_hub:
        batches = (
            _load_from_hub(where, streaming=True).with_format("arrow").iter(batch_size=_BATCH_OF_PICTURES)
        )
        yield from Rows(lambda: batches, 0)
    elif where.path.is_dir() or _is_parquet(where.path):
        yield from read_raws(place)[0]
    else:
        try:
            with where.path.open(encoding="utf-8-sig") as lines:
                yield from parse_lines(_lines_of(lines, place))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({error.strerror})") from None


def _lines_of(lines: Iterable[str], place: str) -> Iterator[tuple[int, str]]:
    is_first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if is_first and not (line.lstrip().startswith("{") and line.strip() != "{"):
            raise UserError(
                f"{place}: data.streaming=true reads JSON lines, Parquet files and data sets of the hub, and this is "
                "none; write a JSON list one record a line (jq -c '.[]' a.json > a.jsonl)"
            )
        is_first = False
        yield number, line.rstrip("\n")


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def _of_folder(where: Place, place: str) -> Rows:
    """A folder of `Dataset.save_to_disk`, or Parquet files; their names may tell splits apart, as on the hub."""
    if any((where.path / name).is_file() for name in _ARROW_FILES):
        from datasets import DatasetDict, load_from_disk  # slow to import, and needed here alone

        try:
            dataset = load_from_disk(str(where.path))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where.path}: not a readable Arrow data set ({reason})") from None
        if isinstance(dataset, DatasetDict):
            return _of_dataset(dataset[_choose(where.split, dataset, place)])
        return _of_dataset(dataset)
    files = sorted(where.path.rglob("*.parquet"))
    if not files:
        raise UserError(f"{where.path}: a folder without Parquet files; expected records as JSON or Parquet")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        found = _SPLIT.findall(file.relative_to(where.path).as_posix())
        name = _SPLIT_WORDS.get(found[-1], found[-1]) if found else None
        by_split.setdefault(name, []).append(file)
    if len(by_split) > 1 or where.split is not None:
        wanted = _SPLIT_WORDS.get(str(where.split), where.split)
        return _of_parquet(by_split[_choose(wanted, by_split, place)])
    return _of_parquet(files)


def _choose(split: str | None, known: Iterable[Any], place: str) -> Any:
    """The split that is named, of those that are there."""
    names = list(known)
    if split not in names or split is None:
        shown = ", ".join(str(name) for name in names if name is not None) or "none"
        what = "several splits" if split is None else f"no split {split}"
        raise UserError(
            f"{place}: {what}; name one of {shown} behind the folder, as in {place_of(place).name}:train"
        )
    return split


def _of_parquet(files: list[Path]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def opened(file: Path) -> Any:
        try:
            return pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file}: cannot be read as Parquet ({reason}); copy or download it again"
            ) from None

    def batches() -> Iterator[Any]:
        for file in files:
            table = opened(file)
            try:
                yield from table.iter_batches(batch_size=_at_once(table.schema_arrow))
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{file}: cannot be read to its end ({reason}); copy it again") from None

    count = sum(opened(file).metadata.num_rows for file in files)
    return Rows(batches, count, _at_once(opened(files[0]).schema_arrow))


def _of_dataset(dataset: Any) -> Rows:
    """A `datasets.Dataset`; pictures come as it stores them, not decoded."""
    at_once = _at_once(dataset.features.arrow_schema)
    return Rows(lambda: dataset.with_format("arrow").iter(batch_size=at_once), len(dataset), at_once)


def _at_once(schema: Any) -> int:
    return _BATCH_OF_PICTURES if "binary" in str(schema) else _BATCH


def _load_from_hub(where: Place, *, streaming: bool) -> Any:
    from datasets import disable_progress_bars, load_dataset

    owner, name, *config = where.name.split("/")
    disable_progress_bars()
    try:
        return load_dataset(f"{owner}/{name}", *config, split=where.split or "train", streaming=streaming)
    except Exception as error:  # of a dozen types
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{where.name}: no file or folder here, and not loaded from the hub either: {reason}; expected a path, or "
            "owner/name[/config][:split] of a data set that this machine can reach or has loaded before"
        ) from error


def read_annotations(path: Path) -> tuple[list[Raw], list[Problem]]:
    """Every readable record of a file with its index, and the unreadable ones.

    A JSON list that breaks off yields the records before the break and one problem (`Kind.CUT_SHORT`); a
    broken line of JSON lines costs that line alone (`Kind.MALFORMED`).

    Raises:
        UserError: the file is missing, is not UTF-8 text, or is neither a JSON list nor JSON lines.
    """
    with suppress(OSError, UnicodeDecodeError), path.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        # an object over several lines is no list of records but a metadata file, say
        if first.lstrip().startswith("{") and first.strip() != "{":
            lines.seek(0)  # line by line: the text as a whole would be some six times the file
            numbered = (
                (number, line.rstrip("\n")) for number, line in enumerate(lines, start=1) if line.strip()
            )
            return _parted(parse_lines(numbered))
    text = read_text(path, "a JSON annotation file")
    beginning = text.lstrip()
    if beginning.startswith("["):
        try:
            return list(enumerate(parse_json(text, str(path)))), []
        except json.JSONDecodeError:
            return _salvage_list(text)
    raise UserError(f"{path}: expected a JSON list of records or JSON lines, one record a line")


def _salvage_list(text: str) -> tuple[list[Raw], list[Problem]]:
    """Records before the break, read one by one, and a problem that says where the break is."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def behind_space(position: int) -> int:
        match = space.match(text, position)
        return position if match is None else match.end()

    records: list[Raw] = []
    position = behind_space(text.index("[") + 1)
    while True:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason, position = error.msg, error.pos
            break
        records.append((len(records), value))
        position = behind_space(end)
        following = text[position : position + 1]
        if following != ",":
            reason = "Text after the end of the list" if following == "]" else "Expecting ',' or ']'"
            break
        position = behind_space(position + 1)
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    where = f"line {line} column {column} (character {position} of {len(text)})"
    detail = f"{reason} at {where}, after {len(records)} whole records"
    return records, [Problem(len(records), Kind.CUT_SHORT, detail)]


def _parted(found: Iterable[Raw | Problem]) -> tuple[list[Raw], list[Problem]]:
    records: list[Raw] = []
    problems: list[Problem] = []
    for each in found:
        if isinstance(each, Problem):
            problems.append(each)
        else:
            records.append(each)
    return records, problems


def parse_lines(lines: Iterable[tuple[int, str]]) -> Iterator[Raw | Problem]:
    """Records of JSON lines, which come with their numbers."""
    for index, (number, line) in enumerate(lines):
        try:
            yield index, parse_json(line, f"line {number}")
        except json.JSONDecodeError as error:
            detail = f"line {number} is not JSON: {error.msg} at column {error.colno}"
            yield Problem(index, Kind.MALFORMED, detail)
        except UserError as error:
            yield Problem(index, Kind.MALFORMED, str(error))
