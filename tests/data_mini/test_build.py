"""Building on disk: the format, the same files every time, whole or not at all."""

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

from mixlora_cli.data.mini import build
from mixlora_cli.data.mini.build import build_mini, generator_digest, mini_root
from mixlora_cli.data.mini.plan import Counts, make_plan
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


def test_two_builds_are_equal_bit_for_bit(built: Path, few: Counts, tmp_path: Path) -> None:
    build_mini(tmp_path / "again", progress=False, counts=few)
    first, second = tree(built), tree(tmp_path / "again")
    assert len(first) == 4 + 26 * (6 + 3) + 8 + 5 * 12 + 13 + 2
    assert first == second


def test_records_have_the_vision_flan_format(built: Path, read_records: Records) -> None:
    for split, records in read_records.items():
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
            assert (built / "images" / record["image"]).is_file()
            assert record["image"].split("/")[0] == record["task_name"]
            assert ("benchmark" in record) == (split == "unseen")
    first = read_records["train"][0]
    assert (first["id"], first["image"]) == ("object_naming_train_0000", "object_naming/train_0000.png")


def test_counts_and_metadata(built: Path, read_records: Records) -> None:
    assert Counter(record["task_name"] for record in read_records["train"]) == dict.fromkeys(SEEN_TASKS, 6)
    assert Counter(record["task_name"] for record in read_records["heldout"]) == dict.fromkeys(SEEN_TASKS, 3)
    assert {record["benchmark"] for record in read_records["unseen"]} == set(UNSEEN_BENCHMARKS)
    metadata = json.loads((built / "metadata.json").read_text())
    assert list(metadata) == [*SEEN_TASKS, *UNSEEN_BENCHMARKS]
    assert metadata["count_digit"]["split"] == "seen"
    assert metadata["count_digit"]["instances"] == {"train": 6, "heldout": 3}
    assert metadata["mini_mme"]["split"] == "unseen"
    assert metadata["mini_mme"]["instances"] == {"unseen": 16}
    assert all(entry["definition"] for entry in metadata.values())


def test_the_project_s_own_loader_takes_it(one: Path) -> None:
    from mixlora_cli.config import DataConfig
    from mixlora_cli.data.loading import load_records

    config = DataConfig("json", "json", train=str(one / "train.json"), images=str(one / "images"))
    assert len(load_records(config, "train")) == 26


def test_what_is_there_stays(one: Path) -> None:
    before = tree(one)
    build_mini(one, progress=False, counts=Counts(train=2, heldout=1, unseen=0.001))
    assert tree(one) == before


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        build_mini(tmp_path / "mini", progress=False, counts=ONE)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_builder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "mini"
    write_json = build._write_json

    def write_and_be_overtaken(plan: Any, folder: Path) -> None:
        write_json(plan, folder)
        root.mkdir()
        (root / "metadata.json").write_text("the other's")

    monkeypatch.setattr(build, "_write_json", write_and_be_overtaken)
    build_mini(root, progress=False, counts=ONE)
    assert (root / "metadata.json").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "mini"
    root.mkdir()
    (root / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be built at .*mini"):
        build_mini(root, progress=False, counts=ONE)
    assert (root / "diary.txt").read_text() == "mine"


def test_without_worker_processes(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    source = str(Path(build.__file__).parents[3])
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "mini")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": source, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert run.stderr.splitlines()[-1] == "Drawing the mini data set 60/60"
    assert tree(tmp_path / "mini") == tree(one)


def test_root_is_in_the_cache_and_named_by_the_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path))
    root = tmp_path / f"mini-{generator_digest()}"
    root.mkdir()
    (root / "metadata.json").write_text("{}")  # already built, so that nothing is drawn here
    assert mini_root() == root
    assert len(generator_digest()) == 12


def test_the_digest_is_that_of_what_is_drawn_and_its_name_is_kept() -> None:
    """Of records, pictures' descriptions and every 101st picture's pixels: moving the code changes none of them."""
    plan = make_plan(Counts())
    assert build.plan_digest(plan) == build.DRAWN
    assert build.pixels_digest(plan) == build.PIXELS
    assert generator_digest() == "b4050ad1f629"  # what results/mini was made of
    name = next(iter(plan.pictures))
    other = replace(plan, pictures=plan.pictures | {name: plan.pictures[list(plan.pictures)[-1]]})
    assert build.plan_digest(other) != build.DRAWN


def test_digest_changes_with_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator_digest()
    monkeypatch.setattr(build, "version", lambda package: "0.0")
    assert generator_digest() != before


def test_an_unusable_cache_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set MIXLORA_CACHE"):
        mini_root()
