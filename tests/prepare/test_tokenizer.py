"""A tokenizer made from LLaMA's kind of sentencepiece model reads every text as sentencepiece itself."""

from __future__ import annotations

import argparse
import calendar
import dataclasses
import difflib
import inspect
import json
import random
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mixlora_cli.errors import UserError
from mixlora_cli.prepare.parts import Part
from mixlora_cli.prepare.tokenizer import as_sentencepiece_reads, build_vocabulary, merges_by_score

from .standins import train_sentencepiece

VOCABULARY = 2000
RUNS = ["▁" * length for length in range(2, 17)]
LAST = -1e9  # the score of LLaMA's runs of spaces
CODE = "\n".join(map(inspect.getsource, (argparse, calendar, dataclasses, difflib)))


def trained(folder: Path, **options: object) -> ModelProto:
    """A model with LLaMA's options, trained on Python source code."""
    train_sentencepiece(folder, CODE, VOCABULARY, **options)
    model = ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    return model


def as_llama(model: ModelProto) -> ModelProto:
    """Runs of spaces behind the bytes, with the first ids of all pieces and the lowest scores."""
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.pieces[:]
    others = [piece for piece in model.pieces if piece.piece not in RUNS]
    changed.pieces.extend(others[:259])
    for run in RUNS:
        changed.pieces.add(piece=run, score=LAST, type=1)
    changed.pieces.extend(others[259:])
    return changed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelProto]:
    plain = trained(tmp_path_factory.mktemp("plain"))
    defined = trained(tmp_path_factory.mktemp("defined"), user_defined_symbols=RUNS)
    return {"trained": plain, "LLaMA's runs of spaces": as_llama(plain), "defined runs of spaces": defined}


def texts() -> list[str]:
    """Lines of code, and words between spaces, tabs, line ends and characters that the model has never seen."""
    chance = random.Random(0)
    lines = CODE.split("\n")
    found = []
    for _ in range(300):
        start = chance.randrange(len(lines) - 6)
        found.append("\n".join(lines[start : start + chance.randrange(1, 6)]))
    words = [
        "a",
        "b",
        "the",
        "return",
        "def",
        "x1234",
        "1,000",
        "</s",
        "<0x41>",
        '"""',
        "猫",
        "😀",
        "é",
        "naïve",
        "¿",
    ]
    words += ["\t", "\n", "\n\n", "\r\n", "\x00", "\u3000", *(" " * count for count in (2, 3, 7, 16, 21, 33))]
    for _ in range(400):
        count = chance.randrange(1, 12)
        found.append("".join(chance.choice(words) + chance.choice(["", " ", "  "]) for _ in range(count)))
    found += [" " * n for n in range(40)] + ["a" + " " * n + "b" for n in range(70)]
    return found


TEXTS = texts()


def part_with(model: ModelProto, folder: Path) -> Part:
    """The tokenizer's files of a language model of Vicuna's time."""
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "model_max_length": 2048, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Part("prepare.language_model", str(folder), folder)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    read: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read


@pytest.mark.parametrize("name", ["trained", "LLaMA's runs of spaces", "defined runs of spaces"])
def test_hundreds_of_texts_get_the_ids_that_sentencepiece_gives(
    name: str, models: dict[str, ModelProto], tmp_path: Path
) -> None:
    model = models[name]
    part = part_with(model, tmp_path)
    original = SentencePieceProcessor(model_proto=model.SerializeToString())
    expected = [original.encode(text) for text in TEXTS]
    made = build_vocabulary(part, len(model.pieces)).tokenizer
    assert [text for text, wanted in zip(TEXTS, expected, strict=True) if ids(made, text) != wanted] == []

    made.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [text for text, wanted in zip(TEXTS, expected, strict=True) if ids(again, text) != wanted] == []
    assert again("a b")["input_ids"] == [1, *original.encode("a b")]
    assert set(again("a b")) == {"input_ids", "attention_mask"}
    assert (again.padding_side, again.model_max_length) == ("left", 2048)
    assert [again.decode(wanted) for wanted in expected[-70:]] == TEXTS[-70:]


def test_the_order_of_ids_is_another_one(models: dict[str, ModelProto], tmp_path: Path) -> None:
    """Without which the test above would say little."""
    model = models["LLaMA's runs of spaces"]
    original = SentencePieceProcessor(model_proto=model.SerializeToString())
    part_with(model, tmp_path)
    by_id = AutoTokenizer.from_pretrained(tmp_path, legacy=True)
    assert original.encode("a  b", out_type=str) == ["▁a", "▁", "▁b"]
    assert by_id.tokenize("a  b") == ["▁a", "▁▁", "b"]
    inside = [
        text for text in TEXTS if not text.startswith(" ")
    ]  # a leading space is a difference of its own
    assert sum(ids(by_id, text) != original.encode(text) for text in inside) > 100


def test_merges_go_by_score_and_only_join_pieces_of_text() -> None:
    model = ModelProto()
    for piece, score, kind in (
        *(("<unk>", 0, 2), ("ab", 0, 6), ("a", -9, 1), ("b", -9, 1), ("c", -9, 1)),
        *(("bc", -2, 1), ("abc", -1, 1), ("ca", -3, 1), ("cac", -1, 4)),
    ):
        model.pieces.add(piece=piece, score=score, type=kind)
    assert merges_by_score(model) == [("ca", "c"), ("a", "bc"), ("b", "c"), ("c", "a")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "tokenizer.model is no BPE model"),
        (
            {"normalization_rule_name": "nmt_nfkc"},
            "tokenizer.model reads 'a  b' otherwise than a tokenizer of LLaMA's",
        ),
    ],
)
def test_another_kind_of_model_is_refused(options: dict[str, object], reason: str, tmp_path: Path) -> None:
    model = trained(tmp_path, **{"remove_extra_whitespaces": True, **options})
    part = part_with(model, tmp_path)
    with pytest.raises(UserError, match=rf"^prepare\.language_model=.*: {re.escape(reason)}"):
        build_vocabulary(part, len(model.pieces))


def test_a_damaged_file_is_refused(models: dict[str, ModelProto], tmp_path: Path) -> None:
    part_with(models["trained"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, legacy=True)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"^tokenizer\.model is damaged: "):
        as_sentencepiece_reads(tokenizer, tmp_path / "tokenizer.model")


def test_where_text_behind_special_tokens_gets_no_space_only_the_merges_change(
    models: dict[str, ModelProto], tmp_path: Path
) -> None:
    model = models["LLaMA's runs of spaces"]
    part_with(model, tmp_path)
    original = SentencePieceProcessor(model_proto=model.SerializeToString())
    before = AutoTokenizer.from_pretrained(tmp_path, legacy=False)
    kind = type(before)
    made = as_sentencepiece_reads(before, tmp_path / "tokenizer.model")
    assert type(made) is kind
    inside = [text for text in TEXTS if text and not text.startswith(" ")]
    assert [text for text in inside if ids(made, text) != original.encode(text)] == []
