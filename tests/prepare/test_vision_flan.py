"""`mixlora prepare data=vision_flan` from a local copy."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import DryRunFileInfo

from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.images import open_picture
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.sources import read_raws
from mixlora_cli.errors import UserError
from mixlora_cli.prepare import parts, vision_flan
from mixlora_cli.prepare.vision_flan import find_definitions, prepare_vision_flan, unique_ids

from .conftest import INSTRUCTION, png, record, vision_flan_records

ARCHIVE, ANNOTATIONS = "image_191-task_1k.zip", "annotation_191-task_1k.json"


def refused(config) -> str:
    with pytest.raises(UserError) as caught:
        prepare_vision_flan(config)
    return str(caught.value)


@pytest.mark.parametrize("form", ["archive", "archive, unpacked here", "folder"])
def test_records_and_pictures_survive_and_are_counted(make_copy, configure, form) -> None:
    copy = make_copy()
    if form == "folder":
        zipfile.ZipFile(copy / ARCHIVE).extractall(copy)
        (copy / ARCHIVE).unlink()
    unpack = form == "archive, unpacked here"
    config = configure(copy, unpack=unpack)
    root = prepare_vision_flan(config)
    raws = vision_flan_records()
    rows = [row for _, row in read_raws(str(root / "records"))[0]]
    assert [row["conversations"] for row in rows] == [raw["conversations"] for raw in raws]
    assert [row["source_id"] for row in rows] == [raw["id"] for raw in raws]
    assert [row["id"] for row in rows][7:10] == [
        "CIFAR+colour_7.png", "CIFAR+colour_0.png#2", "CIFAR+colour_0.png#3"
    ]  # fmt: skip
    assert len({row["id"] for row in rows}) == len(raws) == 13
    records = load_records(config.data, "train")
    assert [record.task for record in records] == [raw["task_name"] for raw in raws]
    assert [r.files[0].name if r.files else None for r in records] == [raw.get("image") for raw in raws]
    with open_picture(records[2].files[0]) as picture:
        assert (picture.size, picture.convert("RGB").getpixel((0, 0))) == ((18, 18), (0, 0, 255))
    places = {"archive": copy / ARCHIVE / "images_191task_1k", "folder": copy / "images_191task_1k"}
    assert locate_files(config.data, "train").images == places.get(form, root / "images")
    assert (root / "images").is_dir() is unpack
    manifest = json.loads((root / "prepared.json").read_text())
    assert (manifest["records"], manifest["pictures"], manifest["text_only"]) == (13, 8, 1)
    assert manifest["tasks"] == {"CIFAR+colour": 8, "VQA": 4, "text": 1}
    assert manifest["definitions"] == {"metadata": 0, "questions": 1}
    assert manifest["undefined_tasks"] == ["VQA", "text"]


def test_definitions_come_from_the_questions_or_from_metadata_that_has_them(make_copy, configure) -> None:
    copy = make_copy()
    config = configure(copy)
    prepare_vision_flan(config)
    assert load_definitions(config.data) == {"CIFAR+colour": INSTRUCTION}
    (copy / "metadata.json").write_text(
        json.dumps({"VQA": "Answer it.", "CIFAR+colour": "Name it.", "x": "y"})
    )
    root = prepare_vision_flan(configure(copy, overwrite=True))
    assert json.loads((root / "definitions.json").read_text()) == {
        "CIFAR+colour": {"definition": "Name it.", "origin": "metadata"},
        "VQA": {"definition": "Answer it.", "origin": "metadata"},
    }


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        (["Name the dog breed here.\n\nIs it A?", "Name the dog breed here.\n\nIs it B?"], "Name the dog breed here."),
        (["Name the dog breed here"] * 3, "Name the dog breed here"),
        (["What is the dog?", "What is the cat?"], None),
        (["Look. What is the dog?", "Look. What is the cat?"], None),
        (["Name the dog breed here."], None),
        (["Score from 1.5 to 2 it is: a", "Score from 1.5 to 2 it is: b"], "Score from 1.5 to 2 it is:"),
    ],
)  # fmt: skip
def test_what_questions_begin_with(questions, expected) -> None:
    from mixlora_cli.data.records import parse_record

    raws = [record("t", n, question, "a", None) for n, question in enumerate(questions)]
    found = find_definitions([parse_record(n, raw, None) for n, raw in enumerate(raws)], None)
    assert found == ({} if expected is None else {"t": {"definition": expected, "origin": "questions"}})


def test_a_second_call_does_nothing(make_copy, configure, monkeypatch, capsys) -> None:
    copy = make_copy()
    root = prepare_vision_flan(configure(copy, unpack=True))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr("mixlora_cli.prepare.vision_flan.open_source", None)
    assert prepare_vision_flan(configure(copy, unpack=True)) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert f"{root} is prepared already" in capsys.readouterr().err


def test_other_settings_or_files_are_not_mixed_up(make_copy, configure) -> None:
    copy = make_copy()
    prepare_vision_flan(configure(copy))
    message = refused(configure(copy, seed=1, data={"max_per_task": 3}))
    assert "was prepared otherwise: max_per_task (was None, now 3), seed (was 0, now 1); " in message
    (copy / ANNOTATIONS).write_text(json.dumps(vision_flan_records()[:9]))
    assert f"{ANNOTATIONS} in {copy} has changed" in refused(configure(copy))
    config = configure(copy, overwrite=True)
    prepare_vision_flan(config)
    assert len(load_records(config.data, "train")) == 9


def test_a_seeded_sample_of_each_task(make_copy, configure) -> None:
    copy = make_copy()

    def ids(seed: int) -> list[str]:
        root = prepare_vision_flan(configure(copy, seed=seed, data={"max_per_task": 3}, overwrite=True))
        return [row["id"] for _, row in read_raws(str(root / "records"))[0]]

    first = ids(0)
    assert len(first) == 3 + 3 + 1
    assert ids(0) == first != ids(1)


def test_stopped_while_unpacking_it_goes_on(make_copy, configure, monkeypatch) -> None:
    copy = make_copy()
    read, done = vision_flan.read_picture, []

    def stop_at_the_fourth(path: Path) -> bytes:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        return read(path)

    monkeypatch.setattr(vision_flan, "read_picture", stop_at_the_fourth)
    config = configure(copy, unpack=True)
    with pytest.raises(KeyboardInterrupt):
        prepare_vision_flan(config)
    with pytest.raises(
        UserError, match=r"the preparation in .*flan is not complete; run `mixlora prepare data"
    ):
        load_records(config.data, "train")
    again: list[str] = []
    monkeypatch.setattr(vision_flan, "read_picture", lambda path: again.append(path.name) or read(path))
    prepare_vision_flan(config)
    assert (len(done), len(again), set(done) & set(again)) == (3, 5, set())
    assert len(load_records(config.data, "train")) == 13


def test_missing_partial_and_damaged_copies(make_copy, configure, tmp_path) -> None:
    copy = make_copy()
    whole = (copy / ARCHIVE).read_bytes()
    assert "no such file or folder; give one with annotation_191-task_1k.json" in refused(
        configure("/no/copy")
    )
    (tmp_path / "other").mkdir()
    assert "other: holds nothing of Vision-Flan; expected " in refused(configure(tmp_path / "other"))

    (copy / ARCHIVE).write_bytes(whole[: len(whole) // 2])
    message = refused(configure(copy))
    assert f"{ARCHIVE}: begins like a zip archive but is cut short at {len(whole) // 2:,} bytes" in message
    (copy / ARCHIVE).write_bytes(b"<html>" * 100)
    assert f"{ARCHIVE}: not a zip archive (600 bytes)" in refused(configure(copy))
    (copy / ARCHIVE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "only a Git LFS pointer" in refused(configure(copy))
    (copy / ARCHIVE).unlink()
    assert f"a partial copy: has {ANNOTATIONS}, metadata.json, lacks {ARCHIVE}; finish" in refused(
        configure(copy)
    )
    (copy / "x.incomplete").write_text("")
    assert "(1 unfinished downloads lie in it)" in refused(configure(copy))

    (copy / ARCHIVE).write_bytes(whole)
    text = (copy / ANNOTATIONS).read_text()
    (copy / ANNOTATIONS).write_text(text[: len(text) // 2])
    assert f"{ANNOTATIONS}: cut short: " in refused(configure(copy, data={"on_error": "skip"}))
    assert not (tmp_path / "flan").exists()


def test_bad_records_stop_or_are_left_out(make_copy, configure, capsys) -> None:
    records = [
        *vision_flan_records(),
        record("VQA", 5, "What?", "a", "gone.png"),
        record("VQA", 6, "What?", "a", "../../CIFAR+colour_0.png"),
        record("VQA", 7, "What?", " ", "CIFAR+colour_0.png"),
    ]
    copy = make_copy(records)
    message = refused(configure(copy))
    assert "3 bad records in " in message
    for part in (
        "1 empty answer (record 15",
        "1 image path outside the image folder (record 14",
        "1 missing image",
    ):
        assert part in message
    config = configure(copy, data={"on_error": "skip"})
    prepare_vision_flan(config)
    assert "left out 3 of 16 records" in capsys.readouterr().err
    assert len(load_records(config.data, "train")) == 13


def test_a_corrupt_member_is_found_when_pictures_are_opened(make_copy, configure) -> None:
    records = [*vision_flan_records(), record("VQA", 5, "What?", "a", "half.png")]
    config = configure(make_copy(records, {"half.png": png("red", 64)[:60]}))
    prepare_vision_flan(config)
    with pytest.raises(UserError, match=r"1 corrupt image .record 13, half.png"):
        load_records(config.data, "train")


def test_data_that_was_never_prepared_and_pictures_that_went_away(make_copy, configure) -> None:
    copy = make_copy()
    config = configure(copy)
    with pytest.raises(
        UserError, match=r"data=vision_flan: not prepared: no .*flan; run `mixlora prepare da"
    ):
        load_records(config.data, "train")
    prepare_vision_flan(config)
    shutil.move(copy, copy.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"its pictures were in .*images_191task_1k, which is gone"):
        load_records(config.data, "train")


def test_a_full_disk_is_noticed_before_writing(make_copy, configure, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))
    message = refused(configure(make_copy(), unpack=True))
    assert "unpacking the pictures needs 0.0 GB in " in message and "0.0 GB are free" in message


def test_other_data_needs_no_preparation(configure) -> None:
    config = configure("x", data={"name": "mini", "source": "mini"})
    assert refused(config) == "data=mini: needs no preparation; only data=vision_flan does"


def test_unique_ids() -> None:
    assert unique_ids(["a", None, "a", "b", None, "a"]) == ["a", "text", "a#2", "b", "text#2", "a#3"]


def on_the_hub(copy: Path, cache: Path, monkeypatch) -> list[str]:
    """Stand-in for the hub's client: files come as links to blobs, as in its cache; returns what is fetched."""
    fetched: list[str] = []

    def snapshot(repository: str, repo_type: str, revision: str, allow_patterns: list[str], dry_run=False):
        assert (repository, repo_type, revision) == ("Vision-Flan/some", "dataset", "abc")
        if dry_run:
            return [
                DryRunFileInfo("abc", (copy / name).stat().st_size, name, "", False, True)
                for name in allow_patterns
            ]
        cache.mkdir(exist_ok=True)
        for name in allow_patterns:
            fetched.append(name)
            (cache / name).symlink_to(copy / name)
        return str(cache)

    monkeypatch.setattr(parts, "snapshot_download", snapshot)
    return fetched


def test_from_the_hub(make_copy, configure, tmp_path, monkeypatch) -> None:
    copy = make_copy()
    fetched = on_the_hub(copy.rename(tmp_path / "blobs"), tmp_path / "snapshot", monkeypatch)
    config = configure("Vision-Flan/some", revision="abc")
    prepare_vision_flan(config)
    assert sorted(fetched) == [ANNOTATIONS, ARCHIVE, "metadata.json"]
    assert len(load_records(config.data, "train")) == 13
    assert locate_files(config.data, "train").images == tmp_path / "snapshot" / ARCHIVE / "images_191task_1k"
    fetched.clear()
    prepare_vision_flan(config)
    assert fetched == []


def test_a_hub_that_cannot_be_reached_or_a_disk_too_small(
    make_copy, configure, tmp_path, monkeypatch
) -> None:
    on_the_hub(make_copy(), tmp_path / "snapshot", monkeypatch)
    config = configure("Vision-Flan/some", revision="abc")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))
    assert "downloading Vision-Flan/some needs 0.0 GB in " in refused(config)

    def fail(*names: str, **options: object) -> None:
        raise OSError("the hub did not answer") from OSError("no route to host\nand more")

    monkeypatch.setattr(parts, "snapshot_download", fail)
    assert refused(config).startswith(
        "prepare.vision_flan=Vision-Flan/some: cannot be downloaded: no route to host; check the name"
    )
    assert "no such file or folder" in refused(configure("not-a-repository"))
