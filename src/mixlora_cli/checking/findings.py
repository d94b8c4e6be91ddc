"""What a check found: problems, which stop a training or cost it records, and remarks, which do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from mixlora_cli.data.problems import Kind


class Remark(Enum):
    """What a training puts up with, and its user should know; the value is the text that the user reads."""

    DUPLICATE = "duplicate record (same picture, same turns)"
    OVER_LENGTH = "over-length: the end of its last answer is cut"
    UNDEFINED_TASK = (
        "task without definition (refused by routing=task, which data.metadata makes the default)"
    )


class Mistake(Enum):
    """Problems that only this check names."""

    LABELS = "wrong label mask"


Sort = Kind | Mistake | Remark
SORTS: tuple[Sort, ...] = (*Kind, *Mistake, *Remark)


@dataclass
class Found:
    """How often one sort of thing was found, and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """Findings of one split, by sort, in the order of the records."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self._found: dict[Sort, Found] = {}

    def add(self, sort: Sort, example: str) -> None:
        """Count one more."""
        found = self._found.setdefault(sort, Found())
        found.count += 1
        if len(found.examples) < self.num_examples:
            found.examples.append(" ".join(example.split()))

    def of(self, sorts: Iterable[Sort] = SORTS) -> dict[Sort, Found]:
        """What was found of `sorts`, in their order."""
        return {sort: self._found[sort] for sort in sorts if sort in self._found}

    @property
    def num_problems(self) -> int:
        return sum(found.count for found in self.of((*Kind, *Mistake)).values())

    @property
    def num_remarks(self) -> int:
        return sum(found.count for found in self.of(Remark).values())
