"""From a table's layout to its cells: every row, seed and task, with the commands that make it.

The rows are Hydra's experiments (`conf/experiment/<scale>`), but each runs in processes of its own and not as a job of
Hydra's multirun: a crash, or a kernel that kills for memory, then ends one cell and not the sweep; a cell that is there
is not run again; and a row is trained and evaluated before the next, so that the table fills row by row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_cli.config import ReproduceConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.reproduce.cell import Cell
from mixlora_cli.reproduce.compose import sweep_of
from mixlora_cli.reproduce.drawings import COMPARED, FIGURE_ROWS, LORA, drawings_of
from mixlora_cli.reproduce.layout import LAYOUTS, Layout, Row
from mixlora_cli.reproduce.parts import BASE, base_folder, evaluation, training

DEFAULT_SEEDS = {"mini": [0, 1, 2], "paper": [0]}


def build_grid(config: ReproduceConfig) -> list[Cell]:
    """All cells, in the order in which they are run: every row with the first seed, then the further seeds.

    Raises:
        UserError: an experiment, an override or the name of a row in `replicated` or `only` is wrong.
    """
    layout = LAYOUTS.get(str(config.what))
    rows = FIGURE_ROWS if layout is None else layout.rows
    known = {row.experiment for each in LAYOUTS.values() for row in each.rows}
    _check_names("replicated", config.replicated, known)
    _check_names("only", config.only, {row.experiment for row in rows})
    rows = tuple(row for row in rows if config.only is None or row.experiment in config.only)
    first, *others = config.seeds or DEFAULT_SEEDS[config.scale]
    wanted = [(row, first) for row in rows]
    if layout is not None:  # one training is enough for a picture
        wanted += [(row, seed) for seed in others for row in rows if _is_replicated(row, config)]
    maker = _Maker(config, layout, _tasks(config) if layout and layout.on_seen_tasks else [])
    return [maker.cell(row, seed, task) for row, seed in wanted for task in maker.tasks_of(row)]


@dataclass(frozen=True)
class _Maker:
    config: ReproduceConfig
    layout: Layout | None
    tasks: list[str]
    """The six seen tasks where the table is about them."""

    def tasks_of(self, row: Row) -> list[str] | list[None]:
        """Specialists have a cell for each task, the others one for all."""
        return self.tasks if row.per_task else [None]

    def cell(self, row: Row, seed: int, task: str | None) -> Cell:
        name = f"{row.experiment}{f'-{_safe(task)}' if task else ''}-seed{seed}"
        if row.experiment == BASE:
            folder, parts = base_folder(self.config, name), []
        else:
            train, folder = training(self.config, row.experiment, seed, task, name)
            parts = [train]
        after = None
        if self.layout is None:
            lora = self._lora(seed)
            parts += drawings_of(row.experiment, folder, lora, self.config)
            after = lora if row.experiment == COMPARED else None
        else:
            seen = ([task] if task else self.tasks) if self.layout.on_seen_tasks else None
            parts.append(evaluation(self.config, row.experiment, folder, seen))
        return Cell(row.experiment, seed, task, folder, tuple(parts), after)

    def _lora(self, seed: int) -> Path:
        return training(self.config, LORA, seed, None, f"{LORA}-seed{seed}")[1]


def _is_replicated(row: Row, config: ReproduceConfig) -> bool:
    return row.experiment != BASE and (config.replicated is None or row.experiment in config.replicated)


def _check_names(key: str, names: Sequence[str] | None, known: Collection[str]) -> None:
    if unknown := [name for name in names or [] if name not in known]:
        raise UserError(f"{key}={unknown[0]}: no such row; rows are {', '.join(sorted(known))}")


def _tasks(config: ReproduceConfig) -> list[str]:
    """The six seen tasks: the specialists' experiment says which."""
    experiment = f"experiment={config.scale}/specialist_lora_r4"
    return [value.strip("[]") for value in sweep_of("train", TrainConfig, [experiment], "data.tasks")]


def _safe(task: str) -> str:
    return task.replace("/", "-").replace("+", "-")
