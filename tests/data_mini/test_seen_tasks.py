"""The table of seen tasks: instructions, balance of the answers, no instance twice."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest

from mixlora_cli.data.mini.plan import Plan
from mixlora_cli.data.mini.seen import SEEN_TASKS

# task -> (number of possible answers, largest share that one of them may have in training)
CLOSED = {
    "object_category": (9, 0.16),
    "object_presence": (2, 0.56),
    "statement_truth": (2, 0.56),
    "count_digit": (6, 0.22),
    "count_words": (6, 0.22),
    "count_kinds": (4, 0.32),
    "same_or_different": (2, 0.56),
    "choice_letter": (2, 0.56),
    "left_or_right": (2, 0.56),
    "above_or_below": (2, 0.56),
    "picture_position": (5, 0.26),
    "shape_colour": (10, 0.16),
    "shape_naming": (5, 0.26),
    "background_colour": (6, 0.22),
    "flag_naming": (14, 0.12),
    "arithmetic": (19, 0.16),
    "caption_matching": (2, 0.56),
}
# task -> (at least so many different answers, largest share of one)
OPEN = {
    "object_naming": (120, 0.03),
    "odd_one_out": (120, 0.03),
    "neighbour_naming": (120, 0.03),
    "size_comparison": (120, 0.03),
    "word_reading": (35, 0.06),
    "first_letter": (15, 0.25),
    "number_reading": (58, 0.05),
    "number_comparison": (50, 0.06),
    "captioning": (350, 0.03),
}


def test_each_task_is_described() -> None:
    assert len(SEEN_TASKS) == 26
    for name, task in SEEN_TASKS.items():
        assert name == task.name
        assert set(name) <= set(string.ascii_lowercase + "_")
        assert len(set(task.templates)) >= 3
        assert task.definition.endswith(".")
        assert 8 <= len(task.definition.split()) <= 45
    templates = [template for task in SEEN_TASKS.values() for template in task.templates]
    assert len(templates) == len(set(templates))  # an instruction tells its task


def test_answers_are_spread(full_plan: Plan) -> None:
    assert CLOSED.keys() | OPEN.keys() == SEEN_TASKS.keys()
    answers: dict[str, Counter[str]] = {name: Counter() for name in SEEN_TASKS}
    for record in full_plan.records["train"]:
        answers[record["task_name"]][record["conversations"][1]["value"]] += 1
    for name, (number, share) in CLOSED.items():
        assert len(answers[name]) == number, name
        assert answers[name].most_common(1)[0][1] <= 500 * share, name
    for name, (number, share) in OPEN.items():
        assert len(answers[name]) >= number, name
        assert answers[name].most_common(1)[0][1] <= 500 * share, name


def test_questions_and_answers_are_short(full_plan: Plan) -> None:
    for record in full_plan.records["train"]:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.startswith("<image>\n")
        assert "{" not in question
        assert len(question.split()) - 1 <= 14, question
        assert len(answer.split()) <= (10 if record["task_name"] == "captioning" else 2), answer


def test_templates_are_drawn_alike(full_plan: Plan) -> None:
    """Of 500 draws of three templates each takes 167 on average, with a standard deviation of 10.5."""
    used: Counter[str] = Counter()
    for record in full_plan.records["train"]:
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        for template in SEEN_TASKS[record["task_name"]].templates:
            parts = re.split(r"\{\w+\}", template)
            used[template] += bool(re.fullmatch(".+".join(map(re.escape, parts)), question))
    assert len(used) == 78
    assert used.total() == 500 * 26  # every question comes from exactly one template
    assert all(125 <= number <= 209 for number in used.values())


@pytest.mark.parametrize("subject", ["left_or_right", "above_or_below"])
def test_word_order_does_not_give_the_answer_away(subject: str, full_plan: Plan) -> None:
    """The first named thing is the subject in one template of three, so its place says nothing."""
    first_drawn = 0
    records = [record for record in full_plan.records["train"] if record["task_name"] == subject]
    for record in records:
        scene = full_plan.pictures[record["image"]]
        question = record["conversations"][0]["value"]
        places = [question.index(f"the {item.name}") for item in scene.items]  # type: ignore[union-attr]
        first_drawn += places[0] < places[1]
    assert 0.42 <= first_drawn / len(records) <= 0.58


def test_no_picture_twice(full_plan: Plan) -> None:
    assert len(full_plan.pictures) == 26 * 560 + 834
    assert len(set(full_plan.pictures.values())) == len(full_plan.pictures)
