"""Answers are those of greedy decoding one instance at a time, whatever the batch."""

import hashlib
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from threading import Event

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mixlora_cli.analysis.bench.whole import sharing_weights
from mixlora_cli.config import AdapterConfig, DataConfig, RoutingConfig
from mixlora_cli.data.collate import PixelLoader, Rows, draw_seed
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.loading import load_records
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.generate import Decoding, Factors, Generator, batches
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


def test_the_next_batch_is_opened_while_one_is_answered(base: LoadedModel, items: list[Item]) -> None:
    opened, second = [], Event()

    class Watched(PixelLoader):
        def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
            if len(opened) == 2:
                raise UserError("broken")
            opened.append(len(rows))
            if len(opened) == 2:
                second.set()
            return super().__call__(rows)

    groups = batches(items, 4)
    expected = [list(answers(base, group, 4).values()) for group in groups]
    coming = Generator(base.model, base, Watched(base.chat), NEW_TOKENS).each(groups)
    assert next(coming) == expected[0]
    assert second.wait(timeout=60)  # nobody has asked for the second batch yet
    assert next(coming) == expected[1]
    with pytest.raises(UserError, match="broken"):
        next(coming)
    assert opened == [4, 4]


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
    """Task by task, that with the longest prompt first."""
    tasks = ("naming", "counting", "naming", "reading")
    mixed = [replace(item, task=tasks[number % 4]) for number, item in enumerate(items)]
    cut = batches(mixed, 4)
    assert [len(batch) for batch in cut] == [4, 4, 2]
    ordered = [item for batch in cut for item in batch]
    assert ordered[0].length == max(item.length for item in items) > ordered[-1].length
    runs = [list(group) for _, group in groupby(ordered, key=lambda item: item.task)]
    assert len(runs) == 3
    for run in runs:
        assert [item.length for item in run] == sorted((item.length for item in run), reverse=True)
    assert [run[0].length for run in runs] == sorted((run[0].length for run in runs), reverse=True)
    assert sorted(item.index for item in ordered) == sorted(item.index for item in items)


@pytest.mark.parametrize("is_copy", [False, True])
def test_the_heads_weight_is_not_copied_for_every_row(items: list[Item], is_copy: bool) -> None:
    """Which torch does, as a batched product, for hidden states that are a slice of longer ones."""
    base = build_tiny()
    model = sharing_weights(base.model) if is_copy else base.model
    generator = Generator(model, base, PixelLoader(base.chat), 3)
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


@pytest.fixture(scope="module")
def adapted(items: list[Item]) -> Generator:
    """Of a MixLoRA adapter whose answers differ."""
    own = build_tiny()
    model = attach_adapter(
        own.model, AdapterConfig("mixlora", dropout=0.0), RoutingConfig("instance"), rank=2, factors=4
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return Generator(model, own, PixelLoader(own.chat), NEW_TOKENS)


def test_each_row_is_decoded_in_its_own_way_and_greedy_ones_as_in_a_call(
    adapted: Generator, items: list[Item]
) -> None:
    greedy = dict(zip(range(6), adapted(items[:6]), strict=True))
    drawn = Decoding(NEW_TOKENS, temperature=1.5, seed=3)
    decoding = [Decoding(NEW_TOKENS), drawn, Decoding(2), drawn, Decoding(NEW_TOKENS), Decoding(1)]
    found = adapted.write(items[:6], decoding)
    assert [found[row].text for row in (0, 4)] == [greedy[0], greedy[4]]
    assert greedy[2].startswith(found[2].text) and (found[2].num_tokens, found[2].finish) == (2, "length")
    assert found[5].num_tokens == 1
    # A draw depends on its seed and its prompt, on nothing else in the batch.
    assert found[1] == adapted.write([items[1]], [drawn])[0]
    others = {adapted.write([items[1]], [replace(drawn, seed=seed)])[0].text for seed in range(4)}
    assert len(others) > 1
    likeliest = replace(drawn, top_p=1e-6)
    assert adapted.write([items[1]], [likeliest])[0].text == greedy[1]
    assert adapted.write([items[1]], [replace(drawn, temperature=1e-4)])[0].text == greedy[1]


def test_pieces_of_an_answer_join_to_it_and_a_row_that_is_not_wanted_ends(
    adapted: Generator, items: list[Item]
) -> None:
    pieces: dict[int, list[str]] = {row: [] for row in range(5)}

    def watch(row: int, piece: str, factors: Factors | None) -> bool:
        assert factors is not None
        pieces[row].append(piece)
        return row != 2 or len(pieces[2]) < 2

    found = adapted.write(items[:5], [Decoding(NEW_TOKENS)] * 5, watch)
    assert ["".join(pieces[row]) for row in range(5)] == [answer.text for answer in found]
    assert [answer.text for answer in found if answer.finish != "cancelled"] == [
        text for row, text in enumerate(adapted(items[:5])) if row != 2
    ]
    assert found[2].finish == "cancelled" and found[2].num_tokens == 2
    assert max(len(told) for told in pieces.values()) > 2


def test_an_answer_ends_before_its_stop_text_and_no_part_of_that_is_told(
    adapted: Generator, items: list[Item]
) -> None:
    whole = adapted.write([items[0]], [Decoding(NEW_TOKENS)])[0].text
    assert len(whole) > 4
    for stop in (whole[2:4], whole[-2:], whole[0]):
        told: list[str] = []
        decoding = Decoding(NEW_TOKENS, stop=("never", stop))
        answer = adapted.write(
            [items[0]], [decoding], lambda _, piece, __, told=told: told.append(piece) or True
        )[0]
        assert answer.finish == "stop"
        assert answer.text == "".join(told) == whole[: whole.index(stop)].strip()
    assert adapted.write([items[0]], [Decoding(NEW_TOKENS, stop=("never",))])[0].text == whole


def test_the_factors_of_an_answer_are_those_of_its_prompt(adapted: Generator, items: list[Item]) -> None:
    together = adapted.write(items[:4], [Decoding(3)] * 4)
    alone = [adapted.write([item], [Decoding(1)])[0] for item in items[:4]]
    assert [answer.factors for answer in together] == [answer.factors for answer in alone]
    factors = together[0].factors
    assert factors is not None and factors != together[1].factors
    assert all(len(set(row)) == 2 for row in (*factors.a, *factors.b))
    assert len(factors.layers) == len(factors.a) == len(factors.b) == len(set(factors.layers)) > 6


@pytest.mark.parametrize("doubt", [1e9, 0.05])
def test_an_answer_in_doubt_is_written_again_alone_and_told_once(
    adapted: Generator, items: list[Item], doubt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = [Decoding(NEW_TOKENS), Decoding(NEW_TOKENS, temperature=1.0, seed=1)] * 3
    alone = [adapted.write([item], [each])[0] for item, each in zip(items, decoding, strict=False)]
    calls: list[int] = []
    generate = adapted._generate
    monkeypatch.setattr(
        adapted,
        "_generate",
        lambda batch, **more: calls.append(len(batch["input_ids"])) or generate(batch, **more),
    )
    pieces = [""] * 6

    def watch(row: int, piece: str, factors: Factors | None) -> bool:
        pieces[row] += piece
        return True

    assert adapted.write(items[:6], decoding, watch, doubt) == alone
    assert pieces == [answer.text for answer in alone]
    again = calls[1:]
    assert calls[0] == 6 and set(again) <= {1}
    assert len(again) == 3 if doubt > 1 else len(again) <= 3  # the greedy ones; drawn ones are never in doubt
