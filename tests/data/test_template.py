from __future__ import annotations

import pytest

from mixlora_cli.data.template import SMOLLM, TEMPLATES, V1, Segment, Turn, segments

ASKED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat colour? ASSISTANT:"
)
ONE = [Turn("human", "<image>\nWhat colour?"), Turn("gpt", "red")]
TWO = [*ONE, Turn("human", "Sure?"), Turn("gpt", "yes")]


def test_every_answer_and_its_end_carry_loss_and_nothing_else() -> None:
    assert segments(V1, TWO) == [
        Segment(ASKED, is_answer=False),
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
    padded = [Turn(turn.role, f" {turn.text}\n") for turn in conversation]
    assert segments(template, padded) == segments(template, conversation)


@pytest.mark.parametrize(
    "roles", [[], ["human"], ["gpt", "human"], ["human", "human"], ["human", "gpt", "human"]]
)
def test_roles_must_alternate(roles) -> None:
    with pytest.raises(ValueError, match="alternates human, gpt"):
        segments(V1, [Turn(role, "x") for role in roles])
