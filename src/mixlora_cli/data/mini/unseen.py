"""The unseen benchmarks: one row each, in the order of the paper's columns."""

from __future__ import annotations

from mixlora_cli.data.mini.benchmark import Benchmark
from mixlora_cli.data.mini.unseen_judging import JUDGING_BENCHMARKS
from mixlora_cli.data.mini.unseen_mme import MINI_MME
from mixlora_cli.data.mini.unseen_naming import NAMING_BENCHMARKS

_ORDER = (
    "mini_mme",
    "mini_textvqa",
    "mini_vsr",
    "mini_snli_ve",
    "mini_cifar10",
    "mini_cifar100",
    "mini_mnist",
    "mini_pope",
)
_BY_NAME = {benchmark.name: benchmark for benchmark in (MINI_MME, *NAMING_BENCHMARKS, *JUDGING_BENCHMARKS)}

UNSEEN_BENCHMARKS: dict[str, Benchmark] = {name: _BY_NAME[name] for name in _ORDER}
