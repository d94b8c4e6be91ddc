"""The text tasks: the right answers, contradicting conventions, nothing trained on that is evaluated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from random import Random

import pytest

from mixlora_cli.benchmarks.metrics import EXACT
from mixlora_cli.benchmarks.registry import BENCHMARKS
from mixlora_cli.benchmarks.scorers import exact_match
from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.mini.build import plan_digest
from mixlora_cli.data.mini.plan import Counts, Plan
from mixlora_cli.data.mini.text import (
    BLAME,
    DRAWN,
    PRAISE,
    TEXT_TASKS,
    THINGS,
    TRIPLES,
    is_held_out,
    text_plan,
)

SEEN = [task.name for task in TEXT_TASKS if not task.unseen]
UNSEEN = [task.name for task in TEXT_TASKS if task.unseen]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return text_plan()


def triples(plan: Plan, *splits: str) -> list[tuple[str, str, str]]:
    """(task, question, answer) of splits."""
    return [
        (record["task_name"], *(turn["value"] for turn in record["conversations"]))
        for split in splits or plan.records
        for record in plan.records[split]
    ]


def test_the_digest_is_that_of_what_is_drawn(plan: Plan) -> None:
    assert plan_digest(plan) == DRAWN == plan_digest(text_plan()) != plan_digest(text_plan(Counts(320, 49)))


def numbers(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question)]


def day(question: str) -> datetime:
    found = re.search(r"\d+ [A-Z][a-z]+ \d{4}", question)
    assert found
    return datetime.strptime(found[0], "%d %B %Y")


def thing(question: str) -> str:
    """What the statement in a question is about."""
    found = re.search(r"(?:An?|Every) (\w+) is an? [a-z ]+\.", question)
    assert found
    return found[1]


def is_true(question: str) -> bool:
    return re.search(rf"{thing(question)} is an? {THINGS[thing(question)]}\.", question) is not None


def listed(question: str) -> list[str]:
    """The words with commas between them."""
    found = re.search(r"\w+(, \w+)+", question)
    assert found
    return found[0].split(", ")


def praised(question: str) -> list[bool]:
    opinions = re.findall(r"was (\w+)", question)
    assert len(opinions) == 2 and set(opinions) <= {*PRAISE, *BLAME}
    return [opinion in PRAISE for opinion in opinions]


def offered(question: str, place: int) -> str:
    found = re.search(r"(\w+) \((.*)\)", question)
    assert found
    (triple,) = (triple for triple in TRIPLES if triple[0] == found[1])
    words = found[2].split(", ")
    assert len(set(words)) == 3 and {triple[1], triple[2]} < set(words)
    return triple[place]


ORACLES: dict[str, Callable[[str], str]] = {
    "sort_ascending": lambda q: ", ".join(map(str, sorted(numbers(q)))),
    "sort_descending": lambda q: ", ".join(map(str, sorted(numbers(q))[::-1])),
    "date_day_first": lambda q: day(q).strftime("%d/%m/%Y"),
    "date_month_first": lambda q: day(q).strftime("%m/%d/%Y"),
    "statement_yes": lambda q: "yes" if is_true(q) else "no",
    "statement_reversed": lambda q: "no" if is_true(q) else "yes",
    "first_word": lambda q: listed(q)[0],
    "last_word": lambda q: listed(q)[-1],
    "review_word": lambda q: {0: "bad", 1: "mixed", 2: "good"}[sum(praised(q))],
    "review_stars": lambda q: {0: "1", 1: "3", 2: "5"}[sum(praised(q))],
    "same_meaning": lambda q: offered(q, 1),
    "opposite_meaning": lambda q: offered(q, 2),
    "text_largest": lambda q: str(max(numbers(q))),
    "text_year_first": lambda q: day(q).strftime("%Y-%m-%d"),
    "text_true_false": lambda q: str(is_true(q)).lower(),
    "text_come_back": lambda q: {0: "no", 2: "yes"}[sum(praised(q))],
}
MATERIALS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("statement_yes", "statement_reversed", "text_true_false"), thing),
    **dict.fromkeys(("same_meaning", "opposite_meaning"), lambda q: offered(q, 1)),
}


def test_every_answer_is_right_and_no_question_comes_twice(plan: Plan) -> None:
    assert list(ORACLES) == [*SEEN, *UNSEEN]
    every = triples(plan)
    assert [(name, ORACLES[name](question)) for name, question, _ in every] == [
        (name, answer) for name, _, answer in every
    ]
    assert len({question for _, question, _ in every}) == len(every) == 12 * (320 + 50) + 4 * 100
    assert max(len(question.split()) for _, question, _ in every) <= 30
    assert all(exact_match(answer, answer) for _, _, answer in every)


def test_what_is_evaluated_is_not_trained_on_by_any_task(plan: Plan) -> None:
    for names in (
        ("statement_yes", "statement_reversed", "text_true_false"),
        ("same_meaning", "opposite_meaning"),
    ):
        trained, kept = (
            {MATERIALS[name](question) for name, question, _ in triples(plan, *splits) if name in names}
            for splits in (("train",), ("heldout", "unseen"))
        )
        assert trained and kept and not trained & kept
    assert 0.3 < sum(is_held_out(str(number)) for number in range(1000)) / 1000 < 0.37


@pytest.mark.parametrize("pair", list(zip(SEEN[::2], SEEN[1::2], strict=True)), ids="/".join)
def test_the_tasks_of_a_pair_contradict_each_other(pair: tuple[str, str]) -> None:
    """The same material has other answers, also in the eyes of the metric; two dates in 28 are alike both ways."""
    by_name = {task.name: task for task in TEXT_TASKS}
    differ, draws = 0, 300
    for seed in range(draws):
        one, other = (by_name[name].draw(Random(f"pair {seed}")) for name in pair)
        assert (one.text, one.material) == (other.text, other.material)
        differ += not exact_match(one.answer, other.answer)
    assert differ == draws or (pair[0] == "date_day_first" and differ > 0.9 * draws)


def test_answers_of_closed_questions_are_balanced(plan: Plan) -> None:
    closed = (
        "statement_yes",
        "statement_reversed",
        "review_word",
        "review_stars",
        "text_true_false",
        "text_come_back",
    )
    for name in closed:
        answers = Counter(answer for task, _, answer in triples(plan) if task == name)
        assert max(answers.values()) < 1.35 * min(answers.values())


def test_unseen_tasks_are_benchmarks_scored_by_exact_match(plan: Plan) -> None:
    entries = [BENCHMARKS[name] for name in UNSEEN]
    assert [(entry.metric, entry.origin) for entry in entries] == [(EXACT, None)] * 4
    assert [name for name in BENCHMARKS if name.startswith("text_")] == UNSEEN
    assert {record["benchmark"] for record in plan.records["unseen"]} == set(UNSEEN)
    assert not any("benchmark" in record for record in plan.records["train"] + plan.records["heldout"])


def test_it_is_read_like_any_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_CACHE", str(tmp_path))
    data = DataConfig(name="mini_text", source="mini_text", tasks=["first_word", "last_word"], max_per_task=5)
    assert Counter(record.task for record in load_records(data, "train")) == {"first_word": 5, "last_word": 5}
    assert len(load_records(data, "heldout")) == 100
    assert Counter(record.task for record in load_records(data, "unseen")) == dict.fromkeys(UNSEEN, 100)
    assert list(load_definitions(data)) == [*SEEN, *UNSEEN]
    assert {path.name for path in (tmp_path / f"mini-text-{DRAWN}").iterdir()} == {
        *("train.json", "heldout.json", "unseen.json", "metadata.json")
    }
