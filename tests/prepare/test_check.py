"""`mixlora check`: exact counts of everything that is wrong, in processes and out of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixlora_cli.config import CheckConfig, CheckOptions, DataConfig, ModelConfig
from mixlora_cli.data import images as image_checks
from mixlora_cli.data.encode import Item
from mixlora_cli.data.problems import Kind
from mixlora_cli.errors import UserError
from mixlora_cli.models.load import build_chat
from mixlora_cli.prepare import check as module
from mixlora_cli.prepare.check import (
    Mistake,
    Remark,
    Rules,
    check,
    check_chunk,
    check_texts,
    run_check,
)

TINY = ModelConfig(name="tiny", source="tiny")


def raw(
    question: str, answer: str, image: str | None = None, task: str = "colour", **more: Any
) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "task_name": task, "image": image, "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small noise pictures a..d.png and z.png, a damaged one, a large one, and a link that leads out."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "abcdz":
        noise = Image.frombytes("L", (8, 8), random.Random(name).randbytes(64))
        noise.resize((64, 64)).save(pictures / f"{name}.png")
    whole = (pictures / "a.png").read_bytes()
    (pictures / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (100, 90)).save(pictures / "large.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (pictures / "link.png").symlink_to(tmp_path / "outside.png")
    return tmp_path


def configured(
    folder: Path,
    train: list[Any],
    unseen: list[Any] | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> CheckConfig:
    (folder / "train.json").write_text(json.dumps(train))
    values: dict[str, Any] = {"train": str(folder / "train.json"), "images": str(folder / "pictures")}
    if unseen is not None:
        (folder / "unseen.json").write_text(json.dumps(unseen))
        values["unseen"] = str(folder / "unseen.json")
    group = DataConfig(name="json", source="json", **values, **(data or {}))
    return CheckConfig(TINY, group, str(folder / "out"), CheckOptions(**{"workers": 1, **options}))


EVERYTHING = [
    raw("What?", "red", "a.png"),
    raw("What?", "red", "a.png"),  # a duplicate
    raw("<image>\nWhat?", "red", "a.png"),  # another: the marker is no text
    raw("What?", "blue", "a.png"),  # the same id and picture, another answer: fine
    raw("What?", " ", "a.png"),
    raw("What?", "red", "gone.png"),
    raw("What?", "red", "half.png"),
    raw("What?", "red", "../outside.png"),
    raw("What?", "red", "/etc/hosts"),
    raw("What?", "red", "link.png"),
    raw("What?", "red", "large.png"),
    raw("What?", "red " * 400, "b.png"),
    raw("What? " * 200, "red", "c.png"),
    raw("What?", "a </s> b", "b.png"),
    raw("Say red.", "red", None, task="text"),
    {"id": "x", "image": "a.png", "conversations": []},
]


def test_exact_counts_of_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "MAX_PIXELS", 8999)
    (folder / "tasks.json").write_text(json.dumps({"colour": "Name the colour."}))
    data = {"max_length": 300, "metadata": str(folder / "tasks.json")}
    report = run_check(configured(folder, EVERYTHING, data=data))
    (train,) = report.splits
    assert {sort: found.count for sort, found in train.found.items()} == {
        Kind.MALFORMED: 1,
        Kind.EMPTY_ANSWER: 1,
        Kind.ESCAPING_IMAGE: 3,
        Kind.MISSING_IMAGE: 1,
        Kind.CORRUPT_IMAGE: 1,
        Kind.HUGE_IMAGE: 1,
        Kind.CONTROL_TEXT: 1,
        Kind.NO_LABEL: 1,
        Remark.DUPLICATE: 2,
        Remark.OVER_LENGTH: 1,
        Remark.UNDEFINED_TASK: 1,
    }
    assert train.found[Remark.DUPLICATE].examples == ["record 1: as record 0", "record 2: as record 0"]
    assert train.found[Remark.UNDEFINED_TASK].examples == ["text (1 records)"]
    huge = "record 10: large.png has 100 x 90 pixels, at most 8999 allowed"
    assert train.found[Kind.HUGE_IMAGE].examples == [huge]
    assert (train.records, train.good, train.text_only, train.pictures) == (16, 6, 1, 2)
    assert (train.tasks, train.shared_ids) == ({"colour": 5, "text": 1}, 5)
    assert report.exit_code == 1


def test_good_data_is_found_good_and_remarks_count_only_if_strict(folder: Path) -> None:
    good = [raw("What?", "red", "a.png"), raw("What?", "red", "b.png")]
    for strict in (False, True):
        report = run_check(configured(folder, good, strict=strict))
        assert (report.exit_code, report.splits[0].found) == (0, {})
        assert run_check(configured(folder, [*good, good[0]], strict=strict)).exit_code == int(strict)


def test_what_is_left_out_is_said(folder: Path) -> None:
    train = [raw("What?", "red " * 2000, "half.png")]
    assert run_check(configured(folder, train)).exit_code == 1
    report = run_check(configured(folder, train, lengths=False, images=False))
    assert (report.exit_code, report.splits[0].good) == (0, 1)
    assert report.left_out == [
        "lengths and label masks (check.lengths=false)",
        "the inside of pictures (check.images=false)",
        "task definitions (data.metadata=null; only routing=task needs them)",
        "leakage (it needs data.train, and data.heldout, data.unseen or check.benchmarks)",
    ]


def test_only_the_named_tasks(folder: Path) -> None:
    train = [raw("What?", "red", "a.png"), raw("What?", "", "a.png", task="other")]
    report = run_check(configured(folder, train, data={"tasks": ["colour"]}))
    assert (report.splits[0].records, report.exit_code) == (1, 0)
    with pytest.raises(UserError, match="no record to check"):
        run_check(configured(folder, train, data={"tasks": ["colr"]}))


def test_a_wrong_label_mask_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = module.encode

    def slipped(record: Any, base: Any, max_length: int | None = None) -> Item:
        whole = encode(record, base, max_length)
        return replace(whole, labels=[*whole.labels[1:], -100])

    rules = Rules(None, 1792, None, build_chat(TINY))
    rows = [(n, raw("What?", "red", None)) for n in range(5)]
    assert check_chunk(rows, rules).found == []
    monkeypatch.setattr(module, "encode", slipped)
    result = check_chunk(rows, rules)
    assert [(index, sort) for index, sort, _ in result.found] == [(0, Mistake.LABELS), (1, Mistake.LABELS)]
    assert len(result.good) == 5


def test_processes_give_what_one_gives_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    rows = [(n, raw(f"What {n}?", "" if n % 10 == 3 else "red", "a.png")) for n in range(60)]
    rules = Rules((folder / "pictures").resolve(), 1792, None, build_chat(TINY))
    alone, together = (list(check_texts(rows, rules, workers)) for workers in (1, 2))
    assert alone == together
    assert [record.index for result in together for record in result.good] == [
        n for n in range(60) if n % 10 != 3
    ]


def test_leakage(folder: Path) -> None:
    pictures = folder / "pictures"
    (pictures / "copy.png").write_bytes((pictures / "a.png").read_bytes())
    with Image.open(pictures / "b.png") as image:
        image.convert("RGB").resize((50, 50)).save(pictures / "b_small.jpg", quality=70)
    Image.new("RGB", (8, 8)).save(pictures / "plain.png")
    train = [
        raw("What is it?", "red", "a.png"),
        raw("Which?", "blue", "b.png"),
        raw("Where?", "here", "plain.png"),
    ]
    unseen = [
        # the same question about the same picture
        raw("what  is IT?\n<image>", "Red", "copy.png", benchmark="pope"),
        raw("How many?", "two", "copy.png", benchmark="pope"),
        raw("Which?", "blue", "z.png", benchmark="pope"),
        raw("Who?", "me", "b_small.jpg", benchmark="mme"),
        raw("Who?", "you", "d.png", benchmark="mme"),
        raw("Who?", "they", None, benchmark="mme"),
    ]

    def checked(**options: Any) -> module.Report:
        return run_check(configured(folder, train, unseen, **options))

    report = checked()
    pope, mme = report.leaks
    assert (pope.benchmark, pope.records, pope.pictures) == ("pope", 3, 2)
    assert pope.same_picture.examples == ["copy.png = a.png"]
    assert pope.same_text.examples == ["record 0 = training record 0", "record 2 = training record 1"]
    assert pope.same_picture_and_question.examples == ["record 0 = training record 0"]
    assert pope.near_picture.count == 0
    assert (mme.benchmark, mme.records, mme.pictures, mme.total) == ("mme", 3, 2, 1)
    assert mme.near_picture.examples[0].startswith("b_small.jpg ~ b.png (")
    assert checked(near=0).leaks[1].near_picture.count == 0
    assert (report.exit_code, checked(strict=True).exit_code) == (0, 1)
    assert checked(leakage=False).leaks == []


def test_table_file_and_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        check(configured(folder, [raw("What?", "", "a.png"), raw("What?", "red", "a.png")], examples=1))
    assert stop.value.code == 1
    written = json.loads((folder / "out" / "check.json").read_text())
    train = written["splits"]["train"]
    assert list(written) == ["exit_code", "splits", "leakage", "left_out"]
    assert train.pop("text_records_per_second") > 0
    assert train == {
        "source": str(folder / "train.json"),
        "records": 2,
        "good": 1,
        "text_only": 0,
        "pictures": 1,
        "shared_ids": 0,
        "tasks": {"colour": 1},
        "longest": 67,
        "pictures_per_record": {"1": 1},
        "findings": {
            "empty_answer": {
                "text": "empty answer",
                "remark": False,
                "count": 1,
                "examples": ["record 0: turn 1"],
            }
        },
    }
    shown = capsys.readouterr().out
    assert "train: 2 records; 1 good, of 1 tasks, with 1 pictures, 0 without one;" in shown
    assert "1 problems, 0 remarks; full report: " in shown


def test_pictures_inside_records_do_not_flood_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = f"data:image/jpeg;base64,{'QUJD' * 25_000}"
    records = [raw("What?", "red", inside, task="t" * 5000) for _ in range(5)]
    records += [raw("What?", "red", "a.png", task="t" * 5000)]
    (folder / "tasks.json").write_text(json.dumps({"colour": "Name the colour."}))
    with pytest.raises(SystemExit):
        check(configured(folder, records, data={"metadata": str(folder / "tasks.json")}))
    assert len(capsys.readouterr().out) < 4000
    report = json.loads((folder / "out" / "check.json").read_text())["splits"]["train"]["findings"]
    example = "record 0: 75,000 bytes in the record that are no picture (UnidentifiedImageError)"
    assert (report["corrupt_image"]["count"], report["corrupt_image"]["examples"][0]) == (5, example)
    assert report["undefined_task"]["examples"] == [f"{'t' * 77}... (1 records)"]


@pytest.mark.slow
def test_the_command_line_gives_the_exit_code(folder: Path) -> None:
    configured(folder, [raw("What?", "", "a.png")])
    files = [f"data.train={folder}/train.json", f"data.images={folder}/pictures", f"output_dir={folder}/out"]
    command = [sys.executable, "-m", "mixlora_cli.cli", "check", "data=json", "model=tiny", *files]
    assert subprocess.run(command, capture_output=True, cwd=folder, check=False).returncode == 1


def test_every_form_of_records_is_checked_and_counted(folder: Path) -> None:
    picture = (folder / "pictures" / "a.png").read_bytes()
    ask = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
    }
    answer = {"role": "assistant", "content": "red"}
    pq.write_table(
        pa.Table.from_pylist(
            [
                {
                    "images": [{"bytes": picture}, {"bytes": picture}],
                    "messages": [{"role": "user", "content": "Which?"}, answer],
                },
                {
                    "images": [{"bytes": picture[:60]}],
                    "messages": [{"role": "user", "content": "Which?"}, answer],
                },
                {"images": None, "messages": [{"role": "user", "content": "Why?"}, answer]},
            ]
        ),
        folder / "table.parquet",
    )
    lines = [
        {"images": ["a.png", "b.png"], "messages": [ask, answer]},
        {"images": ["a.png"], "messages": [ask, answer]},
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    places = {"table": str(folder / "table.parquet"), "lines": str(folder / "lines.jsonl")}
    for workers in (1, 2):
        config = configured(folder, [], data={}, lengths=False, workers=workers)
        report = run_check(replace(config, data=replace(config.data, train=places)))
        (split,) = report.splits
        assert split.source == f"{places['table']} (from record 0 on), {places['lines']} (from record 3 on)"
        assert (split.records, split.good, split.pictures, split.pictures_per_record) == (
            5,
            3,
            3,
            {0: 1, 2: 2},
        )
        assert split.tasks == {"lines": 1, "table": 2}
        assert split.found[Kind.IMAGE_MARKER].examples == ["record 4: 2 <image> for 1 image"]
        assert split.found[Kind.CORRUPT_IMAGE].examples[0].startswith("record 1: ")


def test_a_check_does_not_stream(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.streaming=true: a check holds all records at once"):
        run_check(configured(folder, [raw("What?", "red")], data={"streaming": True}))
