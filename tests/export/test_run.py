"""The whole command on the tiny model: adapters that stock PEFT loads, merges and that say what they lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from mixlora_cli.analysis.export.comparison import mean_over_tasks
from mixlora_cli.analysis.export.run import choose_inputs, export
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import DataConfig, ExportConfig, ModelConfig
from mixlora_cli.data.collate import PixelLoader, generation_collator
from mixlora_cli.data.encode import encode_prompts
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.hydra_app import run_command
from mixlora_cli.models.adapters import load_adapter, unload_adapter
from mixlora_cli.models.load import build_base
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.stats import wilson
from tiny_data import as_arguments
from tiny_runs import NUM_FACTORS, RANK

from .conftest import TASKS, MakeConfig, MakeRun

COMMAND = COMMANDS["export"]
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
    items = encode_prompts(records, base.chat).items
    return generation_collator(base.chat, PixelLoader(base.chat))(items)


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


@pytest.mark.parametrize("family", ["smolvlm", "phi3"], indirect=True)
def test_any_family_is_exported(family: ModelConfig, make_run: MakeRun, make_config: MakeConfig) -> None:
    """Pictures in tiles, or none at all: PEFT loads what one instance's MixLoRA computes."""
    run = make_run(model=family)
    data = make_config(run.root).data
    if family.name == "phi3":
        data = replace(data, train=without_pictures(data.train), heldout=without_pictures(data.heldout))
    config = make_config(run.root, tasks=[TASKS[0]], instances=1, rank=NUM_FACTORS, limit=2, data=data)
    folder = export(config)
    records = [record for group in choose_inputs(config)[0].values() for record in group]
    base = build_base(family)
    batch = generation_collator(base.chat, PixelLoader(base.chat))(encode_prompts(records, base.chat).items)
    expected = logits(load_adapter(base.model, run.adapter), batch)
    static = PeftModel.from_pretrained(build_base(family).model, str(folder / "adapter")).eval()
    torch.testing.assert_close(logits(static, batch), expected, rtol=0, atol=1e-4)
    assert (logits(build_base(family).model, batch) - expected).abs().max() > 0.1
    assert report(folder)["compared"]["instances"] == {TASKS[0]: 2}


def without_pictures(path: str | None) -> str:
    """A copy of a file of records."""
    assert path is not None
    records = json.loads(Path(path).read_text())
    copy = Path(path).with_suffix(".text.json")
    copy.write_text(json.dumps([{k: v for k, v in one.items() if k != "image"} for one in records]))
    return str(copy)


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
    """All instances of a task share their factors, so its adapter is exact and as small as the adapter's own rank.

    With another rank it is fitted, to all instances of the task at once.
    """
    run = make_run(routing="task")
    found = report(export(make_config(run.root, per_task=True)))
    assert [adapter["rank"] for adapter in found["adapters"]] == [RANK, RANK]
    for adapter in found["adapters"]:
        assert adapter["exact"] and adapter["instances"] == {}
        assert adapter["energy"]["lost_by_averaging"] == 0 and adapter["energy"]["kept_in_all"] == 1
    match, loss = found["comparison"]
    assert loss["static - mixlora, paired"]["mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert match["static - mixlora, paired"]["mean"]["value"] == 0
    assert match["static - mixlora, paired"]["mean"]["high"] > 0
    cut = make_config(run.root, per_task=True, rank=1, evaluate=False, output_dir=str(run.root / "cut"))
    for adapter in report(export(cut))["adapters"]:
        assert not adapter["exact"] and adapter["instances"] == {adapter["tasks"][0]: 10}
        assert adapter["energy"]["lost_by_averaging"] == pytest.approx(0, abs=1e-9)
        assert 0.3 < adapter["energy"]["kept_by_rank"] < 0.99
    whole = make_config(run.root, evaluate=False, output_dir=str(run.root / "whole"))
    (adapter,) = report(export(whole))["adapters"]
    assert RANK < adapter["rank"] <= 2 * RANK and adapter["instances"] == dict.fromkeys(TASKS, 10)


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


def test_a_projector_that_was_trained_travels_along_and_decode_step_is_said(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(train_also=["multi_modal_projector"], decode="step")
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
    said = capsys.readouterr().err
    assert "multi_modal_projector: trained whole" in said
    assert "selects anew for each decoded token" in said
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
    given = as_arguments(data)
    arguments = [f"run={run.root}", *given, "export.instances=2", "export.evaluate=false", "export.rank=2"]
    assert run_command(COMMAND, arguments) == 0, capsys.readouterr().err
    folder = run.root / "export"
    assert PeftConfig.from_pretrained(str(folder / "adapter")).r == 2

    assert run_command(COMMAND, arguments) == 2
    assert "holds an export; choose another output_dir=, or overwrite=true" in capsys.readouterr().err
    (folder / "adapter" / "stale").touch()
    (folder / "mine.txt").touch()
    assert run_command(COMMAND, [*arguments, "overwrite=true"]) == 0
    left = ["adapter", "chat_template.jinja", "export.json", "manifest.json", "mine.txt"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert not (folder / "adapter" / "stale").exists()

    # A static adapter is a PEFT adapter like any other.
    evaluate = COMMANDS["eval"]
    wanted = [f"run={folder}/adapter", "model=tiny", *given, "eval.seen=true", "eval.max_new_tokens=2"]
    assert run_command(evaluate, [*wanted, f"output_dir={run.root}/scores"]) == 0, capsys.readouterr().err
    results = read_results(run.root / "scores")
    assert results.seen is not None and results.seen.n == 12


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("run", "values", "message"),
    [
        (["lora"], {}, "LORA adapter, which is static already: serve "),
        (["full"], {}, "there is nothing to export"),
        ([], {"rank": NUM_FACTORS + 1}, f"export.rank={NUM_FACTORS + 1}: must be <= {NUM_FACTORS}"),
        (
            [],
            {"tasks": ["countin"]},
            "export.tasks=countin: no such task in the train data; did you mean counting?",
        ),
        ([], {"heldout": None}, "data.heldout=null: comparing needs"),
        ([], {"split": "unseen"}, "data.unseen=null"),
        (["mixlora", "random"], {"per_task": True}, "chance selects alike for every task"),
        (["mixlora", "task"], {"metadata": None}, "definition"),
        ([], {"output_dir": "."}, "holds a trained adapter"),
        ([], {"output_dir": "adapter"}, "holds a trained adapter"),
        ([], {"output_dir": "notes"}, "holds files that no export wrote"),
        ([], {"output_dir": "others"}, "is no file of this version's export"),
    ],
)
def test_refused_in_one_line_before_a_model_is_built(
    run: list[str], values: dict[str, Any], message: str, make_run: MakeRun, make_config: MakeConfig
) -> None:
    root = make_run(*run).root
    for name, file in (("notes", "mine.txt"), ("others", "export.json")):
        (root / name).mkdir()
        (root / name / file).write_text('{"format": "of another program"}')
    changes = {key: value for key, value in values.items() if key in ("heldout", "metadata")}
    values = {key: value for key, value in values.items() if key not in changes}
    if "output_dir" in values:
        values |= {"output_dir": str(root / values["output_dir"]), "overwrite": True}
    config = make_config(root, **values)
    with pytest.raises(UserError) as caught:
        export(replace(config, data=replace(config.data, **changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fitted_and_compared_instances_never_overlap(make_run: MakeRun, make_config: MakeConfig) -> None:
    config = make_config(make_run().root, split="heldout", instances=100, limit=2)
    groups = choose_inputs(config)[:2]
    for task in TASKS:
        fitted, compared = ({r.index for r in group[task]} for group in groups)
        assert (len(fitted), len(compared)) == (3, 2)
        assert not fitted & compared
    whole, nothing, _ = choose_inputs(replace(config, export=replace(config.export, evaluate=False)))
    assert [len(records) for records in whole.values()] == [6, 6] and nothing == {}


def test_samples_are_seeded(make_run: MakeRun, make_config: MakeConfig) -> None:
    run = make_run().root
    chosen = [
        [r.index for r in choose_inputs(make_config(run, instances=3, seed=seed))[0][TASKS[0]]]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3
    assert any(other != chosen[0] for other in chosen[2:])


def test_mean_over_tasks_by_hand() -> None:
    first = np.array([[2.0, 1.0], [4.0, 2.0]])
    second = np.array([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    both = mean_over_tasks([first, second])
    # 6 / 3 and 6 / 3; the first task's ratio is the same however it is resampled.
    assert both.value == 2.0
    assert both.low is not None and both.high is not None
    assert 1.5 <= both.low < 2.0 < both.high <= 2.5
    unseen = wilson(0, 8).high or 0.0
    alike = mean_over_tasks([np.array([[0.0, 1.0]] * 8)])
    assert (alike.value, alike.low, alike.high) == (0.0, -unseen, unseen)
    # Losses that do not differ at all are no proportion.
    equal = mean_over_tasks([np.array([[0.0, 3.0]] * 8)], proportion=False)
    assert (equal.value, equal.low, equal.high) == (0.0, 0.0, 0.0)
    certain = mean_over_tasks([np.array([[1.0, 1.0]] * 8)])
    assert (certain.value, certain.high) == (1.0, 1.0) and certain.low == pytest.approx(wilson(8, 8).low)
