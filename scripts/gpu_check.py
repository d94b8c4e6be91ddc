#!/usr/bin/env python3
"""What this program does on one GPU, measured in minutes: right results, single layers, a 7B model, long runs.

Every result goes into a JSON file as soon as it is there; what is there is not measured again, what failed is.

parts:
  tests   `pytest -m gpu`: the layer against its equations, the CPU's selections, checkpointing, torch.compile, ...
  layers  one linear layer, forward and backward in bf16: frozen, LoRA, MixLoRA in two forms, the published form
  step    optimizer steps of the paper's LLaVA-7B with random weights: time, peak memory, tokens a second, MFU, what
          they make of the hours in docs/paper-scale.md; and generation
  align   `mixlora align` until its time is over; the same command goes on. Only if named
  grid    rows of Table 1 at 3,000 steps, six processes side by side on the card. Only if named

needed, and no network: torch with CUDA, transformers, peft, accelerate, pydantic, pillow, scipy, scikit-learn, rich;
for `tests` pytest and, for a base in four bits, bitsandbytes; for `align` and `grid` all of 'mixlora-cli[mini]'.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_cases import NOTES, Case, Rows, card_name, layer_cases, step_cases

from mixlora_cli.stats import Estimate
from mixlora_cli.store import write_json
from mixlora_cli.tables import Table, show

ROOT = Path(__file__).resolve().parents[1]
CLI = "mixlora_cli.cli"
PARTS: dict[str, tuple[int, int, tuple[str, ...], tuple[str, ...]]] = {
    # seconds; the same with --tiny; further arguments of the command; these with --tiny
    "tests": (150, 60, (), ("-k", "near_the_oracle and fused")),
    "layers": (120, 10, (), ()),
    "step": (180, 30, (), ()),
    "align": (480, 200, (), ("pictures=4", "batch_size=2", "lexical_steps=0", "steps=1", "check_pictures=2")),
    "grid": (600, 60, ("seeds=[0]", "jobs=6", 'train=["train.steps=3000"]'), ("dry_run=true",)),
}
GRACE = 20.0
"""Seconds that a stopped command has to save what it has."""
COLUMNS = ("ms", "to LoRA", "extra to LoRA", "peak GiB", "tokens/s", "MFU", "hours", "note")


def command(arguments: list[str], log: Path, device: torch.device, until: float) -> Rows:
    """Run `python -m ...` until it ends; asked to stop in time, it may save. With pytest's counts, if it has any."""
    start = time.monotonic()
    grace = min(GRACE, (until - start) / 4)
    search = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": search, "MIXLORA_TEST_DEVICE": device.type}
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            ended = f"exit code {child.wait(until - start - grace)}"
            code = child.returncode
        except subprocess.TimeoutExpired:
            ended, code = "stopped, its time was over", None
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.9 * grace)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    row = {
        "command": arguments,
        "seconds": time.monotonic() - start,
        "code": code,
        "note": f"{ended}: {last}",
    }
    return {arguments[0]: row | counts}


def went_well(rows: Rows) -> bool:
    """Whether a case need not be tried again: no error, and no command that failed or was stopped."""
    return "error" not in rows and all(row.get("code", 0) == 0 for row in rows.values())


def measure(
    cases: Mapping[str, Case], kept: dict[str, Rows], seconds: float, write: Callable[[], None]
) -> str:
    """Measure what is missing, each case within its share of the seconds; returns how it ended."""
    missing = [name for name in cases if name not in kept or not went_well(kept[name])]
    deadline = time.monotonic() + seconds
    for number, name in enumerate(missing):
        now = time.monotonic()
        share = (deadline - now) / (len(missing) - number)
        signal.setitimer(
            signal.ITIMER_REAL, max(deadline - now, 0.01), 5
        )  # again, if a destructor swallows it
        try:
            kept[name] = cases[name](now + max(share - 5, share / 2))  # intervals take time, too
        except TimeoutError:
            return f"out of time before {name} was done"
        except Exception as error:  # the other cases may still go
            traceback.print_exc()
            kept[name] = {"error": {"note": f"{type(error).__name__}: {error}".partition("\n")[0]}}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        write()
    return "done"


def time_is_over(*_: object) -> None:
    """Answer the alarm, wherever the program is."""
    raise TimeoutError


def text(value: Any) -> str:
    """What stands in a cell of the table."""
    if isinstance(value, dict):
        return Estimate(**value).text(2)
    return "" if value is None else value if isinstance(value, str) else f"{value:,.3g}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    shape = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    usual = ["tests", "layers", "step"]
    options.add_argument("--parts", nargs="+", choices=PARTS, default=usual, help="tests layers step")
    options.add_argument("--seconds", type=float, help="of each part, in the place of its own")
    options.add_argument("--again", action="store_true", help="measure these parts anew")
    options.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check/results.json"), help="the JSON file"
    )
    options.add_argument(
        "--keys", nargs="*", default=[], help="further key=value of the command of align or grid"
    )
    options.add_argument(
        "--device", type=torch.device, default="cuda:0", help="cpu makes sense with --tiny only"
    )
    options.add_argument(
        "--tiny", action="store_true", help="everything very small, to try this program itself"
    )
    return options.parse_args()


def main() -> int:
    """Measure, write, print."""
    given = arguments()
    if given.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no GPU that torch can use; --device cpu --tiny tries this program without one"
        )
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    machine = {"card": card_name(given.device), "cuda": torch.version.cuda, **versions, "tiny": given.tiny}
    found = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine, "parts": {}}
    if found["machine"] != machine:
        raise SystemExit(
            f"{given.out} was measured on {found['machine']}, this is {machine}: give another --out"
        )
    folder = given.out.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, time_is_over)
    commands = {
        "tests": ["pytest", "-q", "-m", "gpu", "tests/method/test_gpu.py"],
        "align": [CLI, "align", f"output_dir={folder / 'align'}", *given.keys],
        "grid": [CLI, "reproduce", "table1", f"output_dir={folder / 'grid'}", *given.keys],
    }
    makers = {"layers": layer_cases, "step": step_cases}
    for part in given.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        if given.again:
            found["parts"].pop(part, None)
        kept = found["parts"].setdefault(part, {"ended": "not done", "seconds": 0.0, "cases": {}})
        budget, further = PARTS[part][given.tiny], PARTS[part][2 + given.tiny]
        start = time.monotonic()
        if part in makers:
            cases = makers[part](given.device, given.tiny)
        else:
            run = [*commands[part], *further]
            cases = {part: partial(command, run, folder / f"{part}.log", given.device)}
        write = partial(write_json, given.out, found)
        kept["ended"] = measure(cases, kept["cases"], given.seconds or budget, write)
        kept["seconds"] += time.monotonic() - start
        write()
    rows = [
        (part, name, variant, row)
        for part, done in found["parts"].items()
        for name, variants in done["cases"].items()
        for variant, row in variants.items()
    ]
    cells = tuple((*labels, *(text(row.get(column)) for column in COLUMNS)) for *labels, row in rows)
    ends = [f"{part}: {done['ended']}, {done['seconds']:.0f} s" for part, done in found["parts"].items()]
    title = ", ".join(f"{name} {value}" for name, value in machine.items())
    show(Table(title, ("part", "case", "", *COLUMNS), cells, num_labels=3, notes=(*ends, *NOTES)))
    return int(any(variant == "error" or row.get("code") for *_, variant, row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
