"""Stage one: its pictures are its own, their cells and questions say what is shown, a run is recognised."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixlora_cli.config import AlignConfig
from mixlora_cli.data.collate import Rows
from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.captions import Captioned, plural
from mixlora_cli.data.mini.objects import MiniObject, all_objects
from mixlora_cli.data.mini.plan import Counts, make_plan
from mixlora_cli.data.mini.seen import SEEN_TASKS
from mixlora_cli.data.mini.unseen import UNSEEN_BENCHMARKS
from mixlora_cli.errors import UserError
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.prepare.align.projector_pretraining import Tokens, cell_targets, pretrain_projector
from mixlora_cli.prepare.align.questions import Asked, ask
from mixlora_cli.prepare.align.run import (
    ANNOTATION,
    align,
    asked_first,
    count_names,
    draw,
    remember,
    write_pictures,
)


def test_a_shape_is_described_by_colour_and_name_in_the_cells_that_it_covers_by_area() -> None:
    # Cells are 32 x 32 pixels; the first square's box is exactly cell (row 1, column 2) = number 7.
    tokens = {"red": [10], "square": [11], "white": [12]}
    alone, across = (
        cell_targets(Scene((Item("shape", "square", x, 48, 32, "red"),), "white"), 5, tokens)
        for x in (80, 96)
    )
    assert alone[7] == pytest.approx({10: 1.0, 11: 1.0, 12: 1e-3})
    assert alone[0] == pytest.approx({12: 0.15 + 1e-3})
    assert (across[7][10], across[8][10]) == pytest.approx((0.5, 0.5))


def test_a_number_is_spelt_digit_by_digit_from_left_to_right() -> None:
    scene = Scene((Item("text", "42", 80, 80, 60),), "white")
    targets = cell_targets(scene, 5, {"4": [4], "2": [2], "white": [9]})
    weight = np.array([[cell.get(4, 0.0), cell.get(2, 0.0)] for cell in targets]).reshape(5, 5, 2).sum(axis=0)
    centre_of_4, centre_of_2 = (weight * np.arange(5)[:, None]).sum(axis=0) / weight.sum(axis=0)
    assert centre_of_4 < 2 < centre_of_2


def test_the_projector_learns_to_say_the_words(tmp_path: Path) -> None:
    """On features that are the answer in disguise, the loss falls to near the entropy of the targets."""
    base = build_tiny("smollm")
    assert len(base.chat.picture_tokens) == 4
    pictures = draw(24, "align/0")
    tokens = Tokens(base.tokenizer)
    assert tokens["cat"] == base.tokenizer.encode(" cat", add_special_tokens=False)  # as inside a sentence
    assert tokens["7"] == base.tokenizer.encode("7", add_special_tokens=False)
    # The tiny tower has 2 x 2 cells; each cell's feature is a fixed random code of its target.
    code = torch.randn(len(base.tokenizer), 16, generator=torch.Generator().manual_seed(0))
    features = torch.stack(
        [
            torch.stack(
                [
                    sum(weight * code[token] for token, weight in cell.items()) / sum(cell.values())
                    for cell in cell_targets(picture.scene, 2, tokens)
                ]
            )
            for picture in pictures
        ]
    )
    paths = [Path(str(number)) for number in range(len(pictures))]

    def lookup(wanted: Rows) -> dict[str, torch.Tensor]:
        return {"pixel_values": features[[int(path.name) for (path,) in wanted]]}

    def loss_after(steps: int) -> float:
        torch.manual_seed(0)
        projector = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
        base.model.model.multi_modal_projector = projector
        config = AlignConfig(
            output_dir=str(tmp_path), lexical_steps=steps, lexical_batch_size=12, lexical_learning_rate=1e-2
        )
        value = pretrain_projector(base, lookup, pictures, paths, config)
        assert not any(parameter.requires_grad for parameter in projector.parameters())
        return value

    assert loss_after(120) < 0.5 * loss_after(1)


@pytest.mark.parametrize(
    ("names", "caption", "count"),
    [
        (("cat", "dog"), "A cat and a dog.", 2),
        (("cat",), "Three cats.", 1),
        (("cat",), "A caterpillar.", 0),
        (("cat", "cat"), "A cat.", 1),
        ((), "A cat.", 0),
    ],
)
def test_names_are_counted_as_whole_words_once_each(names, caption: str, count: int) -> None:
    assert count_names(names, caption) == count


@pytest.mark.parametrize(("name", "many"), [("cat", "cats"), ("cross", "crosses"), ("grapes", "grapes")])
def test_plurals(name: str, many: str) -> None:
    assert plural(name) == many


def test_pictures_depend_on_the_stream_and_the_number_alone_and_are_written_once(tmp_path: Path) -> None:
    first, longer, other = draw(5, "align/0"), draw(9, "align/0"), draw(5, "align/1")
    assert first == longer[:5]
    assert first != other
    paths = write_pictures(tmp_path, first)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert write_pictures(tmp_path, first) == paths
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert not list(tmp_path.rglob("*.partial"))


def test_no_picture_is_one_that_the_small_model_is_trained_or_evaluated_on_later() -> None:
    # What the shipped stage one saw in its rounds; the first 8,000 also with an earlier mix of captions.
    seen = {"align/0": 24_000, "align/1": 4_000}
    shown = {captioned.scene for stream, count in seen.items() for captioned in draw(count, stream)}
    asked = {picture for picture in make_plan(Counts()).pictures.values() if isinstance(picture, Scene)}
    assert len(shown) > 0.99 * sum(seen.values()) and len(asked) > 10_000
    assert not shown & asked


def _object(name: str) -> MiniObject:
    return next(item for item in all_objects() if item.name == name)


CAT_AND_ONION = Scene(
    (Item("object", _object("cat"), 30, 30, 50), Item("object", _object("onion"), 130, 130, 50)), "pink"
)
WORD = Scene((Item("text", "river", 80, 80, 40, "blue"),))
STARS = Scene(tuple(Item("shape", "star", x, 80, 30, "red") for x in (30, 80, 130)))
ANSWERS = {
    CAT_AND_ONION: {
        "Do you find a cat in it?": "yes",
        "Yes or no: The cat is left of the onion.": "yes",
        "The cat is below the onion, yes or no?": "no",
        "Is this so? The onion is below the cat.": "yes",
        "Further right: cat or onion?": "onion",
        "Further up: onion or cat?": "cat",
        "What do you find above the onion?": "cat",
        "Look at the top left. What is it?": "cat",
        "How many, all in all?": "two",
    },
    WORD: {
        "Copy what stands there.": "river",
        'Yes or no: It reads "river".': "yes",
        "In what colour do you see the text?": "blue",
        "Is this so? The text is red.": "no",
    },
    STARS: {
        "How many, all in all?": "three",
        "Yes or no: The number of things is 3.": "yes",
        "Say which form you see.": "star",
    },
}


@pytest.fixture(scope="module")
def found() -> dict[Scene, dict[str, str]]:
    """Question -> answer of each scene, of many draws; a question has one answer."""
    answers: dict[Scene, dict[str, str]] = {scene: {} for scene in ANSWERS}
    for scene, known in answers.items():
        for seed in range(400):
            for asked in ask(random.Random(seed), scene, 6):
                assert known.setdefault(asked.text, asked.answer) == asked.answer
    return answers


def test_answers_are_what_the_scene_shows(found: dict[Scene, dict[str, str]]) -> None:
    for scene, expected in ANSWERS.items():
        assert {question: found[scene][question] for question in expected} == expected


def test_nothing_is_asked_that_the_scene_leaves_open(found: dict[Scene, dict[str, str]]) -> None:
    others = [text for text in found[CAT_AND_ONION] if re.match("Do you find an? (?!cat |onion )", text)]
    assert others and {found[CAT_AND_ONION][text] for text in others} == {"no"}
    assert not any("What thing is it?" in text for text in found[CAT_AND_ONION])  # there are two
    assert not any("colour do you see" in text for text in found[STARS])  # which of the three?
    assert ask(random.Random(0), WORD, 0) == []


@pytest.fixture(scope="module")
def conversations() -> list[list[Asked]]:
    return [ask(random.Random(each.caption), each.scene, 6) for each in draw(1500, "test/questions")]


def test_earlier_turns_do_not_give_an_answer_away_nor_does_guessing(conversations: list[list[Asked]]) -> None:
    for asked in conversations:
        assert len({question.text for question in asked}) == len(asked) <= 6
        open_answers = [question.answer for question in asked if question.answer not in ("yes", "no")]
        assert len(set(open_answers)) == len(open_answers)
    counts = Counter(question.answer for asked in conversations for question in asked)
    assert 0.85 < counts["yes"] / counts["no"] < 1.18


def test_no_wording_is_that_of_a_task_or_benchmark(conversations: list[list[Asked]]) -> None:
    templates = [
        re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)))
        for entry in (*SEEN_TASKS.values(), *UNSEEN_BENCHMARKS.values())
        for template in entry.templates
    ]
    texts = {question.text for asked in conversations[:800] for question in asked}
    assert any(pattern.fullmatch("Is there a cat in the image?") for pattern in templates)
    assert len(texts) > 1000
    assert [text for text in texts if any(pattern.fullmatch(text) for pattern in templates)] == []


def test_conversation_has_the_picture_once_and_the_questions_in_turns(tmp_path: Path) -> None:
    picture = Captioned(CAT_AND_ONION, "A cat and an onion.", ("cat", "onion"))
    write_pictures(tmp_path, [picture], questions=3)
    (record,) = json.loads((tmp_path / ANNOTATION).read_text())
    turns = record["conversations"]
    assert len(turns) in (6, 8)
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert sum("<image>" in turn["value"] for turn in turns) == 1
    first = asked_first(0, picture)
    assert first is not None
    assert [turn["value"] for turn in turns[:2]] == [f"<image>\n{first.text}", first.answer]


def test_a_start_that_is_not_there_and_another_run_s_folder_are_said_before_anything_is_drawn(
    tmp_path: Path,
) -> None:
    missing, folder = tmp_path / "one.safetensors", tmp_path / "align"
    with pytest.raises(UserError, match=r"one\.safetensors: no stage-one weights"):
        align(AlignConfig(output_dir=str(folder), start=str(missing)))
    assert not folder.exists()
    remember(AlignConfig(output_dir=str(folder), seed=0), folder)
    remember(AlignConfig(output_dir=str(folder), seed=0, save_every=7), folder)
    with pytest.raises(
        UserError, match=r"seed \(was 0, now 1\); give the same values, or another output_dir="
    ):
        align(AlignConfig(output_dir=str(folder), seed=1))
    assert [path.name for path in folder.iterdir()] == ["align.json"]


@pytest.mark.parametrize("key", ["questions", "lexical_steps"])
def test_a_number_that_may_be_zero_is_not_negative(key: str) -> None:
    assert getattr(AlignConfig(output_dir="", **{key: 0}), key) == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{key}=-1: must be >= 0"):
        AlignConfig(output_dir="", **{key: -1})  # type: ignore[arg-type]
