"""Which instances an adapter is fitted to, and which it is compared on: never the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlora_cli.config import ExportConfig, FitConfig
from mixlora_cli.data.loading import load_records
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.evaluation.sampling import benchmark_of, grouped, stratified

ByTask = Mapping[str, list[Record]]


@dataclass(frozen=True)
class Inputs:
    """Records by task, or by benchmark where they have one."""

    fitted: ByTask
    compared: ByTask
    """Empty without a comparison."""
    compared_split: Literal["heldout", "unseen"]


def choose_inputs(config: ExportConfig, input_matters: bool = True) -> Inputs:
    """Seeded samples of both kinds. Instances to fit to come from `export.split`, those to compare on from the
    held-out ones, or from the unseen ones where the fit does; from one split at most half are fitted to.

    Args:
        input_matters: False where chance selects: without a comparison, no data is read.

    Raises:
        UserError: an unknown task, or too few instances of one to do both.
    """
    settings, split = config.export, config.export.split
    if not (input_matters or settings.evaluate):
        return Inputs({}, {}, "heldout")
    available = _wanted(grouped(load_records(config.data, split, config.seed), benchmark_of), settings, split)
    compared_split: Literal["heldout", "unseen"] = "unseen" if split == "unseen" else "heldout"
    if not settings.evaluate:
        fitted = {task: stratified(r, settings.instances, config.seed) for task, r in available.items()}
        return Inputs(fitted, {}, compared_split)
    if split == compared_split:
        fitted, rest = _halves(available, settings, config.seed)
    else:
        fitted = {task: stratified(r, settings.instances, config.seed) for task, r in available.items()}
        rest = _heldout(config, list(available))
    return Inputs(fitted, _limited(rest, settings.limit, config.seed), compared_split)


def _wanted(available: ByTask, settings: FitConfig, split: str) -> dict[str, list[Record]]:
    if settings.tasks is None:
        return dict(sorted(available.items()))
    for task in settings.tasks:
        if task not in available:
            hint = hint_at(task, available, "tasks")
            raise UserError(f"export.tasks={cut(task)}: no such task in the {split} data; {hint}")
    return {task: available[task] for task in dict.fromkeys(settings.tasks)}


def _halves(available: ByTask, settings: FitConfig, seed: int) -> tuple[dict[str, list[Record]], ByTask]:
    fitted, rest = {}, {}
    for task, records in available.items():
        # Half of them, whatever `export.instances` says, remain to be answered.
        fitted[task] = stratified(records, max(min(settings.instances, len(records) // 2), 1), seed)
        used = {record.index for record in fitted[task]}
        rest[task] = [record for record in records if record.index not in used]
        if not rest[task]:
            raise UserError(
                f"export.split={settings.split}: task {cut(task)} has too few instances ({len(records)}) to "
                "fit to some and compare on others; leave it out of export.tasks, or export.evaluate=false"
            )
    return fitted, rest


def _heldout(config: ExportConfig, tasks: Sequence[str]) -> ByTask:
    if config.data.source == "json" and config.data.heldout is None:
        raise UserError(
            "data.heldout=null: comparing needs held-out records; give data.heldout=<file>, or export.evaluate=false"
        )
    heldout = grouped(load_records(config.data, "heldout"), benchmark_of)
    if missing := [task for task in tasks if task not in heldout]:
        raise UserError(
            f"the held-out data has no instance of {', '.join(missing)}: choose others with export.tasks, "
            "or export.evaluate=false"
        )
    return {task: heldout[task] for task in tasks}


def _limited(groups: ByTask, limit: int | None, seed: int) -> ByTask:
    if limit is None:
        return groups
    return {task: stratified(records, limit, seed) for task, records in groups.items()}
