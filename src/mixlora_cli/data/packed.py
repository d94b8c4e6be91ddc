"""Many encoded instances in few objects: lists of integers take some 40 bytes a token, this takes 8."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload


@dataclass(frozen=True)
class Item:
    """One encoded instance: ids and labels (S,), its picture and where it came from."""

    input_ids: list[int]
    labels: list[int]
    image: Path | None
    task: str
    index: int
    """`Record.index`, for messages."""

    @property
    def length(self) -> int:
        """Tokens, image tokens included."""
        return len(self.input_ids)


class PackedItems(Sequence[Item]):
    """A sequence of items that is appended to; an item is put together anew each time it is asked for."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._ends = array("q", [0])
        self._indices = array("q")
        self._tasks: list[str] = []
        self._names: dict[str, str] = {}  # one string for each task, however many records have it
        self.images: list[Path | None] = []
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        """Take up one more item."""
        self._ids.extend(item.input_ids)
        self._labels.extend(item.labels)
        self._ends.append(len(self._ids))
        self._indices.append(item.index)
        self._tasks.append(self._names.setdefault(item.task, item.task))
        self.images.append(item.image)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = range(len(self))[position]
        start, end = self._ends[number], self._ends[number + 1]
        return Item(
            self._ids[start:end].tolist(),
            self._labels[start:end].tolist(),
            self.images[number],
            self._tasks[number],
            self._indices[number],
        )
