"""`mixlora bench`: measure what is not measured yet, compare, judge, print, write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from mixlora_cli.analysis.bench.machine import choose_device, describe_machine, fingerprint
from mixlora_cli.analysis.bench.measure import measure
from mixlora_cli.analysis.bench.measurement import FILE_NAME, Journal, move_aside
from mixlora_cli.analysis.bench.plan import Case, make_plan
from mixlora_cli.analysis.bench.progress import case_progress
from mixlora_cli.analysis.bench.report import print_report, write_report
from mixlora_cli.analysis.bench.results import Findings, find
from mixlora_cli.analysis.bench.whole import WholeModel
from mixlora_cli.config import BenchConfig
from mixlora_cli.output import alone_in
from mixlora_cli.training.precision import choose_dtype

WHOLE_MODEL = ("memory", "step", "generation", "evaluation")


def bench(config: BenchConfig) -> Findings:
    """Measure as `config` says; everything lands in `config.output_dir`, where the same command continues.

    Raises:
        UserError: the folder cannot be written, or the model or its data cannot be loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "benchmark"):
        return _bench(config, folder)


def _bench(config: BenchConfig, folder: Path) -> Findings:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, guesses aloud
    console = Console(stderr=True)
    device = choose_device()
    with _threads(config.bench.threads):
        machine = describe_machine(device)
        if config.overwrite and (folder / FILE_NAME).is_file():
            _say(console, f"overwrite=true: the old measurements are {move_aside(folder / FILE_NAME)}")
        journal = Journal(folder, fingerprint(machine), lambda text: _say(console, text))
        dtype = choose_dtype(config.bench.precision)
        plan = make_plan(config, "bf16" if dtype == torch.bfloat16 else "fp32")
        try:
            _measure_missing(plan, journal, WholeModel(config, device), console)
        except KeyboardInterrupt:
            done = sum(case.key in journal.done for case in plan)
            _say(console, f"stopped at {done}/{len(plan)} cases: the same command continues")
            raise
    findings = find(machine, [journal.done[case.key] for case in plan])
    print_report(findings, Console())
    for path in write_report(findings, folder):
        _say(console, f"wrote {path}")
    return findings


def _measure_missing(plan: Sequence[Case], journal: Journal, whole: WholeModel, console: Console) -> None:
    missing = [case for case in plan if case.key not in journal.done]
    if any(case.part in WHOLE_MODEL for case in missing):
        _ = whole.base  # a model that cannot be loaded should be found now, not behind the layers
    with case_progress(console, len(plan) - len(missing), len(plan)) as start:
        for case in missing:
            start(case.label)
            journal.append(measure(case, whole))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
