"""Answers are those of greedy decoding one instance at a time, whatever the batch."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mixlora_cli.config import AdapterConfig, DataConfig, RoutingConfig
from mixlora_cli.data.collate import PixelLoader, draw_seed
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.evaluation.generate import Generator, batches
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.tiny import build_tiny

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def items(base: LoadedModel, data: DataConfig) -> list[Item]:
    return encode_prompts(load_records(data, "unseen"), base.chat).items[:10]


def greedy_tokens(base: LoadedModel, item: Item, model: torch.nn.Module) -> list[int]:
    """The plain loop: no padding, no cache, the whole sequence again for every token."""
    assert item.images
    pictures = PixelLoader(base.chat)([item.images])
    ends = {*base.chat.ends}
    ids: list[int] = list(item.input_ids)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, **pictures).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[item.length :]


def greedy_one_by_one(base: LoadedModel, item: Item) -> str:
    return base.tokenizer.decode(greedy_tokens(base, item, base.model), skip_special_tokens=True).strip()


def answers(
    base: LoadedModel,
    items: list[Item],
    batch_size: int,
    model: torch.nn.Module | None = None,
    **settings: bool,
) -> dict[int, str]:
    pixels = PixelLoader(base.chat)
    generator = Generator(model or base.model, base, pixels, NEW_TOKENS, **settings)  # type: ignore[arg-type]
    found: dict[int, str] = {}
    for batch in batches(items, batch_size):
        found.update(zip((item.index for item in batch), generator(batch), strict=True))
    return found


def test_the_untuned_model_answers_as_one_by_one(base: LoadedModel, items: list[Item]) -> None:
    expected = {item.index: greedy_one_by_one(base, item) for item in items}
    assert len(set(expected.values())) > 3  # else the comparison below would show little
    for batch_size in (1, 3, 10):
        assert answers(base, items, batch_size) == expected
    assert answers(base, items, 5, use_cache=False) == expected


@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_an_adapter_answers_alike_in_every_batch(items: list[Item], name: str) -> None:
    own = build_tiny()
    adapter = AdapterConfig(name=name, dropout=0.0)  # type: ignore[arg-type]
    model = attach_adapter(own.model, adapter, RoutingConfig("instance"), rank=2, factors=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    with model.disable_adapter():
        plain = answers(own, items, 7, model)
    alone = answers(own, items, 1, model)
    assert alone == answers(own, items, 10, model)
    assert alone != plain


def test_each_answer_stops_at_its_own_end_token(base: LoadedModel, items: list[Item]) -> None:
    whole = greedy_tokens(base, items[0], base.model)
    # Let the third token of one answer be the end token: that answer has two tokens, others go on or stop
    # elsewhere.
    end = base.tokenizer.convert_ids_to_tokens(whole[2])
    stopping = replace(base, chat=replace(base.chat))
    stopping.chat.__dict__["end"] = end
    expected = {item.index: greedy_one_by_one(stopping, item) for item in items}
    assert greedy_tokens(stopping, items[0], base.model) == whole[: whole.index(whole[2])]
    assert len({len(greedy_tokens(stopping, item, base.model)) for item in items}) > 1
    assert answers(stopping, items, 7) == expected


def test_batches_go_from_long_to_short_and_lose_nothing(items: list[Item]) -> None:
    cut = batches(items, 4)
    assert [len(batch) for batch in cut] == [4, 4, 2]
    lengths = [item.length for batch in cut for item in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert sorted(item.index for batch in cut for item in batch) == sorted(item.index for item in items)


def test_the_heads_weight_is_not_copied_for_every_row(items: list[Item]) -> None:
    """Which torch does, as a batched product, for hidden states that are a slice of longer ones."""
    base = build_tiny()
    generator = Generator(base.model, base, PixelLoader(base.chat), 3)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        generator(items[:8])
    vocabulary, width = base.model.get_output_embeddings().weight.shape
    products = [event for event in found.events() if event.name == "aten::bmm"]
    operands = [tuple(shape) for event in products for shape in event.input_shapes]
    assert operands and (8, width, vocabulary) not in operands


def test_the_mode_of_the_model_is_put_back(items: list[Item]) -> None:
    own = build_tiny()
    own.model.train()
    Generator(own.model, own, PixelLoader(own.chat), 1)(items[:1])
    assert own.model.training


def test_a_draw_s_seed_is_a_digest_of_seed_tokens_and_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    (tmp_path / "c.png").write_bytes(b"two")
    item = Item([1, 2], [-100, -100], (tmp_path / "a.png",), "task", 5)
    tokens = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    expected = hashlib.sha256(b"7 2 " + tokens + b"one").digest()
    assert draw_seed(7, item) == int.from_bytes(expected[:8], "big") >> 1
    assert draw_seed(7, replace(item, images=(tmp_path / "b.png",), index=6, task="x")) == draw_seed(7, item)
    others = [
        replace(item, images=(tmp_path / "c.png",)),
        replace(item, input_ids=[1, 3]),
        replace(item, images=()),
    ]
    assert len({draw_seed(7, item), draw_seed(8, item), *(draw_seed(7, each) for each in others)}) == 5
