from __future__ import annotations

from pathlib import Path

import pytest

from mixlora_cli.data.packed import Item, PackedItems

ITEMS = [
    Item([1, 2, 3], [-100, 2, 3], Path("a.png"), "colour", 7),
    Item([70_000], [-100], None, "text", 3),
    Item([], [], Path("b.png"), "colour", 9),
]


def test_items_come_back_as_they_were() -> None:
    packed = PackedItems(ITEMS)
    assert list(packed) == ITEMS
    assert (packed[-1], packed[1:], packed[::2]) == (ITEMS[-1], ITEMS[1:], ITEMS[::2])
    assert (len(packed), packed.lengths, packed.images) == (
        3,
        [3, 1, 0],
        [Path("a.png"), None, Path("b.png")],
    )
    with pytest.raises(IndexError):
        packed[3]


def test_tokens_are_not_kept_as_objects() -> None:
    packed = PackedItems(Item(list(range(1000, 1400)), [-100] * 400, None, "t", n) for n in range(50))
    assert packed._ids.itemsize + packed._labels.itemsize == 8
    assert len(packed._ids) == 50 * 400
    assert packed[49].input_ids[-1] == 1399
