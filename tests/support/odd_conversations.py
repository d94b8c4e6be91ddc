"""Several hundred conversations as odd as users' files hold them, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

_WORDS = (
    "red", "a", "USER:", "ASSISTANT:", "user", "assistant\n", "what?", "naïve", "日本", "😀", "1,000", "</", "<0x41>",
    "  ", "\n", "\t", "\r\n", ".", ":", "▁", "e\u0301", "\u00a0", "don't", "x=1;", "<s>", "im_start", "|>",
    "A chat between", "the number 7", "ﬁ", "\u200b", "\u02bc", "-", "''",
)  # fmt: skip


def odd_conversations(number: int = 400) -> Iterator[tuple[list[str], bool]]:
    """Texts of human and gpt in turn, and whether the first question has a picture, whose marker may stand anywhere."""
    draw = random.Random("odd conversations")
    for _ in range(number):
        texts = [_text(draw) for _ in range(2 * draw.choice([1, 1, 2, 3]))]
        texts[1::2] = [text if text.strip("\u200b \n\t\r\u00a0") else "yes" for text in texts[1::2]]
        has_picture = draw.random() < 0.6
        if has_picture:
            before, after = texts[0][: draw.randrange(3)], texts[0]
            texts[0] = draw.choice(
                [f"<image>\n{after}", f"{after}\n<image>", f"{before}<image>{after}", after]
            )
        yield texts, has_picture


def _text(draw: random.Random) -> str:
    glue = draw.choice([" ", " ", "", "\n"])
    text = glue.join(draw.choice(_WORDS) for _ in range(draw.choice([0, 1, 2, 5, 12])))
    return draw.choice(["", " ", "\n"]) + text + draw.choice(["", "", "  ", "\n"])
