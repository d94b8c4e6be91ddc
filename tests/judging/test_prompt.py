"""The words of App. C, and what counts as a verdict."""

import pytest

from mixlora_cli.judging import prompt
from mixlora_cli.judging.prompt import fill, read_verdict


def test_the_prompt_is_one_line_of_vicunas_conversation_with_three_places() -> None:
    """Its digest pins the words; they are those of the paper's App. C, of which these are the parts."""
    assert prompt.DIGEST == "247dcd50c17fd10b"
    places = ["{Question}", "{Ground-truth Answer}", "{Prediction}"]
    assert [prompt.TEMPLATE.count(place) for place in places] == [1, 1, 1]
    assert "\n" not in prompt.TEMPLATE and "  " not in prompt.TEMPLATE
    assert prompt.TEMPLATE.startswith(
        "A chat between a curious user and an artificial intelligence assistant. "
    )
    assert prompt.TEMPLATE.endswith(" Your response should only be Yes or No. ASSISTANT:")
    assert prompt.TEMPLATE.count("USER: ") == 1


def test_it_is_filled_literally() -> None:
    text = fill(prompt.USER, "What is {Prediction}?", "a {Question}", r"\1 {x}")
    assert "Questions: What is {Prediction}? Answer: a {Question} Prediction: \\1 {x} Your response" in text


YES = (
    *(
        "Yes",
        " yes.",
        "YES, it is",
        '"Yes"',
        "**Yes**",
        "_Yes_",
        "\N{LEFT DOUBLE QUOTATION MARK}Yes",
        "\nYes\nNo",
    ),
    *("Yes; not no", "Yes, yes it is", "Yes. No", "Yes or maybe", "Yes, orange is no fruit"),
)
NO = (
    *("No", "no", " No, the answer is yes", "`No`", "(No)", "No, no.", "No, yes it is wrong", "No. Yes"),
    *("No no", "No: nor yes"),
)
UNPARSED = (
    *("", "  ", "Not sure", "None", "Nothing", "Yesterday", "The answer is Yes", "Yes or No", "yes or no?"),
    *(
        "No or Yes.",
        '"Yes" or "No"',
        "**Yes** or **No**",
        "_Yes_ or _No_",
        "yes/no",
        "Yes / No: no",
        "Yes|No",
    ),
    *("Yes or No: Yes", "I", "…", "Nope"),
)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        *((reply, "yes") for reply in YES),
        *((reply, "no") for reply in NO),
        *((reply, "unparsed") for reply in UNPARSED),
    ],
)
def test_the_first_word_decides(reply: str, verdict: str) -> None:
    assert read_verdict(reply) == verdict
