"""`train` from configuration to run folder, on the tiny model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixlora_cli.config import TrainConfig
from mixlora_cli.data.collate import Collator, PixelLoader
from mixlora_cli.data.encode import encode_records
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter, load_adapter
from mixlora_cli.models.features import accept_features
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.training import train as run_module
from mixlora_cli.training.callbacks import Interrupted
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import NUM_RECORDS, MakeConfig, adapter_weights, assert_same_bits, each_step

Trained = Callable[[str], RunFolder]


@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_steps_are_repeatable_bit_for_bit(make_config: MakeConfig, trained: Trained, adapter: str) -> None:
    first = trained(adapter).root
    torch.rand(3)
    second = train(make_config("second", adapter, steps=7))
    other_seed = train(make_config("third", adapter, steps=7, seed=1))
    assert_same_bits(adapter_weights(first), adapter_weights(second))
    assert any(not torch.equal(t, adapter_weights(other_seed)[n]) for n, t in adapter_weights(first).items())
    untrained = [
        n for n, t in adapter_weights(first).items() if ("lora_B" in n or "factors_b" in n) and not t.any()
    ]
    assert untrained == []


def test_loss_equals_transformers_own_and_files_are_complete(make_config: MakeConfig) -> None:
    """One step over all records: the logged loss is the loss of the untrained model over all label tokens."""
    config = make_config("run", steps=1, batch_size=5, accumulation=3, dropout=0.0)
    run = RunFolder(train(config))

    base = build_tiny()
    dataset = encode_records(load_records(config.data, "train"), base.chat, 1792)
    batch = Collator(build_tiny().chat, PixelLoader(base.chat))([dataset[i] for i in range(NUM_RECORDS)])
    expected = base.model(**batch).loss.item()
    (row,) = read_metrics(run.metrics)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["tokens"] == batch["attention_mask"].sum().item()
    assert row["step"] == 1
    assert row["epoch"] == 1.0
    assert row["grad_norm"] > 0
    assert row["seconds"] > 0
    assert row["tokens_per_second"] > 0

    result = json.loads(run.result.read_text())
    assert (result["steps"], result["loss"], result["tokens"]) == (1, row["loss"], row["tokens"])
    assert (run.adapter / "adapter_config.json").is_file()
    assert run.config.is_file()
    assert run.versions.is_file()


def test_learning_rate_warms_up_and_falls_along_a_cosine(make_config: MakeConfig) -> None:
    config = make_config("run", steps=6, warmup_ratio=0.3, learning_rate=1e-2)
    rows = read_metrics(RunFolder(train(config)).metrics)
    # Two of six steps warm up; the rate of step k is that of a schedule read at k - 1.
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * share for share in [0.0, 0.5, *cosine]])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_each_row_says_over_how_many_steps_its_loss_is_the_mean(
    make_config: MakeConfig, trained: Trained
) -> None:
    losses = [row["loss"] for row in read_metrics(trained("mixlora").metrics)]
    rows = read_metrics(RunFolder(train(make_config("some", steps=7, log_every=3))).metrics)
    assert [(row["step"], row["loss_steps"]) for row in rows] == [(1, 1), (3, 2), (6, 3), (7, 1)]
    for row in rows:
        window = losses[row["step"] - row["loss_steps"] : row["step"]]
        assert row["loss"] == pytest.approx(sum(window) / len(window), rel=1e-5)


def test_base_weights_do_not_move_and_the_loss_falls(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = []

    def remember(base: Any, *rest: Any) -> Any:
        bases.append(base)
        return attach_adapter(base, *rest)

    monkeypatch.setattr(run_module, "attach_adapter", remember)
    folder = RunFolder(train(make_config("run", "lora", steps=12, learning_rate=5e-2)))
    rows = read_metrics(folder.metrics)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    trained = {name.replace(".base_layer", ""): tensor for name, tensor in bases[0].state_dict().items()}
    original = build_tiny().model.state_dict()
    assert_same_bits({name: trained[name] for name in original}, original)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_trained_projector_comes_back(make_config: MakeConfig, adapter: str) -> None:
    config = make_config("run", adapter)
    config = replace(config, model=replace(config.model, train_also=["multi_modal_projector"]))
    run = train(config)
    saved = {
        name: tensor
        for name, tensor in adapter_weights(run, adapter).items()
        if "projector.linear_1.weight" in name
    }
    (weight,) = saved.values()
    base = build_tiny().model
    assert not torch.equal(weight, base.model.multi_modal_projector.linear_1.weight)
    loaded = load_adapter(base, run / "adapter")
    found = [p for n, p in loaded.named_parameters() if "projector" in n and n.endswith("linear_1.weight")]
    assert any(torch.equal(p, weight) for p in found)


@pytest.mark.parametrize("whole", [False, True])
def test_a_trained_tower_is_not_read_from_the_cache(make_config: MakeConfig, whole: bool) -> None:
    def make(folder: str, cached: bool) -> TrainConfig:
        config = make_config(folder, "lora", cache_features=cached)
        if whole:
            return replace(config, model=replace(config.model, train_also=["vision_tower"]))
        targets = r".*layers\.0\.self_attn\.q_proj"  # of the language model, too
        return replace(config, adapter=replace(config.adapter, target_modules=targets))

    with pytest.raises(
        UserError, match=r"and vision_tower\.\S+ is to be trained .*train\.cache_features=false"
    ):
        train(make("cached", True))
    weights = adapter_weights(train(make("pixels", False)), "lora")
    original = build_tiny().model.model.vision_tower.state_dict()
    learned = [n for n, t in weights.items() if "vision_tower" in n and ("lora_B" in n or whole) and t.any()]
    assert learned and (
        not whole or any(not torch.equal(weights[n], original[n.split("vision_tower.")[1]]) for n in learned)
    )
    base = build_tiny()
    accept_features(base.model)
    with pytest.raises(UserError, match=r"give eval\.cache_features=false where the tower was trained$"):
        load_adapter(base.model, Path(make("pixels", False).output_dir) / "adapter")


@pytest.mark.parametrize(("adapter", "stop_at"), [("mixlora", 2), ("lora", 3), ("mixlora", 5), ("full", 4)])
def test_resume_after_a_signal_gives_the_uninterrupted_adapter(
    make_config: MakeConfig,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    stop_at: int,
) -> None:
    """Three steps an epoch: the stops lie within the first epoch, at its very end and within the second one."""
    numbers = {"steps": 7, "batch_size": 4, "adapter": adapter}
    whole = trained(adapter)
    with monkeypatch.context() as patch:
        each_step(patch, lambda step: signal.raise_signal(signal.SIGTERM) if step == stop_at else None)
        with pytest.raises(Interrupted) as stopped:
            train(make_config("cut", **numbers))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    said = capsys.readouterr().out
    assert f"stopped after step {stop_at} of 7" in said
    assert "resume=auto" in said
    cut = RunFolder(Path(make_config("cut").output_dir))
    assert not cut.finished
    assert not cut.adapter.exists()
    assert cut.newest_checkpoint() == cut.checkpoints / f"checkpoint-{stop_at}"

    train(make_config("cut", resume="auto", **numbers))
    assert_same_bits(adapter_weights(whole.root, adapter), adapter_weights(cut.root, adapter))
    rows = read_metrics(cut.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_metrics(whole.metrics)]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_metrics_after_the_resumed_step_are_dropped(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        each_step(patch, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(make_config("run", steps=5, save_every=2))
    run = RunFolder(Path(make_config("run").output_dir))
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    train(make_config("run", steps=5, save_every=2, log_every=2, resume="auto"))
    # Row 3 came after the checkpoint; the second call logs every other step and the last one.
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 4, 5]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_checkpoints_hold_no_base_weights_and_lines_say_what_to_do_next(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(train(make_config("run", "lora", save_every=1, resume="auto")))
    said = capsys.readouterr().out
    for words in (
        "yet: starting new",
        "step 2/2  loss ",
        "tokens/s  ETA 0:00:00",
        f"mixlora eval run={run.root}",
    ):
        assert words in said
    (newest,) = [path for path in run.checkpoints.iterdir() if path.name == "checkpoint-2"]
    assert {path.name for path in newest.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert not (newest / "pytorch_model.bin").exists()
    assert load_file(newest / "adapter_model.safetensors").keys() == adapter_weights(run.root).keys()


def test_a_loss_that_is_not_finite_names_step_and_records(make_config: MakeConfig) -> None:
    with pytest.raises(
        UserError, match=r"loss is (nan|inf) at step [2-9], in the batch of records \d+, \d+, \d+, \d+:"
    ):
        train(make_config("run", "lora", steps=9, learning_rate=1e30))


@pytest.mark.parametrize("adapter", ["lora", "mixlora"])
def test_bf16_base_with_fp32_adapter(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """The Trainer's own autocast keeps every adapted layer in bf16, while the adapter's weights stay in fp32."""
    types: set[torch.dtype] = set()

    def watch(_: Any, args: Any, output: Tensor) -> None:
        types.update((args[0].dtype, output.dtype))

    def attach_and_watch(base: Any, *rest: Any) -> Any:
        assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
        model = attach_adapter(base, *rest)
        for name, module in model.named_modules():
            if name.endswith("_proj") and "language_model" in name:
                module.register_forward_hook(watch)
        return model

    monkeypatch.setattr(run_module, "build_base", lambda model, dtype: build_tiny(dtype=dtype))
    monkeypatch.setattr(run_module, "attach_adapter", attach_and_watch)
    config = make_config(adapter, adapter, precision="bf16", steps=4, learning_rate=5e-2, warmup_ratio=0.0)
    rows = read_metrics(RunFolder(train(config)).metrics)
    assert types == {torch.bfloat16}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {t.dtype for t in adapter_weights(Path(config.output_dir)).values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_bit(make_config: MakeConfig, trained: Trained) -> None:
    saving = train(make_config("saving", steps=7, gradient_checkpointing=True))
    assert_same_bits(adapter_weights(trained("mixlora").root), adapter_weights(saving))
