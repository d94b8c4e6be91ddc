"""Prints of pictures, and training pictures against real ones of CIFAR-10 and MNIST, opened as `mixlora eval` does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foolbox_rows import foolbox_pictures, foolbox_rows, table
from mixlora_cli.config import CheckConfig, CheckOptions, DataConfig, ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.prepare import leakage
from mixlora_cli.prepare.check import check, run_check
from mixlora_cli.prepare.leakage import Print, difference_bits, nearest, print_of, prints_of


def scene(seed: int, size: int = 96) -> Image.Image:
    coarse = Image.frombytes("RGB", (9, 9), random.Random(seed).randbytes(243))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def distance(one: Print, other: Print) -> int:
    return (int(one.perceptual, 16) ^ int(other.perceptual, 16)).bit_count()


def test_the_bits_say_which_neighbour_is_brighter() -> None:
    ramp = Image.fromarray(np.tile(np.arange(17, dtype=np.uint8) * 10, (16, 1)))
    assert difference_bits(ramp).all()
    assert not difference_bits(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).any()


def test_the_same_picture_in_other_forms_is_near_and_another_is_far(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.asarray(scene(0).convert("L")).astype("<u2") * 257
    scene(0).save(tmp_path / "a.png")
    scene(0).resize((70, 60)).save(tmp_path / "small.jpg", quality=60)
    scene(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "held.png", exif=turned)
    scene(0).convert("L").save(tmp_path / "8.png")
    Image.fromarray(deep).save(tmp_path / "16.png")
    scene(1).save(tmp_path / "b.png")
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    prints = {path.name: print_of(path) for path in tmp_path.iterdir()}
    a = prints["a.png"]
    assert a.bytes_digest != prints["small.jpg"].bytes_digest
    assert distance(a, prints["small.jpg"]) <= 10
    assert distance(a, prints["b.png"]) > 60
    assert prints["held.png"].perceptual == a.perceptual
    assert prints["16.png"].perceptual == prints["8.png"].perceptual
    assert (a.is_plain, prints["white.png"].is_plain, prints["text.png"]) == (False, True, None)


def test_nearest_is_the_smallest_of_all_pairs(monkeypatch) -> None:
    monkeypatch.setattr(leakage, "_BLOCK", 3)
    source = random.Random(0)
    others = [source.randbytes(32).hex() for _ in range(20)]
    wanted = [*others[:3], *(source.randbytes(32).hex() for _ in range(8))]
    distances = [
        [((int(one, 16) ^ int(other, 16)).bit_count(), place) for place, other in enumerate(others)]
        for one in wanted
    ]
    assert nearest(wanted, others) == [(place, least) for least, place in map(min, distances)]
    assert nearest(wanted, others)[:3] == [(0, 0), (1, 0), (2, 0)]
    assert nearest(wanted, []) == []


def test_prints_are_remembered_until_the_picture_changes(tmp_path: Path, monkeypatch) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        scene(n).save(path)
    made: list[str] = []
    monkeypatch.setattr(leakage, "print_of", lambda path: made.append(path.name) or print_of(path))
    first = prints_of(paths, tmp_path, tmp_path / "cache", 2)
    assert prints_of(paths, tmp_path, tmp_path / "cache", 1) == first
    assert sorted(made) == ["0.png", "1.png", "2.png"]
    scene(7).save(paths[1])
    again = prints_of(paths, tmp_path, tmp_path / "cache", 1)
    assert made[3:] == ["1.png"]
    assert again[paths[1]] != first[paths[1]] and again[paths[0]] == first[paths[0]]


@pytest.fixture
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
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "it"}]
    records = [
        {"id": name, "task_name": task, "image": name, "conversations": turns} for name, task in tasks.items()
    ]
    (folder / "train.json").write_text(json.dumps(records))
    files = {"train": str(folder / "train.json"), "images": str(folder / "pictures")}
    data = DataConfig(name="json", source="json", **files)
    chosen = {"sources": {"cifar10": str(folder / "cifar10"), "mnist": str(folder / "mnist")}, **options}
    tiny = ModelConfig(name="tiny", source="tiny")
    return CheckConfig(tiny, data, str(folder / "out"), CheckOptions(lengths=False, workers=1, **chosen))


def test_other_pictures_are_not_found_and_all_are_hashed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(leakage, "print_of", lambda path: made.append(path) or print_of(path))
    report = run_check(configured(folder))
    assert [(leak.benchmark, leak.records, leak.pictures, leak.total) for leak in report.leaks] == [
        ("cifar10", 20, 20, 0),
        ("mnist", 20, 20, 0),
    ]
    assert [leak.training_tasks for leak in report.leaks] == [{}, {}]
    assert f"cifar10: {folder}/cifar10 has 20 rows, the whole split 10000" in report.left_out
    # CIFAR-10's and CIFAR-100's are far apart
    strict = run_check(configured(folder, strict=True, near=64))
    assert (strict.exit_code, strict.leaks[0].total) == (0, 0)
    assert len(made) == 8 + 20 + 20


def test_the_same_and_a_compressed_picture_are_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, compressed = (foolbox_pictures("cifar10")[number][0] for number in (0, 13))
    digit = foolbox_pictures("mnist")[5][0]
    for name, file in {"same.png": same, "again.png": same, "digit.png": digit}.items():
        (folder / "pictures" / name).write_bytes(file.read_bytes())
    with Image.open(compressed) as image:
        image.save(folder / "pictures" / "compressed.jpg", quality=95)
    more = {"same.png": "scenes", "again.png": "colours", "compressed.jpg": "naming", "digit.png": "digits"}
    report = check(configured(folder, more))
    cifar10, mnist = report.leaks
    assert (cifar10.pictures, cifar10.same_picture.count, cifar10.near_picture.count) == (20, 1, 1)
    assert cifar10.training_tasks == {"scenes": 1, "colours": 1, "naming": 1}
    assert cifar10.same_picture.examples[0].endswith(" = same.png")
    assert " ~ compressed.jpg (" in cifar10.near_picture.examples[0]
    assert (mnist.same_picture.count, mnist.near_picture.count) == (1, 1)  # another digit can be one
    assert mnist.near_picture.examples[0].endswith(" ~ digit.png (6 of 256 bits differ)")
    assert mnist.training_tasks == {"digits": 2}
    written = json.loads((folder / "out" / "check.json").read_text())["leakage"][0]
    assert (written["benchmark"], written["source"]) == ("cifar10", str(folder / "cifar10"))
    assert (written["same_picture"]["count"], written["training_tasks"]) == (1, cifar10.training_tasks)
    shown = capsys.readouterr().out
    tasks = "scenes (1 pictures), colours (1 pictures), naming (1 pictures)"
    assert f"cifar10: training tasks with its pictures: {tasks}\n" in shown
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


def test_a_benchmark_of_one_s_own(folder: Path) -> None:
    (folder / "birds").mkdir()
    (folder / "birds" / "robin.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
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
        run_check(CheckConfig(config.model, data, config.output_dir, config.check))
