"""Seen tasks about what is in a picture: names, categories, presence, numbers, kinds."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.layout import anywhere, background, ninths, quarters, side_by_side, thing, things
from mixlora_cli.data.mini.objects import MiniObject
from mixlora_cli.data.mini.task import Draw, Task
from mixlora_cli.data.mini.vocabulary import capitalised, pictured, with_article

CATEGORIES = {
    "animal": "animal",
    "food": "food",
    "vehicle": "vehicle",
    "tool": "tool",
    "clothing": "clothing",
    "building": "building",
    "furniture": "furniture",
    "nature": "nature",
    "body": "body part",
}
"""Category of the object table -> answer; the mixed ones ("thing", "music") are not asked for."""
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")


def some_objects(rng: Random, count: int) -> list[MiniObject]:
    """Different seen objects."""
    return rng.sample(pictured("seen"), count)


def similar_object(rng: Random, shown: list[MiniObject]) -> MiniObject:
    """A seen object that is not shown, half the time of the category of a shown one."""
    absent = [item for item in pictured("seen") if item not in shown]
    if rng.random() < 0.5:
        category = rng.choice(shown).category
        absent = [item for item in absent if item.category == category] or absent
    return rng.choice(absent)


def _one(rng: Random, item: MiniObject) -> Scene:
    return Scene((thing(item, anywhere(rng)),), background(rng))


def _name(rng: Random) -> Draw:
    item = rng.choice(pictured("seen"))
    return Draw(_one(rng, item), item.name)


def _category(rng: Random) -> Draw:
    category = rng.choice(tuple(CATEGORIES))  # the category first: there are far more animals than buildings
    item = rng.choice([item for item in pictured("seen") if item.category == category])
    return Draw(_one(rng, item), CATEGORIES[category])


def _asked_for(rng: Random, right: str, wrong: str) -> Draw:
    shown = some_objects(rng, rng.randint(2, 4))
    scene = Scene(things(shown, quarters(rng, len(shown))), background(rng))
    there = rng.random() < 0.5
    asked = rng.choice(shown) if there else similar_object(rng, shown)
    phrase = with_article(asked.name)
    return Draw(scene, right if there else wrong, {"a": phrase, "A": capitalised(phrase)})


def _presence(rng: Random) -> Draw:
    return _asked_for(rng, "yes", "no")


def _statement(rng: Random) -> Draw:
    return _asked_for(rng, "true", "false")


def _crowd(rng: Random) -> tuple[Scene, int]:
    """One to six objects, half the time all alike, so that the kinds do not give the number away."""
    count = rng.randint(1, 6)
    shown = some_objects(rng, 1) * count if rng.random() < 0.5 else some_objects(rng, count)
    return Scene(things(shown, ninths(rng, count)), background(rng)), count


def _count_digit(rng: Random) -> Draw:
    scene, count = _crowd(rng)
    return Draw(scene, str(count))


def _count_words(rng: Random) -> Draw:
    scene, count = _crowd(rng)
    return Draw(scene, f"{NUMBER_WORDS[count]} {'object' if count == 1 else 'objects'}")


def _count_kinds(rng: Random) -> Draw:
    kinds = some_objects(rng, rng.randint(1, 4))
    count = rng.randint(max(2, len(kinds)), 6)
    shown = kinds + [rng.choice(kinds) for _ in range(count - len(kinds))]
    return Draw(Scene(things(shown, ninths(rng, count)), background(rng)), str(len(kinds)))


def _odd_one_out(rng: Random) -> Draw:
    usual, odd = some_objects(rng, 2)
    spots = quarters(rng, 4)
    return Draw(Scene(things([usual, usual, usual, odd], spots), background(rng)), odd.name)


def _same_or_different(rng: Random) -> Draw:
    first, second = some_objects(rng, 2)
    same = rng.random() < 0.5
    shown = [first, first] if same else [first, second]
    return Draw(Scene(things(shown, side_by_side(rng)), background(rng)), "same" if same else "different")


def _choice_letter(rng: Random) -> Draw:
    shown = rng.choice(pictured("seen"))
    options = [shown, similar_object(rng, [shown])]
    rng.shuffle(options)
    blanks = {"first": options[0].name, "second": options[1].name}
    return Draw(_one(rng, shown), "AB"[options.index(shown)], blanks)


OBJECT_TASKS = (
    Task(
        "object_naming",
        "Name the one object that the picture shows. The answer is the object's name in lower case.",
        ("What object is shown?", "Name the object.", "Which thing do you see here?"),
        _name,
    ),
    Task(
        "object_category",
        "Say which category the pictured object belongs to, not what it is called. The categories are "
        + ", ".join(CATEGORIES.values())
        + ".",
        (
            "Which category does the object belong to?",
            "What kind of thing is it?",
            "Give the category of the object.",
        ),
        _category,
    ),
    Task(
        "object_presence",
        "Decide whether the object that the question names is one of those in the picture. Answer yes or no.",
        ("Does the picture show {a}?", "Can you see {a} here?", "Look for {a}: yes or no?"),
        _presence,
    ),
    Task(
        "statement_truth",
        "Decide whether a statement about the objects in the picture is true. Answer true or false.",
        (
            "True or false: the picture shows {a}.",
            "{A} can be seen. True or false?",
            'Judge "this shows {a}" as true or false.',
        ),
        _statement,
    ),
    Task(
        "count_digit",
        "Count all objects in the picture, whatever they are. The answer is a single digit.",
        (
            "How many objects are there? Use a digit.",
            "Count the objects and reply with a digit.",
            "Number of objects, as a digit?",
        ),
        _count_digit,
    ),
    Task(
        "count_words",
        "Count all objects in the picture, whatever they are. The answer is in words, such as: two objects.",
        (
            "How many objects are there? Use words.",
            "Count the objects and reply in words.",
            "Number of objects, in words?",
        ),
        _count_words,
    ),
    Task(
        "count_kinds",
        "Count how many different kinds of object the picture shows; several of the same kind count once.",
        (
            "How many different kinds of object are there?",
            "Count the kinds of object.",
            "Number of distinct kinds?",
        ),
        _count_kinds,
    ),
    Task(
        "odd_one_out",
        "Three of the four objects are the same. Name the one that differs from them.",
        (
            "Which object is the odd one out?",
            "One object differs from the rest. Name it.",
            "Find the object that does not fit.",
        ),
        _odd_one_out,
    ),
    Task(
        "same_or_different",
        "Compare the two objects in the picture. Answer same if they are of one kind, whatever their size, "
        "else different.",
        (
            "Are the two objects the same or different?",
            "Compare both objects: same or different?",
            "Same or different objects?",
        ),
        _same_or_different,
    ),
    Task(
        "choice_letter",
        "Two names are offered for the pictured object. Answer with the letter of the right one, A or B.",
        (
            "Pick the object shown: (A) {first} (B) {second}. Reply A or B.",
            "A: {first}, B: {second}. Which letter fits?",
            "Is this (A) {first} or (B) {second}? Answer by letter.",
        ),
        _choice_letter,
    ),
)
