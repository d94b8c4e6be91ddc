"""The answer of every seen instance, worked out again from the scene and the question's own words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from random import Random

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


LITERAL = {
    "object_naming": ("What object is shown?", "goggles"),
    "object_category": ("Which category does the object belong to?", "building"),
    "object_presence": ("Can you see an elephant here?", "yes"),
    "count_words": ("Number of objects, in words?", "three objects"),
    "odd_one_out": ("Which object is the odd one out?", "bread"),
    "choice_letter": ("Is this (A) spoon or (B) goggles? Answer by letter.", "B"),
    "left_or_right": ("Seen from the bread, are the goggles left or right?", "left"),
    "above_or_below": ("Seen from the goggles, is the bread above or below?", "below"),
    "picture_position": ("In which part of the picture are the goggles?", "bottom right"),
    "shape_colour": ("What colour is the shape?", "gray"),
    "flag_naming": ("Which country has this flag?", "Peru"),
    "first_letter": ("Give only the initial letter.", "h"),
    "number_comparison": ("Which number is smaller?", "24"),
    "captioning": ("Write a short caption.", "a red circle left of an elevator"),
    "caption_matching": ('Does "a red circle left of an elevator" fit the picture?', "yes"),
}


@pytest.mark.parametrize("task", LITERAL)
def test_a_seed_always_gives_this_instance(task: str) -> None:
    _, question, answer = SEEN_TASKS[task].instance(Random(7))
    assert (question, answer) == LITERAL[task]


def test_a_seed_always_gives_this_scene() -> None:
    scene, _, _ = SEEN_TASKS["left_or_right"].instance(Random(7))
    places = [(item.name, item.x, item.y, item.size) for item in scene.items]
    assert places == [("goggles", 33, 41, 56), ("bread", 116, 81, 61)]
    assert scene.background == "pink"


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
