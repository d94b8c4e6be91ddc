"""`mixlora reproduce`: the grid of a table, cell by cell, and then the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mixlora_cli.config import MOST_JOBS, ReproduceConfig
from mixlora_cli.errors import WorkerFailed
from mixlora_cli.launch import threads_each
from mixlora_cli.output import require_writable
from mixlora_cli.reproduce.board import Board
from mixlora_cli.reproduce.cell import Cell, finished
from mixlora_cli.reproduce.estimate import SECONDS, in_words, total
from mixlora_cli.reproduce.grid import build_grid
from mixlora_cli.reproduce.process import PROGRAM, StopRequest
from mixlora_cli.reproduce.runner import Outcome, Runner

NOTHING_YET = "no cell is finished yet: there is no table to print"


def reproduce(config: ReproduceConfig, program: Sequence[str] = PROGRAM) -> Outcome:
    """Run what is missing of the grid, print the table, and say what failed.

    Args:
        config: What to reproduce.
        program: What `mixlora` is; tests put a stand-in here.

    Raises:
        UserError: an experiment or override is wrong, before anything runs.
        WorkerFailed: cells failed, or are left to another process; the others are done.
        KeyboardInterrupt: stopped by a signal; the running training has its checkpoint.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    cells = build_grid(config)
    _say_estimate(config, cells, console)
    if config.dry_run:
        _list(cells, console)
        return Outcome()
    require_writable(Path(config.output_dir))
    stop = StopRequest()
    unfinished = sum(not all(finished(cell, part) for part in cell.parts) for cell in cells)
    # Of all, not of what is left: it decides how many threads a cell gets, on which its numbers depend.
    jobs = _jobs(config)
    shown = min(jobs, max(unfinished, 1))
    with stop.listening(), Board(cells, Console(highlight=False), shown) as board:
        outcome = Runner(board, stop, program, config.keep_checkpoints, jobs).run(cells)
    if outcome.stopped:
        console.print(
            f"stopped: {len(outcome.done)} of {len(cells)} cells are done, interrupted trainings have their "
            "checkpoints; the same command goes on from here"
        )
        raise KeyboardInterrupt
    _print_table(config, outcome, console)
    _complain(outcome)
    return outcome


def _jobs(config: ReproduceConfig) -> int:
    """How many cells run at the same time. Few threads each waste least of a processor; GPUs are for one training."""
    if config.jobs is not None:
        return config.jobs
    import torch  # takes a second, which a mistake in the configuration need not wait for

    if config.scale == "paper" or torch.cuda.is_available():
        return 1
    return min(threads_each(1), MOST_JOBS)


def _say_estimate(config: ReproduceConfig, cells: Sequence[Cell], console: Console) -> None:
    missing = [part for cell in cells for part in cell.parts if not finished(cell, part)]
    complete = sum(all(finished(cell, part) for part in cell.parts) for cell in cells)
    seconds, unknown = total(part.seconds for part in missing)
    trainings = sum(part.name == "train" for part in missing)
    by = (
        f"{config.speed.train} training and {config.speed.answer} answered instances a second"
        if config.scale == "mini"
        else "`mixlora plan` for four A100s of 80 GB"
    )
    without = f", {unknown} parts without an estimate" if unknown else ""
    console.print(
        f"{config.what} at scale {config.scale}: {len(cells)} cells, {complete} there, {trainings} trainings and "
        f"{len(missing) - trainings} other parts to do; "
        f"estimate {seconds / SECONDS:.1f} hours ({by}){without}; in {config.output_dir}"
    )


def _list(cells: Sequence[Cell], console: Console) -> None:
    for cell in cells:
        parts = ", ".join(
            f"{part.name} {'there' if finished(cell, part) else in_words(part.seconds)}"
            for part in cell.parts
        )
        console.print(f"  {cell.title}: {parts}  {cell.folder}")


def _print_table(config: ReproduceConfig, outcome: Outcome, console: Console) -> None:
    if config.what == "figures":
        for cell in outcome.done:
            for part in cell.parts[1:]:
                console.print(f"{part.name} of {cell.title}: {part.result.parent}")
        return
    from mixlora_cli.config import TableConfig
    from mixlora_cli.reproduce.table import table

    if not outcome.done:
        console.print(NOTHING_YET)
        return
    folder = str(Path(config.output_dir) / "tables")
    table(TableConfig(runs=config.output_dir, output_dir=folder, what=config.what, scale=config.scale))


def _complain(outcome: Outcome) -> None:
    if not outcome.failed and not outcome.elsewhere:
        return
    lines = [
        f"{each.cell.title}: {each.part.name} failed, {each.reason}\n  log: {each.log}"
        for each in outcome.failed
    ]
    lines += [f"{cell.title}: another process is at work in {cell.folder}" for cell in outcome.elsewhere]
    raise WorkerFailed(
        f"{len(lines)} cells are not done, {len(outcome.done)} are; the same command tries them again\n"
        + "\n".join(lines)
    )
