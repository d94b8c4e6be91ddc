"""The real small model as everybody gets it: assembled from packages and the shipped stage-one weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaProcessor

from mixlora_cli.config import AdapterConfig, ModelConfig, RoutingConfig
from mixlora_cli.data.template import Turn
from mixlora_cli.models.adapters import attach_adapter, num_parameters
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.paths import cache_root
from mixlora_cli.prepare.align.run import check_questions, draw


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return build_base(ModelConfig(name="mini", source="mini", chat_template="smollm"))


def test_every_weight_is_frozen_and_the_picture_is_25_tokens(base: LoadedModel) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert len(base.chat.picture_tokens) == 25
    assert base.tokenizer.convert_tokens_to_ids("<image>") == base.chat.image_token_ids[0]
    assert base.tokenizer.encode("<image>", add_special_tokens=False) == [base.chat.image_token_ids[0]]


def test_our_template_is_the_processors_chat_template(base: LoadedModel) -> None:
    folder = next(
        path for path in cache_root().glob("mini-base-*") if path.name.endswith(base.fingerprint[:16])
    )
    processor = LlavaProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "a cat")]
    assert prompt == base.chat.segments(turns, with_answer=False)[0].text


def test_it_answers_short_questions_about_pictures_that_stage_one_never_saw(
    base: LoadedModel, tmp_path: Path
) -> None:
    """A quick sample of what it was taught well; the full check is what `mixlora align` ends with."""
    check = check_questions(base, draw(60, "align/heldout"), tmp_path)
    learned = ("presence", "form", "next to", "from list", "at place", "colour")
    asked = sum(check["asked"].get(kind, 0) for kind in learned)
    assert sum(check["asked"].values()) > 50 and asked > 20
    assert sum(check["right"].get(kind, 0) for kind in learned) / asked >= 0.65  # by chance: below 0.3


def test_adapter_sizes_are_what_the_shapes_say(base: LoadedModel) -> None:
    """LoRA r=4: r (d_in + d_out) for each linear layer; 30 layers of width 576, 3 of 9 key-value heads, MLP 1536."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    lora = attach_adapter(
        base.model, AdapterConfig(name="lora"), RoutingConfig(name="instance"), rank=4, factors=16
    )
    assert num_parameters(lora)[0] == 30 * sum(4 * (d_in + d_out) for d_in, d_out in shapes)
    plain = lora.unload()
    mixlora = attach_adapter(
        plain, AdapterConfig(name="mixlora"), RoutingConfig(name="instance"), rank=4, factors=16
    )
    # Pools E (d_in + d_out); with router_grad=none the routers keep their first values: E d_in twice, W_AB r d_in E.
    pools = 30 * sum(16 * (d_in + d_out) for d_in, d_out in shapes)
    routers = 30 * sum(2 * 16 * d_in + 4 * d_in * 16 for d_in, _ in shapes)
    assert num_parameters(mixlora)[0] == pools
    assert sum(p.numel() for name, p in mixlora.named_parameters() if "mixlora_" in name) == pools + routers
    assert all(p.dtype == torch.float32 for p in mixlora.parameters() if p.requires_grad)
