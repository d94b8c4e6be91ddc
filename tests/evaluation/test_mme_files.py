"""The official files of MME, read back by the official rule written anew here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mixlora_cli.benchmarks.metrics import COGNITION, MME, PERCEPTION, safe_names
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score

SUBTASKS = [*PERCEPTION, *COGNITION]
ANSWERS = (
    "yes",
    "No",
    "Yes, it is not",
    " yes",
    "  yes",
    "not sure",
    "None",
    "",
    "\nyes",
    "y\tes",
    "The answer: no",
    "NO.",
)


def answers() -> list[Prediction]:
    rng = random.Random(0)
    found = []
    for subtask in SUBTASKS:
        for image in range(5):
            for target in ("Yes", "No"):
                about = {"category": subtask, "image_id": f"{subtask}/{image}.jpg"}
                question = f"Is it {target}?\tPlease answer yes or no."
                found.append(
                    Prediction(
                        "unseen", len(found), "mme", "", question, target, rng.choice(ANSWERS), **about
                    )
                )
    rng.shuffle(found)
    return found


def official(folder: Path) -> dict[str, float]:
    """Accuracy and accuracy-plus as in the tool's `calculation.py`, of pairs of lines that stand together."""
    scores = {}
    for subtask in SUBTASKS:
        lines = (folder / f"{subtask}.txt").read_text().splitlines(keepends=True)
        right = []
        for line in lines:
            _, _, truth, prediction = line.split("\t")
            prediction = prediction.lower()
            start = prediction[:4]
            read = (
                prediction
                if prediction in ("yes", "no")
                else "yes"
                if "yes" in start
                else "no"
                if "no" in start
                else "other"
            )
            right.append(read == truth.lower())
        pairs = [all(right[place : place + 2]) for place in range(0, len(right), 2)]
        scores[subtask] = 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)
    return scores


def test_the_official_tool_gets_the_same_numbers(tmp_path: Path) -> None:
    given = answers()
    with open_predictions(tmp_path / "predictions.jsonl", Header({}, len(given))) as writer:
        writer.append(given)
    results = score(tmp_path)
    theirs = official(tmp_path / "official" / "mme")
    ours = results.scores[0]
    assert {name: ours.parts[name]["score"] for name in SUBTASKS} == pytest.approx(theirs)
    assert 0 < ours.value < 2800
    assert ours.value == pytest.approx(sum(theirs.values()))
    assert ours.parts["perception"]["score"] == pytest.approx(sum(theirs[name] for name in PERCEPTION))
    assert ours.parts["cognition"]["score"] == pytest.approx(sum(theirs[name] for name in COGNITION))


def test_the_two_lines_of_an_image_stand_together() -> None:
    files = MME.scores(answers()).official_files()
    assert list(files) == sorted(f"{name}.txt" for name in SUBTASKS)
    lines = {name.removesuffix(".txt"): text.splitlines() for name, text in files.items()}
    assert all(len(line.split("\t")) == 4 for each in lines.values() for line in each)
    images = [line.split("\t")[0] for line in lines["scene"]]
    assert images == [f"scene/{number // 2}.jpg" for number in range(10)]
    assert [line.split("\t")[2] for line in lines["scene"]] == ["Yes", "No"] * 5


def test_names_are_safe_as_file_names_and_differ() -> None:
    assert safe_names(SUBTASKS) == {name: name for name in SUBTASKS}
    names = ["../../etc", "a/b", "a b", "A:B", "", ".hidden", "\N{SNOWMAN}", "é" * 300]
    found = safe_names(names)
    assert list(found.values()) == ["-..-etc", "a-b", "a-b-2", "A-B-3", "unnamed", "hidden", "-", "é" * 60]


def test_a_benchmark_of_the_users_own_gets_the_files_too(tmp_path: Path) -> None:
    """Category names are the user's: whatever they are, the files stay in the folder."""
    category = "../up/left or right"
    given = [
        Prediction(
            "unseen",
            number,
            "sides",
            "",
            "Left?",
            target,
            "yes",
            category=category,
            image_id=f"{number // 2}",
        )
        for number, target in enumerate(("yes", "no", "yes", "no"))
    ]
    about = {"benchmarks": {"sides": {"column": "Sides", "scorer": "mme"}}}
    with open_predictions(tmp_path / "predictions.jsonl", Header({}, 4, about)) as writer:
        writer.append(given)
    folder = tmp_path / "official" / "sides"
    folder.mkdir(parents=True)
    (folder / "existence.txt").write_text("of an earlier evaluation")
    score(tmp_path)
    (path,) = folder.iterdir()
    assert path.name == "-up-left-or-right.txt"
    assert path.read_text().splitlines() == [
        "0\tLeft?\tYes\tyes", "0\tLeft?\tNo\tyes", "1\tLeft?\tYes\tyes", "1\tLeft?\tNo\tyes"
    ]  # fmt: skip


def test_the_halves_need_all_of_their_subtasks() -> None:
    some = [answer for answer in answers() if answer.category != "posters"]
    parts = MME.scores(some).compute().parts
    assert "perception" not in parts
    assert parts["cognition"]["score"] == pytest.approx(sum(parts[name]["score"] for name in COGNITION))
