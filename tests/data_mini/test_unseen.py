"""The unseen benchmarks: numbers, balance, and right answers worked out again from the pictures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.objects import COLOURS, MiniObject, capitalised
from mixlora_cli.data.mini.plan import Counts, Plan
from mixlora_cli.data.mini.seen import CATEGORIES, category_word
from mixlora_cli.data.mini.unseen import GROUPS, PURPOSES, SUBTASKS, UNSEEN_BENCHMARKS

Instance = tuple[dict[str, Any], Scene, str, str]


@pytest.fixture(scope="module")
def instances(full_plan: Plan) -> dict[str, list[Instance]]:
    """Benchmark -> (record, picture, question, answer)."""
    groups: dict[str, list[Instance]] = defaultdict(list)
    for record in full_plan.records["unseen"]:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.startswith("<image>\n")
        picture = full_plan.pictures[record["image"]]
        groups[record["benchmark"]].append((record, picture, question[8:], answer))
    return groups


def test_numbers(instances: dict[str, list[Instance]]) -> None:
    assert {name: len(members) for name, members in instances.items()} == {
        "mini_mme": 160,
        "mini_textvqa": 180,
        "mini_vsr": 120,
        "mini_snli_ve": 120,
        "mini_cifar10": 117,
        "mini_cifar100": 117,
        "mini_mnist": 180,
        "mini_pope": 360,
    }


def test_share_of_pictures_is_at_least_one() -> None:
    counts = Counts(unseen=0.001)
    assert {counts.pictures(benchmark) for benchmark in UNSEEN_BENCHMARKS.values()} == {1}


def test_closed_answers_are_balanced(instances: dict[str, list[Instance]]) -> None:
    def answers(name: str) -> Counter[str]:
        return Counter(answer for *_, answer in instances[name])

    assert answers("mini_mme") == {"yes": 80, "no": 80}
    assert answers("mini_pope") == {"yes": 180, "no": 180}
    assert answers("mini_vsr") == {"above": 60, "below": 60}
    assert answers("mini_snli_ve") == {"true": 60, "false": 60}
    categories = {category_word(category): 13 for category in CATEGORIES}
    assert answers("mini_cifar10") == answers("mini_cifar100") == categories
    assert answers("mini_mnist") == {str(n): 30 for n in range(1, 7)}
    assert len(answers("mini_textvqa")) == 30  # every unseen number, none of them often
    assert max(answers("mini_textvqa").values()) <= 18


def test_pairs_share_a_picture_and_are_answered_yes_and_no(instances: dict[str, list[Instance]]) -> None:
    pairs: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances["mini_mme"]:
        pairs[instance[0]["image_id"]].append(instance)
    assert len(pairs) == 80
    for first, second in pairs.values():
        assert first[0]["image"] == second[0]["image"]
        assert first[0]["category"] == second[0]["category"]
        assert {first[3], second[3]} == {"yes", "no"}
    categories = Counter(record["category"] for record, *_ in instances["mini_mme"])
    assert categories == {name: 20 for name in SUBTASKS}
    first_answers = Counter(members[0][3] for members in pairs.values())
    assert 28 <= first_answers["yes"] <= 52  # the order of the two questions tells nothing


def mme_truth(category: str, scene: Scene, question: str) -> bool:
    names = [item.name for item in scene.items]
    text = question.removesuffix(" Please answer yes or no.")
    assert text != question
    if category == "existence":
        return re.sub(r"^(Is|Are) there (an? )?| in this image\?$", "", text) in names
    if category == "count":
        return int(re.findall(r"\d+", text)[0]) == len(names)
    if category == "position":
        subject, side, other = re.findall(r"the (\w+)", text)
        places = {item.name: item.x for item in scene.items}
        return (places[subject] < places[other]) == (side == "left")
    if category == "color":
        return f" {scene.items[0].colour} {names[0]} " in text
    if category == "scene":
        group = re.fullmatch(r"Are all objects in this image (.+)\?", text)
        assert group
        return {GROUPS[item.content.category] for item in scene.items} == {group[1]}  # type: ignore[union-attr]
    if category == "OCR":
        return f'"{names[0]}"' in text
    if category == "commonsense_reasoning":
        return text == f"Can the object in this image be used to {PURPOSES[names[0]]}?"
    a, sign, b = names[0].split()
    return int(re.findall(r"\d+", text)[0]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_mme_answers(instances: dict[str, list[Instance]]) -> None:
    for record, scene, question, answer in instances["mini_mme"]:
        assert mme_truth(record["category"], scene, question) == (answer == "yes"), record["id"]


def test_vsr_answers(instances: dict[str, list[Instance]]) -> None:
    for record, scene, question, answer in instances["mini_vsr"]:
        match = re.fullmatch(r"Compared with the (\w+), (?:is|are) the (\w+) above or below\?", question)
        assert match
        heights = {item.name: item.y for item in scene.items}
        assert len(heights) == len(scene.items) == 3
        gap = heights[match[1]] - heights[match[2]]
        assert abs(gap) > 40
        assert ("above" if gap > 0 else "below") == answer, record["id"]


KINDS = {"an animal": "animal", "a vehicle": "vehicle", "a tool": "tool", "a body part": "body"}


def test_snli_answers(instances: dict[str, list[Instance]]) -> None:
    forms: Counter[tuple[str, str]] = Counter()
    for record, scene, question, answer in instances["mini_snli_ve"]:
        hypothesis = re.findall(r'Hypothesis: "(.+)\." True or false\?$', question)[0]
        names = {item.name for item in scene.items}
        kinds = {item.content.category for item in scene.items}  # type: ignore[union-attr]
        told = re.sub(r" can be seen$|^There (is|are) ", "", hypothesis)
        if " and " in told:
            form, truth = "two", {re.sub("^an? ", "", part.lower()) for part in told.split(" and ")} == names
        elif told in KINDS or told in ("food", "clothing"):
            form, truth = "category", KINDS.get(told, told) in kinds
        else:
            form, truth = "one", re.sub("^an? ", "", told) in names
        assert len(names) == 2
        assert truth == (answer == "true"), record["id"]
        forms[form, answer] += 1
    assert forms == {
        (form, answer): 20 for form in ("one", "category", "two") for answer in ("true", "false")
    }


def test_pope_answers_and_categories(instances: dict[str, list[Instance]]) -> None:
    by_category: Counter[tuple[str, str]] = Counter()
    asked: dict[str, list[str]] = defaultdict(list)
    for record, scene, question, answer in instances["mini_pope"]:
        match = re.fullmatch(r"(?:Is|Are) there (?:an? )?(\w+) in the image\?", question)
        assert match
        assert (match[1] in {item.name for item in scene.items}) == (answer == "yes")
        by_category[record["category"], answer] += 1
        asked[record["image_id"]].append(match[1])
    assert set(by_category) == {(c, a) for c in ("adversarial", "popular", "random") for a in ("yes", "no")}
    assert set(by_category.values()) == {60}
    assert all(len(set(names)) == 6 for names in asked.values())  # six different objects a picture


def shown_categories(scene: Scene) -> set[str]:
    assert all(isinstance(item.content, MiniObject) for item in scene.items)
    return {category_word(item.content.category) for item in scene.items}  # type: ignore[union-attr]


def test_offered_categories(instances: dict[str, list[Instance]]) -> None:
    first = 0
    for record, scene, question, answer in instances["mini_cifar10"]:
        assert len(scene.items) == 1 and shown_categories(scene) == {answer}
        right, wrong = record["labels"]
        assert right == answer != wrong
        starts = question == f"{capitalised(right)} or {wrong}: which category fits?"
        assert starts or question == f"{capitalised(wrong)} or {right}: which category fits?"
        first += starts
    assert 45 <= first <= 72  # the order tells nothing


def test_shared_categories(instances: dict[str, list[Instance]]) -> None:
    numbers: Counter[int] = Counter()
    for record, scene, _, answer in instances["mini_cifar100"]:
        assert shown_categories(scene) == {answer}
        assert len({item.name for item in scene.items}) == len(scene.items)
        assert record["labels"] == [category_word(category) for category in CATEGORIES]
        numbers[len(scene.items)] += 1
    assert set(numbers) == {2, 3} and min(numbers.values()) >= 40


def test_text_answers(instances: dict[str, list[Instance]]) -> None:
    for record, scene, _, answer in instances["mini_textvqa"]:
        assert [item.kind for item in scene.items] == ["text", "object"]
        text, item = scene.items
        assert text.name == answer and record["answers"] == [answer] * 10
        assert text.box[3] <= item.box[1] or item.box[3] <= text.box[1]  # one above the other


def test_numbers_of_things(instances: dict[str, list[Instance]]) -> None:
    kinds: Counter[str] = Counter()
    for record, scene, _, answer in instances["mini_mnist"]:
        assert str(len(scene.items)) == answer in record["labels"]
        kinds.update({item.kind for item in scene.items})
        for item in scene.items:
            assert item.kind == "object" or (item.colour in COLOURS and item.colour != scene.background)
    assert min(kinds["shape"], kinds["object"]) >= 100
