from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from mixlora_cli.data import encode as module
from mixlora_cli.data.encode import (
    IGNORE,
    Item,
    encode,
    encode_prompt,
    encode_prompts,
    encode_records,
    verify_labels,
)
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import SMOLLM, TEMPLATES, V1, Turn
from mixlora_cli.errors import UserError
from odd_conversations import odd_conversations

from .conftest import SHORT, chat_with, train_sentence_piece


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "png")
    return file.getvalue()


PICTURE = picture()


def record(
    *texts: str, images: tuple[bytes, ...] = (PICTURE,), index: int = 5, task: str = "colour"
) -> Record:
    turns = tuple(Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(texts))
    return Record(index=index, id="a", task=task, images=images, conversation=turns)


def made(input_ids: list[int], labels: list[int], num_dropped: int = 0) -> Item:
    return Item(input_ids, labels, (PICTURE,), "colour", 5, num_dropped)


GOLDEN = [
    ("byte_level", "v1", "1c87ca04bd78173b"),
    ("byte_level", "smollm", "3e4fe751c208d64c"),
    ("newer", "v1", "315ced65228b3760"),
    ("newer", "smollm", "2c58da11127f67f4"),
    ("legacy", "v1", "c768a82c3393c801"),
    ("legacy", "smollm", "b618e807921708cd"),
]

# "<s>", "Hi. USER: ", three image tokens, "\nwhat colour? ASSISTANT:"
PROMPT = [1, 10, 11, 12, 14, 15, 4, 4, 4, 16, 17, 18, 19, 20, 14]
TEXT_PROMPT = [1, 10, 11, 12, 14, 24, 18, 19, 20, 14]
NONE = [IGNORE] * 15


@pytest.mark.parametrize(
    ("turns", "max_length", "rest", "labels", "dropped"),
    [
        (["red and blue"], None, [21, 22, 23, 2], [21, 22, 23, 2], 0),
        (["red and blue"], 19, [21, 22, 23, 2], [21, 22, 23, 2], 0),
        # image tokens count, and the end of the answer goes
        (["red and blue"], 17, [21, 22], [21, 22], 2),
        (
            ["red", "what number?", "7"],
            None,
            [21, 2, 13, 14, 24, 25, 19, 20, 14, 26, 2],
            [21, 2, *[IGNORE] * 7, 26, 2],
            0,
        ),
        # a later question that lost its answer goes with it
        (["red", "what number?", "7"], 22, [21, 2], [21, 2], 9),
    ],
)
def test_ids_and_labels(word_chat, turns, max_length, rest, labels, dropped) -> None:
    encoded = encode(record("<image>\nwhat colour?", *turns), word_chat, max_length)
    assert encoded == made([*PROMPT, *rest], [*NONE, *labels], dropped)
    assert encoded.length == 15 + len(rest)


@pytest.mark.parametrize(
    "question", ["what colour?<image>", "what colour?\n<image>", " <image> what colour?", "what colour?"]
)
def test_the_image_comes_first_wherever_the_marker_stood(word_chat, question) -> None:
    assert encode_prompt(record(question, "red"), word_chat) == made(PROMPT, NONE)


def test_text_only_and_no_bos_where_the_template_has_none(word_chat) -> None:
    encoded = encode(record("what colour?", "red", images=()), word_chat)
    assert encoded.input_ids == [*TEXT_PROMPT, 21, 2]
    assert encoded.labels == [IGNORE] * 10 + [21, 2]
    chat = replace(word_chat, template=replace(SHORT, bos=False))
    assert encode_prompt(record("what colour?", "red"), chat).input_ids == PROMPT[1:]


@pytest.mark.parametrize(
    ("texts", "max_length", "kind", "detail"),
    [
        (("what?", "red"), 13, Kind.NO_LABEL, "the prompt alone fills the 13 tokens allowed (all: 16)"),
        (("what?", "red"), 8, Kind.NO_LABEL, "the prompt alone fills the 8 tokens allowed (all: 16)"),
        (("what</s>?", "red"), None, Kind.CONTROL_TEXT, "'</s>' in a human turn"),
        (("what?", "red</s> and"), None, Kind.CONTROL_TEXT, "'</s>' in a gpt turn"),
    ],
)
def test_what_cannot_be_encoded(word_chat, texts, max_length, kind, detail) -> None:
    with pytest.raises(BadRecord) as caught:
        encode(record(*texts), word_chat, max_length)
    assert (caught.value.kind, caught.value.detail) == (kind, detail)


def test_the_models_own_image_token_is_no_text(words) -> None:
    chat = chat_with(words)
    chat.processor.image_token = "<|im_start|>"
    chat.processor.image_token_ids = [5]
    with pytest.raises(BadRecord, match=r"'<\|im_start\|>' in a human turn"):
        encode(record("what <|im_start|>?", "red"), chat)


@pytest.mark.parametrize(("name", "template", "digest"), GOLDEN)
def test_ids_are_those_of_the_first_encoder(request, name, template, digest) -> None:
    """The digests were computed by the encoder that cut conversations by its own templates, before Jinja did."""
    tokenizer = (
        request.getfixturevalue("byte_level")
        if name == "byte_level"
        else train_sentence_piece(legacy=name == "legacy")
    )
    chat = chat_with(tokenizer, TEMPLATES[template])
    found, number = hashlib.sha256(), 0
    for texts, has_picture in odd_conversations():
        instance = record(*texts, images=(PICTURE,) if has_picture else ())
        encoded, prompt = encode(instance, chat), encode_prompt(instance, chat)
        lists = [list(encoded.input_ids), list(encoded.labels), list(prompt.input_ids)]
        found.update(json.dumps(lists).encode())
        number += 1
    assert (number, found.hexdigest()[:16]) == (400, digest)


QUESTION = "what colour is written in the picture?"
ANSWERS = ["red", "7", "two words: café", "  blue, naïve.\n", "日本", "red\nblue", "a  b"]


LEADS = {"v1": (" ", "</s>", ""), "smollm": ("", "<|im_end|>", "\n")}
"""Before an answer, its end, and what follows that."""


@pytest.mark.parametrize("template", [V1, SMOLLM], ids=["v1", "smollm"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_pieces_give_the_ids_of_the_whole_text_and_loss_on_the_answers(
    any_tokenizer, template, answer
) -> None:
    chat = chat_with(any_tokenizer, template, num_image_tokens=1)
    instance = record(QUESTION, answer, "what number?", "7")
    encoded = encode(instance, chat)
    turns = [Turn("human", f"<image>{QUESTION}"), Turn("gpt", answer)]
    _, end, behind = LEADS[template.name]
    whole = chat.render([*turns, Turn("human", "what number?"), Turn("gpt", "7")]).removesuffix(behind)
    bos = [1] if template.bos else []
    assert encoded.input_ids == bos + any_tokenizer(whole, add_special_tokens=False)["input_ids"]
    verify_labels(encoded, instance, chat)

    single = encode(record(QUESTION, answer), chat)
    labels = [label for label in single.labels if label != IGNORE]
    assert any_tokenizer.decode(labels).lstrip(" ") == answer.strip() + end
    prompt = encode_prompt(record(QUESTION, answer), chat)
    assert single.input_ids == [*prompt.input_ids, *labels]
    assert single.labels == [*prompt.labels, *labels]
    assert set(prompt.labels) == {IGNORE}


def test_a_token_across_the_border_cannot_slip_the_mask(word_chat) -> None:
    joined = SHORT.source.replace("ASSISTANT: {{", "ASSISTANT: re{{").replace(
        "ASSISTANT:{%", "ASSISTANT: re{%"
    )
    chat = replace(word_chat, template=replace(SHORT, source=joined))
    encoded = encode(record("what colour?", "d"), chat)  # "red" is one word, its letters are unknown
    prompt = encode_prompt(record("what colour?", "d"), chat)
    assert encoded.labels == [*prompt.labels, 3, 2]
    assert encoded.input_ids[:-2] == prompt.input_ids


@pytest.mark.parametrize(
    ("ids", "labels", "dropped", "message"),
    [
        # slipped by one
        (
            [21, 22, 23, 2],
            [*NONE[1:], 14, 21, 22, 23, IGNORE],
            0,
            r"record 5 \(task colour\) is wrong: .*': red and blue'.*'red and blue</s>'",
        ),
        ([21, 22, 23, 2], [IGNORE] * 19, 0, "label mask of record 5"),  # empty
        ([21, 23], [*NONE, 21, 23], 2, "label mask"),  # truncated, but no beginning of the answer
        # the right text, one place early
        (
            [21, 22, 23, 2],
            [*NONE[1:], 21, 22, 23, 2, IGNORE],
            0,
            "at position 14 the label is 21, the token 14",
        ),
    ],
)
def test_a_wrong_mask_is_refused(word_chat, ids, labels, dropped, message) -> None:
    instance = record("what colour?", "red and blue")
    verify_labels(encode(instance, word_chat), instance, word_chat)
    verify_labels(encode(instance, word_chat, max_length=17), instance, word_chat)
    with pytest.raises(UserError, match=message):
        verify_labels(made([*PROMPT, *ids], labels, dropped), instance, word_chat)


def test_a_split_character_at_the_cut_is_no_error(word_chat, byte_level) -> None:
    chat = chat_with(byte_level)
    instance = record("what colour?", "日本")
    cut = encode(
        instance, chat, max_length=encode(instance, chat).length - 2
    )  # without </s> and the last byte
    text = byte_level.decode([label for label in cut.labels if label != IGNORE])
    assert text.endswith("\N{REPLACEMENT CHARACTER}")
    verify_labels(cut, instance, chat)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</s>", "<stop>", r"chat template short ends answers with '<stop>', which is no control token"),
        ("</s>", " ", "ends answers with ' '"),
        ("ASSISTANT: {{", "ASSISTANT: \n{{ 'Well, ' ~ ", "changes the answers of record 5"),
        ("ASSISTANT:{%", "ASSISTANT : {%", "otherwise than the prompt and its answer"),
        ("image_token ~", "", r"does not write a place for each picture \(1 in record 5\)"),
        (
            "Hi. ",
            "{{ raise_exception('only one turn') }}",
            "cannot write the turns user, assistant: only one turn",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused(words, old, new, message) -> None:
    assert old in SHORT.source
    chat = chat_with(words, replace(SHORT, source=SHORT.source.replace(old, new)))
    instance = record("what colour?", "red")
    with pytest.raises(UserError, match=message):
        verify_labels(encode(instance, chat), instance, chat)


def texts(*answers: str, **changes) -> list[Record]:
    return [record("what colour?", each, images=(), index=n, **changes) for n, each in enumerate(answers)]


def test_a_dataset_has_all_records_in_few_objects(word_chat) -> None:
    records = [*texts("red"), record("what colour?", "red and blue", index=8)]
    dataset = encode_records(records, word_chat, 64)
    assert [replace(each, input_ids=[*each.input_ids], labels=[*each.labels]) for each in dataset.items] == [
        encode(each, word_chat) for each in records
    ]
    assert (len(dataset), dataset[1].index, dataset.lengths, dataset.num_truncated) == (2, 8, [12, 19], 0)
    assert {each.input_ids.itemsize for each in dataset.items} == {4}
    (prompt,) = encode_prompts(records[:1], word_chat).items
    assert (list(prompt.input_ids), list(prompt.labels)) == (TEXT_PROMPT, [IGNORE] * 10)


def test_truncation_is_reported(word_chat, capsys) -> None:
    dataset = encode_records(texts("red and blue", "red"), word_chat, 12, source="train.json")
    assert [list(item.input_ids[10:]) for item in dataset.items] == [[21, 22], [21, 2]]
    shown = capsys.readouterr().err
    assert "1 of 2 instances of train.json are longer than data.max_length=12 tokens and lost" in shown


def test_an_instance_without_label_stops_or_is_left_out(word_chat, capsys) -> None:
    records = [
        record("what colour?", "red", index=4),
        *texts("red"),
    ]  # the picture makes the first one longer
    with pytest.raises(UserError) as caught:
        encode_records(records, word_chat, 12, source="train.json")
    assert str(caught.value) == (
        "1 bad record in train.json: 1 no answer token left after truncation (record 4, the prompt alone "
        "fills the 12 tokens allowed (all: 17)); fix them or pass data.on_error=skip to go on without them"
    )
    dataset = encode_records(records, word_chat, 12, on_error="skip", source="train.json")
    assert [item.index for item in dataset.items] == [0]
    assert "left out 1 of 2 records; 1 bad record in train.json" in capsys.readouterr().err


def test_the_first_instances_of_every_task_are_verified_whatever_on_error_says(
    word_chat, monkeypatch
) -> None:
    verified: list[int] = []
    monkeypatch.setattr(module, "verify_labels", lambda encoded, record, chat: verified.append(record.index))
    records = texts(*["red"] * 7)
    records[5] = replace(records[5], task="shape")
    encode_records(records, word_chat, 64)
    assert verified == [0, 1, 5]
    monkeypatch.undo()
    slipped = made([*TEXT_PROMPT, 21, 2], [*[IGNORE] * 9, 14, 21, IGNORE])
    monkeypatch.setattr(module, "encode", lambda record, chat, max_length: slipped)
    with pytest.raises(UserError, match="label mask of record 0"):
        encode_records(records, word_chat, 64, on_error="skip")
