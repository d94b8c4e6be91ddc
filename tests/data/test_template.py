from __future__ import annotations

import pytest

from mixlora_cli.data.template import SMOLLM, TEMPLATES, V1, Segment, Turn, segments

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
ONE = [Turn("human", "<image>\nWhat colour?"), Turn("gpt", "red")]
TWO = [*ONE, Turn("human", "Sure?"), Turn("gpt", "yes")]


def test_v1_is_the_papers_text() -> None:
    text = "".join(segment.text for segment in segments(V1, ONE))
    assert text == SYSTEM + "USER: <image>\nWhat colour? ASSISTANT: red</s>"


def test_only_the_answer_and_its_end_carry_loss() -> None:
    assert segments(V1, ONE) == [
        Segment(SYSTEM + "USER: <image>\nWhat colour? ASSISTANT:", is_answer=False),
        Segment(" red</s>", is_answer=True),
    ]


def test_every_answer_of_several_turns_carries_loss() -> None:
    assert segments(V1, TWO)[1:] == [
        Segment(" red</s>", is_answer=True),
        Segment("USER: Sure? ASSISTANT:", is_answer=False),
        Segment(" yes</s>", is_answer=True),
    ]


def test_smollm_text() -> None:
    assert "".join(segment.text for segment in segments(SMOLLM, TWO)) == (
        "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_the_generation_prompt_is_the_training_text_without_the_last_answer(template, conversation) -> None:
    assert segments(template, conversation, with_answer=False) == segments(template, conversation)[:-1]


def test_white_space_around_a_turn_is_not_part_of_it() -> None:
    padded = [Turn("human", " <image>\nWhat colour?\n"), Turn("gpt", "\nred ")]
    assert segments(V1, padded) == segments(V1, ONE)


@pytest.mark.parametrize(
    "roles", [[], ["human"], ["gpt", "human"], ["human", "human"], ["human", "gpt", "human"]]
)
def test_roles_must_alternate(roles) -> None:
    with pytest.raises(ValueError, match="alternates human, gpt"):
        segments(V1, [Turn(role, "x") for role in roles])


def test_templates_are_found_by_their_names() -> None:
    assert {name: template.name for name, template in TEMPLATES.items()} == {"v1": "v1", "smollm": "smollm"}
