"""What an instance gets depends on nothing but the instance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import MECHANISMS, assert_same_choice, batch, logits, prompt
from torch import Tensor

from mixlora_cli.method.context import _threads
from mixlora_cli.method.forward_info import read_inputs


def run(model: Any, inputs: dict[str, Tensor], **extra: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and, by layer, the selections of both sides (B, 2, r)."""
    scores = logits(model, inputs, **extra)
    chosen = selections(model)
    assert len(chosen) == 14
    return scores, chosen


def selections(model: Any) -> dict[str, Tensor]:
    """By layer (B, 2, r)."""
    return {
        name: torch.stack([selection.index_a, selection.index_b], dim=1)
        for name, selection in model.base_model.selections().items()
    }


def own(logits: Tensor, mask: Tensor, row: int) -> Tensor:
    return logits[row][mask[row].bool()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("fields", [{}, {"pool": "prompt"}, *MECHANISMS.values()])
def test_padding_and_neighbours_change_nothing(make_model, prompts, side, extra, fields) -> None:
    model = make_model(**fields)
    together = batch(prompts, side, extra)
    logits, chosen = run(model, together)
    for row, single in enumerate(prompts):
        alone_logits, alone = run(model, batch([single]))
        for name, selection in chosen.items():
            assert torch.equal(selection[row], alone[name][0]), name
        torch.testing.assert_close(
            own(logits, together["attention_mask"], row), alone_logits[0], rtol=1e-4, atol=1e-4
        )


def test_batch_order_changes_nothing(make_model, prompts) -> None:
    model = make_model()
    logits, chosen = run(model, batch(prompts))
    swapped_logits, swapped = run(model, batch(prompts[::-1]))
    torch.testing.assert_close(swapped_logits.flip(0), logits, rtol=1e-4, atol=1e-4)
    for name, selection in chosen.items():
        assert torch.equal(swapped[name].flip(0), selection)


def test_instances_differ_and_their_selection_matters(make_model, prompts) -> None:
    """Otherwise the tests above would pass whatever the code did."""
    model = make_model()
    inputs = batch(prompts)
    logits, chosen = run(model, inputs)
    differing = sum(not torch.equal(s[0], s[1]) and not torch.equal(s[0], s[2]) for s in chosen.values())
    assert differing >= 10
    blind = {key: value for key, value in inputs.items() if key != "attention_mask"}
    _, padded = run(model, blind)
    assert any(not torch.equal(padded[name], chosen[name]) for name in chosen)
    for layer in model.modules():
        if hasattr(layer, "mixlora_router_a"):
            layer.mixlora_router_a["default"].weight.data.neg_()
    other, _ = run(model, inputs)
    assert (other - logits).abs().max() > 0.1


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_answer_tokens_count_for_pool_all_only(make_model, pool) -> None:
    model = make_model(pool=pool).train()
    ids, image = prompt(6, seed=1)
    rows = torch.tensor([[*ids, 10, 11, 12], [*ids, 50, 51, 52]])
    labels = rows.clone()
    labels[:, : len(ids)] = -100
    inputs = {"input_ids": rows, "pixel_values": image.repeat(2, 1, 1, 1), "labels": labels}
    _, chosen = run(model, inputs)
    same = all(torch.equal(selection[0], selection[1]) for selection in chosen.values())
    assert same == (pool == "prompt")
    if pool == "prompt":
        # The same tokens without their answer, as at inference.
        _, alone = run(model.eval(), {"input_ids": rows[:1, : len(ids)], "pixel_values": image})
        assert all(torch.equal(alone[name][0], chosen[name][0]) for name in chosen)
        # And the mask given directly, as by a trainer that computes the loss itself.
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        _, masked = run(model, unlabelled, prompt_mask=labels == -100)
        assert all(torch.equal(masked[name], chosen[name]) for name in chosen)


def test_pool_prompt_refuses_to_train_without_knowing_the_prompt(make_model, prompts) -> None:
    model = make_model(pool="prompt").train()
    with pytest.raises(ValueError, match="pass labels or prompt_mask"):
        model(**batch(prompts))
    with pytest.raises(ValueError, match=r"shape \(3, 2\): expected one entry for each token, \(3, 13\)"):
        model(**batch(prompts), prompt_mask=torch.ones(3, 2))
    # A pass that failed leaves no trace.
    assert _threads.own.frame is None
    run(model.eval(), batch(prompts))


def test_task_routing_follows_the_embedding_alone(make_model, prompts) -> None:
    model = make_model(routing="task")
    task = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    inputs = batch(prompts)
    _, chosen = run(model, inputs, task_embeddings=task[[0, 1, 0]])
    for selection in chosen.values():
        assert torch.equal(selection[0], selection[2])
    assert any(not torch.equal(selection[0], selection[1]) for selection in chosen.values())
    _, alone = run(model, batch(prompts[1:2]), task_embeddings=task[:1])
    assert all(torch.equal(alone[name][0], chosen[name][0]) for name in chosen)
    with pytest.raises(ValueError, match="needs one embedding for each instance"):
        model(**inputs)


def test_random_routing_repeats_with_the_seed_and_is_distinct(make_model, prompts) -> None:
    model = make_model(routing="random")
    assert not any("router" in name for name, _ in model.named_parameters())
    inputs = batch(prompts)
    torch.manual_seed(7)
    first, chosen = run(model, inputs)
    second, other = run(model, inputs)
    torch.manual_seed(7)
    again, repeated = run(model, inputs)
    assert torch.equal(first, again) and not torch.equal(first, second)
    for name, selection in chosen.items():
        assert torch.equal(selection, repeated[name])
        assert (selection[..., 0] != selection[..., 1]).all()
    assert any(not torch.equal(chosen[name], other[name]) for name in chosen)


def test_inner_models_called_directly_read_the_mask_too(make_model, prompts) -> None:
    """Training code may run the language model itself."""
    model = make_model()
    inputs = batch(prompts, extra=3)
    _, chosen = run(model, inputs)
    with torch.no_grad():
        model.get_base_model().model(**inputs)
    assert all(torch.equal(selection, chosen[name]) for name, selection in selections(model).items())


def test_arguments_may_be_positional_and_masks_four_dimensional(make_model, prompts) -> None:
    model = make_model()
    inputs = batch(prompts, extra=3)
    _, chosen = run(model, inputs)
    base, mask = model.get_base_model(), inputs["attention_mask"].bool()
    length = mask.shape[1]
    causal = torch.ones(length, length).tril().bool() & mask[:, None, None, :]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert torch.equal(read_inputs({"input_ids": inputs["input_ids"], "attention_mask": causal}).tokens, mask)
    for given in (inputs["attention_mask"], additive):
        with torch.no_grad():
            base(inputs["input_ids"], inputs["pixel_values"], given)
        assert all(torch.equal(selection, chosen[name]) for name, selection in selections(model).items())


def test_layers_outside_the_language_model_count_all_their_tokens(make_model, prompts) -> None:
    model = make_model(target_modules=r".*vision_tower.*\.(q|k|v)_proj")
    logits(model, batch(prompts))
    chosen = model.base_model.selections()
    assert len(chosen) == 6
    logits(model, batch(prompts[1:2], extra=4))
    assert_same_choice(chosen, 1, model.base_model.selections())
