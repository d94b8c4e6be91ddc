"""The task of a free question: the classifier equals scikit-learn's, and what a served model makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mixlora_cli.config import DataConfig
from mixlora_cli.data.definitions import asked_questions
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models.generate import Decoding
from mixlora_cli.models.session import find_run
from mixlora_cli.serving.choosing import _PENALTY, TaskChooser
from mixlora_cli.serving.models import FREE, open_models
from tiny_runs import TINY, finished_run

WIDTH = 24


def embeddings_of(
    centres: np.ndarray, sizes: list[int]
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """Questions of each task, with embeddings around its centre and one feature that is always the same."""
    rng = np.random.default_rng(0)
    questions: dict[str, list[str]] = {}
    found: dict[str, torch.Tensor] = {}
    for task, (centre, size) in enumerate(zip(centres, sizes, strict=True)):
        questions[f"task {task}"] = [f"{task}/{number}" for number in range(size)]
        for text in questions[f"task {task}"]:
            values = centre + 0.3 * rng.standard_normal(WIDTH)
            values[3] = 0.5
            found[text] = torch.tensor(values, dtype=torch.float32)
    return questions, found


def test_equals_a_ridge_classifier() -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((4, WIDTH))
    questions, known = embeddings_of(centres, [8, 3, 5, 1])
    chooser = TaskChooser(questions, known)
    features = np.stack([known[text].double().numpy() for texts in questions.values() for text in texts])
    wanted = [task for task, texts in questions.items() for _ in texts]
    theirs = make_pipeline(StandardScaler(), RidgeClassifier(_PENALTY * WIDTH)).fit(features, wanted)
    chosen = []
    for number in range(200):
        embedding = centres[number % 4] * rng.uniform(0, 1.5) + 0.5 * rng.standard_normal(WIDTH)
        embedding[3] = 0.5
        scores = theirs.decision_function(embedding.astype(np.float32)[None])[0]
        expected = theirs.classes_[scores.argmax()] if scores.max() > 0 else None
        assert chooser.choose(torch.tensor(embedding, dtype=torch.float32)) == expected
        chosen.append(expected)
    assert {*chosen} == {"task 0", "task 1", "task 2", "task 3", None}


def test_a_single_task_is_always_it() -> None:
    questions, known = embeddings_of(np.zeros((1, WIDTH)), [3])
    assert TaskChooser(questions, known).choose(torch.ones(WIDTH)) == "task 0"


def test_a_served_model_says_which_task_it_took(data: DataConfig, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", data, routing="task")
    asked = {"counting": ["How many dogs?", "Count the dogs."], "reading": ["What is written?", "Read it."]}
    folder.definitions.write_text(json.dumps({"counting": "Do counting.", "reading": "Do reading."}))
    folder.questions.write_text(json.dumps({**asked, "no longer defined": ["Why?"]}))
    (served,) = open_models([str(folder.root)], TINY, base=False)
    named = served.prepare([Turn("human", "Read it.")], task="counting")
    for task, texts in asked.items():
        for text in texts:
            question = served.prepare([Turn("human", text)])
            assert question.item.task == FREE + text
            served.write([question, named], [Decoding(1)] * 2)
            assert (question.selected_by, question.task, question.item.task) == ("question", task, task)
    assert (named.selected_by, named.task, named.item.task) == ("task", "counting", "counting")
    defined = served.prepare([Turn("human", "Read it.")], definition="Read it.")
    served.write([defined], [Decoding(1)])
    assert (defined.selected_by, defined.task, defined.item.task) == ("definition", None, FREE + "Read it.")

    folder.questions.write_text("{}")  # not known: the text is the definition
    (served,) = open_models([str(folder.root)], TINY, base=False)
    free = served.prepare([Turn("human", " Read it. ")])
    served.write([free], [Decoding(1)])
    assert (free.selected_by, free.task, free.item.task) == ("question", None, FREE + "Read it.")


def test_questions_of_a_run(data: DataConfig, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", data, routing="task")
    questions = asked_questions(load_records(data, "train"))
    assert find_run(str(folder.root), TINY).questions == questions  # of an earlier version, from its data
    assert [*questions] == ["counting", "reading", "naming"]
    assert all(0 < len({*texts}) == len(texts) <= 8 for texts in questions.values())
    assert all(
        text == text.strip() and "<image>" not in text for texts in questions.values() for text in texts
    )
    folder.questions.write_text('{"reading": ["Read it."]}')
    assert find_run(str(folder.root), TINY).questions == {"reading": ["Read it."]}
    folder.questions.unlink()
    assert isinstance(data.train, str)
    Path(data.train).unlink()
    assert find_run(str(folder.root), TINY).questions == {}
    folder.questions.write_text("[")
    with pytest.raises(UserError, match=r"questions\.json"):
        _ = find_run(str(folder.root), TINY).questions
