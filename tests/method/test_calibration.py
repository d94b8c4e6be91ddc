"""Statistics of what routers read, and routers that start as centroids of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import MECHANISMS, adapt, batch, build_llama, build_llava, logits
from peft import PeftModel, get_peft_model
from torch import nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.factors import Standardiser, clusters, of_tasks
from mixlora_cli.method.layer import MixLoraLinear


def test_a_standardiser_gives_units_of_deviation() -> None:
    read = torch.tensor([[1.0, 5.0, 1000.0], [3.0, 5.0, 1000.5], [5.0, 5.0, 1001.0]])
    standardiser = Standardiser(3)
    standardiser.take(read)
    assert standardiser.mean.tolist() == [3.0, 5.0, 1000.5]
    assert standardiser.deviation.tolist() == [2.0, 1.0, 0.5]  # what does not vary is only centred
    assert standardiser(read)[0].tolist() == [-1.0, 0.0, -1.0]
    again = Standardiser(3)
    assert standardiser.known and not again.known
    again.load_state_dict(standardiser.state_dict())
    assert again.known and torch.equal(again(read), standardiser(read))


def test_clusters_are_groups_of_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(4, 12)
    read = directions.repeat(20, 1) + 0.1 * torch.randn(80, 12, generator=generator)
    found = clusters(read * torch.rand(80, 1, generator=generator), 4, 0)
    assert sorted(found[:4].tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, found[:4].repeat(20))
    # Of few inputs no more than a quarter of them, and two.
    assert clusters(torch.ones(8, 3), 2, 0).tolist() == [0] * 8
    assert clusters(read[:20], 9, 0).max() == 4 and clusters(read[:3], 9, 0).unique().tolist() == [0, 1]


def test_weights_of_tasks_solve_the_ridge_regression_of_their_factors() -> None:
    """Against the normal equations with an intercept, for the factors that the weights themselves select."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(6, 20, generator=generator, dtype=torch.float64)
    tasks = torch.arange(6).repeat_interleave(torch.tensor([3, 5, 2, 8, 4, 4]))
    read = means[tasks] + 0.5 * torch.randn(len(tasks), 20, generator=generator, dtype=torch.float64)
    read = read - read.mean(dim=0)
    weight, bias = of_tasks(read, tasks, 8, 3, generator)
    chosen = (read @ weight.T + bias).topk(3).indices.sort().values
    wanted = torch.zeros(len(tasks), 8, dtype=torch.float64).scatter_(1, chosen, 1.0)
    ridge = 0.1 * read.square().sum(dim=1).mean()
    expected = torch.linalg.inv(read.T @ read + ridge * torch.eye(20)) @ read.T @ wanted
    torch.testing.assert_close(weight, expected.T)
    torch.testing.assert_close(bias, wanted.mean(dim=0))
    of_task = [{tuple(row) for row in chosen[tasks == task].tolist()} for task in range(6)]
    assert [len(each) for each in of_task] == [1] * 6 and len(set.union(*of_task)) > 1
    # Of instances that were not read.
    others = (means - means[tasks].mean(dim=0))[tasks]
    others = others + 0.5 * torch.randn(len(tasks), 20, generator=generator, dtype=torch.float64)
    assert torch.equal((others @ weight.T + bias).topk(3).indices.sort().values, chosen)


def test_tasks_share_three_quarters_of_their_factors_and_more_with_their_like() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(8, 40, generator=generator).repeat_interleave(2, dim=0)  # tasks come in pairs
    means = kinds + 0.5 * torch.randn(16, 40, generator=generator)
    means = means - means.mean(dim=0)
    tasks = torch.arange(16).repeat(4)
    alike: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(30):
        weight, bias = of_tasks(means[tasks], tasks, 16, 4, generator)
        used = torch.zeros(16, 16).scatter_(1, (means @ weight.T + bias).topk(4).indices, 1.0)
        shared = used @ used.T / 4
        for one in range(16):
            for other in range(one):
                alike[one // 2 == other // 2].append(shared[one, other].item())
    assert 0.65 < sum(alike[False]) / len(alike[False]) < 0.8
    assert sum(alike[True]) / len(alike[True]) > sum(alike[False]) / len(alike[False]) + 0.05


def tuner(model: PeftModel) -> Any:
    return model.base_model


def test_what_is_read_inside_is_what_counts(prompts) -> None:
    """Of pads nothing, of later passes nothing; the same inputs give the same again."""
    torch.manual_seed(0)
    model = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=8, **MECHANISMS["plus"])).eval()

    def calibrate(extra: int) -> list[torch.Tensor]:
        with tuner(model).calibrated():
            for side, rows in (("left", prompts[:2]), ("right", prompts[2:])):
                model(**batch(rows, side, extra))
        return [tensor.clone() for tensor in tuner(model).calibrated_tensors()]

    first = calibrate(extra=3)
    layer = next(module for module in model.modules() if isinstance(module, MixLoraLinear))
    assert len(first) == 14 * 4
    logits(model, batch(prompts))
    assert all(torch.equal(one, other) for one, other in zip(first, calibrate(extra=3), strict=True))
    for at, (one, other) in enumerate(zip(first, calibrate(extra=0), strict=True)):
        if at % 4 < 2:  # the statistics; clusters of so few inputs hang on a rounding
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    logits(model, batch(prompts))
    embedded = (
        model.get_base_model()
        .model.language_model.layers[0]
        .input_layernorm(model.get_input_embeddings()(torch.tensor(prompts[0][0])))
    )
    words = embedded[[0, *range(5, len(embedded))]].mean(dim=0)  # without the picture's four tokens
    assert tuner(model).context.collecting is None
    chosen = tuner(model).selections()
    read = layer.mixlora_standardiser["default"](words[None])
    logits(model, batch(prompts[:1]))
    expected = layer.mixlora_router_a["default"](read).topk(2).indices
    assert torch.equal(tuner(model).selections()[layer.name].index_a, expected)
    assert torch.equal(chosen[layer.name].index_a[:1], expected)


def test_without_statistics_it_is_refused(prompts, tmp_path) -> None:
    model = get_peft_model(build_llava(), MixLoraConfig(r=2, factors=8, normalize=True))
    model.save_pretrained(tmp_path)
    for without in (model, PeftModel.from_pretrained(build_llava(), tmp_path)):
        with pytest.raises(
            ValueError, match=r"layers\.0\.self_attn\.q_proj: normalize=True needs the statistics"
        ):
            without(**batch(prompts))
    too_few = pytest.raises(ValueError, match="statistics need two inputs at least, 1 were read")
    with too_few, tuner(model).calibrated():
        model(**batch(prompts[:1]))


def test_tasks_are_named_for_each_input(prompts) -> None:
    config = MixLoraConfig(r=2, factors=8, normalize=True, pool="text", router_init="tasks")
    model = get_peft_model(build_llava(), config).eval()
    for tasks, message in (
        (None, "router_init=tasks needs inputs of two tasks at least; tasks names 0"),
        (["a", "a", "a"], "two tasks at least; tasks names 1"),
        (["a", "b"], r"q_proj: tasks names 2 inputs, \d were read"),
    ):
        with pytest.raises(ValueError, match=message), tuner(model).calibrated(tasks=tasks):
            model(**batch(prompts))
    with tuner(model).calibrated(tasks=["a", "b", *["a"] * (len(prompts) - 2)]):
        model(**batch(prompts[:2]))
        model(**batch(prompts[2:]))
    logits(model, batch(prompts))
    chosen = [each.index_a.sort().values for each in tuner(model).selections().values()]
    assert all(torch.equal(each[0], each[2]) for each in chosen)
    assert any(not torch.equal(each[0], each[1]) for each in chosen)


def test_routers_of_tasks_depend_on_the_seed_and_the_layer(prompts) -> None:
    def routers(seed: int) -> list[torch.Tensor]:
        config = MixLoraConfig(r=2, factors=8, normalize=True, router_init="tasks")
        model = get_peft_model(build_llava(), config).eval()
        torch.manual_seed(seed)
        torch.rand(seed + 1)  # what is drawn before does not count
        with tuner(model).calibrated(tasks=["a", "b", *["a"] * (len(prompts) - 2)]):
            model(**batch(prompts))
        return [layer.mixlora_router_a["default"].bias for layer in tuner(model).decoder_layers().values()]

    first, again, other = routers(3), routers(3), routers(4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert sum(not torch.equal(one, two) for one, two in zip(first, other, strict=True)) > 7
    assert len({tuple(each.tolist()) for each in first}) > 7  # of fourteen layers


def test_they_are_saved_and_loaded(prompts, tmp_path) -> None:
    model = adapt(build_llava(), **MECHANISMS["plus"])
    inputs = batch(prompts)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build_llava(), tmp_path).eval(), inputs), expected)
    beside = get_peft_model(build_llava(), MixLoraConfig(r=3, factors=4)).eval()
    beside.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=True)
    beside.set_adapter("loaded")
    assert torch.equal(logits(beside, inputs), expected)
    beside.delete_adapter("loaded")
    assert not any("loaded" in name for name in beside.state_dict())


def test_a_block_selects_once(prompts) -> None:
    model = adapt(build_llava(), **MECHANISMS["block"])
    logits(model, batch(prompts))
    chosen = tuner(model).selections()
    by_block: dict[str, set[str]] = {}
    for name, selection in chosen.items():
        by_block.setdefault(name.split(".layers.")[1][0], set()).add(str(selection))
    assert [len(each) for each in by_block.values()] == [1, 1] and len(chosen) == 14
    assert len({next(iter(each)) for each in by_block.values()}) == 2
    routers = {name for name, _ in model.named_parameters() if "mixlora_router" in name}
    assert len(routers) == 2 and all(".self_attn.q_proj." in name for name in routers)


def test_an_adapter_that_takes_a_name_again_has_holders_of_its_own(prompts) -> None:
    model = adapt(build_llava(), **MECHANISMS["block"], target_modules=["q_proj", "up_proj"])
    model.add_adapter(
        "other", MixLoraConfig(**{**MECHANISMS["block"], "target_modules": ["q_proj", "up_proj"]})
    )
    model.delete_adapter("other")
    model.add_adapter("other", MixLoraConfig(**{**MECHANISMS["block"], "target_modules": ["up_proj"]}))
    model.set_adapter("other")
    logits(model, batch(prompts))
    assert all(name.endswith("up_proj") for name in tuner(model).selections("other"))


def test_a_block_whose_first_layer_comes_late_is_refused() -> None:
    model = build_llama()
    layer = model.model.layers[0]
    attention = layer.self_attn
    # Declared last, called first: q_proj holds no routers, the layer that does has not run.
    del layer.self_attn
    layer.self_attn = attention
    adapted = adapt(model, **MECHANISMS["block_hard"])
    with pytest.raises(
        ValueError, match=r"self_attn\.q_proj: per=block gives this layer .*gate_proj selects.*use per=layer"
    ):
        adapted(input_ids=torch.arange(4, 10)[None])


def test_pictures_of_the_config_or_of_the_adapter_are_left_out(prompts) -> None:
    model = adapt(build_llava(), **MECHANISMS["text"])
    assert model.peft_config["default"].picture_tokens == [3]
    inputs = batch(prompts)
    logits(model, inputs)
    seen = tuner(model).selections()
    first = next(iter(seen))
    logits(model, inputs | {"pixel_values": -inputs["pixel_values"]})
    # What a picture shows reaches the words behind it in the second block, but no word's embedding.
    assert torch.equal(tuner(model).selections()[first].index_a, seen[first].index_a)
    other = adapt(build_llava(), picture_tokens=[], pool="text")
    logits(other, inputs)
    assert not torch.equal(tuner(other).selections()[first].index_a, seen[first].index_a)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    with pytest.raises(ValueError, match="which tokens stand for pictures is known of input_ids alone"):
        model(**embedded)
    text = adapt(build_llama(), pool="text")
    text(inputs_embeds=text.get_input_embeddings()(torch.arange(4, 10)[None]))  # has no pictures


def test_only_numbered_names_have_blocks() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("second", nn.Linear(4, 4))
    adapted = get_peft_model(
        model, MixLoraConfig(r=2, factors=4, per="block", target_modules=["first", "second"])
    )
    assert sum("mixlora_router_a." in name for name, _ in adapted.named_parameters()) == 2
