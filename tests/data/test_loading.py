from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.paths import cache_root

pytestmark = pytest.mark.usefixtures("own_cache")


def refused(data: DataConfig, split="train") -> str:
    with pytest.raises(UserError) as caught:
        load_records(data, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def indices(data: DataConfig, **arguments) -> list[int]:
    return [record.index for record in load_records(data, "train", **arguments)]


def test_good_records_load_in_order_without_a_word(make_raw, make_data, capsys) -> None:
    data = make_data([make_raw(), make_raw(image=None), make_raw("blue.png", id=7)])
    records = load_records(data, "train")
    assert [(record.index, record.id, record.image and record.image.name) for record in records] == [
        (0, "a", "red.png"),
        (1, "a", None),
        (2, "7", "blue.png"),
    ]
    assert "left out" not in capsys.readouterr().err


@pytest.fixture
def bad_image(images) -> dict[str, str]:
    """A bad image path of each kind, and what the message says of it when it is record 1."""
    (images.parent / "outside.png").write_bytes((images / "red.png").read_bytes())
    (images / "corrupt.png").write_bytes((images / "red.png").read_bytes()[:40])
    (images / "link.png").symlink_to(images.parent / "outside.png")
    outside = f"leads to {images.parent / 'outside.png'}, outside {images}"
    climbs = "1 image path outside the image folder (record 1, {} " + outside + ")"
    return {
        "green.png": "1 missing image (record 1, green.png)",
        "corrupt.png": "1 corrupt image (record 1, corrupt.png: ",
        "../outside.png": climbs.format("../outside.png"),
        "link.png": climbs.format("link.png"),
    }


@pytest.mark.parametrize("name", ["green.png", "corrupt.png", "../outside.png", "link.png"])
def test_one_bad_image_stops_or_is_left_out(make_raw, make_data, bad_image, capsys, name) -> None:
    records = [make_raw(), make_raw(name), make_raw("blue.png")]
    message = refused(make_data(records))
    assert f"1 bad record in {make_data(records).train}: {bad_image[name]}" in message
    assert message.endswith("; fix them or pass data.on_error=skip to go on without them")
    capsys.readouterr()
    assert indices(make_data(records, on_error="skip")) == [0, 2]
    assert "left out 1 of 3 records; 1 bad record in " in capsys.readouterr().err


def test_problems_are_counted_together(make_raw, make_data, bad_image, capsys) -> None:
    empty = make_raw(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}])
    records = [
        make_raw("corrupt.png"),
        make_raw("green.png"),
        empty,
        make_raw(),
        make_raw("lime.png"),
        {"id": 1},
    ]
    message = refused(make_data(records))
    assert "5 bad records in " in message
    for part in (
        "1 malformed record (record 5, ",
        "1 empty answer (record 2, turn 1)",
        "1 corrupt image (record 0, ",
    ):
        assert part in message
    assert "2 missing image (first: record 1, green.png)" in message
    table = capsys.readouterr().err
    assert "record 1: green.png" in table
    assert "record 4: lime.png" in table
    assert indices(make_data(records, on_error="skip")) == [3]
    assert "left out 5 of 6 records; 5 bad records in " in capsys.readouterr().err


def test_a_bad_picture_counts_for_each_record_that_shows_it(make_raw, make_data, bad_image) -> None:
    message = refused(make_data([make_raw("corrupt.png"), make_raw(), make_raw("corrupt.png")]))
    assert "2 bad records in " in message
    assert "2 corrupt image (first: record 0, corrupt.png: " in message


def test_a_truncated_json(make_raw, make_data, capsys) -> None:
    text = json.dumps([make_raw(), make_raw("blue.png"), make_raw()])[:-60]
    message = refused(make_data(text))
    assert message.startswith(f"{make_data(text).train}: broken JSON: ")
    assert (
        f"of {len(text)}), after 2 whole records; if the file was cut short, copy or download it again"
        in message
    )
    assert indices(make_data(text, on_error="skip")) == [0, 1]
    shown = capsys.readouterr().err
    assert "left out 1 of 3 records; 1 bad record in " in shown
    assert "1 broken JSON, nothing read after it (record 2, " in shown


def test_a_truncated_json_line(make_raw, make_data, capsys) -> None:
    text = "\n".join(json.dumps(row) for row in (make_raw(), make_raw(), make_raw("blue.png")))[:-30]
    assert "1 bad record in " in (message := refused(make_data(text)))
    assert "1 malformed record (record 2, line 3 is not JSON: " in message
    assert indices(make_data(text, on_error="skip")) == [0, 1]
    assert "left out 1 of 3 records" in capsys.readouterr().err


def test_nothing_left_is_an_error_even_when_skipping(make_raw, make_data) -> None:
    assert "no usable record" in refused(make_data([make_raw("green.png")], on_error="skip"))
    assert "no usable record" in refused(make_data([]))


def test_folders_and_files_that_do_not_exist(make_raw, make_data, tmp_path) -> None:
    assert f"data.images={tmp_path}/no: no such folder" in refused(
        make_data([make_raw()], images=f"{tmp_path}/no")
    )
    assert "records have images, but data.images=null" in refused(make_data([make_raw()], images=None))
    assert f"{tmp_path}/no.json: cannot be read" in refused(make_data([], train=f"{tmp_path}/no.json"))
    assert refused(make_data([make_raw()]), "heldout").startswith(
        "data.heldout=null: expected the path of a JSON"
    )


def test_text_only_data_needs_no_image_folder(make_raw, make_data) -> None:
    assert indices(make_data([make_raw(image=None)], images=None)) == [0]


def tasks_of(make_raw, **counts: int):
    return [make_raw(task_name=task) for task, count in counts.items() for _ in range(count)]


def test_only_the_named_tasks(make_raw, make_data) -> None:
    records = tasks_of(make_raw, colour=2, shape=2, count=1)
    assert indices(make_data(records, tasks=["count", "colour"])) == [0, 1, 4]
    message = refused(make_data(records, tasks=["coluor"]))
    assert message.startswith("data.tasks=coluor: no such task in ")
    assert message.endswith("; did you mean colour?")
    assert refused(make_data(records, tasks=["zzz"])).endswith("; known tasks: colour, count, shape")


def test_problems_of_other_tasks_do_not_matter(make_raw, make_data) -> None:
    records = [make_raw(), make_raw("green.png", task_name="shape")]
    assert indices(make_data(records, tasks=["colour"])) == [0]


def test_the_unseen_split_is_not_filtered_by_the_seen_tasks(make_raw, make_data) -> None:
    data = make_data(tasks_of(make_raw, colour=1, shape=1), tasks=["other"], max_per_task=1)
    unseen = DataConfig(**{**vars(data), "unseen": data.train})
    assert [record.task for record in load_records(unseen, "unseen")] == ["colour", "shape"]


def test_the_sample_depends_on_the_seed_alone(make_raw, make_data) -> None:
    records = tasks_of(make_raw, colour=20, shape=3)
    data = make_data(records, max_per_task=4)
    assert indices(data) == [2, 3, 11, 19, 20, 21, 22]  # literal: the same on every machine
    assert indices(data, seed=1) == [1, 6, 10, 18, 20, 21, 22]
    assert indices(make_data(records, max_per_task=4, tasks=["colour"])) == [2, 3, 11, 19]


def test_only_the_training_split_is_sampled_and_only_the_sample_is_opened(
    make_raw, make_data, images
) -> None:
    records = tasks_of(make_raw, colour=20)
    (images / "corrupt.png").write_bytes(b"x")
    records[0]["image"] = "corrupt.png"
    data = make_data(records, max_per_task=4)
    assert indices(data) == [2, 3, 11, 19]
    heldout = DataConfig(**{**vars(data), "heldout": data.train, "on_error": "skip"})
    assert len(load_records(heldout, "heldout")) == 19


def test_definitions(make_data, tmp_path) -> None:
    metadata = tmp_path / "metadata.json"
    metadata.write_text(
        json.dumps({"colour": {"definition": "Say the colour.", "split": "seen"}, "shape": "Say it."})
    )
    data = make_data([], metadata=str(metadata))
    assert load_definitions(data) == {"colour": "Say the colour.", "shape": "Say it."}
    assert load_definitions(make_data([])) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object of task names, got a list"),
        ('{"colour": {"definition": " "}}', "task colour has no text in 'definition'"),
        ('{"colour": 3}', "task colour has no text in 'definition'"),
    ],
)
def test_bad_definitions(make_data, tmp_path, text, message) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_definitions(make_data([], metadata=str(tmp_path / "metadata.json")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"colour": "caf\xe9"}', "not UTF-8 text at byte 15; expected a JSON file of task definitions"),
        ('{"colour": "é"}'.encode("utf-16"), "not UTF-8 text at byte 0"),
        (b'{"colour": "\\ud83d"}', r"text that is no Unicode: lone surrogate U\+D83D"),
        (b'{"colour": ' + b"9" * 5000 + b"}", "malformed JSON: a number with thousands of digits"),
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
        (b'{"' + b"x" * 300 + b'": 3}', rf": task {'x' * 77}\.\.\. has no text"),
    ],
)
def test_definitions_are_read_by_the_rule_of_records(make_data, tmp_path, content, message) -> None:
    data = make_data([], metadata=str(tmp_path / "metadata.json"))
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_definitions(data)
    assert str(caught.value).startswith(f"data.metadata={tmp_path / 'metadata.json'}: ")
    assert "\n" not in str(caught.value)
    (tmp_path / "metadata.json").write_bytes(b"\xef\xbb\xbf" + '{"colour": "é"}'.encode())
    assert load_definitions(data) == {"colour": "é"}


def test_pictures_in_lists_need_a_folder_too(make_data, make_raw) -> None:
    data = make_data([make_raw(image=None, images=["red.png"])], images=None)
    with pytest.raises(UserError, match=r"records have images, but data\.images=null"):
        load_records(data, "train")


def test_half_characters_are_counted_and_left_out(make_data, make_raw, own_cache, capsys) -> None:
    records = [make_raw(id=str(number)) for number in range(4)]
    records[0]["image"] = "p\ud83d.png"
    records[1]["conversations"][1]["value"] = "nice \ud83d"
    records[2]["task_name"] = "\ud83d"
    told = "3 text that is no Unicode (first: record 0, lone surrogate U+D83D in image)"
    with pytest.raises(UserError) as caught:
        load_records(make_data(records), "train")
    assert told in str(caught.value)
    assert [record.id for record in load_records(make_data(records, on_error="skip"), "train")] == ["3"]
    assert (
        f"left out 3 of 4 records; 3 bad records in {make_data(records).train}: {told}"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"known tasks: colour$"):
        load_records(make_data(records, tasks=["number"]), "train")


def test_mini_goes_through_the_same_loader(make_raw, images, tmp_path, monkeypatch) -> None:
    for split in ("train", "heldout", "unseen"):
        (tmp_path / f"{split}.json").write_text(json.dumps([make_raw(id=split)]))
    (tmp_path / "metadata.json").write_text(json.dumps({"colour": {"definition": "Say the colour."}}))
    build = ModuleType("mixlora_cli.data.mini.build")
    build.mini_root = lambda: tmp_path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mixlora_cli.data.mini.build", build)
    data = DataConfig(name="mini", source="mini")
    for split in ("train", "heldout", "unseen"):
        (record,) = load_records(data, split)
        assert (record.id, record.image) == (split, images / "red.png")
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
