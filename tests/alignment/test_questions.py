"""Short questions about the pictures of stage one: their answers are right, and their wordings are their own."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.captions import Captioned
from mixlora_cli.data.mini.objects import MiniObject, all_objects
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.data.mini.unseen import UNSEEN_BENCHMARKS
from mixlora_cli.prepare.align.questions import ask
from mixlora_cli.prepare.align.run import ANNOTATION, asked_first, draw, write_pictures


def _object(name: str) -> MiniObject:
    return next(item for item in all_objects() if item.name == name)


CAT_AND_TREE = Scene(
    (Item("object", _object("cat"), 30, 30, 50), Item("object", _object("onion"), 130, 130, 50)), "pink"
)
WORD = Scene((Item("text", "river", 80, 80, 40, "blue"),))
STARS = Scene(tuple(Item("shape", "star", x, 80, 30, "red") for x in (30, 80, 130)))


def _answers(scene: Scene) -> dict[str, str]:
    """Question -> answer, of many draws; a question has one answer."""
    found: dict[str, str] = {}
    for seed in range(400):
        for asked in ask(random.Random(seed), scene, 6):
            assert found.setdefault(asked.text, asked.answer) == asked.answer
    return found


@pytest.mark.parametrize(
    ("scene", "question", "answer"),
    [
        (CAT_AND_TREE, "Do you find a cat in it?", "yes"),
        (CAT_AND_TREE, "Yes or no: The cat is left of the onion.", "yes"),
        (CAT_AND_TREE, "The cat is below the onion, yes or no?", "no"),
        (CAT_AND_TREE, "Is this so? The onion is below the cat.", "yes"),
        (CAT_AND_TREE, "Further right: cat or onion?", "onion"),
        (CAT_AND_TREE, "Further up: onion or cat?", "cat"),
        (CAT_AND_TREE, "What do you find above the onion?", "cat"),
        (CAT_AND_TREE, "Look at the top left. What is it?", "cat"),
        (CAT_AND_TREE, "How many, all in all?", "two"),
        (WORD, "Copy what stands there.", "river"),
        (WORD, 'Yes or no: It reads "river".', "yes"),
        (WORD, "In what colour do you see the text?", "blue"),
        (WORD, "Is this so? The text is red.", "no"),
        (STARS, "How many, all in all?", "three"),
        (STARS, "Yes or no: The number of things is 3.", "yes"),
        (STARS, "Say which form you see.", "star"),
    ],
)
def test_answer_is_what_the_scene_shows(scene: Scene, question: str, answer: str) -> None:
    assert _answers(scene)[question] == answer


def test_nothing_is_asked_that_the_scene_leaves_open() -> None:
    answers = _answers(CAT_AND_TREE)
    assert all(answer == "no" for text, answer in answers.items() if re.match("Do you find", text) and "cat" not in text
               and "onion" not in text)  # fmt: skip
    assert not any("What thing is it?" in text for text in answers)  # there are two
    assert not any("colour do you see" in text for text in _answers(STARS))  # which of the three?
    assert ask(random.Random(0), WORD, 0) == []


def test_earlier_turns_do_not_give_an_answer_away() -> None:
    for picture in draw(300, "test/questions"):
        asked = ask(random.Random(picture.caption), picture.scene, 6)
        assert len({question.text for question in asked}) == len(asked) <= 6
        open_answers = [question.answer for question in asked if question.answer not in ("yes", "no")]
        assert len(set(open_answers)) == len(open_answers)


def test_yes_and_no_are_about_as_frequent() -> None:
    counts = Counter(
        question.answer
        for picture in draw(1500, "test/questions")
        for question in ask(random.Random(picture.caption), picture.scene, 6)
    )
    assert 0.85 < counts["yes"] / counts["no"] < 1.18


def test_no_wording_is_that_of_a_task_or_benchmark() -> None:
    templates = [
        re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))
        for entry in (*SEEN_TASKS.values(), *UNSEEN_BENCHMARKS.values())
        for template in entry.templates
    ]
    texts = {
        question.text
        for picture in draw(800, "test/questions")
        for question in ask(random.Random(picture.caption), picture.scene, 6)
    }
    assert any(pattern.fullmatch("Is there a cat in the image?") for pattern in templates)
    assert len(texts) > 1000
    assert [text for text in texts if any(pattern.fullmatch(text) for pattern in templates)] == []


def test_conversation_has_the_picture_once_and_the_questions_in_turns(tmp_path: Path) -> None:
    picture = Captioned(CAT_AND_TREE, "A cat and an onion.", ("cat", "onion"))
    write_pictures(tmp_path, [picture], questions=3)
    (record,) = json.loads((tmp_path / ANNOTATION).read_text())
    turns = record["conversations"]
    assert len(turns) in (6, 8)
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert turns[0]["value"].startswith("<image>\n")
    assert sum("<image>" in turn["value"] for turn in turns) == 1
    first = asked_first(0, picture)
    assert first is not None
    assert (turns[0]["value"], turns[1]["value"]) == (f"<image>\n{first.text}", first.answer)
