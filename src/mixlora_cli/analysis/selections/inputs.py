"""Whose selections are read: instances of unseen benchmarks, and held-out ones of seen tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixlora_cli.config import DataConfig, TsneConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.evaluation.benchmarks import BENCHMARKS, benchmark_named, in_paper_order
from mixlora_cli.evaluation.sampling import benchmark_of, grouped, stratified

Split = Literal["unseen", "heldout"]
_NOT_IN_FIG_5 = "MME"
_LISTED = 20


@dataclass(frozen=True)
class Instances:
    """The sample of one task."""

    task: str
    split: Split
    records: Sequence[Record]
    available: int
    """Instances that the split has of it."""
    images: Path | None
    """Folder that holds the pictures."""


def choose_instances(config: TsneConfig) -> list[Instances]:
    """Seeded samples of the tasks in the order that they were named, or in the paper's.

    A name that both splits have means the unseen one.

    Raises:
        UserError: a task is unknown or has too few instances, or there are fewer than two tasks.
    """
    data = replace(config.data, tasks=None)
    wanted = _wanted(config)
    found: dict[str, tuple[Split, list[Record]]] = {}
    for split, groups in _groups(data, only_unseen=wanted is None):
        found = {task: (split, records) for task, records in groups.items()} | found
        if wanted is not None and all(task in found for task in wanted):
            break
    if wanted is None:
        wanted = [t for t in in_paper_order(found) if benchmark_named(t).column != _NOT_IN_FIG_5]
        if len(wanted) < 2:
            raise UserError(
                f"the unseen data has one task alone ({', '.join(map(cut, found))}), and a map of one "
                "compares it with nothing: name two or more with tasks=[...]"
            )
    if missing := [task for task in wanted if task not in found]:
        raise UserError(_unknown(missing[0], list(found), data))
    chosen = []
    for task in wanted:
        split, records = found[task]
        if len(records) < 2:
            raise UserError(
                f"tasks={cut(task)}: the {split} data has 1 instance of it, a map needs at least 2"
            )
        sample = stratified(records, config.tsne.instances, config.seed)
        chosen.append(Instances(task, split, sample, len(records), locate_files(data, split).images))
    return chosen


def _wanted(config: TsneConfig) -> list[str] | None:
    """Names of tasks, each once; None = the unseen benchmarks."""
    if config.pairs is not None:
        return list(dict.fromkeys(task for side in zip(*config.pairs, strict=True) for task in side))
    return None if config.tasks is None else list(dict.fromkeys(config.tasks))


def _groups(data: DataConfig, only_unseen: bool) -> Iterator[tuple[Split, dict[str, list[Record]]]]:
    """Records by task of each split that the data has; a split is read when it is asked for."""
    if only_unseen or data.source == "mini" or data.unseen is not None:
        if only_unseen and data.source != "mini" and data.unseen is None:
            raise UserError(
                "data.unseen=null: without tasks=[...] the unseen benchmarks are drawn; give data.unseen=<file>, or "
                "name held-out tasks"
            )
        yield "unseen", grouped(load_records(data, "unseen"), benchmark_of)
    if not only_unseen and (data.source == "mini" or data.heldout is not None):
        yield "heldout", grouped(load_records(data, "heldout"), lambda record: record.task)


def _unknown(task: str, available: Sequence[str], data: DataConfig) -> str:
    names = sorted(available)
    without = [f"data.{split}=null" for split in ("unseen", "heldout") if _absent(data, split)]
    reason = f" ({' and '.join(without)})" if without else ""
    if task in BENCHMARKS or task in load_definitions(data):
        return (
            f"tasks={cut(task)}: the unseen and the held-out data have no instance of it{reason}; "
            f"there are: {', '.join(map(cut, names[:_LISTED])) or 'none'}"
        )
    hint = hint_at(task, names, "tasks")
    return f"tasks={cut(task)}: no such task in the unseen and the held-out data{reason}; {hint}"


def _absent(data: DataConfig, split: str) -> bool:
    return data.source != "mini" and getattr(data, split) is None
