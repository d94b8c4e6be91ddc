"""Generating: with and without cache, alone and in a padded batch, with beams: the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from method_models import IMAGE, MECHANISMS, NEW, PAD, batch, beside, generate
from torch import Tensor

from mixlora_cli.method.context import _threads


@contextmanager
def selections_of_each_pass(model: Any) -> Iterator[list[list[Tensor]]]:
    """Collects `index_a` and `index_b` that each layer used, pass by pass."""
    passes: list[list[Tensor]] = []
    layers = [layer for layer in model.modules() if hasattr(layer, "_chosen")]
    first = layers[0]

    def watch(layer: Any) -> None:
        plain = layer._chosen

        def noting(*given: Any) -> Any:
            chosen = plain(*given)
            selection = chosen.selection
            if layer is first:
                passes.append([])
            passes[-1] += [selection.index_a, selection.index_b]
            return chosen

        layer._chosen = noting

    for layer in layers:
        watch(layer)
    yield passes
    for layer in layers:
        del layer._chosen


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two passes selected the same in every layer."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("fields", [{}, {"pool": "prompt"}, *MECHANISMS.values()])
def test_cache_and_batch_change_no_token(make_model, prompts, fields) -> None:
    model = make_model(**fields)
    together = batch(prompts)
    cached = generate(model, together, use_cache=True)
    assert torch.equal(cached, generate(model, together, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) == 3
    for row, single in enumerate(prompts):
        for use_cache in (True, False):
            assert torch.equal(generate(model, batch([single]), use_cache=use_cache)[0], cached[row])
    assert torch.equal(generate(model, batch(prompts, extra=4)), cached)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_prompts_selection_stays_for_the_answer(make_model, prompts, use_cache) -> None:
    model = make_model()
    with selections_of_each_pass(model) as passes:
        generate(model, batch(prompts), use_cache=use_cache)
    assert len(passes) == NEW
    assert all(same(passes[0], later) for later in passes[1:])


def test_decode_step_routes_on_each_tokens_own_state(make_model, prompts) -> None:
    model = make_model(decode="step")
    with selections_of_each_pass(model) as passes:
        stepped = generate(model, batch(prompts))
    assert not any(same(passes[0], later) for later in passes[1:])
    # Each instance's own state: neighbours and padding still change nothing.
    for row, single in enumerate(prompts):
        assert torch.equal(generate(model, batch([single]))[0], stepped[row])
    assert not torch.equal(stepped, generate(make_model(), batch(prompts)))


@pytest.mark.parametrize("routing", ["instance", "task", "random"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_share_their_prompts_factors(make_model, prompts, routing, options) -> None:
    model = make_model(routing=routing)
    inputs = batch(prompts)
    if routing == "task":
        options = options | {
            "task_embeddings": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        }
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with selections_of_each_pass(model) as passes:
            answers.append(generate(model, inputs, use_cache=use_cache, **options))
        beams = options["num_beams"]
        for indices in passes:
            for index in indices:
                assert torch.equal(index, index[::beams].repeat_interleave(beams, dim=0))
    assert torch.equal(*answers)
    if routing == "instance":
        alone = generate(model, batch(prompts[1:2]), **options)
        returned = options.get("num_return_sequences", 1)
        assert torch.equal(alone, answers[0][returned : 2 * returned])


def test_sampled_sequences_of_one_prompt(make_model, prompts) -> None:
    model = make_model()
    inputs = batch(prompts)
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        tokens = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, use_cache=use_cache
        )
        answers.append(tokens)
    assert answers[0].shape[0] == 9
    assert torch.equal(*answers)


def test_a_static_cache_gives_the_same_tokens(make_model, prompts) -> None:
    model = make_model()
    inputs = batch(prompts)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, inputs))


def test_decoding_by_hand_with_interleaved_caches(make_model, prompts) -> None:
    """A pass that brings a cache keeps the selection of the pass that filled that very cache."""
    model = make_model()
    expected = [generate(model, batch([single]))[0] for single in prompts[:2]]
    streams = []
    with torch.no_grad():
        for single in prompts[:2]:
            inputs = beside(model, batch([single]))
            streams.append([inputs["attention_mask"], model(**inputs, use_cache=True), []])
        for _ in range(NEW):
            for stream in streams:
                mask, output, tokens = stream
                scores = output.logits[:, -1:].clone()
                scores[..., [PAD, IMAGE]] = -torch.inf  # as generate does
                token = scores.argmax(-1)
                tokens.append(token.item())
                stream[0] = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
                stream[1] = model(
                    input_ids=token, attention_mask=stream[0], past_key_values=output.past_key_values
                )
    assert [tokens for _, _, tokens in streams] == [tokens.tolist() for tokens in expected]


def test_a_new_prompt_is_read_anew(make_model, prompts) -> None:
    """Neither an earlier answer nor a forward pass in between leaves anything behind."""
    model = make_model()
    first = generate(model, batch(prompts[:1]))
    generate(model, batch(prompts[1:2]), use_cache=False)
    with torch.no_grad():
        model(**batch(prompts))
    assert torch.equal(generate(model, batch(prompts[:1])), first)
    assert _threads.own.frame is None and _threads.own.generation is None


def test_the_base_model_behind_the_adapter_generates_alike(make_model, prompts) -> None:
    model = make_model()
    inputs = batch(prompts)
    expected = generate(model, inputs, use_cache=True)
    assert torch.equal(generate(model.get_base_model(), inputs, use_cache=False), expected)


@pytest.mark.parametrize("decode", ["prefill", "step"])
def test_seeded_draws_are_an_instances_own(make_model, prompts, decode) -> None:
    """Neighbours, their order and beams change no draw; layers, sides and (under step) passes do."""
    model = make_model(routing="random", decode=decode)
    seeds = torch.tensor([11, 2**60 + 5, 987_654_321_987]) * 7919
    inputs = batch(prompts)
    answers = []
    for use_cache in (True, False):
        with selections_of_each_pass(model) as passes:
            answers.append(generate(model, inputs, use_cache=use_cache, routing_seeds=seeds))
        distinct = {tuple(map(tuple, index.tolist())) for each in passes for index in each}
        drawn = len(passes) if decode == "step" else 1
        assert len(distinct) > 0.9 * drawn * len(passes[0])
    # Without a cache, step reads the prompt again with each pass's factors.
    assert torch.equal(*answers) == (decode == "prefill")
    for row, single in enumerate(prompts):
        alone = generate(model, batch([single]), routing_seeds=seeds[row : row + 1])
        assert torch.equal(alone[0], answers[0][row])
    swapped = generate(model, batch(prompts[::-1]), routing_seeds=seeds.flip(0))
    assert torch.equal(swapped.flip(0), answers[0])
    assert not torch.equal(generate(model, inputs, routing_seeds=seeds + 1), answers[0])
    beams = generate(model, inputs, num_beams=3, routing_seeds=seeds)
    alone = generate(model, batch(prompts[1:2]), num_beams=3, routing_seeds=seeds[1:2])
    assert torch.equal(alone[0], beams[1])
    with pytest.raises(ValueError, match=r"routing_seeds=\(2,\): expected one for each instance, \(3,\)"):
        model(**beside(model, inputs), routing_seeds=seeds[:2])
