"""`mixlora bench`: measure what is not measured yet, compare, judge, print, write.

Finished cases are lines of `measurements.jsonl`, behind a header that says what they depend on beside their case:
machine, versions, the code that is measured. A file with another header is moved aside.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate needs it too
import torch
from rich.console import Console

from mixlora_cli.analysis.bench.counters import Measurement, Value
from mixlora_cli.analysis.bench.goals import Findings, find
from mixlora_cli.analysis.bench.peers import trl_version
from mixlora_cli.analysis.bench.report import all_tables, write_report
from mixlora_cli.analysis.bench.whole import WholeModel, measure
from mixlora_cli.config import (
    AdapterConfig,
    BenchConfig,
    BenchSettings,
    Precision,
    RoutingConfig,
    parse_shape,
)
from mixlora_cli.models.forward import choose_dtype, multiplies_bf16
from mixlora_cli.output import alone_in
from mixlora_cli.progress import counting, say
from mixlora_cli.store import Log, digest_of, move_aside, open_log
from mixlora_cli.tables import show
from mixlora_cli.training.run_folder import versions

FORMAT = "mixlora-bench-measurements/1"
FILE_NAME = "measurements.jsonl"
WHOLE_MODEL = ("memory", "step", "peers", "generation", "evaluation")
MEASURING = ("counters.py", "layers.py", "whole.py", "peers.py")

PRODUCTS = {"fp32": 2**33, "bf16": 2**29}
"""Multiplications of one pass over a frozen layer that its tokens are chosen to stay below: a good second on two cores,
of which many have no bf16 in hardware."""
FEWEST_TOKENS = 16
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "shapes": (("576", "1024", "4096", "4096x11008"), ("576", "1024")),
    "batches": ((1, 8), (8,)),
    "pools": ((16, 32, 64), (16, 64)),
    "rounds": (20, 5),
    "warmup": (2, 1),
    "min_seconds": (5.0, 0.5),
    "step_batch_size": (8, 2),
    "answer_batch_size": (8, 2),
    "max_new_tokens": (16, 4),
    "instances": (16, 4),
    "evaluation_rounds": (5, 2),
    "predictions": (100_000, 2_000),
}
"""What the nulls of `BenchSettings` stand for: in full, and with `bench.quick=true`."""
_MOST_TOKENS = (256, 32)


def bench(config: BenchConfig) -> Findings:
    """Measure as `config` says; everything lands in `config.output_dir`, where the same command continues.

    Raises:
        UserError: the folder cannot be written, or the model or its data cannot be loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "benchmark"), _threads(config.bench.threads):
        return _bench(config, folder)


def _bench(config: BenchConfig, folder: Path) -> Findings:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, guesses aloud
    console = Console(stderr=True)
    machine = describe_machine(device)
    if config.overwrite and (folder / FILE_NAME).is_file():
        say(f"overwrite=true: the old measurements are {move_aside(folder / FILE_NAME)}", console)
    dtype = choose_dtype(config.bench.precision)
    plan = make_plan(config, "bf16" if dtype == torch.bfloat16 else "fp32")
    with open_log(
        folder / FILE_NAME,
        {"format": FORMAT, "fingerprint": fingerprint(machine)},
        "give another output_dir, or overwrite=true",
        lambda text: say(text, console),
        "measuring anew",
    ) as log:
        measured = [Measurement(**record) for record in log.records]
        done = {measurement.key: measurement for measurement in measured}
        try:
            _measure_missing(plan, done, log, WholeModel(config, device), console)
        except KeyboardInterrupt:
            count = sum(case.key in done for case in plan)
            say(f"stopped at {count}/{len(plan)} cases: the same command continues", console)
            raise
    findings = find(machine, [done[case.key] for case in plan])
    show(all_tables(findings))
    for path in write_report(findings, folder):
        say(f"wrote {path}", console)
    return findings


def _measure_missing(
    plan: Sequence[Measurement], done: dict[str, Measurement], log: Log, whole: WholeModel, console: Console
) -> None:
    missing = [case for case in plan if case.key not in done]
    if any(case.part in WHOLE_MODEL for case in missing):
        _ = whole.base  # a model that cannot be loaded should be found now, not behind the layers
    begin, first = time.monotonic(), len(plan) - len(missing) + 1
    with counting("measuring", len(plan), first - 1, console) as advance:
        for number, case in enumerate(missing, start=first):
            if console.is_terminal:
                advance(0, case.label)
            else:
                say(f"{number}/{len(plan)}  {case.label}  (after {time.monotonic() - begin:.0f} s)", console)
            done[case.key] = measure(case, whole)
            log.append([asdict(done[case.key])])
            advance()


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


# -- what is measured -------------------------------------------------------------------------------------------------


def make_plan(config: BenchConfig, precision: str) -> list[Measurement]:
    """All cases, not yet measured, in the order of `Part`; `precision` is that of the whole model, "fp32" or "bf16"."""
    chosen = _chosen(config.bench)
    layers = _layer_cases(config, chosen)
    not_timed = ("rounds", "warmup", "min_seconds")
    operations = [
        Measurement("operations", {name: each.case[name] for name in each.case if name not in not_timed})
        for each in layers
    ]
    cases = [*layers, *operations, *_model_cases(config, chosen, precision)]
    return [case for case in cases if case.part in config.bench.parts]


def _chosen(settings: BenchSettings) -> dict[str, Any]:
    """The settings without nulls, but for tokens, which follow from the width."""
    chosen = {name: getattr(settings, name) for name in _DEFAULTS}
    return {
        name: _DEFAULTS[name][settings.quick] if value is None else value for name, value in chosen.items()
    }


def pools_of(config: BenchConfig) -> list[int]:
    """Sizes of the pools, `factors` always among them, ascending."""
    chosen = _chosen(config.bench)["pools"]
    return sorted({config.factors, *(pool for pool in chosen if pool >= config.rank)})


def tokens_for(d_in: int, d_out: int, batch: int, dtype: Precision, most: int = _MOST_TOKENS[0]) -> int:
    """Tokens of each instance: a power of two, `most` for narrow layers, fewer for wide ones (see `PRODUCTS`)."""
    affordable = PRODUCTS[dtype] // (d_in * d_out * batch)
    rounded = 1 << max(affordable.bit_length() - 1, 0)
    return max(FEWEST_TOKENS, min(most, rounded))


def _layer_cases(config: BenchConfig, chosen: dict[str, Any]) -> list[Measurement]:
    settings, most = config.bench, _MOST_TOKENS[config.bench.quick]
    cases = []
    for shape, dtype, batch in product(chosen["shapes"], settings.dtypes, chosen["batches"]):
        d_in, d_out = parse_shape(shape)
        values: dict[str, Value] = {
            "shape": shape,
            "d_in": d_in,
            "d_out": d_out,
            "dtype": dtype,
            "batch": batch,
            "tokens": settings.tokens or tokens_for(d_in, d_out, batch, dtype, most),
            "rank": config.rank,
            "factors": config.factors,
            "pools": ",".join(map(str, pools_of(config))),
            "seed": config.seed,
            **{name: chosen[name] for name in ("rounds", "warmup", "min_seconds")},
        }
        cases.append(Measurement("layer", values))
    return cases


def _model_cases(config: BenchConfig, chosen: dict[str, Any], precision: str) -> list[Measurement]:
    common: dict[str, Value] = {
        "model": config.model.name,
        "data": config.data.name,
        "precision": precision,
        "rank": config.rank,
        "factors": config.factors,
        "seed": config.seed,
    }
    if changed := _changed(config):
        common["mixlora"] = changed
    rounds = {name: chosen[name] for name in ("rounds", "warmup")}
    few_rounds = {"rounds": chosen["evaluation_rounds"], "warmup": 1}
    step = {**common, "batch_size": chosen["step_batch_size"]}
    answers = {
        **common,
        "batch_size": chosen["answer_batch_size"],
        "max_new_tokens": chosen["max_new_tokens"],
    }
    return [
        Measurement("memory", step),
        Measurement("step", {**step, **rounds}),
        Measurement("peers", {**step, **rounds, "trl": trl_version()}),
        Measurement("generation", {**answers, **rounds}),
        Measurement("evaluation", {**answers, "instances": chosen["instances"], **few_rounds}),
        Measurement("scoring", {"predictions": chosen["predictions"], "seed": config.seed, **few_rounds}),
    ]


def _changed(config: BenchConfig) -> str:
    """How MixLoRA differs from the paper's: `pairing=tied pool=text`."""
    usual = asdict(AdapterConfig("mixlora")) | asdict(RoutingConfig("instance"))
    own = asdict(config.adapter) | asdict(config.routing)
    return " ".join(f"{key}={own[key]}" for key in own if own[key] != usual[key])


# -- what the numbers are about ---------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, number formats and versions."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": torch.get_num_threads(),
        "bf16_in_hardware": multiplies_bf16(),
        "instructions": str(torch.backends.cpu.get_cpu_capability()),
        "versions": versions(),
    }


def _processor() -> str:
    """The name that the kernel knows; `platform` gives only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def fingerprint(machine: dict[str, Any]) -> dict[str, Value]:
    """What measurements depend on beside their case; equal fingerprints may share a file."""
    packages = machine["versions"]["packages"]
    return {
        **{
            name.replace("_", " "): machine[name]
            for name in ("processor", "cores", "device", "torch_threads")
        },
        **{name: str(packages[name]) for name in ("torch", "peft", "transformers")},
        "code": code_digest(),
    }


def code_digest() -> str:
    """Digest of the code that is measured or that measures: a change makes older numbers worthless.

    Covered are the files `MEASURING` beside this one and whatever they import from the package: the whole folder that
    an imported module stands in, or its own file where that is the package's own folder.
    """
    here = Path(__file__).parent
    package = next(folder for folder in here.parents if folder.name == __name__.partition(".")[0])
    covered = {here / name for name in MEASURING}
    for file in list(covered):
        for name in re.findall(rf"^\s*from {package.name}\.(\S+) import", file.read_text(), re.MULTILINE):
            module = package.joinpath(*name.split("."))
            folder = module if module.is_dir() else module.parent
            if folder == package:
                covered.add(module.with_suffix(".py"))
            elif folder != here:
                covered.update(folder.rglob("*.py"))
    return digest_of(
        {
            file.relative_to(package).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in covered
        }
    )
