"""`mixlora reproduce`: the grid of a table, cell by cell, and then the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mixlora_cli.config import MOST_JOBS, ReproduceConfig, TableConfig
from mixlora_cli.errors import WorkerFailed
from mixlora_cli.launch import threads_each
from mixlora_cli.output import require_writable
from mixlora_cli.progress import say
from mixlora_cli.reproduce.jobs import Job, build_grid
from mixlora_cli.reproduce.runner import PROGRAM, GridView, Outcome, Runner, StopRequest, in_words, total

NOTHING_YET = "no cell is finished yet: there is no table to print"


def reproduce(config: ReproduceConfig, program: Sequence[str] = PROGRAM) -> Outcome:
    """Run what is missing of the grid, print the table, and say what failed.

    Args:
        config: what to reproduce.
        program: what `mixlora` is; tests put a stand-in here.

    Raises:
        UserError: an experiment or override is wrong, before anything runs.
        WorkerFailed: cells failed, or are left to another process; the others are done.
        KeyboardInterrupt: stopped by a signal; the running training has its checkpoint.
    """
    console = Console(highlight=False)
    jobs = build_grid(config)
    _say_estimate(config, jobs, console)
    if config.dry_run:
        for job in jobs:
            steps = ", ".join(
                f"{step.name} {'there' if job.has(step) else in_words(step.seconds)}" for step in job.steps
            )
            say(f"  {job.title}: {steps}  {job.folder}", console)
        return Outcome()
    require_writable(Path(config.output_dir))
    stop = StopRequest()
    unfinished = sum(bool(job.missing()) for job in jobs)
    # Of all, not of what is left: it decides how many threads a cell gets, on which its numbers depend.
    at_once = _at_once(config)
    with stop.listening(), GridView(jobs, console, min(at_once, max(unfinished, 1))) as view:
        outcome = Runner(view, stop, program, config.keep_checkpoints, at_once).run(jobs)
    if outcome.stopped:
        say(
            f"stopped: {len(outcome.done)} of {len(jobs)} cells are done, interrupted trainings have their "
            "checkpoints; the same command goes on from here",
            console,
        )
        raise KeyboardInterrupt
    _print_table(config, outcome, console)
    _complain(outcome)
    return outcome


def _say_estimate(config: ReproduceConfig, jobs: Sequence[Job], console: Console) -> None:
    missing = [step for job in jobs for step in job.missing()]
    complete = sum(not job.missing() for job in jobs)
    seconds, unknown = total(step.seconds for step in missing)
    trainings = sum(step.name == "train" for step in missing)
    by = (
        f"{config.speed.train} training and {config.speed.answer} answered instances a second"
        if config.scale == "mini"
        else "`mixlora plan` for four A100s of 80 GB"
    )
    without = f", {unknown} parts without an estimate" if unknown else ""
    say(
        f"{config.what} at scale {config.scale}: {len(jobs)} cells, {complete} there, {trainings} trainings and "
        f"{len(missing) - trainings} other parts to do; "
        f"estimate {seconds / 3600:.1f} hours ({by}){without}; in {config.output_dir}",
        console,
    )


def _at_once(config: ReproduceConfig) -> int:
    """How many cells run at the same time. Few threads each waste least of a processor; GPUs are for one training."""
    if config.jobs is not None:
        return config.jobs
    import torch  # takes a second, which a mistake in the configuration need not wait for

    if config.scale == "paper" or torch.cuda.is_available():
        return 1
    return min(threads_each(1), MOST_JOBS)


def _print_table(config: ReproduceConfig, outcome: Outcome, console: Console) -> None:
    if config.what == "figures":
        for job in outcome.done:
            for step in job.steps[1:]:
                say(f"{step.name} of {job.title}: {step.result.parent}", console)
        return
    if not outcome.done:
        say(NOTHING_YET, console)
        return
    from mixlora_cli.reproduce.table import table  # loads libraries that a mistake need not wait for

    folder = str(Path(config.output_dir) / "tables")
    table(TableConfig(runs=config.output_dir, output_dir=folder, what=config.what, scale=config.scale))


def _complain(outcome: Outcome) -> None:
    if not outcome.failed and not outcome.elsewhere:
        return
    lines = [
        f"{each.job.title}: {each.step.name} failed, {each.reason}\n  log: {each.log}"
        for each in outcome.failed
    ]
    lines += [f"{job.title}: another process is at work in {job.folder}" for job in outcome.elsewhere]
    raise WorkerFailed(
        f"{len(lines)} cells are not done, {len(outcome.done)} are; the same command tries them again\n"
        + "\n".join(lines)
    )
