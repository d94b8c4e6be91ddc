from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixlora_cli.data.collate import Collator, PixelLoader, generation_collator
from mixlora_cli.data.encode import IGNORE, EncodedDataset, Item

ITEMS = EncodedDataset(
    [
        Item([1, 21, 2], [IGNORE, 21, 2], Path("a.png"), "colour", 7),
        Item([1, 2], [IGNORE, 2], None, "colour", 3),
        Item([1, 22, 23, 2], [IGNORE, IGNORE, 23, 2], Path("b.png"), "colour", 9),
    ]
).items


def features(paths: list[Path]) -> torch.Tensor:
    return torch.tensor([[float(ord(path.stem))] for path in paths])


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_training_pads_on_the_right() -> None:
    batch = Collator(0, features, with_indices=True)(ITEMS)
    assert as_lists(batch) == {
        "input_ids": [[1, 21, 2, 0], [1, 2, 0, 0], [1, 22, 23, 2]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, 21, 2, -100], [-100, 2, -100, -100], [-100, -100, 23, 2]],
        "pixel_values": [[97.0], [98.0]],
        "indices": [7, 3, 9],
    }
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_generation_pads_on_the_left() -> None:
    assert as_lists(generation_collator(0, features)(ITEMS[::-1])) == {
        "input_ids": [[1, 22, 23, 2], [0, 0, 1, 2], [0, 1, 21, 2]],
        "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]],
        "pixel_values": [[98.0], [97.0]],
    }


def test_a_batch_without_picture_has_no_pixel_values() -> None:
    def refuse(paths: list[Path]) -> torch.Tensor:
        raise AssertionError("asked for features of no picture")

    assert set(Collator(0, refuse)([ITEMS[1]])) == {"input_ids", "attention_mask", "labels"}


def test_the_dataset_feeds_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(
        EncodedDataset(ITEMS), batch_size=2, collate_fn=Collator(0, features)
    )
    assert [batch["input_ids"].shape for batch in loader] == [(2, 3), (1, 4)]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_no_row(padding) -> None:
    batch = Collator(0, features, padding=padding)(ITEMS)
    for row, item in enumerate(ITEMS):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == list(item.input_ids)
        assert batch["labels"][row][kept].tolist() == list(item.labels)
        assert set(batch["labels"][row][~kept].tolist()) <= {IGNORE}
        assert set(batch["input_ids"][row][~kept].tolist()) <= {0}


def test_pixels_are_loaded_as_rgb(images) -> None:
    def processor(images, return_tensors):
        assert return_tensors == "pt"
        assert {image.mode for image in images} == {"RGB"}
        return {"pixel_values": torch.stack([torch.tensor(image.getpixel((0, 0))) for image in images])}

    Image.new("L", (4, 4), 9).save(images / "grey.png")
    pixels = PixelLoader(processor)([images / "blue.png", images / "grey.png"])
    assert pixels.tolist() == [[0, 0, 255], [9, 9, 9]]
