"""Building on disk: the format, the same files every time, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import parse_definitions
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.mini import build
from mixlora_cli.data.mini.build import build_mini, generator_digest, mini_root
from mixlora_cli.data.mini.objects import Split
from mixlora_cli.data.mini.plan import Counts, Plan
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.data.mini.unseen import UNSEEN_BENCHMARKS
from mixlora_cli.errors import UserError

ONE = Counts(train=1, heldout=1, unseen=0.001)
Records = Mapping[str, list[dict[str, Any]]]


def tree(root: Path) -> dict[str, str]:
    """Digest of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one") / "mini"
    build_mini(root, progress=False, counts=ONE)
    return root


def test_records_have_the_vision_flan_format(built: Path, read_records: Records, one: Path) -> None:
    for split, records in read_records.items():
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
            assert (built / "images" / record["image"]).is_file()
            assert record["image"].split("/")[0] == record["task_name"]
            assert ("benchmark" in record) == (split == "unseen")
    first = read_records["train"][0]
    assert (first["id"], first["image"]) == ("object_naming_train_0000", "object_naming/train_0000.png")
    config = DataConfig("json", "json", train=str(one / "train.json"), images=str(one / "images"))
    assert len(load_records(config, "train")) == 26  # by the project's own loader


def test_counts_and_metadata(built: Path, read_records: Records) -> None:
    assert len(tree(built)) == 4 + 26 * (6 + 3) + 8 + 2 * 18 + 4 * 12 + 6
    for split, count in (("train", 6), ("heldout", 3)):
        names = Counter(record["task_name"] for record in read_records[split])
        assert names == dict.fromkeys(SEEN_TASKS, count)
    assert {record["benchmark"] for record in read_records["unseen"]} == set(UNSEEN_BENCHMARKS)
    metadata = json.loads((built / "metadata.json").read_text())
    assert list(metadata) == [*SEEN_TASKS, *UNSEEN_BENCHMARKS]
    seen, unseen = metadata["count_digit"], metadata["mini_mme"]
    assert (seen["split"], seen["instances"]) == ("seen", {"train": 6, "heldout": 3})
    assert (unseen["split"], unseen["instances"]) == ("unseen", {"unseen": 16})
    definitions = parse_definitions(metadata, "metadata.json")  # which task routing reads
    assert len(set(definitions.values())) == 26 + 8
    assert all(7 <= len(text.split()) <= 45 and text.endswith(".") for text in definitions.values())


def test_what_is_there_stays(one: Path) -> None:
    before = tree(one)
    build_mini(one, progress=False, counts=Counts(train=2, heldout=1, unseen=0.001))
    assert tree(one) == before


def test_a_failed_build_leaves_nothing_and_a_faster_builder_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "mini"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_write_json", fail)
        build_mini(root, progress=False, counts=ONE)
    assert list(tmp_path.iterdir()) == []

    write_json = build._write_json

    def write_and_be_overtaken(plan: Any, folder: Path) -> None:
        write_json(plan, folder)
        root.mkdir()
        (root / "metadata.json").write_text("the other's")

    monkeypatch.setattr(build, "_write_json", write_and_be_overtaken)
    build_mini(root, progress=False, counts=ONE)
    assert (root / "metadata.json").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [root]


def test_where_nothing_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be built at .*mini"):
        build_mini(tmp_path / "mini", progress=False, counts=ONE)
    assert (tmp_path / "mini" / "diary.txt").read_text() == "mine"
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "mini" / "diary.txt"))
    with pytest.raises(UserError, match="set MIXLORA_CACHE"):
        mini_root()


def test_without_worker_processes_the_files_are_the_same(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoProcesses:
        def __init__(self, *_: object, **__: object) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(build, "ProcessPoolExecutor", NoProcesses)
    build_mini(tmp_path / "mini", progress=False, counts=ONE)
    assert tree(tmp_path / "mini") == tree(one)


@pytest.mark.slow
def test_with_spawned_processes(one: Path, tmp_path: Path) -> None:
    program = (
        "import multiprocessing, pathlib, sys\n"
        "from mixlora_cli.data.mini.build import build_mini\n"
        "from mixlora_cli.data.mini.plan import Counts\n"
        "multiprocessing.set_start_method('spawn')\n"
        "build_mini(pathlib.Path(sys.argv[1]), counts=Counts(1, 1, 0.001))\n"
    )
    environment = {
        "PYTHONPATH": str(Path(build.__file__).parents[3]),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", program, str(tmp_path / "mini")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert run.stderr.splitlines()[-1] == "Drawing the mini data set 60/60"
    assert tree(tmp_path / "mini") == tree(one)


def test_root_is_in_the_cache_and_named_by_the_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path))
    root = tmp_path / f"mini-{generator_digest('seen')}-{generator_digest('unseen')}"
    root.mkdir()
    (root / "metadata.json").write_text("{}")  # already built, so that nothing is drawn here
    assert mini_root() == root


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_digests_are_those_of_what_is_drawn(full_plan: Plan, split: Split) -> None:
    """Of records, pictures' descriptions and every 101st picture's pixels: moving the code changes none of them."""
    half = full_plan.half(split)
    assert build.plan_digest(half) == build.DRAWN[split]
    assert build.pixels_digest(half) == build.PIXELS[split]
    first, *_, last = half.pictures
    other = replace(half, pictures={**half.pictures, first: half.pictures[last]})
    assert build.plan_digest(other) != build.DRAWN[split]


def test_halves_make_the_whole(full_plan: Plan) -> None:
    seen, unseen = full_plan.half("seen"), full_plan.half("unseen")
    assert {**seen.records, **unseen.records} == full_plan.records
    assert {**seen.pictures, **unseen.pictures} == full_plan.pictures
    assert {**seen.metadata, **unseen.metadata} == full_plan.metadata
    assert set(seen.records) == {"train", "heldout"} and set(unseen.metadata) == set(UNSEEN_BENCHMARKS)


def test_the_name_of_what_kept_trainings_saw_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generator_digest("seen") == "b4050ad1f629"  # what results/mini was trained on
    others = {generator_digest("seen"), generator_digest("unseen")}
    monkeypatch.setattr(build, "version", lambda package: "0.0")
    assert len(others | {generator_digest("seen"), generator_digest("unseen")}) == 4
