"""Passes that end early, run again, or belong to a model inside of something else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from method_models import (
    PAD,
    adapt,
    assert_same_choice,
    batch,
    build,
    build_llama,
    build_llava,
    generate,
    padded,
    prompt,
    texts,
)
from method_models import logits as read
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.context import _threads

DECODER = r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return read(model, inputs, use_cache=False, **options)


def logits_of_states(inner: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return inner(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_is_not_transformers_own_is_refused(use_reentrant: bool) -> None:
    """What it computes again in the backward pass knows nothing of the batch any more."""
    model = adapt(build_llama()).train()
    block = model.get_base_model().model.layers[1]
    plain = block.forward
    block.forward = lambda hidden, **rest: checkpoint(
        lambda states: plain(states, **rest), hidden, use_reentrant=use_reentrant
    )
    inputs = padded(texts(), "right")
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    with pytest.raises(ValueError, match=r"computes this layer again.*gradient_checkpointing_enable\(\)"):
        loss.backward()


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    model = adapt(build_llama())
    first, second = padded(texts(), "left"), padded(texts()[::-1], "right")
    expected = logits(model, second)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, first)
    with pytest.raises(KeyboardInterrupt):
        generate(model, first)
    handle.remove()
    assert torch.equal(logits(model, second), expected)
    # A part of the model that is called next is not taken for a part of the pass that ended.
    inner = model.get_base_model().model
    fresh = logits_of_states(inner, second)
    handle = inner.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, first)
    handle.remove()
    assert torch.equal(logits_of_states(inner, second), fresh)
    logits(model, second)
    assert _threads.own.frame is None and _threads.own.generation is None


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_loop_by_hand_goes_on_with_the_cache_that_it_gave(return_dict: bool) -> None:
    model = adapt(build_llama())
    inputs = padded(texts()[:1], "left")
    expected = generate(model, inputs)[0].tolist()
    cache, ids, mask, tokens = hf.DynamicCache(), inputs["input_ids"], inputs["attention_mask"], []
    with torch.no_grad():
        for _ in range(6):
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, return_dict=return_dict)
            scores = output.logits if return_dict else output[0]
            ids = scores[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones(1, 1).long()], dim=1)
            tokens.append(ids.item())
    assert tokens == expected


def test_a_cache_that_no_pass_of_this_model_filled_is_refused() -> None:
    """Rebuilt from tensors, say; and one from which rows were taken."""
    model = adapt(build_llama())
    inputs = padded(texts(), "left")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        rebuilt = hf.DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        token = torch.tensor([[5]] * 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], dim=1)
        with model.disable_adapter():
            plain = model(**inputs, use_cache=True).past_key_values
        for foreign in (rebuilt, plain):
            with pytest.raises(ValueError, match="a cache that no pass of this model with the adapter def"):
                model(input_ids=token, attention_mask=mask, past_key_values=foreign)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(
            ValueError, match="this pass has 1 rows, but the cache that it goes on with was filled by 3"
        ):
            model(input_ids=token[:1], attention_mask=mask[1:2], past_key_values=cache)


class Wrapper(nn.Module):
    """A module of somebody's own around a language model, which makes its arguments itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.llm = kind, build_llama()
        self.soft = nn.Parameter(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        if self.kind == "mask":
            inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
        if self.kind == "soft":
            rows = len(inputs["input_ids"])
            embedded = self.llm.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat([self.soft.expand(rows, -1, -1), embedded], dim=1)
            ones = torch.ones(rows, 3, dtype=torch.long)
            inputs["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], dim=1)
        return self.llm(**inputs, use_cache=False).logits


class TransformersWrapper(hf.PreTrainedModel):
    """The same as a model of transformers' kind."""

    config_class = hf.LlamaConfig
    _supports_sdpa = True
    forward = Wrapper.forward

    def __init__(self, kind: str) -> None:
        inner = build_llama()
        super().__init__(inner.config)
        self.kind, self.llm = kind, inner
        self.soft = nn.Parameter(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("wrapper", [Wrapper, TransformersWrapper])
@pytest.mark.parametrize("kind", ["mask", "soft", "dictionary"])
def test_the_transformers_models_own_arguments_count(wrapper: Any, kind: str) -> None:
    model = adapt(wrapper(kind), target_modules=DECODER)
    together = padded(texts(), "right")
    given = {"input_ids": together["input_ids"]} if kind == "mask" else together
    first = 3 if kind == "soft" else 0
    with torch.no_grad():
        found = model(given)
        for row, ids in enumerate(texts()):
            alone = model(padded([ids], "right"))[0]
            torch.testing.assert_close(found[row, : first + len(ids)], alone, rtol=1e-4, atol=1e-4)
        # A second text through the same wrapper is a pass of its own.
        other = model(padded(texts()[::-1], "right"))
    torch.testing.assert_close(other.flip(0)[0, : first + 5], found[0, : first + 5], rtol=1e-4, atol=1e-4)


def test_generate_of_an_inner_model_is_watched_too() -> None:
    inner = adapt(Wrapper("dictionary"), target_modules=DECODER).base_model.model.llm
    whole = adapt(build_llama(), target_modules=DECODER)
    ids = torch.tensor([texts()[1] * 2])
    expected = generate(whole, {"input_ids": ids})
    for options in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generate(inner, {"input_ids": ids}, **options), expected)
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        generate(inner, {"input_ids": ids}, prefill_chunk_size=4)


def test_a_copy_generates_with_its_own_adapter() -> None:
    model = adapt(build_llama())
    inputs = padded(texts(), "left")
    expected = generate(model, inputs)
    twin = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "factors_b" in name:
            parameter.data.neg_()
    assert torch.equal(generate(twin, inputs), expected)
    assert not torch.equal(generate(model, inputs), expected)
    assert vars(twin.get_base_model())["generate"].model is twin.get_base_model()


def test_a_layer_that_two_blocks_share_keeps_a_choice_for_each() -> None:
    for seed in range(4):
        base = build_llama(seed)
        base.model.layers[1].mlp = base.model.layers[0].mlp
        model = adapt(base)
        inputs = padded(texts(), "left")
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


def test_a_state_that_is_no_cache_ties_an_answer_together() -> None:
    base = build("rwkv")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.3)
    model = adapt(base)
    inputs = {"input_ids": torch.tensor([texts()[1]])}
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("equal_lengths", [True, False])
def test_two_models_joined_as_encoder_and_decoder(equal_lengths: bool) -> None:
    """Their own configurations do not say that they are halves."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "initializer_range": 0.3, "pad_token_id": PAD}
    encoder = hf.BertConfig(**sizes)
    decoder = hf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, PAD
    torch.manual_seed(0)
    model = adapt(hf.EncoderDecoderModel(config).eval())
    read = padded(texts(), "right")
    width = read["input_ids"].shape[1] if equal_lengths else 4
    written = torch.randint(4, 64, (3, width), generator=torch.Generator().manual_seed(1))
    together = logits(model, read, decoder_input_ids=written)
    chosen = model.base_model.selections()
    assert any("crossattention" in name for name in chosen)
    for row, ids in enumerate(texts()):
        alone = logits(model, padded([ids], "right"), decoder_input_ids=written[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
        assert_same_choice(chosen, row, model.base_model.selections())


def test_sounds_are_a_whispers_batch() -> None:
    model = adapt(build("whisper"))
    sounds = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(2))

    def answer(features: Tensor, **options: Any) -> list[list[int]]:
        return model.generate(input_features=features, max_new_tokens=5, do_sample=False, **options).tolist()

    together = answer(sounds)
    assert together == answer(sounds, use_cache=False)
    assert [answer(sounds[row : row + 1])[0] for row in range(3)] == together
    written = torch.tensor([[1, 9, 8]])
    whole = logits(model, {"input_features": sounds, "decoder_input_ids": written.expand(3, -1)})
    for row in range(3):
        alone = logits(model, {"input_features": sounds[row : row + 1], "decoder_input_ids": written})
        torch.testing.assert_close(whole[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["instance", "task"])
def test_a_model_of_pictures_alone(routing: str) -> None:
    """Each picture is an instance, and a task can be given to each."""
    model = adapt(build("vit"), target_modules=["query", "value", "q_proj", "v_proj"], routing=routing)
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    task = {"task_embeddings": torch.randn(3, 32)} if routing == "task" else {}
    with torch.no_grad():
        whole = model(pixel_values=pictures, **task).logits
        for row in range(3):
            own = {name: value[row : row + 1] for name, value in task.items()}
            alone = model(pixel_values=pictures[row : row + 1], **own).logits
            torch.testing.assert_close(whole[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_tower_called_by_itself_counts_its_pictures() -> None:
    model = adapt(build_llava(), target_modules=r".*vision_tower.*\.(q|v)_proj")
    inputs = batch([prompt(3, 0), prompt(5, 1)])
    logits(model, inputs)
    within = model.base_model.selections()
    with torch.no_grad():
        model.get_base_model().get_image_features(pixel_values=inputs["pixel_values"])
    for name, selection in model.base_model.selections().items():
        assert torch.equal(selection.index_a, within[name].index_a)


def test_models_that_read_tokens_first_are_refused() -> None:
    config = hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    with pytest.raises(
        ValueError, match=r"xlnet: this model's layers read \(tokens, rows, features\).*use LoRA"
    ):
        get_peft_model(hf.XLNetLMHeadModel(config), MixLoraConfig(target_modules=["layer_1"]))


def test_passes_keep_no_activation_alive() -> None:
    """Neither a cache nor the thread holds more of a pass than its choices."""
    import gc
    import weakref

    model = adapt(build("t5", "eager"))
    inputs = padded(texts(), "right")
    alive: list[weakref.ref[Tensor]] = []
    layer = model.get_base_model().encoder.block[1].layer[1].DenseReluDense.wo
    handle = layer.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    with torch.no_grad():
        output = model(**inputs, decoder_input_ids=torch.tensor([[1]] * 3), use_cache=True)
    handle.remove()
    cache = output.past_key_values
    del output
    gc.collect()
    assert alive[0]() is None and cache is not None and _threads.own.frame is None


def test_each_choice_of_a_multiple_choice_model_is_an_instance() -> None:
    """Its ids are (rows, choices, tokens), of which the model within reads one choice a row."""
    model = adapt(build("bert_choice"), target_modules=["query", "value"])
    choices = padded(texts() + texts()[:1], "right")
    together = {name: value.view(2, 2, -1) for name, value in choices.items()}
    with torch.no_grad():
        scores = model(**together).logits.flatten()
        for row in range(4):
            alone = {name: value[row].view(1, 1, -1) for name, value in choices.items()}
            torch.testing.assert_close(model(**alone).logits[0, 0], scores[row], rtol=1e-4, atol=1e-4)
            length = int(choices["attention_mask"][row].sum())
            unpadded = {name: value[..., :length] for name, value in alone.items()}
            torch.testing.assert_close(model(**unpadded).logits[0, 0], scores[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapper", [nn.Module, hf.PreTrainedModel])
def test_two_texts_in_one_pass_of_a_wrapper(wrapper: Any) -> None:
    """A contrastive model calls the language model twice, with masks of the same shape."""

    class Twice(wrapper):  # type: ignore[misc]
        _supports_sdpa = True

        def __init__(self) -> None:
            inner = build_llama()
            super().__init__(*([inner.config] if wrapper is hf.PreTrainedModel else []))
            self.llm = inner

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, other_ids: Tensor, other_mask: Tensor
        ) -> Any:
            one = self.llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return one, self.llm(input_ids=other_ids, attention_mask=other_mask, use_cache=False).logits

    model = adapt(Twice(), target_modules=DECODER)
    alone = adapt(build_llama(), target_modules=DECODER)
    one, other = padded(texts(), "right"), padded(texts()[::-1], "left")
    with torch.no_grad():
        found = model(*one.values(), *other.values())
    for inputs, logits_of in zip((one, other), found, strict=True):
        own = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits_of[own], logits(alone, inputs)[own], rtol=1e-4, atol=1e-4)
