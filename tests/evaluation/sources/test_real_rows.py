"""Real rows of MNIST, CIFAR-10 and CIFAR-100 through the path that the whole benchmarks take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foolbox_rows import foolbox_pictures, table
from mixlora_cli.benchmarks.registry import CIFAR10, CIFAR100, DIGITS
from mixlora_cli.benchmarks.sources import open_benchmark
from mixlora_cli.config import EvalConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.evaluation.predictions import read_predictions
from mixlora_cli.evaluation.scoring import score

from .conftest import Rows

LABELS = {"mnist": DIGITS, "cifar10": CIFAR10, "cifar100": CIFAR100}
HUB_NAMES = {"crab": "cra"}
"""Where the hub's name of a class is not ours: `uoft-cs/cifar100` has a misprint in class 26."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def laid_out(folder: Path, name: str, rows: list[dict[str, Any]], named: bool = True) -> Path:
    """Two parquet files as in a clone of the hub's repository."""
    names = [HUB_NAMES.get(label, label).replace(" ", "_") for label in LABELS[name]] if named else None
    (folder / name / "data").mkdir(parents=True)
    for part in range(2):
        file = folder / name / "data" / f"test-{part:05d}-of-00002.parquet"
        table(name, rows[10 * part :][:10], names).to_parquet(str(file))
    return folder / name


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("named", [True, False])
def test_a_clone_of_the_hub_becomes_records(name: str, named: bool, rows: Rows, tmp_path: Path) -> None:
    folder = laid_out(tmp_path, name, rows(name), named)
    found = open_benchmark(name, {name: str(folder)})
    records = [json.loads(line) for line in found.records.read_text().splitlines()]
    assert (found.rows, found.left_out, len(records)) == (20, 0, 20)
    for record, (file, number) in zip(records, foolbox_pictures(name), strict=True):
        question, answer = record["conversations"]
        assert answer["value"] == LABELS[name][number]
        assert record["labels"] == list(LABELS[name])
        assert (found.images / record["image"]).read_bytes() == file.read_bytes()
        thing = "number" if name == "mnist" else "object"
        assert question["value"] == (
            f"<image>\nWhat is the {thing} in the image? Please only answer a single {thing} in "
            f"{', '.join(LABELS[name])}."
        )
    before = found.records.stat().st_mtime_ns
    assert open_benchmark(name, {name: str(folder)}) == found
    assert found.records.stat().st_mtime_ns == before  # not made again


def test_what_foolbox_s_classes_are() -> None:
    """Numbers in file names are the hub's: sizes, and names of some of the classes."""
    assert {number for _, number in foolbox_pictures("mnist")} <= set(range(10))
    with Image.open(foolbox_pictures("cifar100")[0][0]) as picture:
        assert picture.size == (32, 32)
    assert (len(CIFAR100), CIFAR100[26]) == (100, "crab")
    assert (CIFAR100[47], CIFAR100[0], CIFAR100[99], CIFAR10[9]) == ("maple tree", "apple", "worm", "truck")


def test_a_single_file_and_a_saved_data_set_are_the_same(rows: Rows, tmp_path: Path) -> None:
    data = table("mnist", rows("mnist"), list(DIGITS))
    data.to_parquet(str(tmp_path / "digits.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    import datasets

    datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    texts = set()
    for path in ("digits.parquet", "saved", "splits"):
        found = open_benchmark("mnist", {"mnist": str(tmp_path / path)})
        texts.add(found.records.read_text())
    assert len(texts) == 1


def test_the_whole_way_from_parquet_to_scores(
    config: EvalConfig, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cifar10", "cifar100", "mnist")
    sources = {name: str(laid_out(tmp_path, name, rows(name))) for name in names}
    whole = replace(config, eval=replace(config.eval, sources=sources))
    results = evaluate(whole)
    assert {each.column: each.n for each in results.scores} == {"CIFAR-10": 20, "CIFAR-100": 20, "MNIST": 20}
    assert "mnist: " in (said := capsys.readouterr().err)
    assert "has 20 rows, the whole split 10000" in said
    assert results.about["sources"]["mnist"]["rows"] == 20
    assert results.about["sample"]["mnist"] == {"answered": 20, "of": 20}
    path = Path(config.output_dir) / "predictions.jsonl"
    mnist = [p for p in read_predictions(path).predictions if p.benchmark == "mnist"]
    images = Path(results.about["images"]["mnist"])
    assert all((images / p.image).is_file() for p in mnist)
    # Answers as a good model gives them, in the same file: the score follows.
    lines = path.read_text().splitlines()
    right = [json.loads(line) for line in lines[1:]]
    for number, line in enumerate(sorted(right, key=lambda line: (line["benchmark"], line["index"]))):
        line["prediction"] = (
            f"The answer is {line['target'].upper()}." if number % 20 < 15 else "I see nothing"
        )
    path.write_text("\n".join([lines[0], *map(json.dumps, right)]) + "\n")
    assert {each.column: each.value for each in score(path.parent).scores} == {
        "CIFAR-10": 75.0, "CIFAR-100": 75.0, "MNIST": 75.0
    }  # fmt: skip


def test_a_limit_takes_labels_evenly_and_is_said(config: EvalConfig, rows: Rows, tmp_path: Path) -> None:
    source = {"mnist": str(laid_out(tmp_path, "mnist", rows("mnist")))}
    results = evaluate(replace(config, eval=replace(config.eval, sources=source, limit=8)))
    assert results.about["sample"]["mnist"] == {"answered": 8, "of": 20}
    answered = read_predictions(Path(config.output_dir) / "predictions.jsonl").predictions
    present = {number for _, number in foolbox_pictures("mnist")}
    assert len({p.target for p in answered}) == min(8, len(present))


def test_benchmarks_of_one_column_are_not_mixed(config: EvalConfig, rows: Rows, tmp_path: Path) -> None:
    source = {"mnist": str(laid_out(tmp_path, "mnist", rows("mnist")))}
    both = replace(config.eval, sources=source, benchmarks=["mini_mnist", "mnist"])
    with pytest.raises(UserError, match="mini_mnist and mnist are both the column MNIST"):
        evaluate(replace(config, eval=both))
