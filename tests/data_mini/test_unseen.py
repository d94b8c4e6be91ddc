"""The unseen benchmarks: numbers, balance, and right answers worked out again from the pictures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from mixlora_cli.data.mini.canvas import Digit, Scene, render_digit
from mixlora_cli.data.mini.objects import pictured
from mixlora_cli.data.mini.plan import Counts, Plan
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
        groups[record["benchmark"]].append((record, picture, question[8:], answer))  # type: ignore[arg-type]
    return groups


def test_numbers(instances: dict[str, list[Instance]]) -> None:
    assert {name: len(members) for name, members in instances.items()} == {
        "mini_mme": 160,
        "mini_textvqa": 120,
        "mini_vsr": 120,
        "mini_snli_ve": 120,
        "mini_cifar10": 120,
        "mini_cifar100": 134,
        "mini_mnist": 120,
        "mini_pope": 120,
    }


def test_share_of_pictures_is_at_least_one() -> None:
    counts = Counts(unseen=0.001)
    assert {counts.pictures(benchmark) for benchmark in UNSEEN_BENCHMARKS.values()} == {1}


def test_closed_answers_are_balanced(instances: dict[str, list[Instance]]) -> None:
    def answers(name: str) -> Counter[str]:
        return Counter(answer for *_, answer in instances[name])

    assert answers("mini_mme") == {"yes": 80, "no": 80}
    assert answers("mini_pope") == {"yes": 60, "no": 60}
    assert answers("mini_vsr") == {"yes": 60, "no": 60}
    assert answers("mini_snli_ve") == {"entailment": 40, "neutral": 40, "contradiction": 40}
    assert set(answers("mini_cifar10").values()) == {12}
    assert set(answers("mini_mnist").values()) == {12}
    assert answers("mini_cifar100") == {item.name: 2 for item in pictured("unseen")}
    assert len(answers("mini_textvqa")) >= 30


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


def holds(scene: Scene, statement: str) -> bool:
    match = re.fullmatch(
        r"The (\w+) (?:is|are) (to the left of|to the right of|above|below) the (\w+)\.", statement
    )
    assert match, statement
    first, second = (next(item for item in scene.items if item.name == name) for name in (match[1], match[3]))
    gap = {"to the left of": second.x - first.x, "to the right of": first.x - second.x}
    gap |= {"above": second.y - first.y, "below": first.y - second.y}
    assert abs(gap[match[2]]) > 40
    return gap[match[2]] > 0


def test_vsr_answers(instances: dict[str, list[Instance]]) -> None:
    relations: Counter[tuple[str, str]] = Counter()
    for _, scene, question, answer in instances["mini_vsr"]:
        statement = re.findall(r'"(.+)"', question)[0]
        assert holds(scene, statement) == (answer == "yes")
        relations[re.findall(r"left|right|above|below", statement)[0], answer] += 1
    assert len(relations) == 8  # each relation both true and false
    assert min(relations.values()) >= 8


def test_snli_answers(instances: dict[str, list[Instance]]) -> None:
    for record, scene, question, answer in instances["mini_snli_ve"]:
        hypothesis = re.findall(r'"(.+)"', question)[0]
        if answer == "neutral":
            assert re.search(r"gift|owned|tomorrow|before", hypothesis)
            continue
        if "things" in hypothesis:
            truth = "two" in hypothesis
        elif there := re.fullmatch(r"There (?:is|are) (?:an? )?(\w+)\.", hypothesis):
            truth = there[1] in {item.name for item in scene.items}
        else:
            truth = holds(scene, hypothesis)
        assert len(scene.items) == 2
        assert truth == (answer == "entailment"), record["id"]


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
    assert set(by_category.values()) == {20}
    assert all(len(set(names)) == 6 for names in asked.values())  # six different objects a picture


def test_naming_answers(instances: dict[str, list[Instance]]) -> None:
    for name in ("mini_cifar10", "mini_cifar100"):
        for record, scene, question, answer in instances[name]:
            assert [item.name for item in scene.items] == [answer]
            assert answer in record["labels"]
            assert all(label in question for label in record["labels"]) == (name == "mini_cifar10")
    assert len(instances["mini_cifar10"][0][0]["labels"]) == 10
    assert len(instances["mini_cifar100"][0][0]["labels"]) == 67


def test_text_answers(instances: dict[str, list[Instance]]) -> None:
    numbers = 0
    for record, scene, question, answer in instances["mini_textvqa"]:
        assert [item.name for item in scene.items if item.kind == "text"] == [answer]
        assert record["answers"] == [answer] * 10
        assert ("number" in question) == answer.isdigit()
        numbers += answer.isdigit()
    assert numbers == 30


def test_digits_are_those_of_scikit_learn(full_plan: Plan) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = [picture for picture in full_plan.pictures.values() if isinstance(picture, Digit)]
    assert len(digits) == 120
    for digit in digits:
        assert data.target[digit.index] == digit.label
        assert list(digit.ink) == data.images[digit.index].ravel().tolist()


def test_a_digit_is_drawn_dark_on_white_where_its_ink_is() -> None:
    ink = bytes(16 if row == 0 and column < 4 else 0 for row in range(8) for column in range(8))
    picture = render_digit(Digit(label=7, index=0, ink=ink, size=120))
    assert picture.size == (160, 160)
    # 10 x 10 cells of 12 pixels from (20, 20): the first row of ink is centred at y = 38, its columns at 38, 50, 62, 74
    assert max(picture.getpixel((50, 38))) < 20  # type: ignore[type-var, arg-type]
    assert min(picture.getpixel((98, 38))) > 235  # type: ignore[type-var, arg-type]
    assert min(picture.getpixel((50, 74))) > 235  # type: ignore[type-var, arg-type]
    assert picture.getpixel((5, 5)) == (255, 255, 255)
