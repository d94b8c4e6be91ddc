from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mixlora_cli.data.chat import Chat
from mixlora_cli.data.template import SMOLLM, TEMPLATES, V1, Segment, Template, Turn

from .conftest import chat_with

ASKED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat colour? ASSISTANT:"
)
ONE = [Turn("human", "<image>\nWhat colour?"), Turn("gpt", "red")]
TWO = [*ONE, Turn("human", "Sure?"), Turn("gpt", "yes")]


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES)
def chat(request, byte_level) -> Chat:
    return chat_with(byte_level, request.param)


def test_every_answer_and_its_end_carry_loss_and_nothing_else(byte_level) -> None:
    assert chat_with(byte_level, V1).segments(TWO) == [
        Segment(ASKED, is_answer=False),
        Segment(" red</s>", is_answer=True),
        Segment("USER: Sure? ASSISTANT:", is_answer=False),
        Segment(" yes</s>", is_answer=True),
    ]


def test_smollm_text(byte_level) -> None:
    assert "".join(segment.text for segment in chat_with(byte_level, SMOLLM).segments(TWO)) == (
        "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_a_system_turn(byte_level) -> None:
    turns = [Turn("system", " Be brief. "), *ONE]
    (asked, _) = chat_with(byte_level, V1).segments(turns)
    assert asked.text == "Be brief. USER: <image>\nWhat colour? ASSISTANT:"
    (asked, _) = chat_with(byte_level, SMOLLM).segments(turns)
    assert asked.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat")


@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_the_generation_prompt_is_the_training_text_without_the_last_answer(chat, conversation) -> None:
    assert chat.segments(conversation, with_answer=False) == chat.segments(conversation)[:-1]
    padded = [Turn(turn.role, f" {turn.text}\n") for turn in conversation]
    assert chat.segments(padded) == chat.segments(conversation)


def test_text_alone_is_written_alike_with_and_without_a_processor(chat) -> None:
    turns = [Turn("human", " What\ncolour? "), Turn("gpt", "red")]
    assert chat.segments(turns) == replace(chat, processor=None).segments(turns)


@pytest.mark.parametrize(
    "roles", [[], ["human"], ["gpt", "human"], ["human", "human"], ["human", "gpt", "human"]]
)
def test_roles_must_alternate(chat, roles) -> None:
    turns: list[Any] = [Turn(role, "x") for role in roles]
    with pytest.raises(ValueError, match="alternates human, gpt"):
        chat.segments(turns)


IN_PLACE = Template(
    "in place",
    "{% for message in messages %}{{ '<|im_start|>' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
)


@pytest.mark.parametrize(
    ("question", "written"),
    [
        ("<image>\nWhat?", "<image>What?"),
        ("What? \n<image> ", "What?<image>"),
        (" <image>\n<image> Same? ", "<image><image>Same?"),
        ("Is <image> like <image>?", "Is <image> like <image>?"),
        ("<image>", "<image>"),
    ],
)
def test_a_picture_stands_where_its_marker_stands(byte_level, question, written) -> None:
    (asked, _) = chat_with(byte_level, IN_PLACE).segments([Turn("human", question), Turn("gpt", "yes")])
    assert asked.text == f"<|im_start|>{written}<|im_end|><|im_start|>"
