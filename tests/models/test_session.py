"""A run is found and opened: mistakes in one line before a model loads, then what training and generation compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.data.collate import draw_seed
from mixlora_cli.data.encode import Item, encode_prompts, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.models.generate import Generator
from mixlora_cli.models.session import Session, find_mixlora, find_run, label_of
from mixlora_cli.models.tiny import build_tiny
from tiny_data import tiny_data
from tiny_runs import NUM_FACTORS, RANK, TINY, finished_run


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return tiny_data(tmp_path / "data", heldout=["counting", "reading"] * 6)


def test_what_is_known_without_a_model(data: DataConfig, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", data, routing="task")
    found = find_run(str(run.root), ModelConfig("other", "mini"))
    assert (found.label, found.model) == (f"MixLoRA E={NUM_FACTORS} r={RANK} task", TINY)
    assert found.data is not None
    assert (found.adapter, found.root, found.data.source) == (run.adapter, run.root, "json")
    assert (found.dtype, found.routing) == (torch.float32, "task")
    routing = found.task_routing(data, ["reading"])
    assert routing is not None and routing.definitions == {"reading": "Do reading."}
    with pytest.raises(UserError, match="definition"):
        found.task_routing(data, ["unknown"])

    bare = find_run(str(run.adapter), TINY)
    assert (bare.label, bare.model, bare.digest) == ("adapter", TINY, found.digest)
    base = find_run(None, TINY)
    assert (base.label, base.adapter, base.digest, base.routing) == ("base", None, "none", None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere", "run=.*nowhere: no such folder; expected the run folder that `mixlora train` printed"),
        ("empty", "run=.*empty is no run folder: expected config.yaml in it"),
        ("unfinished", "has not finished: continue it with `mixlora train"),
        ("damaged", "config.yaml is not a configuration that `mixlora train` wrote: "),
        ("unreadable", "adapter_config.json: cannot be read as an adapter's configuration"),
        ("lora", "run=.*lora holds a LORA adapter, which is other: .*/lora/adapter"),
        ("full", "run=.*full trained the model's own weights: own"),
        ("unprepared", "model=llava_v1_7b is not in .*assemble it once"),
    ],
)
def test_refused_in_one_line(
    kind: str, message: str, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path / "cache"))
    model = ModelConfig("llava_v1_7b", "prepared") if kind == "unprepared" else TINY
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    elif kind != "nowhere":
        run = finished_run(folder, data, kind if kind in ("lora", "full") else "mixlora")
        if kind == "unfinished":
            run.result.unlink()
        elif kind == "damaged":
            run.config.write_text("model: 3\n")
        elif kind == "unreadable":
            (run.adapter / "adapter_config.json").write_text("{")
        elif kind == "unprepared":
            folder = run.adapter
    with pytest.raises(UserError, match=message) as caught:
        find_mixlora(str(folder), model, "own", "is other: {folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{}, {"pool": "prompt", "decode": "step"}])
def test_selections_are_those_of_the_first_new_token(
    fields: dict[str, str], data: DataConfig, tmp_path: Path
) -> None:
    """What each layer has chosen when generation, one prompt at a time without padding, begins."""
    adapter = finished_run(tmp_path / "run", data, router_spread=50, **fields).adapter
    session = Session(build_tiny(), torch.float32, cache_features=False, adapter=adapter)
    items = encode_prompts(load_records(data, "heldout"), session.base.chat).items
    assert (
        session.tuner is not None and len({item.length for item in items}) > 4
    )  # so the batch holds padding
    together = session.selections(items)
    generate = Generator(session.model, session.base, session.features, max_new_tokens=1)
    layers = {n: m for n, m in session.tuner.model.named_modules() if isinstance(m, MixLoraLinear)}
    assert layers.keys() == together.keys()
    for row, item in enumerate(items):
        generate([item])
        for name, layer in layers.items():
            alone = layer.last_selection["default"]
            assert alone is not None
            assert alone.index_a[0].tolist() == together[name].index_a[row].tolist()
            assert alone.index_b[0].tolist() == together[name].index_b[row].tolist()
    assert any(len(set(map(tuple, found.index_a.tolist()))) > 1 for found in together.values())


def with_second_turns(data: DataConfig) -> list[Record]:
    """Held-out records, every third of which is asked again."""
    path = Path(str(data.heldout))
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        if number % 3 == 0:
            again = {"from": "human", "value": "And the next?"}, {"from": "gpt", "value": "yes, a dog"}
            record["conversations"] += again
    path.write_text(json.dumps(records))
    return load_records(data, "heldout")


@pytest.mark.parametrize(
    ("adapter", "routing", "fields"),
    [
        ("lora", "instance", {}),
        ("full", "instance", {}),
        ("mixlora", "instance", {}),
        ("mixlora", "instance", {"pool": "prompt", "decode": "step"}),
        ("mixlora", "task", {}),
        ("mixlora", "random", {}),
    ],
)
def test_an_answers_loss_is_its_share_of_the_batch_s_whatever_the_neighbours(
    adapter: str, routing: str, fields: dict[str, str], data: DataConfig, tmp_path: Path
) -> None:
    records = with_second_turns(data)
    root = finished_run(tmp_path / "run", data, adapter, routing, router_spread=50, **fields).root
    run = find_run(str(root), TINY)
    by_task = run.task_routing(data, ["counting", "reading"])
    session = Session(build_tiny(), torch.float32, False, run.adapter, by_task)
    items = encode_records(records, session.base.chat, None).items
    seed = 3 if routing == "random" else None
    together = session.answer_losses(items, seed)

    for item, (nats, tokens) in zip(items, together, strict=True):
        ((alone, count),) = session.answer_losses([item], seed)
        assert tokens == count == sum(label != -100 for label in item.labels)
        assert alone == pytest.approx(nats, rel=1e-5)
        log_probabilities, positions = by_hand(session, item, seed)
        own = [log_probabilities[place - 1, item.input_ids[place]] for place in positions]
        assert nats == pytest.approx(-float(sum(own)), rel=1e-5)
    assert max(tokens for _, tokens in together) > 6  # both answers of two turns count
    assert len({round(nats, 3) for nats, _ in together}) > 6

    if seed is None:  # `loss` draws anew
        pooled = sum(nats for nats, _ in together) / sum(tokens for _, tokens in together)
        assert pooled == pytest.approx(float(session.loss(items)), rel=1e-5)
    else:
        assert session.answer_losses(items, 4) != together


def by_hand(session: Session, item: Item, seed: int | None) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities (S, V) of one unpadded pass with all logits, and the places that carry a label."""
    inputs = {"input_ids": torch.tensor([item.input_ids])}
    if item.images:
        inputs |= session.features([item.images])
    if session.embeddings is not None:
        inputs["task_embeddings"] = session.embeddings[item.task][None]
    if session.tuner is not None:
        inputs["prompt_mask"] = torch.tensor([item.labels]) == -100
    if seed is not None:
        inputs["routing_seeds"] = torch.tensor([draw_seed(seed, item)])
    with torch.inference_mode():
        logits = session.model(**inputs).logits[0]
    return logits.log_softmax(-1), [place for place, label in enumerate(item.labels) if label != -100]


def test_chance_draws_the_same_for_a_question_with_its_answer_and_without(data: DataConfig) -> None:
    records, chat = with_second_turns(data), build_tiny().chat
    asked = encode_prompts(records, chat).items
    answered = encode_records(records, chat, None).items
    assert [item.prompt_length for item in answered] == [item.length for item in asked]
    assert [item.prompt_length for item in asked] == [item.length for item in asked]
    assert all(item.length > item.prompt_length for item in answered)
    assert [draw_seed(7, item) for item in answered] == [draw_seed(7, item) for item in asked]
    other = replace(answered[0], input_ids=[*answered[0].input_ids[:-1], 5])
    assert draw_seed(7, other) == draw_seed(7, asked[0])  # another answer


@pytest.mark.parametrize(
    ("adapter", "routing", "label"),
    [
        (
            {},
            {"name": "instance"},
            "MixLoRA E=16 r=4",
        ),  # older runs say nothing of pairs and of the routers' start
        ({"pairing": "separate"}, {"name": "task", "router_init": "random"}, "MixLoRA E=16 r=4 task"),
        ({"pairing": "tied"}, {"name": "task", "router_init": "random"}, "MixLoRA E=16 r=4 task tied"),
        ({"pairing": "tied"}, {"name": "instance", "router_init": "tasks"}, "MixLoRA E=16 r=4 plus"),
        ({"pairing": "tied"}, {"name": "instance", "router_init": "clusters"}, "MixLoRA E=16 r=4 clusters"),
    ],
)
def test_labels_tell_ways_to_select_apart(adapter: Any, routing: Any, label: str) -> None:
    config = {"adapter": {"name": "mixlora", **adapter}, "routing": routing, "rank": 4, "factors": 16}
    assert label_of(config) == label
