"""Records one after the other: all of them, mixed by a seed, shared among processes, and none held."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from mixlora_cli.config import DataConfig
from mixlora_cli.data import streaming
from mixlora_cli.data.streaming import stream_records
from mixlora_cli.errors import UserError

from .conftest import raw

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def stream(tmp_path, images):
    """Writes records as JSON lines, by name, and gives the configuration that streams them."""

    def make(*records: Any, **changes: Any) -> DataConfig:
        place = tmp_path / f"{changes.pop('file', 'a')}.jsonl"
        place.write_text("".join(json.dumps(each) + "\n" for each in records))
        values = {
            "name": "t",
            "source": "json",
            "train": str(place),
            "streaming": True,
            "images": str(images),
        }
        return DataConfig(**(values | changes))

    return make


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": str(number), "answer": "a", **more} for number in range(count)]


def indices(data: DataConfig, seed: int = 0, **arguments: Any) -> list[int]:
    return [record.index for record in stream_records(data, "train", seed, **arguments)]


def test_a_pass_gives_every_record_once_in_an_order_of_the_seed(stream) -> None:
    data = stream(*numbered(50))
    first, again, other = indices(data), indices(data), indices(data, 1)
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(50)) != first


def test_processes_share_the_records(stream) -> None:
    data = stream(*numbered(20))
    shares = [indices(data, rank=rank, world_size=3) for rank in range(3)]
    assert [sorted(share) for share in shares] == [list(range(rank, 20, 3)) for rank in range(3)]
    with pytest.raises(UserError, match="no usable record for process 2 of 3; expected at least one"):
        indices(stream(*numbered(2)), rank=2, world_size=3)


def test_no_more_than_the_buffer_is_read_ahead(stream, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 5)
    read = []
    parse = streaming.parse_record
    monkeypatch.setattr(
        streaming, "parse_record", lambda index, *more: read.append(index) or parse(index, *more)
    )
    records = stream_records(stream(*numbered(100)), "train", 0)
    got = [record.index for record in islice(records, 10)]
    assert len(read) == 15 and set(got) < set(range(15))


def test_a_buffer_of_large_pictures_is_short(stream, images, monkeypatch) -> None:
    content = (images / "red.png").read_bytes()
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 3 * len(content))
    read = []
    parse = streaming.parse_record
    monkeypatch.setattr(
        streaming, "parse_record", lambda index, *more: read.append(index) or parse(index, *more)
    )
    inside = base64.b64encode(content).decode()
    records = stream_records(stream(*[raw(inside)] * 20, images=None), "train", 0)
    assert next(records).images == (content,)
    assert len(read) == 4


def test_pictures_stay_bytes_or_paths_and_the_cache_stays_empty(stream, images, own_cache) -> None:
    inside = base64.b64encode((images / "red.png").read_bytes()).decode()
    records = list(stream_records(stream(raw(inside), raw("blue.png"), raw(image=None)), "train", 0))
    found = {record.index: record.images for record in records}
    assert found == {0: ((images / "red.png").read_bytes(),), 1: (images / "blue.png",), 2: ()}
    assert not own_cache.exists()


def test_bad_records_stop_or_are_counted(stream, images, capsys) -> None:
    (images / "corrupt.png").write_bytes((images / "red.png").read_bytes()[:60])
    bad = [{"question": "q"}, raw("corrupt.png"), raw("green.png")]
    data = stream(*numbered(3), *bad)
    with pytest.raises(UserError) as caught:
        indices(data)
    message = str(caught.value)
    assert message.startswith(f"{data.train}, record 3: malformed record: no conversation: ")
    assert message.endswith("; mend it or pass data.on_error=skip to go on without such records")
    skipping = stream(*numbered(3), *bad, on_error="skip")
    capsys.readouterr()
    assert sorted(indices(skipping)) == [0, 1, 2]
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"left out 3 bad records of {data.train}; the first: " in told and "missing image: green.png" in told
    )
    with pytest.raises(UserError, match="no usable record; expected at least one"):
        indices(stream(*bad, on_error="skip"))


def test_only_the_named_tasks(stream) -> None:
    records = [*numbered(3, task_name="ocr"), *numbered(3, task_name="vqa")]
    assert sorted(indices(stream(*records, tasks=["vqa"]))) == [3, 4, 5]
    with pytest.raises(UserError, match=r"no usable record of data\.tasks=\[x\]; expected"):
        indices(stream(*records, tasks=["x"]))


def test_files_by_task_are_drawn_by_weight_until_the_last_has_ended(stream) -> None:
    many, few = stream(*numbered(600), file="many").train, stream(*numbered(20), file="few").train
    data = stream(train={"many": {"file": many, "weight": 3.0}, "few": few})
    records = list(stream_records(data, "train", 0))
    tasks = Counter(record.task for record in records)
    assert {record.index for record in records if record.task == "many"} == set(range(600))
    assert 2.4 < tasks["many"] / tasks["few"] < 3.6
    thirds = [Counter(record.task for record in records[start : start + 200]) for start in (0, 200, 400)]
    assert all(third["few"] > 20 for third in thirds)  # mixed, not one behind the other
