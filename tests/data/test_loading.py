"""From the data's configuration to records: what is refused, left out, counted and sampled."""

from __future__ import annotations

import base64
import json
import sys
from types import ModuleType
from typing import Any

import pytest

from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.paths import cache_root

from .conftest import raw, turns

pytestmark = pytest.mark.usefixtures("own_cache")


def refused(data: DataConfig, split="train") -> str:
    with pytest.raises(UserError) as caught:
        load_records(data, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def indices(data: DataConfig, **arguments) -> list[int]:
    return [record.index for record in load_records(data, "train", **arguments)]


def test_good_records_load_in_order_without_a_word(make_data, capsys) -> None:
    records = load_records(make_data([raw(), raw(image=None), raw("blue.png", id=7)]), "train")
    assert [(record.index, record.id, [path.name for path in record.files]) for record in records] == [
        (0, "a", ["red.png"]),
        (1, "a", []),
        (2, "7", ["blue.png"]),
    ]
    assert "left out" not in capsys.readouterr().err
    assert indices(make_data([raw(image=None)], images=None)) == [0]  # texts need no folder


@pytest.fixture
def bad_images(images) -> dict[str, str]:
    """A bad image path of each kind, and what the message says of it when it is record 1."""
    outside = images.parent / "outside.png"
    outside.write_bytes((images / "red.png").read_bytes())
    (images / "corrupt.png").write_bytes((images / "red.png").read_bytes()[:40])
    (images / "link.png").symlink_to(outside)
    climbs = "1 image path outside the image folder (record 1, {} leads to " + f"{outside}, outside {images})"
    return {
        "green.png": "1 missing image (record 1, green.png)",
        "corrupt.png": "1 corrupt image (record 1, corrupt.png: ",
        "../outside.png": climbs.format("../outside.png"),
        "link.png": climbs.format("link.png"),
    }


@pytest.mark.parametrize("name", ["green.png", "corrupt.png", "../outside.png", "link.png"])
def test_one_bad_image_stops_or_is_left_out(make_data, bad_images, capsys, name) -> None:
    records = [raw(), raw(name), raw("blue.png")]
    message = refused(make_data(records))
    assert f"1 bad record in {make_data(records).train}: {bad_images[name]}" in message
    assert message.endswith("; fix them or pass data.on_error=skip to go on without them")
    capsys.readouterr()
    assert indices(make_data(records, on_error="skip")) == [0, 2]
    assert "left out 1 of 3 records; 1 bad record in " in capsys.readouterr().err


def test_problems_are_counted_together(make_data, bad_images, capsys) -> None:
    records = [raw("corrupt.png"), raw("green.png"), raw(**turns("q", "")), raw(), raw("lime.png"), {"id": 1}]
    message = refused(make_data([*records, raw("corrupt.png")]))
    for part in (
        "6 bad records in ",
        "1 malformed record (record 5, ",
        "1 empty answer (record 2, turn 1)",
        "2 missing image (first: record 1, green.png)",
        "2 corrupt image (first: record 0, corrupt.png: ",
    ):
        assert part in message
    table = capsys.readouterr().err
    assert "record 1: green.png" in table and "record 4: lime.png" in table
    assert indices(make_data(records, on_error="skip")) == [3]
    assert "left out 5 of 6 records; 5 bad records in " in capsys.readouterr().err


def test_a_file_that_was_cut_short(make_data, capsys) -> None:
    text = json.dumps([raw(), raw("blue.png"), raw()])[:-60]
    message = refused(make_data(text))
    assert message.startswith(f"{make_data(text).train}: broken JSON: ")
    what_now = "after 2 whole records; if the file was cut short, copy or download it again"
    assert f"of {len(text)}), {what_now}" in message
    assert indices(make_data(text, on_error="skip")) == [0, 1]
    shown = capsys.readouterr().err
    assert "left out 1 of 3 records; 1 bad record in " in shown
    assert "1 broken JSON, nothing read after it (record 2, " in shown

    lines = "\n".join(json.dumps(row) for row in (raw(), raw(), raw("blue.png")))[:-30]
    assert "1 malformed record (record 2, line 3 is not JSON: " in refused(make_data(lines))
    assert indices(make_data(lines, on_error="skip")) == [0, 1]


def test_half_characters_are_counted_and_left_out(make_data) -> None:
    records = [raw(id=str(number)) for number in range(4)]
    records[0]["image"] = "p\ud83d.png"
    records[1]["conversations"][1]["value"] = "nice \ud83d"
    records[2]["task_name"] = "\ud83d"
    told = "3 text that is no Unicode (first: record 0, lone surrogate U+D83D in image)"
    assert told in refused(make_data(records))
    assert [record.id for record in load_records(make_data(records, on_error="skip"), "train")] == ["3"]
    assert refused(make_data(records, tasks=["number"])).endswith("known tasks: colour")


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        ([raw("green.png")], {"on_error": "skip"}, "no usable record"),
        ([], {}, "no usable record"),
        ([raw()], {"images": "gone"}, "data.images=gone: no such folder"),
        ([raw()], {"images": None}, "records have images, but data.images=null"),
        (
            [raw(image=None, images=["red.png"])],
            {"images": None},
            "records have images, but data.images=null",
        ),
        ([], {"train": "no.json"}, "no.json: cannot be read"),
        ([raw()], {"tasks": ["coluor"]}, "data.tasks=coluor: no such task in "),
        ([raw()], {"tasks": ["coluor"]}, "; did you mean colour?"),
        ([raw()], {"tasks": ["zzz"]}, "; known tasks: colour"),
    ],
)
def test_what_cannot_be_loaded(make_data, records, changes, message) -> None:
    assert message in refused(make_data(records, **changes))


def test_a_split_that_no_file_is_named_for(make_data) -> None:
    message = refused(make_data([raw()]), "heldout")
    assert message.startswith("data.heldout=null: expected the path of a JSON")


def of_tasks(**counts: int) -> list[dict[str, Any]]:
    return [raw(task_name=task) for task, count in counts.items() for _ in range(count)]


def test_only_the_named_tasks_and_their_problems(make_data) -> None:
    records = [*of_tasks(colour=2, shape=2, count=1), raw("green.png", task_name="shape")]
    assert indices(make_data(records, tasks=["count", "colour"])) == [0, 1, 4]


def test_the_sample_depends_on_the_seed_alone_and_only_it_is_opened(make_data, images) -> None:
    (images / "corrupt.png").write_bytes(b"x")
    records = of_tasks(colour=20, shape=3)
    records[0]["image"] = "corrupt.png"
    data = make_data(records, max_per_task=4)
    assert indices(data) == [2, 3, 11, 19, 20, 21, 22]  # literal: the same on every machine
    assert indices(data, seed=1) == [1, 6, 10, 18, 20, 21, 22]
    assert indices(make_data(records, max_per_task=4, tasks=["colour"])) == [2, 3, 11, 19]


def test_only_training_is_sampled_and_the_unseen_split_has_its_own_tasks(make_data) -> None:
    data = make_data(of_tasks(colour=3, shape=1), max_per_task=1)
    heldout = DataConfig(**{**vars(data), "heldout": data.train, "tasks": ["colour"]})
    assert len(load_records(heldout, "heldout")) == 3
    unseen = DataConfig(**{**vars(data), "unseen": data.train, "tasks": ["other"]})
    assert len(load_records(unseen, "unseen")) == 4


def asked(*questions: str, **more: Any) -> list[dict[str, Any]]:
    return [{"question": question, "answer": "a", **more} for question in questions]


@pytest.fixture
def mixed(make_data, tmp_path):
    """The configuration of three files by task, of 4, 6 and 1 records; `mixed(ocr=..., ...)` says weights."""
    files = {"ocr": asked(*"abcd", task_name="own"), "vqa": asked(*"efghij"), "count": asked("k", kind="few")}
    for name, records in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))

    def make(**changes: Any) -> DataConfig:
        weights = changes.pop("weights", {})
        places: dict[str, Any] = {name: str(tmp_path / f"{name}.json") for name in files}
        train = places | {name: {"file": places[name], "weight": weight} for name, weight in weights.items()}
        return make_data([], **({"train": train} | changes))

    return make


def questions(data: DataConfig, seed: int = 0) -> str:
    return "".join(record.conversation[0].text for record in load_records(data, "train", seed))


def test_files_by_task_are_one_behind_the_other(mixed) -> None:
    records = load_records(mixed(), "train")
    assert [record.index for record in records] == list(range(11))
    assert [record.task for record in records] == ["ocr"] * 4 + ["vqa"] * 6 + ["count"]
    assert questions(mixed(tasks=["count", "vqa"])) == "efghijk"
    assert "data.tasks=own: no such task in " in refused(mixed(tasks=["own"]))
    assert questions(mixed(max_per_task=2)) == "bdegk"


def test_weights_say_how_often_a_record_is_seen(mixed, capsys) -> None:
    assert questions(mixed(weights={"ocr": 2.0})) == "aabbccddefghijk"
    assert "ocr: 4 records with weight 2, 8 in an epoch" in capsys.readouterr().err
    assert questions(mixed(weights={"count": 3})) == "abcdefghijkkk"
    halves = [questions(mixed(weights={"vqa": 0.5}), seed) for seed in (0, 0, 1)]
    assert halves == ["abcdegjk", "abcdegjk", "abcdefgk"]  # literal: the same on every machine
    assert questions(mixed(weights={"ocr": 1.5})) == "abbcddefghijk"
    assert questions(mixed(weights={"count": 0.001})) == "abcdefghijk"  # one at least
    assert questions(mixed(weights={"ocr": 2.0}, max_per_task=1)) == "ddek"


def test_the_key_of_the_task_is_before_that_of_the_file(mixed, tmp_path) -> None:
    places = {"ocr": str(tmp_path / "ocr.json")}
    records = load_records(mixed(train=places, task_key="task_name"), "train")
    assert [record.task for record in records] == ["own"] * 4
    places["count"] = str(tmp_path / "count.json")
    told = "(record 4, no task_name, which data.task_key names; its keys are question, answer, kind)"
    assert f"1 malformed record {told}" in refused(mixed(train=places, task_key="task_name"))


def test_problems_of_several_files_say_where_each_begins(mixed, tmp_path) -> None:
    (tmp_path / "vqa.json").write_text(json.dumps([*asked("e"), {"question": "x"}]))
    message = refused(mixed())
    ocr, vqa, count = (tmp_path / f"{name}.json" for name in ("ocr", "vqa", "count"))
    where = f"{ocr} (from record 0 on), {vqa} (from record 4 on), {count} (from record 6 on)"
    assert message.startswith(f"1 bad record in {where}: 1 malformed record (record 5, no conversation: ")
    assert questions(mixed(on_error="skip")) == "abcdek"


def test_heldout_and_unseen_files_by_task(mixed, make_data, tmp_path) -> None:
    data = mixed()
    both = DataConfig(**{**vars(data), "heldout": {"ocr": data.train["ocr"]}, "unseen": data.train["vqa"]})
    assert [record.task for record in load_records(both, "heldout")] == ["ocr"] * 4
    assert [record.task for record in load_records(both, "unseen")] == ["unnamed"] * 6
    hub = DataConfig(name="t", source="json", unseen="owner/name")
    assert refused(hub, "unseen") == "data.unseen=owner/name: say which split, as in owner/name:validation"


def test_pictures_in_the_records_become_files_in_the_cache(make_data, images, own_cache) -> None:
    content = (images / "red.png").read_bytes()
    inside = base64.b64encode(content).decode()
    records = [raw(inside), raw(f"data:image/png;base64,{inside}"), raw(image=None)]
    data = make_data(records, images=None)
    first, second, third = load_records(data, "train")
    assert first.files == second.files and third.files == ()
    (path,) = first.files
    assert path.read_bytes() == content and path.is_relative_to(own_cache / "pictures")
    assert load_records(make_data([raw(), raw(inside)]), "train")[1].files == (path,)  # beside paths
    broken = base64.b64encode(content[:60]).decode()
    message = refused(make_data([raw(), raw(f"data:image/png;base64,{broken}")]))
    assert "1 corrupt image (record 1, " in message and len(message) < 400


def test_a_streamed_training_is_not_read_whole(make_data) -> None:
    assert refused(make_data([raw()], streaming=True)).startswith(
        "data.streaming=true: only `mixlora train` reads"
    )
    with pytest.raises(
        ValueError, match=r"data\.max_per_task=3: data\.streaming=true reads records as they come"
    ):
        make_data([raw()], streaming=True, max_per_task=3)
    with pytest.raises(ValueError, match=r"data\.streaming=true: only records of your own are streamed"):
        DataConfig(name="mini", source="mini", streaming=True)


def test_mini_goes_through_the_same_loader(images, tmp_path, monkeypatch) -> None:
    for split in ("train", "heldout", "unseen"):
        (tmp_path / f"{split}.json").write_text(json.dumps([raw(id=split)]))
    (tmp_path / "metadata.json").write_text(json.dumps({"colour": {"definition": "Say the colour."}}))
    build = ModuleType("mixlora_cli.data.mini.build")
    build.mini_root = lambda: tmp_path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mixlora_cli.data.mini.build", build)
    data = DataConfig(name="mini", source="mini")
    for split in ("train", "heldout", "unseen"):
        (record,) = load_records(data, split)
        assert (record.id, record.images) == (split, (images / "red.png",))
    assert load_definitions(data) == {"colour": "Say the colour."}


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("MIXLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "mixlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "mixlora"
