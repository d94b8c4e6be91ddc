"""The seen tasks: what each asks for, its instructions, and how one instance is drawn. One function each.

Several tasks answer by conventions that conflict under alike pictures, so that one can harm another:
object_naming / object_category / choice_letter, object_presence / statement_truth / caption_matching,
count_digit / count_words / count_kinds, word_reading / first_letter, shape_colour / shape_naming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from mixlora_cli.data.mini.canvas import SIZE, Item, Scene
from mixlora_cli.data.mini.layout import (
    PLACES,
    anywhere,
    background,
    colour_on,
    ninths,
    one_above_other,
    place,
    quarters,
    row_of_three,
    side_by_side,
    small_and_large,
    thing,
    things,
    writing,
)
from mixlora_cli.data.mini.objects import (
    BACKGROUNDS,
    COLOURS,
    FLAGS,
    NUMBER_WORDS,
    MiniObject,
    calculations,
    capitalised,
    definition_of,
    is_or_are,
    pictured,
    shapes,
    two_digit_numbers,
    with_article,
    written_words,
)

CATEGORIES = ("animal", "food", "vehicle", "tool", "clothing", "building", "furniture", "nature", "body")
"""Of the object table; the mixed ones ("thing", "music") are not asked for."""


def category_word(category: str) -> str:
    """What an answer calls it."""
    return "body part" if category == "body" else category


@dataclass(frozen=True)
class Draw:
    """A picture, the right answer, and the words that the instruction's blanks are filled with."""

    scene: Scene
    answer: str
    blanks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One training task."""

    name: str
    definition: str
    """What the task requires, in one or two sentences; task routing reads it."""
    templates: tuple[str, ...]
    """Paraphrased instructions; `{blank}` is filled from `Draw.blanks`."""
    draw: Callable[[Random], Draw]

    def instance(self, rng: Random) -> tuple[Scene, str, str]:
        """A random (scene, question, answer)."""
        drawn = self.draw(rng)
        return drawn.scene, rng.choice(self.templates).format(**drawn.blanks), drawn.answer


def task(*templates: str) -> Callable[[Callable[[Random], Draw]], Task]:
    """Make a task of the function that draws its instances: of its name, and of its docstring as the definition."""
    return lambda draw: Task(draw.__name__, definition_of(draw), templates, draw)


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


# What is in a picture: names, categories, presence, numbers, kinds.


def _one(rng: Random, item: MiniObject) -> Scene:
    return Scene((thing(item, anywhere(rng)),), background(rng))


@task("What object is shown?", "Name the object.", "Which thing do you see here?")
def object_naming(rng: Random) -> Draw:
    """Name the one object that the picture shows. The answer is the object's name in lower case."""
    item = rng.choice(pictured("seen"))
    return Draw(_one(rng, item), item.name)


@task(
    "Which category does the object belong to?",
    "What kind of thing is it?",
    "Give the category of the object.",
)
def object_category(rng: Random) -> Draw:
    """Say which category the pictured object belongs to, not what it is called. The categories are animal, food,
    vehicle, tool, clothing, building, furniture, nature, body part.
    """
    category = rng.choice(CATEGORIES)  # the category first: there are far more animals than buildings
    item = rng.choice([item for item in pictured("seen") if item.category == category])
    return Draw(_one(rng, item), category_word(category))


def _asked_for(rng: Random, right: str, wrong: str) -> Draw:
    shown = some_objects(rng, rng.randint(2, 4))
    scene = Scene(things(shown, quarters(rng, len(shown))), background(rng))
    there = rng.random() < 0.5
    asked = rng.choice(shown) if there else similar_object(rng, shown)
    phrase = with_article(asked.name)
    return Draw(scene, right if there else wrong, {"a": phrase, "A": capitalised(phrase)})


@task("Does the picture show {a}?", "Can you see {a} here?", "Look for {a}: yes or no?")
def object_presence(rng: Random) -> Draw:
    """Decide whether the object that the question names is one of those in the picture. Answer yes or no."""
    return _asked_for(rng, "yes", "no")


@task(
    "True or false: the picture shows {a}.",
    "{A} can be seen. True or false?",
    'Judge "this shows {a}" as true or false.',
)
def statement_truth(rng: Random) -> Draw:
    """Decide whether a statement about the objects in the picture is true. Answer true or false."""
    return _asked_for(rng, "true", "false")


def _crowd(rng: Random) -> tuple[Scene, int]:
    """One to six objects, half the time all alike, so that the kinds do not give the number away."""
    count = rng.randint(1, 6)
    shown = some_objects(rng, 1) * count if rng.random() < 0.5 else some_objects(rng, count)
    return Scene(things(shown, ninths(rng, count)), background(rng)), count


@task(
    "How many objects are there? Use a digit.",
    "Count the objects and reply with a digit.",
    "Number of objects, as a digit?",
)
def count_digit(rng: Random) -> Draw:
    """Count all objects in the picture, whatever they are. The answer is a single digit."""
    scene, count = _crowd(rng)
    return Draw(scene, str(count))


@task(
    "How many objects are there? Use words.",
    "Count the objects and reply in words.",
    "Number of objects, in words?",
)
def count_words(rng: Random) -> Draw:
    """Count all objects in the picture, whatever they are. The answer is in words, such as: two objects."""
    scene, count = _crowd(rng)
    return Draw(scene, f"{NUMBER_WORDS[count]} {'object' if count == 1 else 'objects'}")


@task(
    "How many different kinds of object are there?", "Count the kinds of object.", "Number of distinct kinds?"
)
def count_kinds(rng: Random) -> Draw:
    """Count how many different kinds of object the picture shows; several of the same kind count once."""
    kinds = some_objects(rng, rng.randint(1, 4))
    count = rng.randint(max(2, len(kinds)), 6)
    shown = kinds + [rng.choice(kinds) for _ in range(count - len(kinds))]
    return Draw(Scene(things(shown, ninths(rng, count)), background(rng)), str(len(kinds)))


@task(
    "Which object is the odd one out?",
    "One object differs from the rest. Name it.",
    "Find the object that does not fit.",
)
def odd_one_out(rng: Random) -> Draw:
    """Three of the four objects are the same. Name the one that differs from them."""
    usual, odd = some_objects(rng, 2)
    spots = quarters(rng, 4)
    return Draw(Scene(things([usual, usual, usual, odd], spots), background(rng)), odd.name)


@task(
    "Are the two objects the same or different?",
    "Compare both objects: same or different?",
    "Same or different objects?",
)
def same_or_different(rng: Random) -> Draw:
    """Compare the two objects in the picture. Answer same if they are of one kind, whatever their size, else
    different.
    """
    first, second = some_objects(rng, 2)
    same = rng.random() < 0.5
    shown = [first, first] if same else [first, second]
    return Draw(Scene(things(shown, side_by_side(rng)), background(rng)), "same" if same else "different")


@task(
    "Pick the object shown: (A) {first} (B) {second}. Reply A or B.",
    "A: {first}, B: {second}. Which letter fits?",
    "Is this (A) {first} or (B) {second}? Answer by letter.",
)
def choice_letter(rng: Random) -> Draw:
    """Two names are offered for the pictured object. Answer with the letter of the right one, A or B."""
    shown = rng.choice(pictured("seen"))
    options = [shown, similar_object(rng, [shown])]
    rng.shuffle(options)
    blanks = {"first": options[0].name, "second": options[1].name}
    return Draw(_one(rng, shown), "AB"[options.index(shown)], blanks)


# Where things are and how large.


def _asking(subject: MiniObject, other: MiniObject) -> dict[str, str]:
    verb = is_or_are(subject.name)
    return {"name": subject.name, "other": other.name, "is_": verb, "Is_": capitalised(verb)}


@task(
    "{Is_} the {name} left or right of the {other}?",
    "Left or right of the {other}: where {is_} the {name}?",
    "Seen from the {other}, {is_} the {name} left or right?",
)
def left_or_right(rng: Random) -> Draw:
    """Say on which side of the second object the first object stands. Answer left or right."""
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, side_by_side(rng)), background(rng))
    k = rng.randrange(2)
    return Draw(scene, ("left", "right")[k], _asking(pair[k], pair[1 - k]))


@task(
    "{Is_} the {name} above or below the {other}?",
    "Above or below the {other}: where {is_} the {name}?",
    "Seen from the {other}, {is_} the {name} above or below?",
)
def above_or_below(rng: Random) -> Draw:
    """Say whether the first object is above the second in the picture. Answer above or below."""
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, one_above_other(rng)), background(rng))
    k = rng.randrange(2)
    return Draw(scene, ("above", "below")[k], _asking(pair[k], pair[1 - k]))


@task(
    "What is directly {side} of the {name}?",
    "Name the neighbour to the {side} of the {name}.",
    "Which object stands just {side} of the {name}?",
)
def neighbour_naming(rng: Random) -> Draw:
    """Three objects stand in a row. Name the one next to the given object on the given side."""
    left, middle, right = some_objects(rng, 3)
    scene = Scene(things([left, middle, right], row_of_three(rng)), background(rng))
    side, answer = rng.choice([("left", left), ("right", right)])
    return Draw(scene, answer.name, {"side": side, "name": middle.name})


@task(
    "Where {is_} the {name}?",
    "Give the position of the {name}.",
    "In which part of the picture {is_} the {name}?",
)
def picture_position(rng: Random) -> Draw:
    """Say in which part of the picture an object is: top left, top right, bottom left, bottom right, middle."""
    pair = some_objects(rng, 2)
    where = rng.sample(PLACES, 2)
    scene = Scene(things(pair, [place(rng, name) for name in where]), background(rng))
    return Draw(scene, where[0], _asking(pair[0], pair[1]))


@task(
    "Which is {size}, the {name} or the {other}?",
    "Compare sizes: which is {size}, {name} or {other}?",
    "Of {name} and {other}, name the {size} one.",
)
def size_comparison(rng: Random) -> Draw:
    """Two objects are drawn at different sizes. Name the one that is drawn larger, or smaller, as asked."""
    pair = some_objects(rng, 2)
    scene = Scene(things(pair, small_and_large(rng)), background(rng))
    k = rng.randrange(2)
    first, second = rng.sample(pair, 2)  # the order of the names must not give the answer away
    blanks = {"size": ("smaller", "larger")[k], "name": first.name, "other": second.name}
    return Draw(scene, pair[k].name, blanks)


# Colours, shapes and flags.


def _one_shape(rng: Random) -> tuple[Scene, Item]:
    ground = background(rng)
    item = Item("shape", rng.choice(shapes("seen")), *anywhere(rng), colour_on(rng, ground))
    return Scene((item,), ground), item


@task("What colour is the shape?", "Name the colour of the figure.", "Which colour was used for the shape?")
def shape_colour(rng: Random) -> Draw:
    """Name the colour of the shape in the picture, not its form and not the background's colour."""
    scene, item = _one_shape(rng)
    return Draw(scene, item.colour)


@task("What shape is it?", "Name the form of the figure.", "Which shape was drawn?")
def shape_naming(rng: Random) -> Draw:
    """Name the geometric shape in the picture, not its colour: circle, square, triangle, star, cross."""
    scene, item = _one_shape(rng)
    return Draw(scene, item.name)


@task(
    "What colour is the background?",
    "Name the colour behind the object.",
    "On which colour is the object placed?",
)
def background_colour(rng: Random) -> Draw:
    """Name the colour of the background behind the object: white, blue, green, yellow, pink, gray."""
    ground = rng.choice(tuple(BACKGROUNDS))
    return Draw(Scene((thing(rng.choice(pictured("seen")), anywhere(rng)),), ground), ground)


@task("Which country has this flag?", "Name the country of the flag.", "Whose flag is it?")
def flag_naming(rng: Random) -> Draw:
    """Name the country whose flag the picture shows."""
    country = rng.choice(tuple(FLAGS))
    spot = anywhere(rng, 80, 130)
    return Draw(Scene((Item("flag", country, *spot),), background(rng)), country)


# Words and numbers in writing.


def _word_scene(rng: Random) -> tuple[Scene, str]:
    word = rng.choice(written_words("seen"))
    return Scene((writing(rng, word, (28, 42)),), background(rng)), word


@task("What word is written?", "Read the word.", "Which word do the letters form?")
def word_reading(rng: Random) -> Draw:
    """Read the word that is written in the picture. The answer is the whole word in lower case."""
    scene, word = _word_scene(rng)
    return Draw(scene, word)


@task(
    "What is the first letter of the word?",
    "With which letter does the word begin?",
    "Give only the initial letter.",
)
def first_letter(rng: Random) -> Draw:
    """Give only the first letter of the word that is written in the picture, in lower case."""
    scene, word = _word_scene(rng)
    return Draw(scene, word[0])


@task("What number is written?", "Read the number.", "Which number do the digits form?")
def number_reading(rng: Random) -> Draw:
    """Read the two-digit number that is written in the picture. The answer is in digits."""
    number = str(rng.choice(two_digit_numbers("seen")))
    return Draw(Scene((writing(rng, number, (32, 60)),), background(rng)), number)


@task(
    "What is the result of the calculation?",
    "Solve the written exercise.",
    "Work it out and give the result.",
)
def arithmetic(rng: Random) -> Draw:
    """The picture shows a small addition or subtraction. Answer with its result in digits."""
    text, result = rng.choice(calculations("seen"))
    return Draw(Scene((writing(rng, text, (30, 44)),), background(rng)), str(result))


@task(
    "Which number is {size}?",
    "Compare both numbers and write the {size} one.",
    "Of the two numbers, give the {size}.",
)
def number_comparison(rng: Random) -> Draw:
    """Two numbers are written in the picture. Answer with the larger or the smaller one, as asked."""
    pair = rng.sample(two_digit_numbers("seen"), 2)
    ground = background(rng)
    left, right = (0, 0, SIZE // 2, SIZE), (SIZE // 2, 0, SIZE, SIZE)
    items = (writing(rng, str(pair[0]), (34, 46), left), writing(rng, str(pair[1]), (34, 46), right))
    larger = rng.random() < 0.5
    answer, size = (max(pair), "larger") if larger else (min(pair), "smaller")
    return Draw(Scene(items, ground), str(answer), {"size": size})


# Whole captions, in one of four forms: a scene, its caption, and one of the same form that is wrong in one place.

Captioned = tuple[Scene, str, str]


def _other(rng: Random, right: str, names: tuple[str, ...]) -> str:
    return rng.choice([name for name in names if name != right])


def _object_on_ground(rng: Random) -> Captioned:
    item, ground = rng.choice(pictured("seen")), background(rng)
    wrong_name, wrong_ground = item.name, ground
    if rng.random() < 0.5:
        wrong_name = similar_object(rng, [item]).name
    else:
        wrong_ground = _other(rng, ground, tuple(BACKGROUNDS))
    right, wrong = f"{with_article(item.name)} on {ground}", f"{with_article(wrong_name)} on {wrong_ground}"
    return Scene((thing(item, anywhere(rng)),), ground), right, wrong


def _two_objects(rng: Random) -> Captioned:
    """The left or upper one first."""
    pair = some_objects(rng, 2)
    beside = rng.random() < 0.5
    relation = "left of" if beside else "above"
    spots = side_by_side(rng) if beside else one_above_other(rng)
    first, second = (with_article(item.name) for item in pair)
    scene = Scene(things(pair, spots), background(rng))
    other = with_article(similar_object(rng, pair).name)
    wrong = rng.choice([(second, first), (other, second), (first, other)])
    return scene, f"{first} {relation} {second}", f"{wrong[0]} {relation} {wrong[1]}"


def _shape_and_object(rng: Random) -> Captioned:
    ground, item = background(rng), rng.choice(pictured("seen"))
    colour, shape = colour_on(rng, ground), rng.choice(shapes("seen"))
    left, right = side_by_side(rng)
    scene = Scene((Item("shape", shape, *left, colour), thing(item, right)), ground)
    wrong_colour, wrong_shape = colour, shape
    if rng.random() < 0.5:
        wrong_colour = _other(rng, colour, tuple(COLOURS))
    else:
        wrong_shape = _other(rng, shape, shapes("seen"))
    true, false = f"{with_article(colour)} {shape}", f"{with_article(wrong_colour)} {wrong_shape}"
    right_half = f"left of {with_article(item.name)}"
    return scene, f"{true} {right_half}", f"{false} {right_half}"


def _word(rng: Random) -> Captioned:
    scene, word = _word_scene(rng)
    return scene, f"the word {word}", f"the word {_other(rng, word, written_words('seen'))}"


def _any_caption(rng: Random) -> Captioned:
    return rng.choice((_object_on_ground, _two_objects, _shape_and_object, _word))(rng)


@task("Describe the picture briefly.", "Write a short caption.", "Say in a few words what is shown.")
def captioning(rng: Random) -> Draw:
    """Describe the picture in a few words: what it shows, with its colour, its background or its place beside another
    thing.
    """
    scene, caption, _ = _any_caption(rng)
    return Draw(scene, caption)


@task('Does "{caption}" fit the picture?', "Caption: {caption}. Is it right?", "Does it show {caption}?")
def caption_matching(rng: Random) -> Draw:
    """Decide whether a caption describes the picture rightly in all its parts. Answer yes or no."""
    scene, right, wrong = _any_caption(rng)
    fits = rng.random() < 0.5
    return Draw(scene, "yes" if fits else "no", {"caption": right if fits else wrong})


_TASKS = (
    *(
        object_naming,
        object_category,
        object_presence,
        statement_truth,
        count_digit,
        count_words,
        count_kinds,
    ),
    *(odd_one_out, same_or_different, choice_letter),
    *(left_or_right, above_or_below, neighbour_naming, picture_position, size_comparison),
    *(shape_colour, shape_naming, background_colour, flag_naming),
    *(word_reading, first_letter, number_reading, arithmetic, number_comparison),
    *(captioning, caption_matching),
)
SEEN_TASKS: dict[str, Task] = {each.name: each for each in _TASKS}
"""By name, in the order of the data set."""
