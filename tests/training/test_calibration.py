"""What a training takes before its first step: the statistics of what routers read, and where routers start."""

from __future__ import annotations

import signal
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixlora_cli.config import RoutingConfig, TrainConfig
from mixlora_cli.data.encode import EncodedDataset, Item, encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.session import Session
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training import train as train_module
from mixlora_cli.training.callbacks import Interrupted
from mixlora_cli.training.run_folder import RunFolder
from mixlora_cli.training.train import train

from .conftest import MakeConfig, adapter_weights, assert_same_bits, each_step

ROUTING = RoutingConfig("instance", pool="text", normalize=True, router_init="clusters", health_every=0)
LAYER = "base_model.model.model.language_model.layers.1.mlp.up_proj"


def plus(config: TrainConfig) -> TrainConfig:
    adapter = replace(config.adapter, pairing="tied", router_grad="straight_through")
    return replace(config, adapter=adapter, routing=ROUTING)


def words_read_by(config: TrainConfig, layer: str) -> Tensor:
    """Mean input (N, d_in) of a layer of the bare base over each record's prompt, pictures left out; one by one."""
    base = build_tiny()
    items = encode_records(load_records(config.data, "train"), base.chat, 1792, "stop", "the data")
    session = Session(base, torch.float32, cache_features=False)
    found: list[Tensor] = []
    module = base.model.get_submodule(layer)
    for item in items:
        batch = session.collator([item])
        words = (batch["labels"][0] == -100) & (batch["input_ids"][0] != base.model.config.image_token_id)
        hook = module.register_forward_pre_hook(
            lambda _, inputs, words=words: found.append(inputs[0][0][words].mean(dim=0))
        )
        with torch.no_grad():
            base.model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        hook.remove()
    return torch.stack(found)


def selected(weights: dict[str, Tensor], standardised: Tensor, rank: int) -> Tensor:
    """What the layer's routers select for these inputs (N, d_in), to which their ridge regression leads: (N, r)."""
    router, bias = (weights[f"{LAYER}.mixlora_router_a.{name}"] for name in ("weight", "bias"))
    chosen = (standardised @ router.T + bias).topk(rank).indices.sort().values
    wanted = torch.zeros(len(chosen), len(router)).scatter_(1, chosen, 1.0)
    torch.testing.assert_close(bias, wanted.mean(dim=0))
    ridge = 0.1 * standardised.square().sum(dim=1).mean()
    products = standardised @ standardised.T + ridge * torch.eye(len(chosen))
    solved = standardised.T @ torch.linalg.solve(products, wanted - bias)
    torch.testing.assert_close(router, solved.T, rtol=1e-2, atol=1e-4)
    return chosen


def test_statistics_are_those_of_the_prompts_words_on_the_base(make_config: MakeConfig) -> None:
    """All twelve records, whatever their order; a rate of next to nothing leaves the routers where they start."""
    config = plus(make_config("run", learning_rate=1e-12))
    weights = adapter_weights(train(config))
    read = words_read_by(config, LAYER.removeprefix("base_model.model."))
    assert len(read) == 12
    mean, deviation = (
        weights[f"{LAYER}.mixlora_standardiser.mean"],
        weights[f"{LAYER}.mixlora_standardiser.deviation"],
    )
    torch.testing.assert_close(mean, read.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation, read.std(dim=0), rtol=1e-4, atol=1e-5)
    standardised = (read - mean) / deviation
    chosen = selected(weights, standardised, config.rank)
    assert 1 < len(set(map(tuple, chosen.tolist()))) <= 3  # of twelve records three clusters


def test_routers_start_by_telling_tasks_apart(make_config: MakeConfig, tmp_path: Path) -> None:
    """As many records of each task, in closed form from what the base makes of their prompts."""
    config = plus(make_config("run", learning_rate=1e-12))
    config = replace(config, routing=replace(ROUTING, router_init="tasks"))
    weights = adapter_weights(train(config))
    read = words_read_by(config, LAYER.removeprefix("base_model.model."))
    tasks = [record.task for record in load_records(config.data, "train")]
    assert len(set(tasks)) > 1
    standardised = (read - weights[f"{LAYER}.mixlora_standardiser.mean"]) / weights[
        f"{LAYER}.mixlora_standardiser.deviation"
    ]
    chosen = selected(weights, standardised, config.rank)
    by_task = {
        name: {tuple(row) for row, task in zip(chosen.tolist(), tasks, strict=True) if task == name}
        for name in tasks
    }
    assert all(len(each) == 1 for each in by_task.values())


def test_one_task_cannot_be_told_apart(make_config: MakeConfig) -> None:
    config = plus(make_config("run"))
    config = replace(
        config,
        routing=replace(ROUTING, router_init="tasks"),
        data=replace(config.data, tasks=["task0"]),
    )
    with pytest.raises(
        UserError, match=r"tells tasks apart, and all training records are of task0; say with .*clusters"
    ):
        train(config)


def test_as_many_of_each_task_are_read() -> None:
    items = [Item(array("i"), array("i"), (), f"task{n % 7 % 3}", n) for n in range(100)]
    found = train_module._sample(EncodedDataset(items), 0, True)
    assert Counter(item.task for item in found) == {"task0": 43, "task1": 29, "task2": 28}
    many = [Item(array("i"), array("i"), (), f"task{n % 50}", n) for n in range(1000)]
    found = train_module._sample(EncodedDataset(many), 0, True)
    assert set(Counter(item.task for item in found).values()) == {8} and len(found) == 400
    assert len({item.index for item in found}) == 400
    assert len(train_module._sample(EncodedDataset(many), 0, False)) == 256


def test_statistics_come_back_with_the_adapter(make_config: MakeConfig) -> None:
    run = train(plus(make_config("run")))
    adapted = load_adapter(build_tiny().model, run / "adapter")
    layers = [module for module in adapted.modules() if isinstance(module, MixLoraLinear)]
    weights = adapter_weights(run)
    for layer in layers:
        standardiser = layer.mixlora_standardiser["default"]
        assert standardiser.known
        assert torch.equal(
            standardiser.mean, weights[f"base_model.model.{layer.name}.mixlora_standardiser.mean"]
        )
    assert len(layers) == 14


def test_a_resumed_run_is_the_uninterrupted_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(plus(make_config("whole", steps=5)))
    with monkeypatch.context() as patch:
        each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None)
        with pytest.raises(Interrupted):
            train(plus(make_config("cut", steps=5)))
    cut = train(plus(make_config("cut", steps=5, resume="auto")))
    assert_same_bits(adapter_weights(whole), adapter_weights(cut))
    assert RunFolder(cut).finished


def test_one_record_is_too_little(make_config: MakeConfig) -> None:
    config = plus(make_config("run"))
    few = replace(config, data=replace(config.data, max_per_task=1, tasks=["task0"]))
    with pytest.raises(
        UserError, match=r"routing\.normalize=true needs two training records at least; there are 1"
    ):
        train(few)
    assert not Path(few.output_dir, "adapter").exists()
