from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.benchmarks.registry import (
    AVERAGED,
    BENCHMARKS,
    COLUMNS,
    FROM_THE_PAPER,
    choose,
    expand,
    in_paper_order,
)
from mixlora_cli.config import DataConfig
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.instances import limited, stratified


def record(index: int, answer: str = "yes", **extra: Any) -> Record:
    turns = (Turn("human", "?"), Turn("gpt", answer))
    return Record(index, str(index), "task", (Path("x.png"),), turns, {"benchmark": "b", **extra})


def test_a_large_limit_keeps_everything() -> None:
    records = [record(i) for i in range(5)]
    assert limited(records, None, 0) == records
    assert limited(records, 5, 0) == records


def test_the_sample_is_seeded_and_in_the_datas_order() -> None:
    records = [record(i) for i in range(100)]
    sample = stratified(records, 10, seed=1)
    assert sample == stratified(records, 10, seed=1)
    assert sample != stratified(records, 10, seed=2)
    assert [r.index for r in sample] == sorted(r.index for r in sample)
    assert len(sample) == 10


def test_questions_about_one_image_stay_together_and_categories_keep_their_share() -> None:
    records = [
        record(2 * image + question, category="count" if image < 40 else "color", image_id=f"i{image}")
        for image in range(60)
        for question in range(2)
    ]
    sample = stratified(records, 31, seed=0)  # one less than 16 pairs
    assert len(sample) == 30
    assert set(Counter(r.extra["image_id"] for r in sample).values()) == {2}
    assert Counter(r.extra["category"] for r in sample) == {"count": 20, "color": 10}


def test_every_category_is_there_before_any_comes_twice() -> None:
    categories = ["a"] * 90 + ["b"] * 3 + ["c"] * 2
    sample = stratified([record(i, category=category) for i, category in enumerate(categories)], 3, seed=0)
    assert [r.extra["category"] for r in sample] == ["a", "b", "c"]


def test_closed_labels_keep_their_share() -> None:
    answers = ["yes"] * 60 + ["no"] * 30
    sample = stratified([record(i, a, labels=["yes", "no"]) for i, a in enumerate(answers)], 30, seed=3)
    assert Counter(r.conversation[-1].text for r in sample) == {"yes": 20, "no": 10}


def test_labels_keep_their_share_within_each_category() -> None:
    records = [
        record(i, ("yes", "no")[i % 4 == 0], category=("random", "popular")[i < 40], labels=["yes", "no"])
        for i in range(120)
    ]
    sample = stratified(records, 24, seed=0)
    shares = Counter((r.extra["category"], r.conversation[-1].text) for r in sample)
    assert shares == {("popular", "yes"): 6, ("popular", "no"): 2, ("random", "yes"): 12, ("random", "no"): 4}


def test_one_pair_comes_even_with_a_limit_of_one() -> None:
    records = [record(i, category="count", image_id=str(i // 2)) for i in range(6)]
    assert len(stratified(records, 1, seed=0)) == 2


def test_each_benchmark_has_the_limit_of_its_own(data: DataConfig) -> None:
    sample = limited(load_records(data, "unseen"), 3, seed=0)
    counts = Counter(r.extra["benchmark"] for r in sample)
    assert counts == {name: 2 if name == "mini_mme" else 3 for name in BENCHMARKS if name.startswith("mini_")}


def test_the_papers_columns_and_what_is_averaged() -> None:
    text = ["Largest", "Year first", "True/false", "Come back"]
    assert [benchmark.column for benchmark in BENCHMARKS.values()] == [*COLUMNS, *COLUMNS, *text]
    assert expand(["mini_vsr", "paper", "mnist"]) == ["mini_vsr", *FROM_THE_PAPER]
    assert [BENCHMARKS[name].column for name in FROM_THE_PAPER] == list(COLUMNS)
    assert AVERAGED == ("Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE")
    assert in_paper_order(["own", "mini_pope", "mini_mme"]) == ["mini_mme", "mini_pope", "own"]


def test_choose_names_what_was_probably_meant() -> None:
    available = ["mini_pope", "mini_mme"]
    assert choose(None, available) == ["mini_mme", "mini_pope"]
    assert choose(["mini_pope"], available) == ["mini_pope"]
    with pytest.raises(UserError, match=r"no mini_me\. Did you mean mini_mme\? It has: mini_mme, mini_pope"):
        choose(["mini_me"], available)
    with pytest.raises(UserError, match=r"no mnits\. Did you mean mnist\?"):
        choose(["mnits"], available)
