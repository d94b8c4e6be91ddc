"""What each cell of a picture should say, on literal scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixlora_cli.config import AlignConfig
from mixlora_cli.data.mini.canvas import Item, Scene
from mixlora_cli.data.mini.captions import plural
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.prepare.align.projector_pretraining import Tokens, cell_targets, pretrain_projector
from mixlora_cli.prepare.align.run import count_names, draw, write_pictures


def _tokens(**ids: int) -> dict[str, list[int]]:
    return {word: [number] for word, number in ids.items()}


def test_a_shape_that_fills_one_cell_is_described_there_by_colour_and_name() -> None:
    # Cells are 32 x 32 pixels; the square's box is exactly cell (row 1, column 2) = number 7.
    scene = Scene((Item("shape", "square", 80, 48, 32, "red"),), "white")
    targets = cell_targets(scene, 5, _tokens(red=10, square=11, white=12))
    assert targets[7] == pytest.approx({10: 1.0, 11: 1.0, 12: 1e-3})
    assert targets[0] == pytest.approx({12: 0.15 + 1e-3})


def test_a_box_across_two_cells_counts_in_each_by_area() -> None:
    scene = Scene((Item("shape", "square", 96, 48, 32, "red"),), "white")
    targets = cell_targets(scene, 5, _tokens(red=10, square=11, white=12))
    assert targets[7][10] == pytest.approx(0.5)
    assert targets[8][10] == pytest.approx(0.5)


def test_a_number_is_spelt_digit_by_digit_from_left_to_right() -> None:
    scene = Scene((Item("text", "42", 80, 80, 60),), "white")
    targets = cell_targets(scene, 5, {"4": [4], "2": [2], "white": [9]})
    weight = np.array([[cell.get(4, 0.0), cell.get(2, 0.0)] for cell in targets]).reshape(5, 5, 2).sum(axis=0)
    columns = np.arange(5)
    centre_of_4, centre_of_2 = (weight * columns[:, None]).sum(axis=0) / weight.sum(axis=0)
    assert centre_of_4 < 2 < centre_of_2


def test_words_are_tokenised_as_inside_a_sentence_and_digits_alone() -> None:
    tokenizer = build_tiny("smollm").tokenizer
    tokens = Tokens(tokenizer)
    assert tokens["cat"] == tokenizer.encode(" cat", add_special_tokens=False)
    assert tokens["7"] == tokenizer.encode("7", add_special_tokens=False)


def test_names_are_counted_as_whole_words_once_each() -> None:
    assert count_names(("cat", "dog"), "A cat and a dog.") == 2
    assert count_names(("cat",), "Three cats.") == 1
    assert count_names(("cat",), "A caterpillar.") == 0
    assert count_names(("cat", "cat"), "A cat.") == 1
    assert count_names((), "A cat.") == 0


@pytest.mark.parametrize(("name", "many"), [("cat", "cats"), ("cross", "crosses"), ("grapes", "grapes")])
def test_plurals(name: str, many: str) -> None:
    assert plural(name) == many


def test_pictures_depend_on_the_stream_and_the_number_alone() -> None:
    first, longer, other = draw(5, "align/0"), draw(9, "align/0"), draw(5, "align/1")
    assert first == longer[:5]
    assert first != other


def test_writing_pictures_again_changes_no_file(tmp_path: Path) -> None:
    pictures = draw(4, "align/0")
    paths = write_pictures(tmp_path, pictures)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert write_pictures(tmp_path, pictures) == paths
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert not list(tmp_path.rglob("*.partial"))


def test_the_projector_learns_to_say_the_words(tmp_path: Path) -> None:
    """On features that are the answer in disguise, the loss falls to near the entropy of the targets."""
    base = build_tiny("smollm")
    assert base.num_image_tokens == 4
    pictures = draw(24, "align/0")
    tokens = Tokens(base.tokenizer)
    # The tiny tower has 2 x 2 cells; each cell's feature is a fixed random code of its target.
    code = torch.randn(len(base.tokenizer), 16, generator=torch.Generator().manual_seed(0))
    rows = []
    for picture in pictures:
        cells = cell_targets(picture.scene, 2, tokens)
        rows.append(
            torch.stack([sum(w * code[t] for t, w in cell.items()) / sum(cell.values()) for cell in cells])
        )
    features = torch.stack(rows)
    paths = [Path(str(number)) for number in range(len(pictures))]

    def lookup(wanted: list[Path]) -> torch.Tensor:
        return features[[int(path.name) for path in wanted]]

    def loss_after(steps: int) -> float:
        torch.manual_seed(0)
        projector = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
        fresh = build_tiny("smollm")
        fresh.model.model.multi_modal_projector = projector
        config = AlignConfig(
            output_dir=str(tmp_path), lexical_steps=steps, lexical_batch_size=12, lexical_learning_rate=1e-2
        )
        value = pretrain_projector(fresh, lookup, pictures, paths, config)
        assert not any(parameter.requires_grad for parameter in projector.parameters())
        return value

    assert loss_after(120) < 0.5 * loss_after(1)
