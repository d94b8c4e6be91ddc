from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mixlora_cli.data import encode as batches
from mixlora_cli.data.collate import Collator, PixelLoader, generation_collator
from mixlora_cli.data.encode import IGNORE, EncodedDataset, Item, encode_prompts, encode_records
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError


def record(index: int, answer: str, image: Path | None = None, task: str = "colour") -> Record:
    turns = (Turn("human", "what colour?"), Turn("gpt", answer))
    return Record(index=index, id=str(index), task=task, image=image, conversation=turns)


# "<s>Hi. USER: what colour? ASSISTANT:"
PROMPT = [1, 10, 11, 12, 14, 24, 18, 19, 20, 14]


def listed(item: Item) -> Item:
    return replace(item, input_ids=list(item.input_ids), labels=list(item.labels))


def test_items_of_all_records(word_base) -> None:
    dataset = encode_records([record(3, "red"), record(8, "red and blue", Path("a.png"))], word_base, 64)
    assert listed(dataset[0]) == Item([*PROMPT, 21, 2], [IGNORE] * 10 + [21, 2], None, "colour", 3)
    assert (dataset[1].image, dataset[1].index, dataset[1].length) == (Path("a.png"), 8, 19)
    assert (len(dataset), dataset.lengths, dataset.num_truncated) == (2, [12, 19], 0)


def test_prompts(word_base) -> None:
    assert listed(encode_prompts([record(3, "red")], word_base)[0]) == Item(
        PROMPT, [IGNORE] * 10, None, "colour", 3
    )


def test_truncation_is_reported(word_base, capsys) -> None:
    dataset = encode_records(
        [record(0, "red and blue"), record(1, "red")], word_base, 12, source="train.json"
    )
    assert [list(item.input_ids[10:]) for item in dataset.items] == [[21, 22], [21, 2]]
    assert dataset.num_truncated == 1
    shown = capsys.readouterr().err
    assert "1 of 2 instances of train.json are longer than data.max_length=12 tokens and lost" in shown


def test_an_instance_without_label_stops_or_is_left_out(word_base, capsys) -> None:
    # the picture makes the first prompt 15 tokens long
    records = [record(4, "red", Path("a.png")), record(5, "red")]
    with pytest.raises(UserError) as caught:
        encode_records(records, word_base, 12, source="train.json")
    assert str(caught.value) == (
        "1 bad record in train.json: 1 no answer token left after truncation (record 4, the prompt alone "
        "fills the 12 tokens allowed (all: 17)); fix them or pass data.on_error=skip to go on without them"
    )
    dataset = encode_records(records, word_base, 12, on_error="skip", source="train.json")
    assert [item.index for item in dataset.items] == [5]
    assert "left out 1 of 2 records; 1 bad record in train.json" in capsys.readouterr().err


def test_a_wrong_mask_stops_whatever_on_error_says(word_base, monkeypatch) -> None:
    def slipped(record, base, max_length) -> Item:
        return Item([*PROMPT, 21, 2], [IGNORE] * 9 + [14, 21, IGNORE], None, "colour", 7)

    monkeypatch.setattr(batches, "encode", slipped)
    with pytest.raises(UserError, match="label mask of record 7"):
        encode_records([record(7, "red")], word_base, 64, on_error="skip")


def test_the_first_instances_of_every_task_are_verified(word_base, monkeypatch) -> None:
    verified: list[int] = []
    monkeypatch.setattr(batches, "verify_labels", lambda encoded, record, base: verified.append(record.index))
    records = [record(index, "red", task="shape" if index == 5 else "colour") for index in range(7)]
    encode_records(records, word_base, 64)
    assert verified == [0, 1, 5]


ITEMS = [
    Item([1, 21, 2], [IGNORE, 21, 2], Path("a.png"), "colour", 7),
    Item([1, 2], [IGNORE, 2], None, "colour", 3),
    Item([1, 22, 23, 2], [IGNORE, IGNORE, 23, 2], Path("b.png"), "colour", 9),
]


def features(paths: list[Path]) -> torch.Tensor:
    return torch.tensor([[float(ord(path.stem))] for path in paths])


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_training_pads_on_the_right() -> None:
    batch = Collator(0, features)(ITEMS)
    assert as_lists(batch) == {
        "input_ids": [[1, 21, 2, 0], [1, 2, 0, 0], [1, 22, 23, 2]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, 21, 2, -100], [-100, 2, -100, -100], [-100, -100, 23, 2]],
        "pixel_values": [[97.0], [98.0]],
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


def test_indices_on_demand() -> None:
    assert Collator(0, features, with_indices=True)(ITEMS)["indices"].tolist() == [7, 3, 9]


def test_the_dataset_feeds_a_data_loader(word_base) -> None:
    dataset = EncodedDataset(ITEMS)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=Collator(0, features))
    assert [batch["input_ids"].shape for batch in loader] == [(2, 3), (1, 4)]


def test_pixels_are_loaded_as_rgb(images) -> None:
    def processor(images, return_tensors):
        assert return_tensors == "pt"
        pixels = [torch.tensor(list(image.convert("RGB").getpixel((0, 0)))) for image in images]
        assert {image.mode for image in images} == {"RGB"}
        return {"pixel_values": torch.stack(pixels)}

    Image.new("L", (4, 4), 9).save(images / "grey.png")
    pixels = PixelLoader(processor)([images / "blue.png", images / "grey.png"])
    assert pixels.tolist() == [[0, 0, 255], [9, 9, 9]]


def test_padding_changes_no_row(word_base) -> None:
    dataset = encode_records([record(0, "red"), record(1, "red and blue")], word_base, 64)
    for collate in (Collator(0, features), Collator(0, features, padding="left")):
        batch = collate([dataset[0], dataset[1]])
        for row, item in enumerate([dataset[0], dataset[1]]):
            kept = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][kept].tolist() == list(item.input_ids)
            assert batch["labels"][row][kept].tolist() == list(item.labels)
            assert set(batch["labels"][row][~kept].tolist()) <= {IGNORE}
            assert set(batch["input_ids"][row][~kept].tolist()) <= {word_base.tokenizer.pad_token_id}
