"""The benchmarks: one row each. Adding one touches this table and nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.metrics import LABELS, MME, POPE, VQA, Metric

COLUMNS = ("MME", "Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE")
"""The paper's columns, in its order; MMAvg, the mean of all but MME, follows them."""
AVERAGED = tuple(column for column in COLUMNS if column != "MME")
MEAN_TITLE = "MMAvg"


@dataclass(frozen=True)
class Benchmark:
    """An unseen task that is scored as a whole."""

    name: str
    """What records carry as `benchmark`, and what `eval.benchmarks` takes."""
    column: str
    """The paper's name; also the column of the result table."""
    metric: Metric


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mini_mme", "MME", MME),
        Benchmark("mini_textvqa", "Text-VQA", VQA),
        Benchmark("mini_vsr", "VSR", LABELS),
        Benchmark("mini_snli_ve", "SNLI-VE", LABELS),
        Benchmark("mini_cifar10", "CIFAR-10", LABELS),
        Benchmark("mini_cifar100", "CIFAR-100", LABELS),
        Benchmark("mini_mnist", "MNIST", LABELS),
        Benchmark("mini_pope", "POPE", POPE),
    )
}


def benchmark_named(name: str) -> Benchmark:
    """The row of this name; a benchmark of the user's own gets its own column, scored by label match."""
    return BENCHMARKS.get(name) or Benchmark(name, name, LABELS)


def in_paper_order(names: Iterable[str]) -> list[str]:
    """Benchmark names sorted by the paper's columns, others behind them in the order they come."""
    place = {column: position for position, column in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: place.get(benchmark_named(name).column, len(COLUMNS)))


def choose(wanted: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """The benchmarks to evaluate, in the paper's order; `wanted=None` means all that are available.

    Raises UserError that names the unknown ones, what was probably meant, and what there is.
    """
    ordered = in_paper_order(available)
    if wanted is None:
        return ordered
    if unknown := [name for name in wanted if name not in ordered]:
        near = difflib.get_close_matches(unknown[0], ordered, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"eval.benchmarks: the data has no {', '.join(unknown)}.{hint} It has: {', '.join(ordered)}"
        )
    return [name for name in ordered if name in wanted]
