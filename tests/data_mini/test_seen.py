"""The seen tasks: each answer worked out again from the scene and the question's words; balance; no picture twice."""

from __future__ import annotations

import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from mixlora_cli.data.mini.canvas import SIZE, Item, Scene
from mixlora_cli.data.mini.plan import Plan
from mixlora_cli.data.mini.seen import SEEN_TASKS

ENGLISH = ["zero", "one", "two", "three", "four", "five", "six"]


def bare(phrase: str) -> str:
    return re.sub(r"^(an?|An?) ", "", phrase).lower()


def named(scene: Scene, name: str) -> Item:
    (item,) = [item for item in scene.items if item.name == name]
    return item


def only(scene: Scene) -> Item:
    (item,) = scene.items
    return item


def subject_and_other(question: str) -> tuple[str, str]:
    subject = re.search(r"\b(?:is|are) the (\w+)", question, re.IGNORECASE)
    assert subject
    others = [name for name in re.findall(r"the (\w+)", question) if name != subject[1]]
    return subject[1], others[0]


def asked_presence(scene: Scene, question: str) -> bool:
    match = re.search(
        r"(?:picture shows?|this shows|see|for) ([a-z ]+?)( here)?[?.:\"]|^(.*) can be seen", question
    )
    assert match
    return bare(match[1] or match[3]) in {item.name for item in scene.items}


def fits(scene: Scene, caption: str) -> bool:
    """Whether a caption is true in all its parts."""
    if word := re.fullmatch(r"the word (\w+)", caption):
        return only(scene).name == word[1]
    if ground := re.fullmatch(r"(.+) on (\w+)", caption):
        return (only(scene).name, scene.background) == (bare(ground[1]), ground[2])
    match = re.fullmatch(r"(.+) (left of|above) (.+)", caption)
    assert match
    found = []
    for phrase in (bare(match[1]), bare(match[3])):
        *colour, name = phrase.split()
        found += [
            item
            for item in scene.items
            if item.name == name and (item.colour == colour[0] if item.kind == "shape" else not colour)
        ]
    if len(found) != 2:
        return False
    return found[0].x + 40 < found[1].x if match[2] == "left of" else found[0].y + 40 < found[1].y


def neighbour(scene: Scene, question: str) -> str:
    row = sorted(scene.items, key=lambda item: item.x)
    match = re.search(r"(left|right) of the (\w+)", question)
    assert match
    at = [item.name for item in row].index(match[2])
    return row[at + (1 if match[1] == "right" else -1)].name


def position(scene: Scene, question: str) -> str:
    match = re.search(r"the (\w+)[?.]$", question)
    assert match
    item = named(scene, match[1])
    if abs(item.x - 80) < 10 and abs(item.y - 80) < 10:
        return "middle"
    assert abs(item.x - 80) > 40
    assert abs(item.y - 80) > 40
    return f"{'top' if item.y < 80 else 'bottom'} {'left' if item.x < 80 else 'right'}"


def size(scene: Scene, question: str) -> str:
    small, large = sorted(scene.items, key=lambda item: item.size)
    assert large.size >= 1.5 * small.size
    assert small.name in question
    assert large.name in question
    return (large if "larger" in question else small).name


def odd(scene: Scene, question: str) -> str:
    counts = Counter(item.name for item in scene.items)
    assert sorted(counts.values()) == [1, 3]
    return min(counts, key=lambda name: counts[name])


def letter(scene: Scene, question: str) -> str:
    options = re.findall(r"\(([AB])\) (\w+)|([AB]): (\w+)", question)
    table = {first or third: second or fourth for first, second, third, fourth in options}
    assert set(table) == {"A", "B"}
    (right,) = [key for key, name in table.items() if name == only(scene).name]
    return right


def compared(scene: Scene, question: str) -> str:
    numbers = [int(item.name) for item in scene.items]
    assert numbers[0] != numbers[1]
    return str(max(numbers) if "larger" in question else min(numbers))


def result(scene: Scene, question: str) -> str:
    a, sign, b = only(scene).name.split()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


def side(scene: Scene, question: str, axis: str, answers: tuple[str, str]) -> str:
    subject, other = (named(scene, name) for name in subject_and_other(question))
    gap = getattr(subject, axis) - getattr(other, axis)
    assert abs(gap) > 40  # far enough to be told at a glance
    return answers[gap > 0]


def category(scene: Scene, question: str) -> str:
    content = only(scene).content
    assert not isinstance(content, str)
    return {"body": "body part"}.get(content.category, content.category)


def in_words(scene: Scene, question: str) -> str:
    count = len(scene.items)
    return f"{ENGLISH[count]} object{'s' if count > 1 else ''}"


def matching(scene: Scene, question: str) -> str:
    match = re.search(r"\"(.+)\"|Caption: (.+)\. Is|Does it show (.+)\?", question)
    assert match
    return "yes" if fits(scene, next(filter(None, match.groups()))) else "no"


ORACLES: dict[str, Callable[[Scene, str], str]] = {
    "object_naming": lambda scene, _: only(scene).name,
    "object_category": category,
    "object_presence": lambda scene, question: "yes" if asked_presence(scene, question) else "no",
    "statement_truth": lambda scene, question: "true" if asked_presence(scene, question) else "false",
    "count_digit": lambda scene, _: str(len(scene.items)),
    "count_words": in_words,
    "count_kinds": lambda scene, _: str(len({item.name for item in scene.items})),
    "odd_one_out": odd,
    "same_or_different": lambda scene, _: (
        "same" if scene.items[0].content == scene.items[1].content else "different"
    ),
    "choice_letter": letter,
    "left_or_right": lambda scene, question: side(scene, question, "x", ("left", "right")),
    "above_or_below": lambda scene, question: side(scene, question, "y", ("above", "below")),
    "neighbour_naming": neighbour,
    "picture_position": position,
    "size_comparison": size,
    "shape_colour": lambda scene, _: only(scene).colour,
    "shape_naming": lambda scene, _: only(scene).name,
    "background_colour": lambda scene, _: scene.background,
    "flag_naming": lambda scene, _: only(scene).name,
    "word_reading": lambda scene, _: only(scene).name,
    "first_letter": lambda scene, _: only(scene).name[:1],
    "number_reading": lambda scene, _: only(scene).name,
    "arithmetic": result,
    "number_comparison": compared,
    "caption_matching": matching,
}


@pytest.mark.parametrize("task", [task for task in SEEN_TASKS if task != "captioning"])
def test_every_answer_follows_from_the_scene(task: str, full_plan: Plan) -> None:
    oracle = ORACLES[task]
    checked = 0
    for split in ("train", "heldout"):
        for record in full_plan.records[split]:
            if record["task_name"] == task:
                question, answer = (turn["value"] for turn in record["conversations"])
                scene = full_plan.pictures[record["image"]]
                assert isinstance(scene, Scene)
                assert oracle(scene, question.removeprefix("<image>\n")) == answer, record["id"]
                checked += 1
    assert checked == 560


def test_every_caption_is_true_and_names_the_first_thing_first(full_plan: Plan) -> None:
    captions = [
        (full_plan.pictures[record["image"]], record["conversations"][1]["value"])
        for record in full_plan.records["train"]
        if record["task_name"] == "captioning"
    ]
    assert len(captions) == 500
    assert all(fits(scene, caption) for scene, caption in captions if isinstance(scene, Scene))
    assert max(len(caption.split()) for _, caption in captions) <= 10


def test_everything_is_on_the_canvas_and_apart(full_plan: Plan) -> None:
    scenes = [picture for picture in full_plan.pictures.values() if isinstance(picture, Scene)]
    assert len(scenes) > 15_000
    for scene in scenes:
        boxes = [item.box for item in scene.items]
        for k, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 0, scene
            assert max(right, bottom) <= SIZE, scene
            for other in boxes[:k]:
                beside = right <= other[0] or other[2] <= left
                assert beside or bottom <= other[1] or other[3] <= top, scene


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
    assert len(full_plan.pictures) == 26 * 560 + 974
    assert len(set(full_plan.pictures.values())) == len(full_plan.pictures)


def test_without_docstrings_nothing_is_drawn() -> None:
    loading = [sys.executable, "-OO", "-c", "import mixlora_cli.data.mini.seen"]
    done = subprocess.run(loading, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "start it without -OO" in done.stderr
