"""Embeddings of task definitions: equal to a plain mean over hidden states, computed once, kept whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.definitions import TaskRouting, choose_encoder, embed_definitions
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.tiny import build_tiny

TEXTS = {
    "count": "Count the objects in the picture.",
    "name": "Name the object. Answer with one word, please.",
    "read": "Read.",
}


@pytest.fixture
def base() -> LoadedModel:
    return build_tiny()


@pytest.fixture
def calls(base: LoadedModel) -> Iterator[list[int]]:
    """Lengths of the sequences that the language model reads."""
    lengths: list[int] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    handle = base.model.model.language_model.register_forward_hook(note, with_kwargs=True)
    yield lengths
    handle.remove()


def by_hand(base: LoadedModel, texts: list[str]) -> Tensor:
    """One padded batch through the whole model, the final norm by hand, and a loop over the tokens that count."""
    ids = [base.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids)) + 3
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        logits_and_states = base.model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
    states = logits_and_states.hidden_states[-1]
    means = []
    for row, counted in zip(states, mask, strict=True):
        total = torch.zeros(states.shape[-1])
        for state, counts in zip(row, counted, strict=True):
            total = total + state * counts
        means.append(total / counted.sum())
    return torch.stack(means)


def test_equal_to_a_masked_mean_by_hand(base: LoadedModel, tmp_path: Path) -> None:
    found = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path)
    assert list(found) == list(TEXTS)
    torch.testing.assert_close(torch.stack(list(found.values())), by_hand(base, list(TEXTS.values())))
    assert {(e.dtype, tuple(e.shape), e.requires_grad) for e in found.values()} == {
        (torch.float32, (32,), False)
    }
    assert not torch.allclose(found["count"], found["name"], atol=0.1)


def test_hidden_states_are_those_behind_the_final_norm(base: LoadedModel, tmp_path: Path) -> None:
    language_model = base.model.model.language_model
    before = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path / "before")["read"]
    with torch.no_grad():
        language_model.norm.weight.mul_(2)
    after = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path / "after")["read"]
    torch.testing.assert_close(after, 2 * before)


def test_independent_of_what_else_is_embedded(base: LoadedModel, tmp_path: Path) -> None:
    encoder = choose_encoder(None, base)
    together = embed_definitions(TEXTS, encoder, tmp_path / "a")
    alone = embed_definitions({"x": TEXTS["count"]}, encoder, tmp_path / "b")
    assert torch.equal(alone["x"], together["count"])


def test_special_tokens_of_the_frame_are_read_but_do_not_count(base: LoadedModel, tmp_path: Path) -> None:
    """A tokenizer that begins every text with <s>, as LLaMA's: the model sees it, the mean leaves it out."""
    from tokenizers.processors import TemplateProcessing

    start = base.tokenizer.bos_token_id
    base.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    ids = base.tokenizer(TEXTS["read"])["input_ids"]
    assert ids[0] == start
    with torch.no_grad():
        states = base.model.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state
    found = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path)["read"]
    torch.testing.assert_close(found, states[0, 1:].mean(dim=0))


def test_each_distinct_text_is_read_once_and_then_never_again(
    base: LoadedModel, calls: list[int], tmp_path: Path
) -> None:
    encoder = choose_encoder(None, base)
    first = embed_definitions({**TEXTS, "same": TEXTS["read"]}, encoder, tmp_path)
    assert calls == [len(base.tokenizer(text)["input_ids"]) for text in TEXTS.values()]
    assert torch.equal(first["same"], first["read"])

    def must_not_open() -> Any:
        raise AssertionError("the encoder was opened")

    again = embed_definitions(TEXTS, replace(encoder, open=must_not_open), tmp_path)
    assert all(torch.equal(again[task], first[task]) for task in TEXTS)
    calls.clear()
    embed_definitions({**TEXTS, "read": "Read it."}, encoder, tmp_path)
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_another_model_or_number_format_has_its_own_embeddings(base: LoadedModel, tmp_path: Path) -> None:
    encoder = choose_encoder(None, base)
    embed_definitions(TEXTS, encoder, tmp_path)
    for changes in ({"fingerprint": "ff" * 16}, {"dtype": torch.bfloat16}):
        embed_definitions(TEXTS, replace(encoder, **changes), tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 3 * len(TEXTS)


BROKEN = {
    "empty": b"",
    "garbage": b"no numbers here",
    "not finite": np.full(32, np.nan, dtype=np.float32),
    "too short": np.zeros(31, dtype=np.float32),
    "other type": np.zeros(32, dtype=np.float64),
    "pickled": np.array([{"a": 1}], dtype=object),
}


@pytest.mark.parametrize("kind", [*BROKEN, "cut"])
def test_a_broken_file_is_computed_again(
    base: LoadedModel, calls: list[int], tmp_path: Path, kind: str
) -> None:
    encoder = choose_encoder(None, base)
    first = embed_definitions(TEXTS, encoder, tmp_path)
    file = sorted(tmp_path.rglob("*.npy"))[0]
    whole = file.read_bytes()
    content = BROKEN.get(kind, whole[:-5])
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    calls.clear()
    again = embed_definitions(TEXTS, encoder, tmp_path)
    assert len(calls) == 1
    assert all(torch.equal(again[task], first[task]) for task in TEXTS)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(base: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path / "file")
    torch.testing.assert_close(torch.stack(list(found.values())), by_hand(base, list(TEXTS.values())))


def test_the_mode_of_the_model_is_put_back(base: LoadedModel, tmp_path: Path) -> None:
    base.model.train()
    embed_definitions(TEXTS, choose_encoder(None, base), tmp_path)
    assert base.model.model.language_model.training


def test_an_adapted_language_model_is_no_encoder(base: LoadedModel, tmp_path: Path) -> None:
    encoder = choose_encoder(None, base)
    attach_adapter(base.model, AdapterConfig("lora"), RoutingConfig("instance"), 2, 4)
    with pytest.raises(RuntimeError, match="adapted already"):
        embed_definitions(TEXTS, encoder, tmp_path)


@pytest.fixture
def other(base: LoadedModel, tmp_path: Path) -> Path:
    """Another language model in a folder, of 24 features."""
    folder = tmp_path / "other"
    torch.manual_seed(5)
    LlamaModel(
        LlamaConfig(
            vocab_size=len(base.tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def test_another_language_model_reads_them(base: LoadedModel, other: Path, tmp_path: Path) -> None:
    encoder = choose_encoder(str(other), base)
    assert (encoder.width, encoder.fingerprint == base.fingerprint) == (24, False)
    found = embed_definitions(TEXTS, encoder, tmp_path)["count"]
    model = LlamaModel.from_pretrained(other)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor([base.tokenizer(TEXTS["count"])["input_ids"]])
        ).last_hidden_state
    torch.testing.assert_close(found, states[0].mean(dim=0))


def test_of_a_vision_language_checkpoint_the_language_part_reads_them(
    base: LoadedModel, tmp_path: Path
) -> None:
    base.model.save_pretrained(tmp_path / "llava")
    base.tokenizer.save_pretrained(tmp_path / "llava")
    own = embed_definitions(TEXTS, choose_encoder(None, base), tmp_path)
    other = embed_definitions(TEXTS, choose_encoder(str(tmp_path / "llava"), base), tmp_path)
    torch.testing.assert_close(other["name"], own["name"])


def test_an_encoder_that_cannot_be_loaded_is_said(base: LoadedModel, other: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"routing\.encoder=.*/nothing cannot be loaded"):
        choose_encoder(str(tmp_path / "nothing"), base)
    encoder = choose_encoder(str(other), base)
    (other / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"routing\.encoder=.*/other cannot be loaded"):
        embed_definitions(TEXTS, encoder, tmp_path)


def test_the_width_must_be_the_adapter_s(base: LoadedModel, other: Path) -> None:
    with pytest.raises(UserError, match="read task embeddings of 24 features, but tiny gives 32"):
        TaskRouting(TEXTS, None, width=24).embeddings(base)


def test_the_fingerprint_changes_with_text_name_and_encoder(base: LoadedModel, other: Path) -> None:
    first = TaskRouting(TEXTS, None).fingerprint(base)
    assert first == TaskRouting(dict(reversed(TEXTS.items())), None).fingerprint(base)
    changed = [
        TaskRouting({**TEXTS, "read": "Read it."}, None),
        TaskRouting({"reads" if t == "read" else t: text for t, text in TEXTS.items()}, None),
        TaskRouting(TEXTS, str(other)),
    ]
    assert len({first, *(routing.fingerprint(base) for routing in changed)}) == 4
