"""The whole command on the tiny model: adapters that stock PEFT loads, merges and that say what they lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from mixlora_cli.analysis.export.run import choose_inputs, export
from mixlora_cli.config import DataConfig, EvalConfig, ExportConfig
from mixlora_cli.data.collate import PixelLoader, generation_collator
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.hydra_app import Command, run_command
from mixlora_cli.models.adapters import load_adapter, unload_adapter
from mixlora_cli.models.tiny import build_tiny
from tiny_runs import NUM_FACTORS, RANK

from .conftest import TASKS, MakeConfig, MakeRun

NUM_LAYERS = 14
"""Adapted layers of the tiny model: seven in each of two blocks."""


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return content


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


def fitted_batch(config: ExportConfig) -> dict[str, Tensor]:
    """The prompts that the export was fitted to."""
    base = build_tiny()
    records = [record for group in choose_inputs(config)[0].values() for record in group]
    items = encode_prompts(records, base).items
    return generation_collator(0, PixelLoader(base.image_processor))(items)


def test_one_instance_at_full_rank_is_the_adapter_itself(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    config = make_config(
        run.root, tasks=[TASKS[0]], instances=1, rank=NUM_FACTORS, evaluate=False, cache_features=True
    )
    folder = export(config)
    batch = fitted_batch(config)
    expected = logits(load_adapter(build_tiny().model, run.adapter), batch)
    static = PeftModel.from_pretrained(build_tiny().model, str(folder / "adapter")).eval()
    assert isinstance(static.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(static, batch), expected, rtol=0, atol=1e-4)
    assert (logits(build_tiny().model, batch) - expected).abs().max() > 0.1

    merged = static.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-4)
    (adapter,) = report(folder)["adapters"]
    assert adapter["energy"]["lost_by_averaging"] == pytest.approx(0, abs=1e-9)
    assert adapter["energy"]["kept_in_all"] == pytest.approx(1)
    assert adapter["instances"] == {TASKS[0]: 1}


def test_without_a_rank_nothing_is_cut_off(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    one = export(make_config(run.root, tasks=[TASKS[0]], instances=1, evaluate=False))
    many = export(make_config(run.root, evaluate=False, output_dir=str(run.root / "many")))
    (of_one,), (of_many,) = report(one)["adapters"], report(many)["adapters"]
    assert of_one["rank"] == RANK
    assert RANK < of_many["rank"] <= NUM_FACTORS
    assert of_many["energy"]["kept_by_rank"] == pytest.approx(1)
    assert 0.01 < of_many["energy"]["lost_by_averaging"] < 1
    assert len(of_many["layers"]) == NUM_LAYERS
    assert of_many["instances"] == dict.fromkeys(TASKS, 10)


def test_padding_and_neighbours_change_no_export(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    folders = [
        export(make_config(run.root, evaluate=False, batch_size=size, output_dir=str(run.root / f"by{size}")))
        for size in (1, 7)
    ]
    alone, together = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], together[name])


def test_everything_is_compared_on_the_same_instances(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    folder = export(make_config(run.root, instances=4, rank=3))
    found = report(folder)
    assert found["finished"] and found["label"] == f"MixLoRA E={NUM_FACTORS} r={RANK}"
    assert found["compared"] == {"split": "heldout", "instances": dict.fromkeys(TASKS, 6)}
    assert found["versions"]["packages"]["peft"]
    match, loss = found["comparison"]
    assert (match["name"], loss["name"]) == ("exact match", "answer loss")
    for measure in (match, loss):
        kinds = measure["adapter kind"]
        assert set(kinds) == {"base", "mixlora", "static"}
        difference = measure["static - mixlora, paired"]
        for task in TASKS:
            values = {kind: estimates["tasks"][task] for kind, estimates in kinds.items()}
            assert {estimate["n"] for estimate in values.values()} == {6}
            change = values["static"]["value"] - values["mixlora"]["value"]
            assert difference["tasks"][task]["value"] == pytest.approx(change)
        assert difference["mean"]["low"] <= difference["mean"]["value"] <= difference["mean"]["high"]
    values = {kind: estimates["mean"]["value"] for kind, estimates in loss["adapter kind"].items()}
    assert len(set(values.values())) == 3
    shown = capsys.readouterr().out
    assert "lost by averaging" in shown and "static - mixlora" in shown


def test_loss_is_that_of_the_model_at_the_prompts_selection(
    make_run: MakeRun, make_config: MakeConfig
) -> None:
    """One task, one instance at full rank: static and MixLoRA have one loss, though pool=all would see the answer."""
    run = make_run()
    data = make_config(run.root).data
    same = replace(data, train=data.heldout)
    config = make_config(
        run.root, tasks=[TASKS[1]], instances=1, rank=NUM_FACTORS, limit=1, data=same, seed=3
    )
    found = report(export(config))
    _, loss = found["comparison"]
    assert loss["adapter kind"]["mixlora"]["mean"]["n"] == 1
    assert loss["static - mixlora, paired"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert loss["adapter kind"]["base"]["mean"]["value"] != pytest.approx(
        loss["adapter kind"]["mixlora"]["mean"]["value"], abs=0.01
    )


def test_one_adapter_for_each_task_loses_less(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run()
    whole = report(export(make_config(run.root, evaluate=False)))["adapters"]
    config = make_config(run.root, per_task=True, output_dir=str(run.root / "each"))
    folder = export(config)
    found = report(folder)
    names = [adapter["folder"] for adapter in found["adapters"]]
    assert names == ["counting", "naming_things_now"]
    assert [adapter["tasks"] for adapter in found["adapters"]] == [[task] for task in TASKS]
    # Means of parts lie nearer to their instances than the mean of all.
    energies = [adapter["energy"] for adapter in found["adapters"]]
    within = sum(e["selected"] * e["lost_by_averaging"] for e in energies) / sum(
        e["selected"] for e in energies
    )
    assert within < whole[0]["energy"]["lost_by_averaging"]
    for name in names:
        settings = json.loads((folder / name / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA" and settings["lora_alpha"] == settings["r"]
        assert settings["base_model_name_or_path"] == "tiny"
    assert set(found["comparison"][0]["adapter kind"]["static"]["tasks"]) == set(TASKS)


def test_task_routing_selects_once_for_each_task(make_run: MakeRun, make_config: MakeConfig) -> None:
    """All instances of a task share their factors, so its adapter is exact and as small as the adapter's own rank."""
    run = make_run(routing="task")
    found = report(export(make_config(run.root, per_task=True)))
    assert [adapter["rank"] for adapter in found["adapters"]] == [RANK, RANK]
    for adapter in found["adapters"]:
        assert adapter["energy"]["lost_by_averaging"] == pytest.approx(0, abs=1e-9)
        assert adapter["instances"] == {adapter["tasks"][0]: 10}
    match, loss = found["comparison"]
    assert loss["static - mixlora, paired"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert match["static - mixlora, paired"]["mean"]["value"] == 0
    assert match["static - mixlora, paired"]["mean"]["high"] > 0


def test_random_routing_exports_its_expectation(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(routing="random")
    nowhere = DataConfig(name="json", source="json", unseen="not read")
    folder = export(make_config(run.root, evaluate=False, data=nowhere))
    (adapter,) = report(folder)["adapters"]
    assert (adapter["rank"], adapter["instances"]) == (1, {})
    assert "exact expectation over all choices" in capsys.readouterr().err
    pools = load_file(run.adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.language_model.layers.0.mlp.down_proj"
    factors_a, factors_b = (pools[f"{layer}.mixlora_factors_{side}.weight"] for side in "ab")
    scaling = 2 * NUM_FACTORS / RANK
    expected = scaling * RANK / NUM_FACTORS**2 * torch.outer(factors_b.sum(dim=0), factors_a.sum(dim=0))
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    static = written[f"{layer}.lora_B.weight"] @ written[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(static, expected, rtol=1e-4, atol=1e-5)
    compared = report(export(make_config(run.root, limit=2, output_dir=str(run.root / "compared"))))
    assert compared["compared"]["instances"] == dict.fromkeys(TASKS, 2)


def test_decode_step_is_said(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(decode="step")
    export(make_config(run.root, instances=1, evaluate=False))
    assert "selects anew for each decoded token" in capsys.readouterr().err


def test_a_projector_that_was_trained_travels_along(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(train_projector=True)
    config = make_config(run.root, tasks=[TASKS[0]], instances=1, rank=NUM_FACTORS, limit=1)
    folder = export(config)
    batch = fitted_batch(config)
    expected = logits(load_adapter(build_tiny().model, run.adapter), batch)
    static = load_adapter(build_tiny().model, folder / "adapter")
    torch.testing.assert_close(logits(static, batch), expected, rtol=0, atol=1e-4)
    kept = [
        name for name in load_file(folder / "adapter" / "adapter_model.safetensors") if "projector" in name
    ]
    assert len(kept) == 4
    assert "multi_modal_projector: trained whole" in capsys.readouterr().err
    # The comparison's base has its own projector again, and so does what the static adapter was put on.
    model = build_tiny().model
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unload_adapter(load_adapter(model, run.adapter))
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_command_line_and_evaluation_of_the_result(
    make_run: MakeRun, data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    given = [
        "data=json",
        f"data.train={data.train}",
        f"data.heldout={data.heldout}",
        f"data.images={data.images}",
    ]
    command = Command("export", ExportConfig, "mixlora_cli.analysis.export.run:export")
    arguments = [f"run={run.root}", *given, "export.instances=2", "export.evaluate=false", "export.rank=2"]
    assert run_command(command, arguments) == 0, capsys.readouterr().err
    folder = run.root / "export"
    assert PeftConfig.from_pretrained(str(folder / "adapter")).r == 2

    assert run_command(command, arguments) == 2
    assert "holds an export; choose another output_dir=, or overwrite=true" in capsys.readouterr().err
    (folder / "adapter" / "stale").touch()
    (folder / "mine.txt").touch()
    assert run_command(command, [*arguments, "overwrite=true"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "export.json", "mine.txt"]
    assert not (folder / "adapter" / "stale").exists()

    # A static adapter is a PEFT adapter like any other.
    evaluate = Command("eval", EvalConfig, "mixlora_cli.evaluation.run:evaluate")
    wanted = [f"run={folder}/adapter", "model=tiny", *given, "eval.seen=true", "eval.max_new_tokens=2"]
    assert run_command(evaluate, [*wanted, f"output_dir={run.root}/scores"]) == 0, capsys.readouterr().err
    results = read_results(run.root / "scores")
    assert results.seen is not None and results.seen.n == 12
