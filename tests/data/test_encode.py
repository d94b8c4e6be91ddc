from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixlora_cli.data.encode import IGNORE, Item, encode, encode_prompt, verify_labels
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import SMOLLM, V1, Turn
from mixlora_cli.errors import UserError

PICTURE = Path("red.png")


def made(input_ids, labels, num_dropped=0) -> Item:
    return Item(input_ids, labels, PICTURE, "colour", 5, num_dropped)


def record(*texts: str, image: Path | None = PICTURE) -> Record:
    turns = tuple(Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(texts))
    return Record(index=5, id="a", task="colour", image=image, conversation=turns)


# "<s>", "Hi. USER: ", three image tokens, "\nwhat colour? ASSISTANT:"
PROMPT = [1, 10, 11, 12, 14, 15, 4, 4, 4, 16, 17, 18, 19, 20, 14]


def test_ids_and_labels(word_base) -> None:
    encoded = encode(record("<image>\nwhat colour?", "red and blue"), word_base)
    assert encoded.input_ids == [*PROMPT, 21, 22, 23, 2]
    assert encoded.labels == [IGNORE] * 15 + [21, 22, 23, 2]
    assert encoded.num_dropped == 0


def test_several_answers_carry_loss(word_base) -> None:
    encoded = encode(record("<image>\nwhat colour?", "red", "what number?", "7"), word_base)
    assert encoded.input_ids == [*PROMPT, 21, 2, 13, 14, 24, 25, 19, 20, 14, 26, 2]
    assert encoded.labels == [IGNORE] * 15 + [21, 2] + [IGNORE] * 7 + [26, 2]


@pytest.mark.parametrize(
    "question", ["what colour?<image>", "what colour?\n<image>", " <image> what colour?", "what colour?"]
)
def test_the_image_comes_first_wherever_the_marker_stood(word_base, question) -> None:
    assert encode_prompt(record(question, "red"), word_base).input_ids == PROMPT


def test_text_only(word_base) -> None:
    encoded = encode(record("what colour?", "red", image=None), word_base)
    assert encoded.input_ids == [1, 10, 11, 12, 14, 24, 18, 19, 20, 14, 21, 2]
    assert encoded.labels == [IGNORE] * 10 + [21, 2]


def test_no_bos_where_the_template_has_none(word_base) -> None:
    base = replace(word_base, template=replace(word_base.template, bos=False))
    assert encode_prompt(record("what colour?", "red"), base).input_ids == PROMPT[1:]


def test_truncation_drops_the_end_of_the_answer_and_counts_image_tokens(word_base) -> None:
    instance = record("<image>\nwhat colour?", "red and blue")
    assert encode(instance, word_base, max_length=19) == encode(instance, word_base)
    cut = encode(instance, word_base, max_length=17)
    assert cut == made([*PROMPT, 21, 22], [IGNORE] * 15 + [21, 22], num_dropped=2)


def test_truncation_inside_a_later_question_drops_that_turn(word_base) -> None:
    instance = record("<image>\nwhat colour?", "red", "what number?", "7")
    cut = encode(instance, word_base, max_length=22)
    assert cut == made([*PROMPT, 21, 2], [IGNORE] * 15 + [21, 2], num_dropped=9)


@pytest.mark.parametrize("max_length", [15, 8])
def test_an_instance_without_label_is_a_problem(word_base, max_length) -> None:
    with pytest.raises(BadRecord) as caught:
        encode(record("<image>\nwhat colour?", "red"), word_base, max_length)
    assert caught.value.kind is Kind.NO_LABEL
    assert caught.value.detail == f"the prompt alone fills the {max_length} tokens allowed (all: 17)"


@pytest.mark.parametrize("texts", [("what</s> colour?", "red"), ("what colour?", "red</s> and")])
def test_control_text_in_a_turn_is_a_problem(word_base, texts) -> None:
    with pytest.raises(BadRecord) as caught:
        encode(record(*texts), word_base)
    assert caught.value.kind is Kind.CONTROL_TEXT


def test_the_models_own_image_token_in_a_turn_is_a_problem(word_base) -> None:
    base = replace(word_base, image_token_id=5)  # written "<|im_start|>"
    with pytest.raises(BadRecord, match="the image token in a turn's text"):
        encode(record("what <|im_start|>?", "red"), base)


QUESTION = "what colour is written in the picture?"
ANSWERS = ["red", "7", "two words: café", "  blue, naïve.\n", "日本", "red\nblue", "a  b"]


@pytest.mark.parametrize("template", [V1, SMOLLM], ids=["v1", "smollm"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_pieces_give_the_ids_of_the_whole_text(word_base, any_tokenizer, template, answer) -> None:
    base = replace(word_base, tokenizer=any_tokenizer, template=template, num_image_tokens=1)
    encoded = encode(record(QUESTION, answer, "what number?", "7"), base)
    ask, close = template.user_open, template.user_close + template.assistant_open
    end = template.answer_lead, template.end
    whole = (
        f"{template.system}{ask}<image>\n{QUESTION}{close}{end[0]}{answer.strip()}{end[1]}{template.between}"
        f"{ask}what number?{close}{end[0]}7{end[1]}"
    )
    bos = [1] if template.bos else []
    assert encoded.input_ids == bos + any_tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [V1, SMOLLM], ids=["v1", "smollm"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_unmasked_text_is_answer_and_end(word_base, any_tokenizer, template, answer) -> None:
    base = replace(word_base, tokenizer=any_tokenizer, template=template)
    instance = record(QUESTION, answer)
    encoded = encode(instance, base)
    labels = [label for label in encoded.labels if label != IGNORE]
    assert any_tokenizer.decode(labels).lstrip(" ") == answer.strip() + template.end
    verify_labels(encoded, instance, base)
    prompt = encode_prompt(instance, base).input_ids
    assert encoded.input_ids == prompt + labels
    assert encoded.labels[: len(prompt)] == [IGNORE] * len(prompt)


def test_a_token_across_the_border_cannot_slip_the_mask(word_base, words) -> None:
    joined = replace(word_base.template, assistant_open="ASSISTANT: re", answer_lead="")
    base = replace(word_base, template=joined)
    encoded = encode(record("what colour?", "d"), base)  # "red" is one word, its letters are unknown
    assert encoded.labels[-2:] == [3, 2]
    assert encoded.labels[:-2] == [IGNORE] * (len(encoded.labels) - 2)
    assert encoded.input_ids[:-2] == encode_prompt(record("what colour?", "d"), base).input_ids


def test_a_mask_that_slipped_by_one_is_refused(word_base) -> None:
    instance = record("what colour?", "red and blue")
    good = encode(instance, word_base)
    slipped = made(good.input_ids, [IGNORE] * 14 + [14, 21, 22, 23, IGNORE])
    with pytest.raises(
        UserError, match=r"record 5 \(task colour\) is wrong: .*': red and blue'.*'red and blue</s>'"
    ):
        verify_labels(slipped, instance, word_base)


def test_an_empty_mask_is_refused(word_base) -> None:
    instance = record("what colour?", "red")
    nothing = made(encode(instance, word_base).input_ids, [IGNORE] * 17)
    with pytest.raises(UserError, match="label mask of record 5"):
        verify_labels(nothing, instance, word_base)


def test_a_truncated_answer_is_verified_as_a_beginning(word_base) -> None:
    instance = record("what colour?", "red and blue")
    verify_labels(encode(instance, word_base, max_length=17), instance, word_base)
    wrong = made([*PROMPT, 21, 23], [IGNORE] * 15 + [21, 23], num_dropped=2)
    with pytest.raises(UserError, match="label mask"):
        verify_labels(wrong, instance, word_base)


def test_a_split_character_at_the_cut_is_no_error(word_base, byte_level) -> None:
    base = replace(word_base, tokenizer=byte_level)
    instance = record("what colour?", "日本")
    whole = encode(instance, base)
    cut = encode(instance, base, max_length=len(whole.input_ids) - 2)  # without </s> and the last byte
    assert byte_level.decode([label for label in cut.labels if label != IGNORE]).endswith(
        "\N{REPLACEMENT CHARACTER}"
    )
    verify_labels(cut, instance, base)


def test_a_template_that_is_not_the_tokenizers_is_refused(word_base) -> None:
    base = replace(word_base, template=replace(word_base.template, end="<stop>"))
    instance = record("what colour?", "red")
    with pytest.raises(UserError, match="'<stop>', which is not one token"):
        verify_labels(encode(instance, base), instance, base)


def test_labels_moved_against_their_tokens_are_refused(word_base) -> None:
    instance = record("what colour?", "red and blue")
    good = encode(instance, word_base)
    moved = made(good.input_ids, [*good.labels[1:], IGNORE])  # the right text, one place early
    with pytest.raises(UserError, match=r"record 5 .* at position 14 the label is 21, the token 14"):
        verify_labels(moved, instance, word_base)
