"""Training with routing=task: every batch brings the embeddings of its tasks, from definitions read once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from mixlora_cli.config import RoutingConfig, TrainConfig
from mixlora_cli.data.collate import Collator, PixelLoader
from mixlora_cli.data.definitions import asked_questions, load_definitions, made_definitions
from mixlora_cli.data.encode import encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.models import definitions as task_embeddings
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.session import Run
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training import train as run_module
from mixlora_cli.training.callbacks import Interrupted
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import NUM_RECORDS, MakeConfig, adapter_weights, assert_same_bits, each_step

DEFINITIONS = {
    "task0": {"definition": "Say which colour fills the whole picture."},
    "task1": {"definition": "Count to three, then name what you see, in capitals."},
}


@pytest.fixture
def by_task(make_config: MakeConfig, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`make_config` with routing=task and a definition for both tasks."""
    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps(DEFINITIONS))

    def make(folder: str, encoder: str | None = None, **values: Any) -> TrainConfig:
        config = make_config(folder, **values)
        data = replace(config.data, metadata=str(metadata))
        return replace(config, data=data, routing=RoutingConfig("task", encoder=encoder))

    return make


def test_training_changes_the_factors_and_the_adapter_knows_its_encoder(
    by_task: Callable[..., TrainConfig],
) -> None:
    run = RunFolder(train(by_task("run", steps=3)))
    weights = adapter_weights(run.root)
    moved = [name for name, tensor in weights.items() if "factors_b" in name and tensor.any()]
    assert len(moved) == len([name for name in weights if "factors_b" in name]) == 14
    assert {tuple(w.shape) for name, w in weights.items() if "router_a." in name} == {(4, 32)}
    saved = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (saved["routing"], saved["task_embedding_dim"], saved["task_encoder"]) == ("task", 32, None)
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_single_task_is_warned_of(
    by_task: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    both = by_task("both", steps=1)
    train(both)
    assert "warning" not in capsys.readouterr().out
    alone = replace(both, data=replace(both.data, tasks=["task1"]), output_dir=f"{both.output_dir}-alone")
    train(alone)
    warned = "warning: there is a single task, task1: routing=task selects the same "
    assert capsys.readouterr().out.count(warned) == 1


def test_a_better_way_to_select_is_named_where_tasks_are(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("both", steps=1)
    alone = replace(
        config, data=replace(config.data, tasks=["task1"]), output_dir=f"{config.output_dir}-alone"
    )
    for each, named in ((config, 1), (alone, 0)):
        train(each)
        note = "note: 2 tasks are named; docs/findings.md has adapter=mixlora_plus ahead there"
        assert capsys.readouterr().out.count(note) == named


def test_definitions_are_read_before_the_loop_and_once(
    by_task: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    embed = task_embeddings.mean_hidden_state

    def noting(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
        read.append(text)
        return embed(model, tokenizer, text)

    monkeypatch.setattr(task_embeddings, "mean_hidden_state", noting)
    steps: list[int] = []
    each_step(monkeypatch, lambda step: steps.append(len(read)))
    train(by_task("one", steps=4))
    assert sorted(read) == sorted(entry["definition"] for entry in DEFINITIONS.values())
    assert steps == [2, 2, 2, 2]
    train(by_task("two", steps=1))
    assert len(read) == 2


def test_resume_gives_the_uninterrupted_adapter(
    by_task: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(by_task("whole", steps=5))
    with monkeypatch.context() as patch:
        each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
        with pytest.raises(Interrupted):
            train(by_task("cut", steps=5))
    cut = train(by_task("cut", steps=5, resume="auto"))
    assert_same_bits(adapter_weights(whole), adapter_weights(cut))


def test_gradient_checkpointing_changes_no_bit(by_task: Callable[..., TrainConfig]) -> None:
    plain = train(by_task("plain", dropout=0.0))
    saving = train(by_task("saving", dropout=0.0, gradient_checkpointing=True))
    assert_same_bits(adapter_weights(plain), adapter_weights(saving))


def test_one_task_one_selection_in_every_layer(by_task: Callable[..., TrainConfig]) -> None:
    config = by_task("run", learning_rate=5e-2)
    run = RunFolder(train(config))
    base = build_tiny()
    dataset = encode_records(load_records(config.data, "train"), base.chat, 1792)
    tasks = [item.task for item in dataset.items]
    routing = Run("run", config.model, run.adapter).task_routing(config.data, tasks)
    assert routing is not None
    assert routing.definitions == load_definitions(config.data) == json.loads(run.definitions.read_text())
    asked = json.loads(run.questions.read_text())
    assert asked == asked_questions(load_records(config.data, "train")) and asked.keys() == {*tasks}
    collate = Collator(build_tiny().chat, PixelLoader(base.chat), embeddings=routing.embeddings(base))
    batch = collate([dataset[index] for index in range(NUM_RECORDS)])
    assert batch["task_embeddings"].shape == (NUM_RECORDS, 32)
    model = load_adapter(base.model, run.adapter)
    with torch.no_grad():
        model(**batch)
    selections = model.base_model.selections()  # type: ignore[operator, union-attr]
    assert len(selections) == 14
    first = tasks.index("task0"), tasks.index("task1")
    differing = 0
    for selection in selections.values():
        both = torch.cat([selection.index_a, selection.index_b], dim=1)
        for row, task in zip(both, tasks, strict=True):
            assert torch.equal(row, both[first[int(task == "task1")]])
        differing += not torch.equal(both[first[0]], both[first[1]])
    assert differing > 7


def test_another_encoder_sets_the_width_of_the_routers(
    by_task: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_tiny()
    torch.manual_seed(5)
    LlamaModel(
        LlamaConfig(
            vocab_size=len(base.tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path / "encoder")
    base.tokenizer.save_pretrained(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    config = by_task("run", encoder="encoder")
    run = RunFolder(train(config))
    assert {tuple(w.shape) for name, w in adapter_weights(run.root).items() if "router_b." in name} == {
        (4, 24)
    }
    monkeypatch.chdir("/")
    routing = Run("run", config.model, run.adapter).task_routing(config.data, DEFINITIONS)
    assert routing is not None
    assert routing.encoder == str(tmp_path / "encoder")
    assert {len(embedding) for embedding in routing.embeddings(base).values()} == {24}


def test_a_missing_definition_is_said_before_a_model_is_built(
    by_task: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(run_module, "build_base", no_model)
    config = by_task("run")
    (tmp_path / "metadata.json").write_text(json.dumps({"task0": "Say the colour."}))
    with pytest.raises(UserError, match=r"1 of 2 tasks have none \(task1\): add them to .*metadata\.json"):
        train(config)
    without = replace(config.data, metadata=None)
    records = [
        {"question": each["conversations"][0]["value"].replace("<image>", ""), "answer": "a"}
        for each in json.loads(Path(str(config.data.train)).read_text())
    ]
    (tmp_path / "no_tasks.json").write_text(json.dumps(records))
    with pytest.raises(
        UserError, match=r"the records name no task and data\.metadata=null; give data\.metadata"
    ):
        train(replace(config, data=replace(without, train=str(tmp_path / "no_tasks.json"))))
    streamed = replace(without, streaming=True)
    with pytest.raises(UserError, match=r"streamed records are not known before and data\.metadata=null"):
        train(replace(config, data=streamed, train=replace(config.train, steps=1)))
    assert not Path(config.output_dir).exists()


def test_without_a_file_tasks_are_defined_by_their_names_and_first_questions(
    by_task: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = by_task("run", steps=2)
    data = replace(config.data, metadata=None)
    run = RunFolder(train(replace(config, data=data)))
    made = made_definitions(load_records(data, "train"))
    assert json.loads(run.definitions.read_text()) == made
    assert made.keys() == {"task0", "task1"} and all(len(text.split("\n")) > 1 for text in made.values())
    shown = capsys.readouterr().out
    assert "data.metadata=null: the 2 tasks are defined by their names and first 3 questions" in shown

    unseen = [{"question": f"Which letter is {n}?", "answer": "a", "task_name": "read_it"} for n in range(5)]
    (tmp_path / "unseen.json").write_text(json.dumps(unseen))
    later = replace(data, train=None, unseen=str(tmp_path / "unseen.json"))
    known = Run("run", config.model, run.adapter, run.root)
    routing = known.task_routing(later, ["task1", "read_it"])
    assert routing is not None
    asked = "read it\nWhich letter is 0?\nWhich letter is 1?\nWhich letter is 2?"
    assert routing.definitions == {"task1": made["task1"], "read_it": asked}
    assert "1 tasks that the training does not know are defined by their names" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"1 of 1 tasks have none \(other\): give data\.metadata=<file>"):
        known.task_routing(later, ["other"])
    read_a_file = replace(known, data=config.data)  # then nothing else stands in for it
    assert read_a_file.definitions == made
    run.definitions.unlink()
    for run_without in (read_a_file, replace(known)):
        with pytest.raises(UserError, match=r"2 of 2 tasks have none"):
            run_without.task_routing(later, ["task1", "read_it"])


def test_only_mixlora_reads_definitions(by_task: Callable[..., TrainConfig]) -> None:
    config = by_task("run", adapter="lora", steps=1)
    train(replace(config, data=replace(config.data, metadata=None)))
    with pytest.raises(ValueError, match=r"routing\.encoder=x: routing=random reads no task definitions"):
        RoutingConfig("random", encoder="x")
