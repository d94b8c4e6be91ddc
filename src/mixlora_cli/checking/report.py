"""What `mixlora check` says: tables for the screen, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixlora_cli.checking.findings import Findings, Found, Remark
from mixlora_cli.checking.leakage import Leak
from mixlora_cli.errors import cut
from mixlora_cli.store import write_text

FILE_NAME = "check.json"
PROBLEMS_FOUND = 1
"""Exit code; 0 is a clean bill, 2 (a user's mistake) means that the check could not be made."""


@dataclass
class SplitReport:
    """What was found in one file of records."""

    split: str
    source: str
    findings: Findings
    records: int = 0
    """Looked at; records of other tasks than `data.tasks` do not count."""
    good: int = 0
    """Without a problem."""
    text_only: int = 0
    pictures: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    """Good records of each task."""
    shared_ids: int = 0
    """Records whose id an earlier record has; allowed."""
    text_seconds: float = 0.0

    @property
    def texts_per_second(self) -> float:
        return self.records / max(self.text_seconds, 1e-9)


@dataclass
class Report:
    """Everything that one check found."""

    splits: list[SplitReport]
    leaks: list[Leak]
    left_out: list[str]
    """What was not looked at, and why."""
    strict: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 1: problems; with `strict` also remarks and leaks."""
        problems = sum(split.findings.num_problems for split in self.splits)
        remarks = sum(split.findings.num_remarks for split in self.splits) + sum(
            leak.total for leak in self.leaks
        )
        return PROBLEMS_FOUND if problems or (self.strict and remarks) else 0

    def as_json(self) -> dict[str, Any]:
        """Plain values, with every example that was kept."""
        return {
            "exit_code": self.exit_code,
            "splits": {split.split: _split_json(split) for split in self.splits},
            "leakage": [asdict(leak) for leak in self.leaks],
            "left_out": self.left_out,
        }


def _split_json(split: SplitReport) -> dict[str, Any]:
    findings = {
        sort.name.lower(): {"text": sort.value, "remark": isinstance(sort, Remark), **asdict(found)}
        for sort, found in split.findings.of().items()
    }
    return {
        "source": split.source,
        "records": split.records,
        "good": split.good,
        "text_only": split.text_only,
        "pictures": split.pictures,
        "shared_ids": split.shared_ids,
        "tasks": split.tasks,
        "text_records_per_second": round(split.texts_per_second, 1),
        "findings": findings,
    }


def write_report(report: Report, folder: Path) -> Path:
    """Write `check.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    write_text(path, json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n")
    return path


def print_report(report: Report, path: Path, examples: int, console: Console) -> None:
    """Tables of findings and leaks, then one line that sums up."""
    for split in report.splits:
        console.print(
            f"{split.split}: {split.records:,} records of {len(split.tasks)} tasks, {split.pictures:,} pictures, "
            f"{split.text_only:,} records without one; {split.good:,} good; "
            f"texts checked at {split.texts_per_second:,.0f} records/s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if split.findings.of():
            console.print(_finding_table(split, examples))
    if report.leaks:
        console.print(_leak_table(report.leaks))
    for leak in report.leaks:
        for line in _leak_lines(leak, examples):
            console.print(f"{cut(leak.benchmark)}: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in report.left_out:
        console.print(f"not checked: {line}", markup=False, highlight=False, soft_wrap=True)
    problems = sum(split.findings.num_problems for split in report.splits)
    remarks = sum(split.findings.num_remarks for split in report.splits)
    verdict = f"{problems:,} problems, {remarks:,} remarks; full report: {path}"
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)


def _shown(found: Found, examples: int) -> str:
    return escape("\n".join(found.examples[:examples]))


def _finding_table(split: SplitReport, examples: int) -> Table:
    table = Table(title=f"{split.split}: {escape(split.source)}", title_justify="left")
    table.add_column("")
    table.add_column("found", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("first examples", overflow="fold")
    for sort, found in split.findings.of().items():
        weight = "remark" if isinstance(sort, Remark) else "problem"
        table.add_row(weight, escape(sort.value), f"{found.count:,}", _shown(found, examples))
    return table


def _leak_table(leaks: list[Leak]) -> Table:
    table = Table(title="evaluation sets: what they share with the training records", title_justify="left")
    table.add_column("set", no_wrap=True)
    for name in (
        "records",
        "pictures",
        "same picture",
        "near duplicate",
        "same question + answer",
        "same picture + question",
    ):
        table.add_column(name, justify="right")
    for leak in leaks:
        numbers = (leak.records, leak.pictures, *(part.count for part in leak.parts))
        table.add_row(escape(cut(leak.benchmark)), *(f"{number:,}" for number in numbers))
    return table


def _leak_lines(leak: Leak, examples: int) -> list[str]:
    """The training tasks that have its pictures, the first examples of each sort, and what was not compared."""
    tasks = [f"{cut(task)} ({count:,} pictures)" for task, count in leak.training_tasks.items()]
    more = [f"and {len(tasks) - examples} more"] if len(tasks) > examples else []
    lines = [f"training tasks with its pictures: {', '.join([*tasks[:examples], *more])}"] if tasks else []
    lines += [example for part in leak.parts for example in part.examples[:examples]]
    if leak.plain_pictures:
        lines.append(f"{leak.plain_pictures:,} pictures too plain to be anything's near duplicate")
    return lines
