"""From files of records to unchecked records: JSON, Parquet, Arrow, data sets of the hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixlora_cli.data.problems import Kind, Problem
from mixlora_cli.data.sources import Rows, place_of, read_annotations, read_raws, stream_raws
from mixlora_cli.errors import UserError


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "train.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_json_list_and_json_lines_read_alike(tmp_path) -> None:
    rows = [{"id": 1}, {"id": 2, "text": "a\u2028b"}]
    as_list = read_annotations(written(tmp_path, "\ufeff" + json.dumps(rows, indent=1)))
    assert as_list == ([(0, rows[0]), (1, rows[1])], [])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_annotations(written(tmp_path, lines)) == as_list
    assert read_annotations(written(tmp_path, "\ufeff\n" + lines)) == as_list
    mixed = b'{"id": 1}\r\n{"id": 2}\r{"id": 3}\n'  # line breaks of every system
    assert read_annotations(written(tmp_path, mixed)) == (
        [(0, {"id": 1}), (1, {"id": 2}), (2, {"id": 3})],
        [],
    )


@pytest.mark.parametrize(
    ("text", "whole", "detail"),
    [
        (
            '[\n{"id": 1},\n{"id": 2},\n{"id": "thr',
            2,
            "Unterminated string starting at at line 4 column 8 (character 31 of 35)",
        ),
        ('[{"id": 1}', 1, "Expecting ',' or ']' at line 1 column 11 (character 10 of 10)"),
        ('[{"id": 1}, ', 1, "Expecting value at line 1 column 13 (character 12 of 12)"),
        ('[{"id": 1}] x', 1, "Text after the end of the list at line 1 column 11 (character 10 of 13)"),
        ("[", 0, "Expecting value at line 1 column 2 (character 1 of 1)"),
    ],
)
def test_a_list_that_breaks_off(tmp_path, text, whole, detail) -> None:
    records, problems = read_annotations(written(tmp_path, text))
    assert records == [(n, {"id": n + 1}) for n in range(whole)]
    assert problems == [Problem(whole, Kind.CUT_SHORT, f"{detail}, after {whole} whole records")]


HUGE, DEEP = "9" * 5000, "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ('{"id": ', "line 2 is not JSON: Expecting value at column 8"),
        (f'{{"id": {HUGE}}}', "line 2: malformed JSON: a number with thousands of digits"),
        (f'{{"id": {DEEP}}}', "line 2: malformed JSON: nested too deeply, thousands of brackets"),
    ],
)
def test_a_broken_line_costs_that_line_alone(tmp_path, line, detail) -> None:
    records, (problem,) = read_annotations(written(tmp_path, f'{{"id": 1}}\n{line}\n{{"id": 3}}\n'))
    assert records == [(0, {"id": 1}), (2, {"id": 3})]
    assert (problem.index, problem.kind) == (1, Kind.MALFORMED)
    assert problem.detail.startswith(detail)


NO_RECORDS = r"train\.json: expected a JSON list of records or JSON lines"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", NO_RECORDS),
        ("id,image\n1,a.png\n", NO_RECORDS),
        ('{\n "colour": {"definition": "x"}\n}', NO_RECORDS),
        ("3", NO_RECORDS),
        (b'["\xff"]', "not UTF-8 text at byte 2"),
        (b'{"id": 1}\n{"id": "\xff"}\n', "not UTF-8 text at byte 18"),
        (b'\xef\xbb\xbf["\xff"]', "not UTF-8 text at byte 5"),
        (f"[{HUGE}]", r"train\.json: malformed JSON: a number with thousands of digits"),
        (f'[{{"id": {DEEP}}}]', r"train\.json: malformed JSON: nested too deeply, thousands of brackets"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(written(tmp_path, content))
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_annotations(tmp_path)


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{number}", "answer": "a"} for number in range(first, first + count)]


def parquet(path: Path, count: int, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows(count, first)), path)
    return path


def numbered(count: int) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(rows(count)))


def everything(place: Path | str) -> list[Any]:
    """What a place gives, read twice and streamed: alike each time."""
    raws, problems = read_raws(str(place))
    found = list(raws)
    assert len(raws) == len(found) == len(list(raws)) and not problems
    assert list(stream_raws(str(place))) == found
    return found


def test_a_parquet_file_and_a_folder_of_them_are_one_table(tmp_path) -> None:
    assert everything(parquet(tmp_path / "one" / "a.parquet", 3)) == numbered(3)
    for number in range(3):
        parquet(tmp_path / "many" / f"sub{number % 2}" / f"part-{number}.parquet", 2, [0, 4, 2][number])
    assert everything(tmp_path / "many") == numbered(6)
    (tmp_path / "one" / "a.parquet").rename(tmp_path / "without_a_suffix")
    assert everything(tmp_path / "without_a_suffix") == numbered(3)


def test_a_table_is_read_a_batch_at_a_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mixlora_cli.data.sources._BATCH", 4)
    raws, _ = read_raws(str(parquet(tmp_path / "a.parquet", 10)))
    assert isinstance(raws, Rows)
    assert [batch.num_rows for batch in raws.batches()] == [4, 4, 2]
    assert list(raws) == numbered(10)


def test_a_folder_of_splits_must_be_told_which(tmp_path) -> None:
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", 2)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", 2, 2)
    assert everything(tmp_path) == numbered(4)  # the only one
    parquet(tmp_path / "data" / "val-00000-of-00001.parquet", 1)
    message = (
        f"{tmp_path}: several splits; name one of train, validation behind the folder, as in {tmp_path}:train"
    )
    with pytest.raises(UserError) as caught:
        read_raws(str(tmp_path))
    assert str(caught.value) == message
    assert everything(f"{tmp_path}:train") == numbered(4)
    assert everything(f"{tmp_path}:val") == everything(f"{tmp_path}:validation") == numbered(1)
    with pytest.raises(UserError, match="no split test; name one of train, validation behind"):
        read_raws(f"{tmp_path}:test")


def test_a_folder_that_datasets_wrote(tmp_path) -> None:
    table = datasets.Dataset.from_list(rows(3))
    table.save_to_disk(tmp_path / "one")
    assert everything(tmp_path / "one") == numbered(3)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several splits; name one of train, test behind the folder"):
        read_raws(str(tmp_path / "two"))
    assert everything(f"{tmp_path / 'two'}:test") == numbered(1)


def test_pictures_of_a_table_come_as_bytes_not_decoded(tmp_path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    kinds = datasets.Features({"images": datasets.List(datasets.Image()), "image": datasets.Image()})
    table = datasets.Dataset.from_list([{"images": [stored, stored], "image": stored}], features=kinds)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "arrow")
    for place in (tmp_path / "a.parquet", tmp_path / "arrow"):
        assert everything(place) == [(0, {"images": [stored, stored], "image": stored})]
        raws, _ = read_raws(str(place))
        assert isinstance(raws, Rows) and raws.at_once == 50  # megabytes each


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for owner/name on the hub: `datasets` loads it as it would load that."""
    load = datasets.load_dataset

    def from_folder(name: str, *config: str, **options: Any) -> Any:
        folder = tmp_path / "hub" / name
        if not folder.is_dir():
            return load(name, *config, **options)
        return load(str(folder / "/".join(config)), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_data_set_of_the_hub_by_name_configuration_and_split(hub) -> None:
    parquet(hub / "owner/name/data/train-00000-of-00001.parquet", 3)
    parquet(hub / "owner/name/data/test-00000-of-00001.parquet", 1)
    parquet(hub / "owner/name/french/data/train-00000-of-00001.parquet", 2)
    assert everything("owner/name/data") == everything("owner/name/data:train") == numbered(3)
    assert everything("owner/name/data:test") == numbered(1)
    assert list(read_raws("owner/name/french:train[:50%]")[0]) == numbered(1)
    with pytest.raises(UserError, match=r"^owner/name/data: .*Unknown split \"val\""):
        read_raws("owner/name/data:val")


def test_a_hub_that_cannot_be_reached_is_one_line(hub) -> None:
    for read in (read_raws, lambda place: list(stream_raws(place))):
        with pytest.raises(UserError) as caught:
            read("nobody/nothing:train")
        message = str(caught.value)
        assert message.startswith(
            "nobody/nothing: no file or folder here, and not loaded from the hub either: "
        )
        assert "owner/name[/config][:split]" in message and "\n" not in message


PLACES = [
    ("a.json", "a.json", None, False),
    ("data/a.json", "data/a.json", None, False),
    ("owner/a.jsonl", "owner/a.jsonl", None, False),
    ("owner/name", "owner/name", None, True),
    ("owner/name:test", "owner/name", "test", True),
    ("owner/name/config:train[:10%]", "owner/name/config", "train[:10%]", True),
    ("./owner/name", "./owner/name", None, False),
    ("/owner/name", "/owner/name", None, False),
    ("a/b/c/d", "a/b/c/d", None, False),
    ("name", "name", None, False),
]


@pytest.mark.parametrize(("text", "name", "split", "on_hub"), PLACES)
def test_what_a_place_names(text, name, split, on_hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = place_of(text)
    assert (place.name, place.split, place.on_hub) == (name, split, on_hub)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert not place_of("owner/name").on_hub  # what is here comes first


def broken_parquet(folder: Path) -> Path:
    path = parquet(folder / "a.parquet", 3)
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken_parquet, r"a\.parquet: cannot be read as Parquet \(.*copy or download it again"),
        (lambda folder: folder, "a folder without Parquet files; expected records as JSON or Parquet"),
        (lambda folder: folder / "gone", r"gone: cannot be read \(No such file or directory\)"),
        (lambda folder: f"{written(folder, '[]')}:train", "a file has no splits; expected "),
    ],
)
def test_places_that_cannot_be_read(make, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_raws(str(make(tmp_path)))
    assert "\n" not in str(caught.value)


def test_json_lines_stream_and_a_list_is_refused(tmp_path) -> None:
    lines = "\ufeff" + "\n".join(['{"id": 1}', "", '{"id": ', '{"id": 3}']) + "\r\n"
    found = list(stream_raws(str(written(tmp_path, lines))))
    assert [found[0], found[2]] == [(0, {"id": 1}), (2, {"id": 3})]
    assert isinstance(found[1], Problem) and "line 3 is not JSON" in found[1].detail
    for content in ('[{"id": 1}]', '{\n"id": 1}', "id,q\n"):
        with pytest.raises(UserError, match=r"data\.streaming=true reads JSON lines.*jq -c"):
            list(stream_raws(str(written(tmp_path, content))))
    with pytest.raises(UserError, match="not UTF-8 text"):
        list(stream_raws(str(written(tmp_path, b'{"id": "\xff"}'))))
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read \(No such file"):
        list(stream_raws(str(tmp_path / "gone.jsonl")))
