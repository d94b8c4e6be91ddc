"""The official files of MME, read back by the official rule written anew here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mixlora_cli.evaluation.metrics import MME
from mixlora_cli.evaluation.mme_files import mme_lines
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.evaluation.tallies import COGNITION, PERCEPTION

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
    lines = mme_lines(answers())
    assert list(lines) == SUBTASKS
    assert all(len(fields) == 4 for each in lines.values() for line in each if (fields := line.split("\t")))
    images = [line.split("\t")[0] for line in lines["scene"]]
    assert images == [f"scene/{number // 2}.jpg" for number in range(10)]


def test_the_halves_need_all_of_their_subtasks() -> None:
    some = [answer for answer in answers() if answer.category != "posters"]
    parts = MME.measure(some).parts
    assert "perception" not in parts
    assert parts["cognition"]["score"] == pytest.approx(sum(parts[name]["score"] for name in COGNITION))
