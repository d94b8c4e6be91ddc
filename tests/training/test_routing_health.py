"""Reports on the routing: what they say is what happened, and training does not notice them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixlora_cli.config import TrainConfig
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.training import train as run_module
from mixlora_cli.training.routing_stats import RoutingHealth
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train
from mixlora_cli.training.trainer import AdapterTrainer

from .conftest import MakeConfig, adapter_weights, assert_same_bits

NUM_LAYERS = 14
Seen = list[tuple[dict[str, Any], list[int]]]


def routed(config: TrainConfig, **values: Any) -> TrainConfig:
    return replace(config, routing=replace(config.routing, **values))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(`MixLoraModel.selections`, record indices) of each training forward pass."""
    passes: Seen = []
    original = RoutingHealth.observe

    def observe(self: RoutingHealth, indices: Tensor) -> None:
        model = models[-1].base_model
        assert isinstance(model, MixLoraModel)
        passes.append((model.selections(), indices.tolist()))
        original(self, indices)

    models: list[Any] = []
    build = run_module.build_trainer

    def remember(*args: Any, **kwargs: Any) -> AdapterTrainer:
        models.append(args[0])
        return build(*args, **kwargs)

    monkeypatch.setattr(RoutingHealth, "observe", observe)
    monkeypatch.setattr(run_module, "build_trainer", remember)
    return passes


@pytest.mark.parametrize("routing", ["instance", "random"])
def test_training_does_not_notice(make_config: MakeConfig, routing: str) -> None:
    """Dropout, random routing and the order of the data draw from the generators that a probe must not move."""
    runs = []
    for every in (0, 1):
        config = make_config(f"every{every}", steps=4)
        runs.append(train(routed(config, name=routing, health_every=every)))
    assert_same_bits(*map(adapter_weights, runs))
    rows_off, rows_on = (read_metrics(RunFolder(run).metrics) for run in runs)
    assert [row["loss"] for row in rows_off] == [row["loss"] for row in rows_on]
    assert not RunFolder(runs[0]).routing.exists()
    assert "routing" not in rows_off[-1] and "routing" not in json.loads(
        RunFolder(runs[0]).result.read_text()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_window_holds_each_forward_pass_once(
    make_config: MakeConfig, seen: Seen, checkpointing: bool
) -> None:
    config = make_config("run", steps=3, batch_size=2, accumulation=2, gradient_checkpointing=checkpointing)
    run = RunFolder(train(routed(config, health_every=2)))
    looks = read_metrics(run.routing)
    assert [look["step"] for look in looks] == [2, 3]
    assert [look["instances"] for look in looks] == [8, 4]
    assert len(seen) == 6
    for look, passes in zip(looks, (seen[:4], seen[4:]), strict=True):
        assert look["tasks"] == len({index % 2 for _, indices in passes for index in indices})
        assert look["layers"] == list(passes[0][0]) and len(look["layers"]) == NUM_LAYERS
        assert look["agreement_by_chance"] == 0.5
        for number, name in enumerate(look["layers"]):
            pairs = [
                (set(a), set(b))
                for selections, _ in passes
                for a, b in zip(
                    selections[name].index_a.tolist(), selections[name].index_b.tolist(), strict=True
                )
            ]
            used_a = [factor for a, _ in pairs for factor in a]
            shares = torch.tensor([used_a.count(factor) / len(used_a) for factor in range(4)])
            entropy = torch.distributions.Categorical(shares).entropy() / torch.tensor(4.0).log()
            agreement = sum(len(a & b) for a, b in pairs) / (2 * len(pairs))
            assert look["entropy_a"][number] == pytest.approx(entropy.item(), abs=1e-5)
            assert look["unused_b"][number] == 1 - len(set().union(*(b for _, b in pairs))) / 4
            assert look["agreement"][number] == pytest.approx(agreement, abs=1e-6)


def test_rows_of_metrics_hold_the_means(make_config: MakeConfig) -> None:
    """A look has a row of its own also between two multiples of log_every, and at the last step."""
    run = RunFolder(train(routed(make_config("run", steps=5, batch_size=2, log_every=3), health_every=2)))
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "routing" in row] == [2, 4, 5]
    look, row = read_metrics(run.routing)[1], rows[3]["routing"]
    for name in ("entropy_a", "entropy_b", "unused_a", "unused_b", "churn_a", "churn_b", "agreement"):
        assert row[name] == pytest.approx(sum(look[name]) / NUM_LAYERS, abs=1e-5)
    assert row["entropy_a_min"] == min(look["entropy_a"])
    assert row["unused_b_max"] == max(look["unused_b"])
    assert row["layers"] == NUM_LAYERS
    assert json.loads(run.result.read_text())["routing"] == rows[-1]["routing"]


def test_churn_counts_the_factors_that_changed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks, A's routers are turned upside down: with r = 2 of E = 4 no factor stays."""

    def report_and_turn(self: RoutingHealth, step: int) -> dict[str, float]:
        if step == 2:
            for layer in self._layers:
                layer.mixlora_router_a["default"].weight.data.neg_()
        return original(self, step)

    original = RoutingHealth.report
    monkeypatch.setattr(RoutingHealth, "report", report_and_turn)
    # At a learning rate of next to nothing the factors that CFS reads stay as they are, and so does all else.
    config = make_config("run", steps=3, learning_rate=1e-12)
    looks = read_metrics(RunFolder(train(routed(config, health_every=1))).routing)
    assert [set(look["churn_a"]) for look in looks] == [{0.0}, {1.0}, {0.0}]
    assert set(looks[0]["churn_b"]) == {0.0}


def test_chance_has_no_churn(make_config: MakeConfig) -> None:
    run = RunFolder(train(routed(make_config("run"), name="random", health_every=1)))
    assert [look["churn_a"] for look in read_metrics(run.routing)] == [None, None]
    assert "churn_a" not in read_metrics(run.metrics)[-1]["routing"]


def test_a_probe_leaves_no_trace(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def state(model: MixLoraModel) -> tuple[Any, ...]:
        layers = model.decoder_layers().values()
        return (
            [module.training for module in model.modules()],
            [selection for layer in layers for selection in layer.last_selection.values()],
            torch.get_rng_state().tolist(),
            vars(model.context),
        )

    def check(self: RoutingHealth, step: int) -> dict[str, float]:
        assert self._probe is not None
        (model,) = models
        before = (*state(model)[:3], dict(vars(model.context)))
        before_a, _ = self._probe()
        torch.rand(3)  # what the probe gives depends on no generator
        torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
        after_a, _ = self._probe()
        assert torch.equal(before_a, after_a)
        assert before_a.shape == (NUM_LAYERS, 4, 2)
        for one, other in zip(before, state(model), strict=True):
            assert one == other
        checked.append(step)
        return original(self, step)

    def attach_and_remember(*args: Any, **kwargs: Any) -> Any:
        model: Any = attach(*args, **kwargs)
        models.append(model.base_model)
        return model

    models: list[MixLoraModel] = []
    original, attach = RoutingHealth.report, run_module.attach_adapter
    monkeypatch.setattr(RoutingHealth, "report", check)
    monkeypatch.setattr(run_module, "attach_adapter", attach_and_remember)
    train(routed(make_config("run"), health_every=2))
    assert checked == [1, 2]


@pytest.fixture
def flat_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A's routers have no opinion: all instances get the same factors."""
    attach = run_module.attach_adapter

    def attach_and_flatten(*args: Any, **kwargs: Any) -> Any:
        model: Any = attach(*args, **kwargs)
        for layer in model.base_model.decoder_layers().values():
            layer.mixlora_router_a["default"].weight.data.zero_()
        return model

    monkeypatch.setattr(run_module, "attach_adapter", attach_and_flatten)


@pytest.mark.usefixtures("flat_routers")
def test_collapse_is_said_once_and_in_the_result(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two looks at 32 instances each, and a last one at four, too few to judge by.
    config = make_config("run", steps=17, log_every=100)
    run = RunFolder(train(routed(config, health_every=8)))
    rows = [row for row in read_metrics(run.metrics) if "routing" in row]
    assert [row["step"] for row in rows] == [8, 16, 17]
    assert [row["routing"].get("collapsed_layers") for row in rows] == [NUM_LAYERS, NUM_LAYERS, None]
    said = capsys.readouterr().out
    warning = f"routing has collapsed in {NUM_LAYERS} of {NUM_LAYERS} layers at step 8: a router gives nearly"
    assert said.count(f"warning: {warning}") == 2  # when it is seen, and at the end
    result = json.loads(run.result.read_text())
    assert result["routing_warning"].startswith(warning)
    assert result["routing_warning"].endswith(f"; at step 16: {NUM_LAYERS} of {NUM_LAYERS} layers")


def test_resume_drops_looks_after_the_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: RoutingHealth, step: int) -> dict[str, float]:
        if step == 4:
            raise RuntimeError("power cut")
        return original(self, step)

    original = RoutingHealth.report
    with monkeypatch.context() as patch:
        patch.setattr(RoutingHealth, "report", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(routed(make_config("run", steps=5, save_every=2), health_every=1))
    run = RunFolder(Path(make_config("run").output_dir))
    assert [look["step"] for look in read_metrics(run.routing)] == [1, 2, 3]
    # Looking less often changes nothing of what is computed, so a resumed run may.
    train(routed(make_config("run", steps=5, save_every=2, resume="auto"), health_every=2))
    assert [look["step"] for look in read_metrics(run.routing)] == [1, 2, 4, 5]


def test_other_adapters_have_no_routing(make_config: MakeConfig) -> None:
    run = RunFolder(train(routed(make_config("run", "lora"), health_every=1)))
    assert not run.routing.exists()
    assert all("routing" not in row for row in read_metrics(run.metrics))
