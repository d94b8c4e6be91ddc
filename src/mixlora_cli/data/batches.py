"""Records encoded once, ready to be batched: what the Trainer and the evaluation iterate over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from rich.console import Console
from torch.utils.data import Dataset

from mixlora_cli.data.encode import Encoded, TextSide, encode, encode_prompt, verify_labels
from mixlora_cli.data.packed import Item, PackedItems
from mixlora_cli.data.problems import BadRecord, Problem, settle
from mixlora_cli.data.records import Record
from mixlora_cli.progress import with_bar

__all__ = ["EncodedDataset", "Item", "encode_prompts", "encode_records"]


class EncodedDataset(Dataset[Item]):
    """Items in the order of their records."""

    def __init__(self, items: Sequence[Item], num_truncated: int = 0) -> None:
        self.items = items if isinstance(items, PackedItems) else PackedItems(items)
        self.num_truncated = num_truncated
        """Items that lost the end of their last answer."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Item:
        return self.items[position]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item, for length-grouped batches."""
        return self.items.lengths


def encode_records(
    records: Sequence[Record],
    base: TextSide,
    max_length: int,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
    verified_per_task: int = 2,
) -> EncodedDataset:
    """Training items of all records; the label masks of the first `verified_per_task` of each task are
    checked.

    How many were truncated, and how many had to be left out, is printed.

    Raises UserError when a checked label mask is wrong, whatever `on_error` is, and when a record cannot be
    encoded and `on_error` is "stop".
    """
    verified: dict[str, int] = {}
    num_truncated = 0

    def encode_one(record: Record) -> Encoded:
        nonlocal num_truncated
        encoded = encode(record, base, max_length)
        num_truncated += encoded.num_dropped > 0
        if verified.setdefault(record.task, 0) < verified_per_task:
            verified[record.task] += 1
            verify_labels(encoded, record, base)
        return encoded

    items = _encode_all(records, encode_one, on_error, source)
    if num_truncated:
        Console(stderr=True).print(
            f"{num_truncated} of {len(items)} instances of {source} are longer than "
            f"data.max_length={max_length} tokens and lost the end of their last answer",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return EncodedDataset(items, num_truncated)


def encode_prompts(
    records: Sequence[Record],
    base: TextSide,
    on_error: Literal["stop", "skip"] = "stop",
    source: str = "the data",
) -> EncodedDataset:
    """Generation prompts of all records, never truncated; labels are all -100.

    Raises UserError when a record cannot be encoded and `on_error` is "stop".
    """
    return EncodedDataset(_encode_all(records, lambda record: encode_prompt(record, base), on_error, source))


def _encode_all(
    records: Sequence[Record],
    encode_one: Callable[[Record], Encoded],
    on_error: Literal["stop", "skip"],
    source: str,
) -> PackedItems:
    items = PackedItems()
    problems: list[Problem] = []
    console = Console(stderr=True)
    for record in with_bar(records, "tokenising", console):
        try:
            encoded = encode_one(record)
        except BadRecord as bad:
            problems.append(Problem(record.index, bad.kind, bad.detail))
            continue
        items.append(Item(encoded.input_ids, encoded.labels, record.image, record.task, record.index))
    settle(problems, source, len(records), on_error)
    return items
