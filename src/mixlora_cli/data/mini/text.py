"""The tasks of `data=mini_text`: a few words to read, and twelve conventions for the answer that contradict each other.

Tasks go in pairs that ask about the same material: numbers sorted up and down, dates with the day or the month first,
statements answered yes where they are true and yes where they are false, first and last words, reviews in a word and
in stars, opposites and synonyms out of the same three words. The unseen tasks ask about it by conventions of their
own. A third of the material (numbers, dates, things, words) is never trained on, whatever the task: held-out instances
and unseen tasks are made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from mixlora_cli.data.mini.objects import definition_of, with_article
from mixlora_cli.data.mini.plan import Counts, Plan

TEXT_COUNTS = Counts(train=320, heldout=50)
DRAWN = "3aa20fe23b0d"
"""`plan_digest` of the complete data set, which names its folder; a test holds it to what is drawn."""
_NUM_UNSEEN = 100
_HELD_OUT = 1 / 3
_ATTEMPTS = 10_000

_KINDS = """
    bird: sparrow eagle owl parrot pigeon robin swan penguin crow falcon seagull woodpecker
    fish: salmon trout herring shark cod carp eel sardine haddock mackerel anchovy sturgeon
    fruit: banana cherry grape lemon mango peach pear plum apricot pineapple raspberry strawberry
    vegetable: carrot cabbage onion potato turnip leek radish cauliflower parsnip lettuce beetroot
    insect: ant beetle butterfly mosquito wasp moth cricket grasshopper dragonfly ladybird bee termite
    tool: hammer saw screwdriver chisel wrench shovel rake drill spade axe hoe spanner
    vehicle: car bus truck tram bicycle motorcycle van tractor lorry taxi ambulance train
    musical instrument: violin piano trumpet flute guitar cello trombone clarinet harp banjo oboe tuba
"""
_OPINIONS = """
    excellent lovely wonderful superb pleasant perfect great delightful brilliant charming
    awful terrible dreadful horrible disappointing unpleasant bad miserable poor dismal
    soup room waiter music bed coffee view garden breakfast service pool dessert
"""
PRAISE, BLAME, REVIEWED = (line.split() for line in _OPINIONS.strip().splitlines())
THINGS = {
    thing: kind.strip()
    for kind, _, things in (line.partition(":") for line in _KINDS.strip().splitlines())
    for thing in things.split()
}
"""Thing -> the only one of the kinds that it belongs to."""
KINDS = tuple(dict.fromkeys(THINGS.values()))
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_TRIPLES = """
    big large small/fast quick slow/happy glad sad/begin start end/shut close open/rich wealthy poor
    hard difficult easy/silent quiet loud/strong powerful weak/brave bold timid/clever smart stupid/angry furious calm
    cold chilly hot/old ancient new/correct right wrong/buy purchase sell/build construct destroy/hate detest love
    allow permit forbid/raise lift lower/gather collect scatter/appear emerge vanish/increase grow shrink
    near nearby distant/damp wet dry/dirty filthy clean/thin slim fat/rude impolite polite/safe secure dangerous
    rare unusual common/tired weary rested/bright shiny dull/empty vacant full/gentle mild harsh/huge enormous tiny
    join connect separate/laugh giggle cry/modern contemporary outdated/help assist hinder/hide conceal reveal
    lazy idle busy/lucky fortunate unfortunate/mend repair break/odd strange normal/push shove pull/reply answer ask
    rough bumpy smooth/sick ill healthy/simple plain complicated/tasty delicious disgusting/victory triumph defeat
    enemy foe friend/accept approve refuse/top summit bottom/speedy rapid sluggish/joyful cheerful gloomy
"""
TRIPLES = [tuple(each.split()) for line in _TRIPLES.strip().splitlines() for each in line.split("/")]
"""A word, one that means the same, and one that means the opposite."""


@dataclass(frozen=True)
class Drawn:
    """One instance."""

    text: str
    """What the instruction is about."""
    answer: str
    material: str
    """What decides whether it may be trained on; tasks of a pair share it."""


@dataclass(frozen=True)
class TextTask:
    """One task."""

    name: str
    definition: str
    """What the task requires; task routing reads it."""
    templates: tuple[str, ...]
    """Paraphrased instructions; `{}` is what they are about."""
    draw: Callable[[Random], Drawn]
    unseen: bool


def task(*templates: str, unseen: bool = False) -> Callable[[Callable[[Random], Drawn]], TextTask]:
    """Make a task of the function that draws its instances: of its name, and of its docstring as the definition."""
    return lambda draw: TextTask(draw.__name__, definition_of(draw), templates, draw, unseen)


# Numbers.


def _numbers(rng: Random, answer: Callable[[list[int]], list[int]]) -> Drawn:
    numbers = rng.sample(range(1, 100), rng.choice((3, 4)))
    text = ", ".join(map(str, numbers))
    return Drawn(text, ", ".join(map(str, answer(numbers))), text)


@task(
    "Sort these numbers from small to large: {}",
    "Put the numbers in ascending order: {}",
    "{}\nWrite them again, the smallest first.",
    "Order from lowest to highest: {}",
)
def sort_ascending(rng: Random) -> Drawn:
    """Sort the numbers so that they rise, the smallest first. The answer is the numbers with commas between them."""
    return _numbers(rng, sorted)


@task(
    "Sort these numbers from large to small: {}",
    "Put the numbers in descending order: {}",
    "{}\nWrite them again, the largest first.",
    "Order from highest to lowest: {}",
)
def sort_descending(rng: Random) -> Drawn:
    """Sort the numbers so that they fall, the largest first. The answer is the numbers with commas between them."""
    return _numbers(rng, lambda numbers: sorted(numbers, reverse=True))


@task(
    "Which of these numbers is the largest? {}",
    "{}\nWrite the largest of them alone.",
    unseen=True,
)
def text_largest(rng: Random) -> Drawn:
    """Find the largest of the numbers. The answer is that number alone."""
    return _numbers(rng, lambda numbers: [max(numbers)])


# Dates.


def _date(rng: Random, form: str) -> Drawn:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2029)
    text = f"{day} {MONTHS[month - 1]} {year}"
    return Drawn(text, form.format(d=day, m=month, y=year), text)


@task(
    "Write the date in figures, the day first: {}",
    "Write this date the British way: {}",
    "{}\nGive this date as DD/MM/YYYY.",
    "Turn the date into day/month/year: {}",
)
def date_day_first(rng: Random) -> Drawn:
    """Write the date in figures as day, month, year, two digits for day and month, with strokes between them."""
    return _date(rng, "{d:02d}/{m:02d}/{y}")


@task(
    "Write the date in figures, the month first: {}",
    "Write this date the American way: {}",
    "{}\nGive this date as MM/DD/YYYY.",
    "Turn the date into month/day/year: {}",
)
def date_month_first(rng: Random) -> Drawn:
    """Write the date in figures as month, day, year, two digits for month and day, with strokes between them."""
    return _date(rng, "{m:02d}/{d:02d}/{y}")


@task(
    "Write the date in figures, the year first: {}",
    "{}\nGive this date as YYYY-MM-DD.",
    unseen=True,
)
def text_year_first(rng: Random) -> Drawn:
    """Write the date in figures as year, month, day, two digits for month and day, with hyphens between them."""
    return _date(rng, "{y}-{m:02d}-{d:02d}")


# Statements.


def _statement(rng: Random, right: str, wrong: str) -> Drawn:
    thing, is_true = rng.choice(tuple(THINGS)), rng.random() < 0.5
    kind = THINGS[thing] if is_true else rng.choice([kind for kind in KINDS if kind != THINGS[thing]])
    text = f"{rng.choice((with_article(thing), f'every {thing}'))} is {with_article(kind)}.".capitalize()
    return Drawn(text, right if is_true else wrong, thing)


@task(
    "Is this true? Answer yes or no. {}",
    "{}\nIs that so, yes or no?",
    "Say yes if this is true and no if it is false: {}",
    "Yes for a true statement, no for a false one: {}",
)
def statement_yes(rng: Random) -> Drawn:
    """Decide whether the statement is true. Answer yes where it is true and no where it is false."""
    return _statement(rng, "yes", "no")


@task(
    "Is this false? Answer yes or no. {}",
    "{}\nIs that a mistake, yes or no?",
    "Say yes if this is false and no if it is true: {}",
    "No for a true statement, yes for a false one: {}",
)
def statement_reversed(rng: Random) -> Drawn:
    """Decide whether the statement is false. Answer yes where it is false and no where it is true."""
    return _statement(rng, "no", "yes")


@task(
    "True or false? {}",
    "{}\nAnswer true or false.",
    unseen=True,
)
def text_true_false(rng: Random) -> Drawn:
    """Decide whether the statement is right. The answer is true or false."""
    return _statement(rng, "true", "false")


# Words in a row.


def _words(rng: Random, place: int) -> Drawn:
    words = rng.sample(tuple(THINGS), rng.choice((3, 4, 5)))
    text = ", ".join(words)
    return Drawn(text, words[place], text)


@task(
    "Which word comes first? {}",
    "Give the first of these words: {}",
    "{}\nRepeat the word at the beginning.",
    "Copy only the first word: {}",
)
def first_word(rng: Random) -> Drawn:
    """Repeat the first of the words. The answer is that word alone."""
    return _words(rng, 0)


@task(
    "Which word comes last? {}",
    "Give the last of these words: {}",
    "{}\nRepeat the word at the end.",
    "Copy only the last word: {}",
)
def last_word(rng: Random) -> Drawn:
    """Repeat the last of the words. The answer is that word alone."""
    return _words(rng, -1)


# Reviews.


def _review(rng: Random, answers: tuple[str, ...]) -> Drawn:
    """`answers` of a bad one, of a good one and, where there is a third, of one that is half and half."""
    verdict = rng.randrange(len(answers))
    opinions = {0: (BLAME, BLAME), 1: (PRAISE, PRAISE), 2: rng.sample((PRAISE, BLAME), 2)}[verdict]
    things = rng.sample(REVIEWED, 2)
    said = [f"the {thing} was {rng.choice(words)}" for thing, words in zip(things, opinions, strict=True)]
    text = f"{said[0]}, {said[1]}.".capitalize()
    return Drawn(text, answers[verdict], text)


@task(
    "Is this review good, bad or mixed? {}",
    "{}\nSum up the review in one word: good, bad or mixed.",
    "What did the guest think, good, bad or mixed? {}",
    "Judge this opinion in a word (good, bad, mixed): {}",
)
def review_word(rng: Random) -> Drawn:
    """Say in one word how a guest liked what the review is about: good, bad, or mixed where one thing was good and
    another bad.
    """
    return _review(rng, ("bad", "good", "mixed"))


@task(
    "How many stars does this review give, 1, 3 or 5? {}",
    "{}\nSum up the review in stars: 1, 3 or 5.",
    "What did the guest think, in stars from 1 to 5? {}",
    "Judge this opinion with a number of stars (1, 3, 5): {}",
)
def review_stars(rng: Random) -> Drawn:
    """Say in stars how a guest liked what the review is about: 5 where all was good, 1 where all was bad, and 3 where
    one thing was good and another bad.
    """
    return _review(rng, ("1", "5", "3"))


@task(
    "Will this guest come back? Answer yes or no. {}",
    "{}\nWould the guest recommend it, yes or no?",
    unseen=True,
)
def text_come_back(rng: Random) -> Drawn:
    """Decide whether a guest who wrote this review will come back: yes where all was good, no where all was bad."""
    return _review(rng, ("no", "yes"))


# Opposites and synonyms.


def _choice(rng: Random, right: int) -> Drawn:
    triple = rng.choice(TRIPLES)
    words = rng.sample((triple[1], triple[2], rng.choice(tuple(THINGS))), 3)
    return Drawn(f"{triple[0]} ({', '.join(words)})", triple[right], " ".join(triple))


@task(
    "Which of the words in brackets means the same? {}",
    "Choose the synonym: {}",
    "{}\nWhich of the three is most like the word in front?",
    "Which word could stand in its place? {}",
)
def same_meaning(rng: Random) -> Drawn:
    """Choose the one of three words that means the same as the word in front of them. The answer is that word alone."""
    return _choice(rng, 1)


@task(
    "Which of the words in brackets means the opposite? {}",
    "Choose the antonym: {}",
    "{}\nWhich of the three is least like the word in front, its very opposite?",
    "Which word says the contrary? {}",
)
def opposite_meaning(rng: Random) -> Drawn:
    """Choose the one of three words that means the opposite of the word in front of them. The answer is that word
    alone.
    """
    return _choice(rng, 2)


TEXT_TASKS = (
    *(sort_ascending, sort_descending, date_day_first, date_month_first, statement_yes, statement_reversed),
    *(first_word, last_word, review_word, review_stars, same_meaning, opposite_meaning),
    *(text_largest, text_year_first, text_true_false, text_come_back),
)


def text_plan(counts: Counts = TEXT_COUNTS) -> Plan:
    """Draw all instances: a function of their numbers alone."""
    records: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": [], "unseen": []}
    metadata: dict[str, Any] = {}
    for each in TEXT_TASKS:
        numbers = {"train": counts.train, "heldout": counts.heldout}
        if each.unseen:
            numbers = {"unseen": max(1, round(_NUM_UNSEEN * counts.unseen))}
        for split, number in numbers.items():
            records[split] += _records(each, split, number)
        metadata[each.name] = {
            "definition": each.definition,
            "split": "unseen" if each.unseen else "seen",
            "templates": list(each.templates),
            "instances": numbers,
        }
    return Plan(records, {}, metadata)


def is_held_out(material: str) -> bool:
    """Whether material is kept for evaluation, the same on every machine."""
    return Random(f"mini_text/{material}").random() < _HELD_OUT


def _records(each: TextTask, split: str, number: int) -> list[dict[str, Any]]:
    """Instances with different questions, of the split's material."""
    rng = Random(f"mini_text/{each.name}/{split}")
    answers: dict[str, str] = {}
    for _ in range(_ATTEMPTS):
        drawn = each.draw(rng)
        if is_held_out(drawn.material) == (split != "train"):
            answers[rng.choice(each.templates).format(drawn.text)] = drawn.answer
        if len(answers) == number:
            break
    else:
        raise RuntimeError(f"{each.name}: no {number} different questions in {_ATTEMPTS} attempts")
    extra = {"benchmark": each.name} if each.unseen else {}
    return [
        {
            "id": f"{each.name}_{split}_{k:04d}",
            "task_name": each.name,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            **extra,
        }
        for k, (question, answer) in enumerate(answers.items())
    ]
