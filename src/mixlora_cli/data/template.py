"""Conversation templates: the one place where turns become the text that a model reads.

Training and generation both go through `segments`, so that a prompt cannot differ between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, without the template around it."""

    role: Literal["system", "human", "gpt"]
    text: str


@dataclass(frozen=True)
class Segment:
    """A stretch of the conversation's text that carries loss as a whole (an answer and its end), or not at all."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Template:
    """Text around the turns: `system`, then for each pair `user_open` q `user_close` `assistant_open` answer.

    An answer's text is `answer_lead` a `end`. Tokenizers of the LLaMA and GPT-2 families keep a space inside
    the token of the word that follows it, so a space before the answer belongs to the answer (`answer_lead`),
    never to the prompt: a prompt that ends with a space would be a token sequence that training never showed.
    """

    name: str
    system: str
    user_open: str
    user_close: str
    assistant_open: str
    answer_lead: str
    end: str
    between: str
    """Text between an answer's `end` and the next user turn."""
    bos: bool
    """Whether the tokenizer's begin-of-sequence token, if it has one, comes first."""


V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user_open="USER: ",
    user_close=" ",
    assistant_open="ASSISTANT:",
    answer_lead=" ",
    end="</s>",
    between="",
    bos=True,
)

SMOLLM = Template(
    name="smollm",
    system="",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    answer_lead="",
    end="<|im_end|>",
    between="\n",
    bos=False,  # "<|im_start|>" is this tokenizer's bos and already opens every turn
)

TEMPLATES: dict[str, Template] = {template.name: template for template in (V1, SMOLLM)}


def segments(template: Template, conversation: Sequence[Turn], *, with_answer: bool = True) -> list[Segment]:
    """The conversation's text, cut where loss begins and ends: prompt, answer, prompt, answer, ...

    The joined texts are the whole conversation. `with_answer=False` leaves out the last answer: what remains ends
    with the prompt that generation continues. White space around a turn is no part of it.

    Raises:
        ValueError: the roles do not alternate human, gpt or the conversation does not end with an answer.
    """
    roles = [turn.role for turn in conversation]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise ValueError(f"a conversation alternates human, gpt and ends with gpt, got {roles}")
    cut: list[Segment] = []
    before = template.system
    for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
        asked = f"{template.user_open}{question.text.strip()}{template.user_close}"
        cut.append(Segment(f"{before}{asked}{template.assistant_open}", is_answer=False))
        cut.append(Segment(f"{template.answer_lead}{answer.text.strip()}{template.end}", is_answer=True))
        before = template.between
    return cut if with_answer else cut[:-1]
