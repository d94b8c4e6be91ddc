"""Counterparts of VSR, SNLI-VE and POPE: judge a spatial statement, a hypothesis, an object's presence."""

from __future__ import annotations

from random import Random

from mixlora_cli.data.mini.benchmark import Benchmark, Question
from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.layout import background, one_above_other, quarters, side_by_side, things
from mixlora_cli.data.mini.objects import MiniObject
from mixlora_cli.data.mini.vocabulary import capitalised, is_or_are, pictured, with_article

RELATIONS = (("to the left of", "to the right of"), ("above", "below"))
"""(relation of the first to the second thing, its opposite): side by side, and one above the other."""
VERDICTS = ("entailment", "neutral", "contradiction")
POPULAR = ("cat", "horse", "tomato", "train", "umbrella", "door", "camera", "cloud")
"""The objects that POPE's pictures show most often; absent ones are asked for in its category "popular"."""
_UNKNOWABLE = (
    "{The} {is_} a gift from a friend.",
    "{The} {is_} owned by a doctor.",
    "Someone will move the {name} tomorrow.",
    "Nobody has seen the {name} before.",
)
_VSR_QUESTION = 'Statement: "{statement}" Is the statement correct? Answer yes or no.'
_ENTAILMENT_QUESTION = (
    'The image is the premise. Hypothesis: "{hypothesis}" Is it entailment, neutral or contradiction?'
)
_POPE_QUESTION = "{Is_} there {a} in the image?"


def _related(rng: Random) -> tuple[Scene, list[MiniObject], tuple[str, str]]:
    """Two objects and (their true relation, its opposite), told of the first object."""
    pair = rng.sample(pictured("unseen"), 2)
    beside = rng.random() < 0.5
    spots = side_by_side(rng) if beside else one_above_other(rng)
    scene = Scene(things(pair, spots), background(rng))
    true, false = RELATIONS[0 if beside else 1]
    if rng.random() < 0.5:
        return scene, pair[::-1], (false, true)
    return scene, pair, (true, false)


def _statement(pair: list[MiniObject], relation: str) -> str:
    return f"The {pair[0].name} {is_or_are(pair[0].name)} {relation} the {pair[1].name}."


def _vsr(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    scene, pair, relations = _related(rng)
    text = _VSR_QUESTION.format(statement=_statement(pair, relations[k % 2]))
    return scene, [Question(text, ("yes", "no")[k % 2], {"labels": ["yes", "no"]})]


def _hypothesis(rng: Random, verdict: str, pair: list[MiniObject], relations: tuple[str, str]) -> str:
    if verdict == "neutral":
        name = pair[0].name
        return rng.choice(_UNKNOWABLE).format(The=f"The {name}", is_=is_or_are(name), name=name)
    true = verdict == "entailment"
    form = rng.randrange(3)
    if form == 0:
        return _statement(pair, relations[0 if true else 1])
    if form == 1:
        return f"There are {'two' if true else rng.choice(['three', 'four', 'five'])} things."
    name = (pair[0] if true else rng.choice([item for item in pictured("unseen") if item not in pair])).name
    return f"There {is_or_are(name)} {with_article(name)}."


def _entailment(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    scene, pair, relations = _related(rng)
    verdict = VERDICTS[k % 3]
    text = _ENTAILMENT_QUESTION.format(hypothesis=_hypothesis(rng, verdict, pair, relations))
    return scene, [Question(text, verdict, {"labels": list(VERDICTS)})]


def _absent(rng: Random, category: str, shown: list[MiniObject], asked: list[MiniObject]) -> MiniObject:
    """An object that is not shown: like a shown one (adversarial), frequent (popular), or any (random)."""
    free = [item for item in pictured("unseen") if item not in shown and item not in asked]
    if category == "adversarial":
        free = [item for item in free if item.category in {one.category for one in shown}] or free
    elif category == "popular":
        free = [item for item in free if item.name in POPULAR]
    return rng.choice(free)


def _pope(rng: Random, k: int) -> tuple[Scene, list[Question]]:
    """Three objects, at least one of them popular, and for each category one present and one absent."""
    popular = [item for item in pictured("unseen") if item.name in POPULAR]
    frequent = rng.choice(popular)
    shown = [frequent, *rng.sample([item for item in pictured("unseen") if item != frequent], 2)]
    rng.shuffle(shown)
    questions: list[Question] = []
    asked: list[MiniObject] = []
    for present, category in zip(shown, ("adversarial", "popular", "random"), strict=True):
        absent = _absent(rng, category, shown, asked)
        asked.append(absent)
        for item, answer in ((present, "yes"), (absent, "no")):
            blanks = {"Is_": capitalised(is_or_are(item.name)), "a": with_article(item.name)}
            questions.append(Question(_POPE_QUESTION.format(**blanks), answer, {"category": category}))
    return Scene(things(shown, quarters(rng, 3)), background(rng)), questions


JUDGING_BENCHMARKS = (
    Benchmark(
        "mini_vsr",
        "Decide whether a statement about where two objects are is correct. Answer yes or no.",
        (_VSR_QUESTION,),
        num_pictures=120,
        picture=_vsr,
    ),
    Benchmark(
        "mini_snli_ve",
        "Decide whether the picture entails a hypothesis, contradicts it, or leaves it open (neutral).",
        (_ENTAILMENT_QUESTION,),
        num_pictures=120,
        picture=_entailment,
    ),
    Benchmark(
        "mini_pope",
        "Decide whether an object is in the picture. Objects that are not are chosen at random, among the "
        "frequent ones, or among those like what is shown.",
        (_POPE_QUESTION,),
        num_pictures=20,
        picture=_pope,
        pairs=True,
    ),
)
