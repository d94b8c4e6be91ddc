"""`generate` where its first pass is not simply the prompt: equal to plain greedy decoding, or refused in one line."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from method_models import PAD, adapt, build_llama, build_llava
from test_generation import same, selections_of_each_pass
from torch import Tensor

NEW = 12


def prompt(length: int = 9, seed: int = 0) -> Tensor:
    """A prompt that repeats itself, so that looking up its own continuation finds something."""
    part = torch.randint(4, 64, (1, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([part, part, part[:, :3]], dim=1)


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(
        input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=NEW, do_sample=False, **options
    )


@pytest.fixture
def model() -> Any:
    return adapt(build_llama())


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_prompt_lookup_equals_greedy(pool: str) -> None:
    model = adapt(build_llama(), pool=pool)
    base = model.get_base_model()
    read: list[int] = []
    base.model.register_forward_pre_hook(
        lambda _, __, given: read.append(
            given["inputs_embeds" if given.get("input_ids") is None else "input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    for seed in range(4):
        ids = prompt(seed=seed)
        read.clear()
        with selections_of_each_pass(model) as passes:
            looked_up = greedy(model, ids, prompt_lookup_num_tokens=4)
        assert read[0] > ids.shape[1], "the first pass did not read any guess"
        with selections_of_each_pass(model) as plain:
            assert torch.equal(looked_up, greedy(model, ids))
        assert all(same(each, plain[0]) for each in passes)


@pytest.mark.parametrize("assistant", ["adapted", "plain", "itself"])
def test_assisted_decoding_equals_greedy(model: Any, assistant: str) -> None:
    helper = {
        "adapted": lambda: adapt(build_llama(seed=3)),
        "plain": lambda: build_llama(),
        "itself": lambda: copy.deepcopy(model),
    }[assistant]()
    own = helper if assistant == "plain" else helper.get_base_model()
    own.generation_config.num_assistant_tokens, own.generation_config.assistant_confidence_threshold = 10, 0
    for seed in range(3):
        ids = prompt(seed=seed)[:, :6]
        ids[:, :2] = PAD
        with selections_of_each_pass(model) as passes:
            assisted = greedy(model, ids, assistant_model=helper)
        with selections_of_each_pass(model) as plain:
            assert torch.equal(assisted, greedy(model, ids))
        # Guesses are many and of one kind, so a choice that counted them would be another.
        assert all(same(each, plain[0]) for each in passes)


def test_an_early_exit_as_the_assistant_equals_greedy(model: Any) -> None:
    ids = prompt()
    assert torch.equal(greedy(model, ids, assistant_early_exit=1), greedy(model, ids))


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_reads_a_second_prompt_and_keeps_both_apart(model: Any, use_cache: bool) -> None:
    """Classifier-free guidance runs the model on another prompt between the passes of the first."""
    ids, negative = prompt(), prompt(seed=5)[:, :7]
    with selections_of_each_pass(model) as passes:
        guided = greedy(model, ids, guidance_scale=1.7, negative_prompt_ids=negative, use_cache=use_cache)
    assert len(passes) == 2 * NEW
    for first, kind in ((passes[0], passes[0::2]), (passes[1], passes[1::2])):
        assert all(same(first, each) for each in kind)
    assert not same(passes[0], passes[1])
    assert torch.equal(
        guided, greedy(model, ids, guidance_scale=1.7, negative_prompt_ids=negative, use_cache=not use_cache)
    )


def test_a_prompt_in_chunks_is_refused_where_routers_read_it(model: Any) -> None:
    ids = prompt()
    with pytest.raises(
        ValueError, match=r"the first 6 of the prompt's 21 tokens by themselves.*leave prefill_chunk_size out"
    ):
        greedy(model, ids, prefill_chunk_size=6)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=64), greedy(model, ids))
    with model.disable_adapter():
        assert torch.equal(greedy(model, ids, prefill_chunk_size=6), greedy(model, ids))
    routed_by_task = adapt(build_llama(), routing="task")
    task = {"task_embeddings": torch.randn(1, 32)}
    assert torch.equal(
        greedy(routed_by_task, ids, prefill_chunk_size=6, **task), greedy(routed_by_task, ids, **task)
    )
    by_chance = adapt(build_llama(), routing="random")
    seeds = {"routing_seeds": torch.tensor([77])}
    assert torch.equal(greedy(by_chance, ids, prefill_chunk_size=6, **seeds), greedy(by_chance, ids, **seeds))


def test_a_cache_that_is_brought_along_is_refused_where_routers_read_the_prompt(model: Any) -> None:
    """Of a prefix that prompts share, or of the turn before."""
    ids = prompt()
    with torch.no_grad():
        prefix = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    message = "given past_key_values that hold tokens already.*without past_key_values"
    with pytest.raises(ValueError, match=message):
        greedy(model, ids, past_key_values=copy.deepcopy(prefix))
    turn = greedy(model, ids, return_dict_in_generate=True)
    second = torch.cat([turn.sequences, ids[:, :4]], dim=1)
    with pytest.raises(ValueError, match=message):
        greedy(model, second, past_key_values=turn.past_key_values)
    routed_by_task = adapt(build_llama(), routing="task")
    task = {"task_embeddings": torch.randn(1, 32)}
    with torch.no_grad():
        prefix = routed_by_task(input_ids=ids[:, :8], use_cache=True, **task).past_key_values
    assert torch.equal(
        greedy(routed_by_task, ids, past_key_values=prefix, **task), greedy(routed_by_task, ids, **task)
    )


def test_an_emptied_cache_is_as_good_as_none(model: Any) -> None:
    from transformers import StaticCache

    cache = StaticCache(config=model.get_base_model().config, max_cache_len=64)
    for seed in range(2):
        ids = prompt(seed=seed)
        assert torch.equal(greedy(model, ids, past_key_values=cache), greedy(model, ids))
        cache.reset()


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="continuous batching reads parts of many requests"):
        model.generate_batch(inputs=[prompt()[0].tolist()])
    with pytest.raises(ValueError, match="continuous batching reads parts of many requests"):
        model(input_ids=prompt(), write_index=[torch.zeros(1)])
    base = model.unload()
    assert "init_continuous_batching" not in vars(base)


@pytest.mark.parametrize("routing", ["instance", "random"])
def test_threads_do_not_see_each_other(routing: str) -> None:
    """Each thread's answers are those of that prompt alone, whatever runs beside it."""
    model = adapt(build_llama(), routing=routing)
    prompts = [prompt(length=4 + i % 5, seed=i) for i in range(12)]
    seeds = [
        {"routing_seeds": torch.tensor([i * 2**40 + 9])} if routing == "random" else {} for i in range(12)
    ]
    expected = [greedy(model, ids, **own) for ids, own in zip(prompts, seeds, strict=True)]
    assert len({tuple(row[0, -NEW:].tolist()) for row in expected}) >= 10
    found: dict[int, Tensor] = {}
    start = threading.Barrier(3)

    def answer(mine: range) -> None:
        start.wait()
        for i in mine:
            found[i] = greedy(model, prompts[i], use_cache=i % 2 == 0, **seeds[i])

    threads = [threading.Thread(target=answer, args=(range(k, 12, 3),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(found[i], expected[i]) for i in range(12)] == [True] * 12


def test_a_training_pass_beside_generation(model: Any) -> None:
    """Between the tokens of an answer another thread reads with gradients."""
    ids = prompt()
    expected = greedy(model, ids)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            model(input_ids=prompt(seed=8), labels=prompt(seed=8)).loss.backward()

    other = threading.Thread(target=train)
    other.start()
    try:
        answers = [greedy(model, ids) for _ in range(5)]
    finally:
        stop.set()
        other.join()
    assert all(torch.equal(answer, expected) for answer in answers)


def test_reinforcement_learning_is_warned_of_pool_all(recwarn: pytest.WarningsRecorder) -> None:
    """Sampled without the answer, trained with it: other factors, other probabilities."""
    ids = prompt()
    for pool, warned in (("all", True), ("prompt", False)):
        model = adapt(build_llama(), pool=pool)
        sequence = greedy(model, ids)
        sampled = model.generate(
            input_ids=ids,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        recwarn.clear()
        trained = model.train()(input_ids=sequence, logits_to_keep=NEW + 1, use_cache=False).logits[0, :-1]
        told = [w for w in recwarn if "use MixLoraConfig(pool='prompt')" in str(w.message)]
        assert len(told) == warned
        difference = (trained.log_softmax(-1) - torch.cat(sampled.logits).log_softmax(-1)).abs().max()
        assert (difference < 1e-4) == (pool == "prompt")


def test_a_picture_model_answers_with_prompt_lookup_as_greedily(prompts: Any) -> None:
    model = adapt(build_llava())
    ids, image = prompts[1]
    inputs = {
        "input_ids": torch.tensor([[*ids, *ids[5:]]]),
        "attention_mask": torch.ones(1, len(ids) + len(ids[5:])).long(),
        "pixel_values": image,
    }
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(
        model.generate(**inputs, **options, prompt_lookup_num_tokens=3), model.generate(**inputs, **options)
    )
