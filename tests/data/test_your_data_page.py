"""docs/your-data.md is right: its files are written as it shows them, and its commands read them."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from mixlora_cli import cli
from mixlora_cli.config import DataConfig
from mixlora_cli.config.settings import parse
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.data.streaming import stream_records
from mixlora_cli.paths import conf_dir

pytestmark = pytest.mark.usefixtures("own_cache")

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [match.groups() for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
COMMANDS = [text.strip() for kind, _, text in BLOCKS if kind == "bash"]
READ: dict[str, tuple[list[int], dict[str, int]]] = {
    "data.train=llava.json": ([1, 2, 0], {"animals": 1, "compare": 1, "words": 1}),
    "data.train=messages.jsonl": ([1, 2, 0], {"unnamed": 3}),
    "data.train=pairs.jsonl": ([0, 0, 1, 1], {"unnamed": 4}),
    "data.train=inside.jsonl": ([1, 1], {"unnamed": 2}),
    "data.train=tables:train": ([2, 0], {"unnamed": 2}),
    "data.train=owner/name/config:train": ([2, 0], {"unnamed": 2}),
    "data.train={ocr: {file: ocr.jsonl, weight: 2.0}, vqa: vqa.jsonl}": ([1] * 6, {"ocr": 4, "vqa": 2}),
    "data.train=keyed.jsonl": ([1, 1], {"animals": 1, "reading": 1}),
}
"""What each command reads: pictures of each record, and records of each task."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, some pictures, and a hub that has the page's table."""
    folder = tmp_path / "here"
    (folder / "pictures").mkdir(parents=True)
    for name, colour in {"cat.jpg": "red", "dog.jpg": "blue", "page.png": "white"}.items():
        Image.new("RGB", (32, 24), colour).save(folder / "pictures" / name)
    monkeypatch.chdir(folder)
    for kind, name, text in BLOCKS:
        if name:
            (folder / name).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
    load = datasets.load_dataset

    def from_hub(name: str, config: str, **options: Any) -> Any:
        assert (name, config) == ("owner/name", "config")
        return load(str(folder / "tables"), cache_dir=str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    return folder


def data_of(command: str) -> DataConfig:
    """What a command says of the data."""
    _, _, *overrides = shlex.split(command)
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = {each.key_or_group: each.value() for each in parsed if each.key_or_group.startswith("data.")}
    given = {key.removeprefix("data."): value for key, value in values.items()}
    return parse(DataConfig, {"name": "json", "source": "json", **given}, with_paths=True)


def counted(records: list[Record]) -> tuple[list[int], dict[str, int]]:
    return [len(record.images) for record in records], dict(Counter(record.task for record in records))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_its_example(command: str, here: Path) -> None:
    (train,) = (word for word in shlex.split(command) if word.startswith("data.train="))
    data = data_of(command)
    if data.streaming:
        records = sorted(stream_records(data, "train", 0), key=lambda record: record.index)
    else:
        records = load_records(data, "train")
    assert counted(records) == READ[train]
    if data.heldout is not None:
        assert counted(load_records(data, "heldout")) == ([2], {"unnamed": 1})


def test_every_example_is_expected() -> None:
    assert {word for text in COMMANDS for word in shlex.split(text) if word.startswith("data.train=")} == set(
        READ
    )


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Two steps of the smallest model, by the command line; logging is left as it was."""

    def train(*arguments: str) -> None:
        small = ["train.steps=2", "train.batch_size=2", "factors=4", "rank=2", "output_dir=run"]
        monkeypatch.setattr(sys, "argv", ["mixlora", "train", *arguments, *small])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert (here / "run" / "adapter" / "adapter_model.safetensors").is_file()

    loggers = [logging.getLogger(), logging.getLogger("hydra")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    yield train
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


TRAINED = [text for text in COMMANDS if "train=llava.json" in text or "train={ocr" in text]


@pytest.mark.parametrize("command", TRAINED)
def test_two_steps_of_an_example(command: str, trained: Callable[..., None]) -> None:
    _, _, model, *rest = shlex.split(command)
    assert (conf_dir() / "model" / f"{model.removeprefix('model=')}.yaml").is_file()
    trained("model=tiny", *rest)


def test_two_steps_of_the_yaml_file(here: Path, trained: Callable[..., None]) -> None:
    file = here / "mixture.yaml"
    file.write_text(re.sub("/model: \\w+", "/model: tiny", file.read_text()))
    trained("-cd", ".", "-cn", "mixture")
