"""Scores of small sets of answers, counted by hand or by plain loops."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixlora_cli.benchmarks.metrics import (
    COGNITION,
    LABELS,
    MME,
    PERCEPTION,
    POPE,
    VQA,
    LossScores,
    mean_loss,
    mean_over,
    pope_numbers,
    safe_names,
)
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score, score_predictions
from mixlora_cli.stats import Estimate, wilson


def answered(index: int, target: str, prediction: str, benchmark: str = "b", **fields: object) -> Prediction:
    common = {"split": "unseen", "index": index, "benchmark": benchmark, "id": str(index), "question": "?"}
    return Prediction(**common, target=target, prediction=prediction, **fields)  # type: ignore[arg-type]


MME_ANSWERS = [
    answered(0, "Yes", "Yes", category="count", image_id="1"),
    answered(1, "No", "no.", category="count", image_id="1"),
    answered(2, "Yes", "No", category="count", image_id="2"),
    answered(3, "No", "No", category="count", image_id="2"),
    answered(4, "Yes", "yes", category="color", image_id="1"),
    answered(5, "No", "it is not", category="color", image_id="1"),
]


def test_mme_by_hand() -> None:
    measured = MME.scores(MME_ANSWERS).compute()
    # count: 3 of 4 answers, 1 of 2 images; color: 1 of 2 answers ("it is not" is "other"), 0 of 1 images.
    # So few images say nothing about the spread: either subtask could have scored anything from 0 to 200.
    assert measured.parts["count"] == {
        "score": 125.0, "low": 0.0, "high": 200.0, "accuracy": 75.0, "accuracy_plus": 50.0, "images": 2.0
    }  # fmt: skip
    assert measured.parts["color"] == {
        "score": 50.0, "low": 0.0, "high": 200.0, "accuracy": 50.0, "accuracy_plus": 0.0, "images": 1.0
    }  # fmt: skip
    assert measured.score.value == 175.0
    assert (measured.score.low, measured.score.high) == (0.0, 400.0)


def test_mme_interval_by_hand() -> None:
    """Four images, two worth 200 and two worth 50: all four alike is drawn once in 16 times, more than 2.5 %."""
    answers = []
    for number in range(4):
        image, right = str(number), "no" if number < 2 else "yes"
        answers.append(answered(2 * number, "Yes", "yes", category="count", image_id=image))
        answers.append(answered(2 * number + 1, "No", right, category="count", image_id=image))
    measured = MME.scores(answers).compute()
    assert measured.score.value == 125.0
    assert (measured.score.low, measured.score.high) == pytest.approx((50.0, 200.0))
    part = measured.parts["count"]
    assert (part["low"], part["high"]) == pytest.approx((50.0, 200.0))


def _images(subtask: str, right: int, count: int, start: int) -> list[Prediction]:
    """`count` images with two questions, of which the first `right` images have both right and the others neither."""
    answers = []
    for number in range(count):
        given = ("yes", "no") if number < right else ("no", "yes")
        for place, target in enumerate(("yes", "no")):
            about = {"category": subtask, "image_id": f"{subtask} {number}"}
            answers.append(answered(start + 2 * number + place, target, given[place], **about))
    return answers


def test_mmes_subtasks_and_halves_have_intervals() -> None:
    """Cognition has three subtasks without a spread and one where every image is worth 200 or 0."""
    answers = [
        answer
        for place, subtask in enumerate(COGNITION)
        for answer in _images(subtask, 10 if place else 5, 10, 20 * place)
    ]
    parts = MME.scores(answers).compute().parts
    first, perfect, half = parts[COGNITION[0]], parts[COGNITION[1]], parts["cognition"]
    # Ten draws with chance 1/2: at most 2 right in 5.5 % and at most 1 in 1.1 % of the samples.
    assert (first["score"], first["low"], first["high"]) == pytest.approx((100.0, 40.0, 160.0))
    assert (perfect["score"], perfect["high"]) == (200.0, 200.0)
    assert perfect["low"] == pytest.approx(200 * wilson(10, 10).low)
    assert (half["score"], half["low"], half["high"]) == pytest.approx((700.0, 640.0, 760.0))
    assert "perception" not in parts


def test_text_vqa_without_any_right_answer_is_not_certain() -> None:
    answers = [answered(i, "stop", "go", answers=("stop",) * 10) for i in range(20)]
    measured = VQA.scores(answers).compute()
    assert measured.score.value == 0.0
    assert measured.score == wilson(0, 20).scaled(100)


def test_mme_pairs_by_image_whatever_the_order() -> None:
    shuffled = MME_ANSWERS[:]
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert MME.scores(shuffled).compute().score.value == 175.0


def test_mme_refuses_an_image_without_its_pair() -> None:
    with pytest.raises(UserError, match=r"subtask count, image '2': 1 questions, expected two"):
        MME.scores(MME_ANSWERS[:3]).compute()


def test_pope_by_hand() -> None:
    answers = [
        answered(0, "yes", "Yes", category="random"),
        answered(1, "yes", "No, there is none", category="random"),
        answered(2, "no", "Yes, it is not", category="random"),
        answered(3, "no", "a dog", category="popular"),
        answered(4, "yes", "yes", category="popular"),
    ]
    measured = POPE.scores(answers).compute()
    assert measured.score.value == pytest.approx(60.0)
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")
    for category, expected in {
        "random": (200 / 3, 100.0, 50.0, 200 / 3, 100 / 3, 3.0),
        "popular": (50.0, 50.0, 100.0, 200 / 3, 100.0, 2.0),
        "all": (60.0, 200 / 3, 200 / 3, 200 / 3, 60.0, 5.0),
    }.items():
        assert [measured.parts[category][name] for name in names] == pytest.approx(expected)
    part = measured.parts["all"]
    for prefix, interval in {
        "": wilson(3, 5),  # right of all
        "precision_": wilson(2, 3),  # right of those that say yes
        "recall_": wilson(2, 3),  # right of those that are yes
        "yes_ratio_": wilson(3, 5),
    }.items():
        assert part[f"{prefix}low"] == pytest.approx(100 * interval.low)
        assert part[f"{prefix}high"] == pytest.approx(100 * interval.high)


def test_popes_f1_has_wilsons_interval_of_the_jaccard_index() -> None:
    """60 hits, 20 false alarms, 20 misses: J = 0.6 of 100, F1 = 2 J / (1 + J) = 0.75."""
    pairs = Counter({("yes", "yes"): 60, ("yes", "no"): 20, ("no", "yes"): 20, ("no", "no"): 50})
    part, interval = pope_numbers(pairs), wilson(60, 100)
    assert part["f1"] == pytest.approx(75.0)
    assert part["f1_low"] == pytest.approx(200 * interval.low / (1 + interval.low))
    assert part["f1_high"] == pytest.approx(200 * interval.high / (1 + interval.high))
    # Against the bootstrap over the 150 answers.
    drawn = np.random.default_rng(0).multinomial(150, np.array([60, 20, 20, 50]) / 150, size=20_000)
    low, high = np.percentile(200 * drawn[:, 0] / (2 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2]), (2.5, 97.5))
    assert (part["f1_low"], part["f1_high"]) == pytest.approx((low, high), abs=1.0)


def test_pope_without_a_yes_divides_by_nothing() -> None:
    measured = POPE.scores([answered(0, "no", "no"), answered(1, "no", "no")]).compute()
    part = measured.parts["all"]
    assert [part[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")] == [
        100.0, 0.0, 0.0, 0.0, 0.0, 2.0
    ]  # fmt: skip
    assert all(
        (part[f"{name}_low"], part[f"{name}_high"]) == (0.0, 100.0) for name in ("precision", "recall", "f1")
    )


def test_label_accuracy_with_wilson_interval_and_categories() -> None:
    answers = [answered(i, "cat", "cat" if i < 7 else "dog", category="ab"[i % 2]) for i in range(10)]
    measured = LABELS.scores(answers).compute()
    assert measured.score.value == 70.0
    assert measured.score.low == pytest.approx(100 * wilson(7, 10).low)
    assert measured.score.high == pytest.approx(100 * wilson(7, 10).high)
    ends = {"a": wilson(4, 5).scaled(100), "b": wilson(3, 5).scaled(100)}
    assert measured.parts == {
        "a": {"accuracy": 80.0, "low": ends["a"].low, "high": ends["a"].high, "n": 5.0},
        "b": {"accuracy": 60.0, "low": ends["b"].low, "high": ends["b"].high, "n": 5.0},
    }


def test_a_mean_of_equal_answers_is_not_certain() -> None:
    wrong, right = np.zeros(2), np.ones(2)
    none = mean_over([wrong] * 2)
    # Wilson's upper end of 0 of 4 is z^2 / (4 + z^2).
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(48.99, abs=0.01)
    every = mean_over([right] * 2)
    assert (every.value, every.high) == (100.0, 100.0) and every.low == pytest.approx(51.01, abs=0.01)
    assert mean_over([wrong, right]).value == 50.0


def test_vqa_is_the_mean_over_instances() -> None:
    answers = [
        answered(0, "7", "Seven", answers=("7",) * 3 + ("1",) * 7),
        answered(1, "7", "7", answers=("7",) * 10),
        answered(2, "7", "", answers=("7",) * 10),
        answered(3, "7", "1", answers=("7",) * 9 + ("1",)),
    ]
    measured = VQA.scores(answers).compute()
    assert measured.score.value == pytest.approx(100 * (0.9 + 1 + 0 + 0.3) / 4)
    assert 0 <= measured.score.low < measured.score.value < measured.score.high <= 100


def _all_columns() -> list[Prediction]:
    answers = [replace(p, benchmark="mini_mme") for p in MME_ANSWERS]
    for number, name in enumerate(("vsr", "snli_ve", "cifar10", "cifar100", "mnist", "pope", "textvqa")):
        yes, no = ("yes", "no") if name in ("vsr", "pope") else ("cat", "dog")
        for i in range(10):  # the first right in 1 of 10, the second in 2, ...
            given = yes if i <= number else no
            answers.append(answered(len(answers), yes, given, f"mini_{name}", answers=(yes,) * 10))
    return answers


def test_mmavg_is_the_mean_of_the_seven_others() -> None:
    answers = _all_columns()
    results = score_predictions(answers, {})
    assert [score.column for score in results.scores] == [
        "MME", "Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE"
    ]  # fmt: skip
    assert [score.value for score in results.scores] == pytest.approx([175.0, 70, 10, 20, 30, 40, 50, 60])
    assert results.mean is not None
    assert results.mean.value == pytest.approx(40.0)
    assert results.mean.n == 70
    # The interval against the normal one: sum of the seven variances p (1 - p) / 10, divided by 49.
    shares = np.arange(1, 8) / 10
    half = 1.96 * 100 * np.sqrt((shares * (1 - shares) / 10).sum() / 49)
    assert results.mean.high - results.mean.low == pytest.approx(2 * half, rel=0.08)
    random.Random(0).shuffle(answers)
    assert score_predictions(answers, {}) == results


def test_mmavg_needs_all_seven() -> None:
    some = [answer for answer in _all_columns() if answer.benchmark != "mini_vsr"]
    results = score_predictions(some, {})
    assert results.mean is None
    assert results.column("VSR") is None
    assert results.column("POPE") is not None


def test_seen_tasks_count_equally() -> None:
    answers = [replace(answered(i, "cat", "cat", "naming"), split="heldout") for i in range(30)]
    answers += [
        replace(answered(100 + i, "3", "three" if i == 0 else "4", "counting"), split="heldout")
        for i in range(10)
    ]
    seen = score_predictions(answers, {}).seen
    assert seen is not None
    assert seen.value == pytest.approx((100 + 10) / 2)
    assert seen.n == 40
    assert seen.parts["naming"]["accuracy"] == 100.0
    assert seen.parts["counting"]["accuracy"] == pytest.approx(10.0)
    assert seen.parts["counting"]["low"] == pytest.approx(100 * wilson(1, 10).low)


def test_the_most_frequent_answer_is_what_chance_can_reach() -> None:
    answers = [
        replace(answered(i, target, "no", "presence"), split="heldout")
        for i, target in enumerate(("yes", "Yes.", "no", "yes"))
    ]
    seen = score_predictions(answers, {}).seen
    assert seen is not None
    assert (seen.parts["presence"]["most_frequent"], seen.parts["presence"]["accuracy"]) == (75.0, 25.0)


def test_a_benchmark_of_the_users_own_is_scored_by_label_match() -> None:
    answers = [answered(0, "cat", "a cat", "birds"), answered(1, "cat", "dog", "birds")]
    (score,) = score_predictions(answers, {}).scores
    assert (score.column, score.value, score.n, score.unit) == ("birds", 50.0, 2, "%")
    assert "normalisation" in score.rule


SUBTASKS = [*PERCEPTION, *COGNITION]
ANSWERS = (
    *("yes", "No", "Yes, it is not", " yes", "  yes", "not sure", "None", "", "\nyes", "y\tes"),
    *("The answer: no", "NO."),
)


def _mme_answers() -> list[Prediction]:
    rng, found = random.Random(0), []
    for subtask in SUBTASKS:
        for image in range(5):
            for target in ("Yes", "No"):
                about = {"category": subtask, "image_id": f"{subtask}/{image}.jpg"}
                question = f"Is it {target}?\tPlease answer yes or no."
                given = answered(len(found), target, rng.choice(ANSWERS), "mme", **about)
                found.append(replace(given, question=question))
    rng.shuffle(found)
    return found


def official(folder: Path) -> dict[str, float]:
    """Accuracy and accuracy-plus as in the tool's `calculation.py`, of pairs of lines that stand together."""
    scores = {}
    for subtask in SUBTASKS:
        right = []
        for line in (folder / f"{subtask}.txt").read_text().splitlines(keepends=True):
            _, _, truth, prediction = line.split("\t")
            prediction = prediction.lower()
            read = prediction
            if prediction not in ("yes", "no"):
                start = prediction[:4]
                read = "yes" if "yes" in start else "no" if "no" in start else "other"
            right.append(read == truth.lower())
        pairs = [all(right[place : place + 2]) for place in range(0, len(right), 2)]
        scores[subtask] = 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)
    return scores


def test_mmes_official_tool_gets_the_same_numbers(tmp_path: Path) -> None:
    given = _mme_answers()
    with open_predictions(tmp_path / "predictions.jsonl", Header({}, len(given))) as log:
        log.append(given)
    results = score(tmp_path)
    theirs = official(tmp_path / "official" / "mme")
    (ours,) = results.scores
    assert {name: ours.parts[name]["score"] for name in SUBTASKS} == pytest.approx(theirs)
    assert 0 < ours.value < 2800
    assert ours.value == pytest.approx(sum(theirs.values()))
    for half, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        assert ours.parts[half]["score"] == pytest.approx(sum(theirs[name] for name in names))
    lines = (tmp_path / "official" / "mme" / "scene.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"scene/{number // 2}.jpg" for number in range(10)]
    assert [line.split("\t")[2] for line in lines] == ["Yes", "No"] * 5


def test_a_benchmark_of_the_users_own_gets_mmes_files_too(tmp_path: Path) -> None:
    """Category names are the user's: whatever they are, the files stay in the folder."""
    given = [
        answered(number, target, "yes", "sides", category="../up/left or right", image_id=f"{number // 2}")
        for number, target in enumerate(("yes", "no", "yes", "no"))
    ]
    about = {"benchmarks": {"sides": {"column": "Sides", "scorer": "mme"}}}
    with open_predictions(tmp_path / "predictions.jsonl", Header({}, 4, about)) as log:
        log.append(given)
    folder = tmp_path / "official" / "sides"
    folder.mkdir(parents=True)
    (folder / "existence.txt").write_text("of an earlier evaluation")
    score(tmp_path)
    (path,) = folder.iterdir()
    assert path.name == "-up-left-or-right.txt"
    assert path.read_text().splitlines() == [
        "0\t?\tYes\tyes", "0\t?\tNo\tyes", "1\t?\tYes\tyes", "1\t?\tNo\tyes"
    ]  # fmt: skip


def test_names_are_safe_as_file_names_and_differ() -> None:
    assert safe_names(SUBTASKS) == {name: name for name in SUBTASKS}
    names = ["../../etc", "a/b", "a b", "A:B", "", ".hidden", "\N{SNOWMAN}", "é" * 300]
    expected = ["-..-etc", "a-b", "a-b-2", "A-B-3", "unnamed", "hidden", "-", "é" * 60]
    assert list(safe_names(names).values()) == expected


def test_mmes_halves_need_all_of_their_subtasks() -> None:
    parts = MME.scores([answer for answer in _mme_answers() if answer.category != "posters"]).compute().parts
    assert "perception" not in parts
    assert parts["cognition"]["score"] == pytest.approx(sum(parts[name]["score"] for name in COGNITION))


def loss_of(index: int, nll: float, tokens: int) -> Prediction:
    return Prediction("heldout", index, "t", "", f"{index}?", "a", "a", nll=nll, tokens=tokens)


def test_a_loss_is_nats_over_tokens_whatever_the_order() -> None:
    answers = [loss_of(0, 3.0, 2), loss_of(1, 0.0, 1), loss_of(2, 9.0, 3)]
    scores = LossScores().update(answers)
    found = scores.compute().score
    assert (found.value, scores.value([0, 2])) == (2.0, 12 / 5)
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == (0.0, 3.0)  # three times the same of three instances: 1 in 27 samples
    assert LossScores().update(answers[::-1]).compute() == scores.compute()
    other = LossScores().update([replace(each, nll=each.nll + 1) for each in answers])  # type: ignore[operator]
    (difference,) = other.minus(scores, [0, 1, 2])
    assert difference.tolist() == [[1.0, 2.0], [1.0, 1.0], [1.0, 3.0]]
    others = LossScores().update([replace(each, tokens=5) for each in answers])
    with pytest.raises(UserError, match="the same answers have other tokens in each"):
        others.minus(scores, [0, 1, 2])


def test_a_mean_loss_weighs_tasks_alike_and_a_single_instance_says_nothing_of_its_spread() -> None:
    two = LossScores().update([loss_of(0, 1.0, 1), loss_of(1, 3.0, 1)])
    one = LossScores().update([loss_of(0, 50.0, 10)])
    assert mean_loss([two]) == Estimate(2.0, 1.0, 3.0)
    assert mean_loss([two, one]) == Estimate(3.5)
