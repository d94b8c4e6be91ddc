"""Models of many kinds: where they are adapted, whose tokens their layers read, and what cannot be adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from method_models import (
    PAD,
    adapt,
    adapted_layers,
    assert_close,
    assert_same_choice,
    build,
    build_llama,
    build_llava,
    generate,
    gradients,
    padded,
    prompt,
    texts,
)
from peft import get_peft_model
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig

ADAPTED = {
    # family: layers that are adapted by default
    "llama": 14,
    "opt": 12,
    "qwen2": 14,
    "gemma3": 14,
    "phi3": 8,
    "gpt_neox": 8,
    "bloom": 8,
    "mixtral": 8,
    "qwen2_moe": 16,
    "mamba": 2,
    "bamba": 11,
    "t5": 32,
    "bart": 32,
}


def eager(family: str) -> Any:
    return build(family, "eager")


@pytest.mark.parametrize("family", ADAPTED)
def test_each_family_has_default_targets_and_neighbours_change_nothing(family: str) -> None:
    model = adapt(eager(family))
    adapted = adapted_layers(model)
    assert len(adapted) == ADAPTED[family]
    assert not any("lm_head" in name or "embed" in name for name in adapted)
    two_halves = model.config.is_encoder_decoder
    decoder = {"decoder_input_ids": torch.tensor([[1, 7, 9]])} if two_halves else {}
    together = padded(texts(), "right")
    with torch.no_grad():
        logits = model(**together, **{key: ids.expand(3, -1) for key, ids in decoder.items()}).logits
        chosen = model.base_model.selections()
        assert set(chosen) == adapted
        for row, ids in enumerate(texts()):
            alone = model(input_ids=torch.tensor([ids]), **decoder).logits[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-3, atol=1e-3)
            assert_same_choice(chosen, row, model.base_model.selections())
    # Selections differ between the rows, else nothing above could fail.
    differing = [name for name, s in chosen.items() if len({tuple(row) for row in s.index_a.tolist()}) == 3]
    assert len(differing) >= len(adapted) / 4


@pytest.mark.parametrize("family", [*ADAPTED, "deepseek_v3"])
def test_each_family_generates_with_and_without_cache_alone_and_in_a_batch(family: str) -> None:
    """DeepSeek's latent attention reads cached tokens again."""
    model = adapt(build(family) if family == "deepseek_v3" else eager(family))
    side = "right" if family == "bart" else "left"
    together = padded(texts(), side)
    cached = generate(model, together)
    assert torch.equal(generate(model, together, use_cache=False), cached)
    for row, ids in enumerate(texts()):
        assert torch.equal(generate(model, padded([ids], side))[0], cached[row])
    with model.disable_adapter():
        assert not torch.equal(generate(model, together), cached)


def test_layers_that_read_tokens_in_one_list_train_as_if_their_rows_were_apart() -> None:
    """OPT's fc1 gets (B * S, d): the gradients of a batch are the sum of its rows'."""
    model = adapt(eager("opt"), router_grad="straight_through").train()
    rows = texts()

    def learn(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = model(**inputs).logits.log_softmax(-1)[..., 7]
        (scores * inputs["attention_mask"]).sum().backward()
        return gradients(model)

    found = learn(padded(rows, "right"))
    expected: dict[str, Tensor] = {}
    for ids in rows:
        for name, gradient in learn(padded([ids], "right")).items():
            expected[name] = expected.get(name, 0) + gradient
    assert any("fc1" in name for name in found)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def with_pictures(num: int) -> dict[str, Tensor]:
    """One row with that many pictures of 4 x 4 patches (4 tokens each)."""
    ids = [1, *[2, 3, 3, 3, 3] * num, *range(10, 17)]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[int(token == 3) for token in ids]]),
        "pixel_values": torch.randn(16 * num, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * num),
    }


def test_the_default_of_a_vision_language_model_leaves_tower_and_projector_alone() -> None:
    model = adapt(build("qwen2_5_vl"))
    adapted = adapted_layers(model)
    assert len(adapted) == 14 and all(".language_model.layers." in name for name in adapted)
    answers = [generate(model, with_pictures(2), use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*answers)
    config = adapt(build_llava()).peft_config["default"]
    assert "vision_tower" not in config.target_modules and "projector" not in config.target_modules


def test_a_tower_whose_layers_read_all_pictures_in_one_list_is_refused_by_name() -> None:
    """Of 16 patches nobody knows which picture they belong to; also where the text has as many tokens by chance."""
    model = adapt(build("qwen2_5_vl"), target_modules=["qkv"])
    for inputs in (with_pictures(1), with_pictures(2)):
        with pytest.raises(
            ValueError, match=r"model\.visual\.blocks\.0\.attn\.qkv: this layer reads \(\d+, 32\)"
        ):
            model(**inputs)
    text = torch.arange(10, 26).unsqueeze(0)
    picture = with_pictures(1)
    assert text.shape[1] == len(picture["pixel_values"])


def test_a_layer_of_the_text_model_that_reads_other_tokens_is_refused_by_name() -> None:
    class Half(nn.Module):
        """Reads every second token."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, hidden: Tensor) -> Tensor:
            hidden[:, ::2] = self.inner(hidden[:, ::2])
            return hidden

    base = build_llama()
    mlp = base.model.layers[1].mlp
    base.model.layers[1].mlp = nn.Sequential(mlp, Half())
    model = adapt(base, target_modules=["inner"])
    with pytest.raises(
        ValueError,
        match=r"mlp\.1\.inner: this layer reads \(2, 3, 32\) where the pass has 2 x 6 tokens.*layers\\\.\\d\+\\\.mlp",
    ):
        model(input_ids=torch.randint(4, 64, (2, 6)))


def test_the_output_layer_is_refused_where_routers_read_it() -> None:
    for targets in (["q_proj", "lm_head"], "all-linear"):
        config = MixLoraConfig(r=2, factors=4, target_modules=targets)
        if targets == "all-linear":
            get_peft_model(build_llama(), config)  # PEFT leaves the output layer out
            continue
        with pytest.raises(ValueError, match="lm_head is the output layer, which reads only the tokens"):
            get_peft_model(build_llama(), config)
    model = adapt(build_llama(), target_modules=["q_proj", "lm_head"], routing="task")
    ids, task = torch.randint(4, 64, (2, 6)), torch.randn(2, 32)
    with torch.no_grad():
        whole = model(input_ids=ids, task_embeddings=task).logits[:, -1]
        last = model(input_ids=ids, task_embeddings=task, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(whole, last)


@pytest.mark.parametrize("name", ["out_proj", "x_proj", "dt_proj"])
def test_layers_past_which_kernels_read_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"mixer.{name} belongs to a state-space layer"):
        adapt(eager("mamba"), target_modules=[name])


def test_a_model_of_two_halves_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="pool=prompt: all that the decoder"):
        adapt(eager("t5"), pool="prompt")
    model = adapt(eager("t5"))
    with pytest.raises(ValueError, match="assisted decoding of an encoder-decoder model"):
        generate(model, padded(texts()[:1], "right"), prompt_lookup_num_tokens=3)


def test_cross_attention_counts_the_encoders_tokens_even_if_there_are_as_many() -> None:
    """The two halves' masks are told apart by what a layer reads, not by their shape."""
    model = adapt(eager("t5"), router_grad="straight_through").train()
    rows = texts()[:2]
    encoder = padded(rows, "right")
    width = encoder["input_ids"].shape[1]
    decoder = torch.randint(4, 64, (2, width), generator=torch.Generator().manual_seed(1))
    whole = model(**encoder, decoder_input_ids=decoder).logits
    for row, ids in enumerate(rows):
        alone = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder[row : row + 1]).logits
        torch.testing.assert_close(whole[row], alone[0], rtol=1e-3, atol=1e-3)
    whole[..., 7].mean().backward()
    plain = gradients(model)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(**encoder, decoder_input_ids=decoder, use_cache=False).logits[..., 7].mean().backward()
        assert_close(gradients(model), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_labels_of_whole_sequences(pool: str) -> None:
    """A classifier's labels (B,) say nothing about tokens: pool=all needs none, pool=prompt says what it lacks."""
    config = MixLoraConfig(task_type="SEQ_CLS", r=2, factors=4, pool=pool)
    model = get_peft_model(build("llama_classifier"), config).train()
    inputs = padded(texts(), "right") | {"labels": torch.tensor([0, 2, 1])}
    if pool == "prompt":
        with pytest.raises(ValueError, match="pool=prompt: training has to know the prompt"):
            model(**inputs)
        return
    model(**inputs).loss.backward()
    learned = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert sum("factors_b" in name for name in learned) == 14 and any("score" in name for name in learned)


def test_an_answer_at_the_end_is_known_by_a_completion_mask_or_the_logits_kept() -> None:
    """What reinforcement learning brings along stands in for labels."""
    model = adapt(build_llama(), pool="prompt").train()
    ids = torch.randint(4, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    chosen = []
    for known in (
        {"labels": labels},
        {"completion_mask": torch.ones(2, 4)},
        {"completion_mask": (labels != -100).long()},
        {"logits_to_keep": 5},
        {"prompt_mask": labels == -100},
    ):
        model(input_ids=ids, **known)
        chosen.append(model.base_model.selections())
    for other in chosen[1:]:
        for name, selection in chosen[0].items():
            assert torch.equal(selection.index_a, other[name].index_a)
    with torch.no_grad():
        model.eval()(input_ids=ids[:, :6])
    for name, selection in model.base_model.selections().items():
        assert torch.equal(selection.index_a, chosen[0][name].index_a)
    with pytest.raises(ValueError, match=r"completion_mask has shape \(2, 12\)"):
        model(input_ids=ids, completion_mask=torch.ones(2, 12))


def test_layers_to_transform_counts_blocks_as_lora_does() -> None:
    def adapted(**fields: Any) -> set[str]:
        return adapted_layers(get_peft_model(build_llama(), MixLoraConfig(r=2, factors=4, **fields)))

    second = {name for name in adapted() if ".layers.1." in name}
    assert len(second) == 7
    assert adapted(layers_to_transform=[1]) == second
    assert adapted(layers_to_transform=1, layers_pattern="layers") == second
    assert adapted(layers_to_transform=[1], target_modules=["q_proj"]) == {"model.layers.1.self_attn.q_proj"}
    for fields, message in (
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*cannot be had: r of E factors"),
        ({"layers_pattern": "layers"}, "layers_pattern=layers: goes with layers_to_transform"),
        (
            {"layers_to_transform": [1], "target_modules": ".*q_proj"},
            "layers_to_transform=.*a list of target_modules",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MixLoraConfig(**fields)


def test_init_weights_false_starts_with_an_update() -> None:
    base = nn.Sequential(nn.Linear(400, 3000))
    model = get_peft_model(base, MixLoraConfig(r=4, factors=8, target_modules=["0"], init_weights=False))
    values = model.base_model.model[0].mixlora_factors_b["default"].weight
    assert 0.99 * 0.5 < values.abs().max() <= 0.5  # a linear layer of four inputs
    assert values.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_routers_with_large_weights_do_not_tie() -> None:
    """Where probabilities are rounded to the same number the logits still differ: A always, B without CFS."""
    layer = get_peft_model(
        nn.Sequential(nn.Linear(4, 3)), MixLoraConfig(r=3, factors=5, cfs="none", target_modules=["0"])
    ).base_model.model[0]
    logits = torch.tensor([0.0, 300.0, 100.0, 200.0, 250.0])  # softmax: 0, 1, 0, 0, 0
    with torch.no_grad():
        for router in (layer.mixlora_router_a, layer.mixlora_router_b):
            router["default"].weight.copy_(logits.unsqueeze(1) * torch.tensor([1.0, 0, 0, 0]))
        layer(torch.tensor([[1.0, 0, 0, 0]]))
    chosen = layer.last_selection["default"]
    assert chosen.index_a.tolist() == chosen.index_b.tolist() == [[1, 4, 3]]


def test_a_mask_that_does_not_say_where_padding_is_is_refused() -> None:
    model = adapt(build_llama())
    ids = torch.randint(4, 64, (1, 6))
    with pytest.raises(ValueError, match="attention_mask is a str, which does not say where padding is"):
        model(input_ids=ids, attention_mask="causal")


def test_a_picture_of_each_row_is_an_instance_of_a_towers_layers() -> None:
    """What a tower reads is not the batch: neither tasks nor seeds can be given to its rows."""
    inputs = {"input_ids": torch.tensor([prompt(3, 0)[0]]), "pixel_values": prompt(3, 0)[1]}
    targets = r".*vision_tower.*\.q_proj"
    task = adapt(build_llava(), target_modules=targets, routing="task")
    with pytest.raises(ValueError, match="q_proj: this layer's rows are not those of the batch"):
        task(**inputs, task_embeddings=torch.randn(1, 32))
    chance = adapt(build_llava(), target_modules=targets, routing="random")
    chance(**inputs)
    with pytest.raises(ValueError, match="q_proj: this layer's rows are not those of the batch"):
        chance(**inputs, routing_seeds=torch.tensor([1]))


def test_a_prompt_without_tokens_is_refused() -> None:
    """Its mean is nothing: every text would get the same factors."""
    model = adapt(build_llama(), pool="prompt").train()
    ids = torch.randint(4, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    with pytest.raises(ValueError, match=r"pool=prompt: instances \[1\] of the batch have no prompt"):
        model(input_ids=ids, labels=labels)
    positions = torch.arange(8).repeat(2, 1)
    positions[0, 4:] -= 4
    with pytest.raises(ValueError, match=r"instances \[1, 2\] of the batch have no prompt"):
        model(input_ids=ids, labels=labels, position_ids=positions)
    model(input_ids=ids[:1], labels=labels[:1])


def test_padding_that_is_counted_in_samples_is_refused() -> None:
    """A model of sounds reads frames; which of them are padding its mask does not say."""
    model = adapt(build("wav2vec2"), target_modules=["q_proj", "v_proj"])
    sounds = torch.randn(2, 80)
    mask = torch.ones(2, 80, dtype=torch.long)
    model(input_values=sounds, attention_mask=mask)
    mask[1, 40:] = 0
    with pytest.raises(ValueError, match="attention_mask is about samples, of which the layers read frames"):
        model(input_values=sounds, attention_mask=mask)


def test_label_smoothing_of_the_trainer(tmp_path: Any) -> None:
    """It takes the labels away before the model sees them: pool=all needs none, pool=prompt says what it lacks."""
    texts_of = [
        {"input_ids": ids + [PAD] * (9 - len(ids)), "labels": [-100] * 3 + ids[3:] + [-100] * (9 - len(ids))}
        for ids in texts()
    ]
    arguments = hf.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    model = adapt(build_llama())
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    found = hf.Trainer(model, arguments, train_dataset=texts_of).train()
    assert found.training_loss > 0
    assert all(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if "factors_b" in name
    )
    with pytest.raises(ValueError, match=r"label smoothing takes the labels away: use pool=all"):
        hf.Trainer(adapt(build_llama(), pool="prompt"), arguments, train_dataset=texts_of).train()
