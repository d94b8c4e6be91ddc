"""Runs beside one another on one base answer as each does alone, and leave the base as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_cli.config import DataConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models.generate import Decoding, Generator
from mixlora_cli.models.load import build_base
from mixlora_cli.models.session import Session, find_run
from mixlora_cli.serving.models import FREE, Embeddings, open_models
from serving import png
from tiny_runs import TINY, finished_run

TURNS = [Turn("human", "<image>\nWhat is it?")]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "train_also": ["multi_modal_projector"]},
    "instance": {"router_spread": 50},
    "random": {"routing": "random"},
    "task": {"routing": "task", "router_spread": 50},
    "full": {"adapter": "full", "train_also": ["multi_modal_projector"]},
}


@pytest.fixture
def runs(data: DataConfig, tmp_path: Path) -> list[str]:
    return [str(finished_run(tmp_path / name, data, **fields).root) for name, fields in KINDS.items()]


def test_each_answers_as_it_does_alone(runs: list[str]) -> None:
    def text(model: Any) -> str:
        definition = "Do reading." if model.run.selects_by == "task" else None
        question = model.prepare(TURNS, [png(1)], definition=definition)
        return str(model.write([question], [Decoding(8)])[0].text)

    served = open_models(runs, TINY)
    assert [(model.name, model.kind) for model in served] == [
        ("base", "base"), ("lora", "lora"), ("instance", "mixlora"), ("random", "mixlora"), ("task", "mixlora"),
        ("full", "full"),
    ]  # fmt: skip
    answers = {model.name: text(model) for model in served}
    assert len(set(answers.values())) == 6
    # By hand, each on a base of its own, as an evaluation does it.
    for path in runs:
        run = find_run(path, TINY)
        base = build_base(TINY)
        session = Session(base, run.dtype, False, run.adapter, run.trained_routing)
        chance = 0 if run.selects_by == "chance" else None
        generator = Generator(
            session.model, base, session.features, 8, embeddings=session.embeddings, routing_seed=chance
        )
        model = next(each for each in served if each.name == Path(path).name)
        task = "reading" if model.name == "task" else None
        item = model.prepare(TURNS, [png(1)], task=task).item
        assert generator([item]) == [answers[model.name]]
    assert text(served[0]) == answers["base"]  # after all the others

    first, *others = [model.session.base.model for model in served]
    weight = first.get_output_embeddings().weight
    shared = [model.get_output_embeddings().weight is weight for model in others]
    assert shared == [True] * 4 + [False]  # `full` has trained weights of its own


def test_names_tell_runs_apart(data: DataConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "base"]
    for folder in folders:
        finished_run(folder, data, adapter="lora")
    served = open_models([str(folder) for folder in folders], TINY)
    assert [model.name for model in served] == ["base", "a/run", "b/run", "b/base"]
    assert [model.name for model in open_models([str(folders[0])], TINY, base=False)] == ["run"]
    assert [model.name for model in open_models([], TINY, base=False)] == ["base"]
    with pytest.raises(UserError, match="the same run twice"):
        open_models([str(folders[0]), f"{folders[0]}/"], TINY)


def test_runs_of_different_bases_are_refused(data: DataConfig, tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one", data, adapter="lora")
    other = finished_run(
        tmp_path / "other", data, adapter="lora", model=replace(TINY, chat_template="smollm")
    )
    with pytest.raises(UserError, match="another base"):
        open_models([str(one.root), str(other.root)], TINY)


def test_a_definition_of_ones_own_selects_as_the_task_that_has_it(data: DataConfig, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "task", data, routing="task", router_spread=50)
    (model,) = open_models([str(run.root)], TINY, base=False)
    assert set(model.definitions) >= {"counting", "reading", "naming"}

    def factors(**fields: Any) -> Any:
        return model.write([model.prepare(TURNS, [png(1)], **fields)], [Decoding(1)])[0].factors

    assert factors(definition="Do reading.") == factors(task="reading") != factors(task="naming")
    assert factors(definition="naming") != factors(task="naming")  # a text that is a task's name is a text
    for fields, message in (
        ({"task": "raeding"}, "did you mean reading"),
        ({"definition": " "}, "give the task"),
    ):
        with pytest.raises(UserError, match=message):
            model.prepare(TURNS, [png(1)], **fields)


def test_only_so_many_free_definitions_are_remembered(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlora_cli.serving.models._KEPT", 2)
    run = find_run(str(finished_run(tmp_path / "task", data, routing="task").root), TINY)
    routing = run.trained_routing
    assert routing is not None
    base = build_base(TINY)
    embeddings = Embeddings(routing.embeddings(base), routing, base)
    tasks = list(embeddings)
    first = embeddings[FREE + "one"]
    assert first.shape == embeddings[tasks[0]].shape and embeddings[FREE + "one"] is first
    for text in ("two", "three", "four"):
        assert embeddings[FREE + text] is not None
    assert list(embeddings) == [*tasks, FREE + "three", FREE + "four"]
    assert torch.equal(embeddings[FREE + "one"], first)
