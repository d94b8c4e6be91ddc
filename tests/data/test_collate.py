from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixlora_cli.data.collate import Collator, PixelLoader, Rows, generation_collator
from mixlora_cli.data.encode import IGNORE, EncodedDataset, Item
from mixlora_cli.models.tiny import build_tiny

CHAT = build_tiny().chat  # pads with token 0
ITEMS = EncodedDataset(
    [
        Item([1, 21, 2], [IGNORE, 21, 2], (Path("a.png"),), "colour", 7),
        Item([1, 2], [IGNORE, 2], (), "colour", 3),
        Item([1, 22, 23, 2], [IGNORE, IGNORE, 23, 2], (Path("b.png"), Path("c.png")), "colour", 9),
    ]
).items


def features(rows: Rows) -> dict[str, torch.Tensor]:
    pictures = [picture for row in rows for picture in row]
    return {
        "pixel_values": torch.tensor([[float(ord(picture.stem))] for picture in pictures]),
        "image_sizes": torch.tensor([len(row) for row in rows]),
    }


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_training_pads_on_the_right() -> None:
    batch = Collator(CHAT, features, with_indices=True)(ITEMS)
    assert as_lists(batch) == {
        "input_ids": [[1, 21, 2, 0], [1, 2, 0, 0], [1, 22, 23, 2]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, 21, 2, -100], [-100, 2, -100, -100], [-100, -100, 23, 2]],
        "pixel_values": [[97.0], [98.0], [99.0]],
        "image_sizes": [1, 2],
        "indices": [7, 3, 9],
    }
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_generation_pads_on_the_left() -> None:
    assert as_lists(generation_collator(CHAT, features)(ITEMS[::-1])) == {
        "input_ids": [[1, 22, 23, 2], [0, 0, 1, 2], [0, 1, 21, 2]],
        "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]],
        "pixel_values": [[98.0], [99.0], [97.0]],
        "image_sizes": [2, 1],
    }


def test_a_batch_without_picture_has_no_pixel_values() -> None:
    def refuse(rows: Rows) -> dict[str, torch.Tensor]:
        raise AssertionError("asked for features of no picture")

    assert set(Collator(CHAT, refuse)([ITEMS[1]])) == {"input_ids", "attention_mask", "labels"}


def test_the_dataset_feeds_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(
        EncodedDataset(ITEMS), batch_size=2, collate_fn=Collator(CHAT, features)
    )
    assert [batch["input_ids"].shape for batch in loader] == [(2, 3), (1, 4)]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_no_row(padding) -> None:
    batch = Collator(CHAT, features, padding=padding)(ITEMS)
    for row, item in enumerate(ITEMS):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == list(item.input_ids)
        assert batch["labels"][row][kept].tolist() == list(item.labels)
        assert set(batch["labels"][row][~kept].tolist()) <= {IGNORE}
        assert set(batch["input_ids"][row][~kept].tolist()) <= {0}


def test_pixels_are_loaded_as_rgb(images) -> None:
    Image.new("L", (4, 4), 9).save(images / "grey.png")
    found = PixelLoader(CHAT)([(images / "blue.png", images / "grey.png"), (images / "red.png",)])
    assert set(found) == {"pixel_values"}
    mean, std = (
        torch.tensor(getattr(CHAT.processor.image_processor, name)) for name in ("image_mean", "image_std")
    )
    shown = (found["pixel_values"].mean(dim=(2, 3)) * std + mean) * 255
    assert shown.round().tolist() == [[0, 0, 255], [9, 9, 9], [255, 0, 0]]


def test_token_types_tell_where_pictures_stand() -> None:
    class Typed(type(CHAT)):  # type: ignore[misc]
        token_types = "mm_token_type_ids"

    chat = Typed(CHAT.tokenizer, CHAT.template, CHAT.processor)
    items = [
        Item([1, 4, 4, 2], [IGNORE] * 4, (Path("a.png"),), "t", 0),
        Item([1, 2], [IGNORE] * 2, (), "t", 1),
    ]
    assert Collator(chat, features)(items)["mm_token_type_ids"].tolist() == [[0, 1, 1, 0], [0] * 4]
    assert Collator(chat, features)(items[1:])["mm_token_type_ids"].tolist() == [[0, 0]]
