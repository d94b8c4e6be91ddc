"""Training pictures against real pictures of CIFAR-10 and MNIST, opened as `mixlora eval` opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foolbox_rows import foolbox_pictures, foolbox_rows, table
from mixlora_cli.config import CheckConfig, CheckOptions, DataConfig, ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.prepare import leakage as prints
from mixlora_cli.prepare.check import check, run_check

TINY = ModelConfig(name="tiny", source="tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of 20 rows of CIFAR-10 and of MNIST, and a picture folder with eight pictures of CIFAR-100."""
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    for name in ("cifar10", "mnist"):
        (tmp_path / name).mkdir()
        table(name, foolbox_rows(name)).to_parquet(str(tmp_path / name / "test-00000-of-00001.parquet"))
    (tmp_path / "pictures").mkdir()
    for number, (file, _) in enumerate(foolbox_pictures("cifar100")[:8]):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(file.read_bytes())
    return tmp_path


def configured(folder: Path, more: dict[str, str] | None = None, **options: Any) -> CheckConfig:
    """The eight pictures, and `more` ({picture: task}), as training data."""
    tasks = {f"{number}.png": "naming" for number in range(8)} | (more or {})
    records = [
        {
            "id": name,
            "task_name": task,
            "image": name,
            "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": name}],
        }
        for name, task in tasks.items()
    ]
    (folder / "train.json").write_text(json.dumps(records))
    files = {"train": str(folder / "train.json"), "images": str(folder / "pictures")}
    data = DataConfig(name="json", source="json", **files)
    chosen = {"sources": {"cifar10": str(folder / "cifar10"), "mnist": str(folder / "mnist")}, **options}
    return CheckConfig(TINY, data, str(folder / "out"), CheckOptions(lengths=False, workers=1, **chosen))


def test_other_pictures_are_not_found(folder: Path) -> None:
    report = run_check(configured(folder))
    assert [(leak.benchmark, leak.records, leak.pictures, leak.total) for leak in report.leaks] == [
        ("cifar10", 20, 20, 0),
        ("mnist", 20, 20, 0),
    ]
    assert [leak.training_tasks for leak in report.leaks] == [{}, {}]
    assert f"cifar10: {folder}/cifar10 has 20 rows, the whole split 10000" in report.left_out
    assert run_check(configured(folder, strict=True)).exit_code == 0
    assert (
        run_check(configured(folder, near=64)).leaks[0].total == 0
    )  # CIFAR-10's and CIFAR-100's are far apart


def test_the_same_and_a_compressed_picture_are_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, compressed = (foolbox_pictures("cifar10")[number][0] for number in (0, 13))
    (folder / "pictures" / "same.png").write_bytes(same.read_bytes())
    with Image.open(compressed) as image:
        image.save(folder / "pictures" / "compressed.jpg", quality=95)
    more = {"same.png": "scenes", "compressed.jpg": "naming"}
    report = check(configured(folder, more))
    cifar10, mnist = report.leaks
    assert (cifar10.pictures, cifar10.same_picture.count, cifar10.near_picture.count) == (20, 1, 1)
    assert cifar10.training_tasks == {"scenes": 1, "naming": 1}
    assert cifar10.same_picture.examples[0].endswith(" = same.png")
    assert " ~ compressed.jpg (" in cifar10.near_picture.examples[0]
    assert mnist.total == 0
    written = json.loads((folder / "out" / "check.json").read_text())["leakage"][0]
    assert (written["benchmark"], written["source"]) == ("cifar10", str(folder / "cifar10"))
    assert (written["same_picture"]["count"], written["training_tasks"]) == (1, {"scenes": 1, "naming": 1})
    shown = capsys.readouterr().out
    assert "cifar10: training tasks with its pictures: scenes (1 pictures), naming (1 pictures)\n" in shown
    assert f"cifar10: {cifar10.same_picture.examples[0]}\n" in shown
    assert "plain" not in shown
    assert run_check(configured(folder, more, strict=True)).exit_code == 1


def test_a_small_picture_that_was_enlarged_takes_a_wider_limit(folder: Path) -> None:
    """16 x 17 cells of 32 x 32 pixels: enlarging changes more bits than it does of a photograph."""
    for number, (file, _) in enumerate(foolbox_pictures("cifar10")):
        with Image.open(file) as image:
            image.resize((64, 64), Image.Resampling.BICUBIC).save(folder / "pictures" / f"large{number}.png")
    more = {f"large{number}.png": "scenes" for number in range(20)}
    found = [run_check(configured(folder, more, near=near)).leaks[0] for near in (10, 30)]
    assert [(leak.near_picture.count, leak.same_picture.count) for leak in found] == [(0, 0), (20, 0)]


def test_another_digit_can_be_a_near_duplicate(folder: Path) -> None:
    digit = foolbox_pictures("mnist")[5][0]
    (folder / "pictures" / "digit.png").write_bytes(digit.read_bytes())
    mnist = run_check(configured(folder, {"digit.png": "digits"})).leaks[1]
    assert (mnist.same_picture.count, mnist.near_picture.count) == (1, 1)
    assert mnist.near_picture.examples[0].endswith(" ~ digit.png (6 of 256 bits differ)")
    assert mnist.training_tasks == {"digits": 2}


def test_one_picture_in_two_tasks_names_both(folder: Path) -> None:
    same = foolbox_pictures("cifar10")[0][0].read_bytes()
    for name in ("a.png", "b.png"):
        (folder / "pictures" / name).write_bytes(same)
    report = run_check(configured(folder, {"a.png": "scenes", "b.png": "colours"}))
    assert report.leaks[0].training_tasks == {"scenes": 1, "colours": 1}
    assert report.leaks[0].same_picture.count == 1


def test_pictures_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    honest = prints.print_of
    monkeypatch.setattr(prints, "print_of", lambda path: made.append(path) or honest(path))
    first = run_check(configured(folder))
    assert len(made) == 8 + 20 + 20
    assert run_check(configured(folder)).leaks == first.leaks
    assert len(made) == 8 + 20 + 20


def test_a_benchmark_of_one_s_own(folder: Path) -> None:
    picture = foolbox_pictures("cifar100")[0][0]
    (folder / "birds").mkdir()
    (folder / "birds" / "robin.png").write_bytes(picture.read_bytes())
    line = {"image": "robin.png", "question": "Which bird is it?", "answer": "robin"}
    (folder / "birds.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "birds.yaml").write_text("records: birds.jsonl\nimages: birds\nscorer: exact\ncolumn: MNIST\n")
    sources = {"birds": str(folder / "birds.yaml"), "mnist": str(folder / "mnist")}
    report = run_check(configured(folder, sources=sources))
    assert {leak.benchmark: leak.same_picture.count for leak in report.leaks} == {"mnist": 0, "birds": 1}
    only = run_check(configured(folder, sources=sources, benchmarks=["birds"]))
    assert [leak.benchmark for leak in only.leaks] == ["birds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ["mnst"]}, r"^check\.benchmarks: unknown mnst\. Did you mean mnist\? Expected mme, "),
        ({"benchmarks": ["mini_pope"]}, r"unknown mini_pope\..* are compared without being named$"),
        ({"sources": {"birds": "copies"}}, r"^check\.sources\.birds=copies: expected a YAML file"),
        ({"sources": {"mnist": "gone"}}, r"^check\.sources\.mnist=.*gone: no such file or folder"),
        ({"benchmarks": ["snli_ve"], "sources": None}, r"give check\.sources=\{snli_ve: <that folder>\}$"),
        ({"leakage": False}, r"^check\.sources asks for a comparison .*, check\.leakage=false for none"),
    ],
)
def test_what_cannot_be_opened_is_said(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_check(configured(folder, **options))


def test_without_training_pictures_there_is_nothing_to_compare(folder: Path) -> None:
    config = configured(folder)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (folder / "train.json").write_text(json.dumps([{"id": "x", "conversations": turns}]))
    with pytest.raises(
        UserError, match=r"no training pictures .* none of the 1 records of .*train\.json has one"
    ):
        run_check(config)
    data = DataConfig(name="json", source="json", unseen=config.data.train, images=config.data.images)
    with pytest.raises(UserError, match=r"^check\.sources: no training pictures .* data\.train=null"):
        run_check(CheckConfig(TINY, data, config.output_dir, config.check))
