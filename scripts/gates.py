#!/usr/bin/env python3
"""Did moving code change a number? Runs of every kind on small models, and what they wrote compared file by file.

    scripts/gates.py record FOLDER          before: train, evaluate, measure (about 6 minutes on two idle cores)
    scripts/gates.py record FOLDER2         after
    scripts/gates.py compare FOLDER FOLDER2

Compared are losses, adapters' tensors, predictions, results, tables, interference and selection numbers: all that is
written but times, speeds, versions and paths, which two runs of the same code do not share. `compare` prints each file
that differs with its first differing lines and ends with 1; without a difference it ends with 0.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["train", "data=mini", "train.batch_size=4", "train.log_every=1", "deepspeed=none"]
TINY = [*TRAIN, "model=tiny", "train.steps=6", "rank=2"]
MIX = [*TINY, "adapter=mixlora", "factors=8"]
LEARNS = ["routing=instance", "adapter.router_grad=straight_through", "routing.balance_loss=0.01"]
FEW = ["eval.limit=3", "eval.batch_size=4"]
RUNS: dict[str, list[str]] = {
    # what it writes into: the command (run=X of an earlier one's folder)
    "lora": [*TINY, "adapter=lora"],
    "instance": [*MIX, "routing=instance"],
    "learned": [*MIX, *LEARNS],
    "prompt": [
        *MIX,
        "routing=instance",
        "routing.pool=prompt",
        "routing.decode=step",
        "adapter.cfs=released",
    ],
    "task": [*MIX, "routing=task"],
    "random": [*MIX, "routing=random"],
    "full": [*TINY, "adapter=full"],
    "lora-eval": ["eval", "run=lora", *FEW],
    "instance-eval": ["eval", "run=instance", *FEW, "eval.seen=true"],
    "prompt-eval": ["eval", "run=prompt", *FEW],
    "task-eval": ["eval", "run=task", *FEW],
    "random-eval": ["eval", "run=random", *FEW],
    "full-eval": ["eval", "run=full", *FEW],
    "lora-interference": ["interference", "run=lora", "interference.batches=2", "interference.batch_size=2"],
    "instance-interference": [
        "interference",
        "run=instance",
        "interference.batches=2",
        "interference.batch_size=2",
    ],
    "instance-tsne": [
        "tsne",
        "run=instance",
        "tsne.instances=8",
        "tsne.permutations=20",
        "tsne.layers=[0,1]",
    ],
    "instance-export": [
        "export",
        "run=instance",
        "export.instances=8",
        "export.limit=2",
        "export.batch_size=4",
    ],
    "mini": [
        *TRAIN,
        "model=mini",
        "adapter=mixlora",
        "routing=instance",
        "train.steps=3",
        "train.precision=fp32",
    ],
    "mini-eval": ["eval", "run=mini", "eval.limit=2", "eval.batch_size=4"],
}
VOLATILE = re.compile(
    r"seconds|per_second|eta|time|date|version|commit|host|machine|memory|pid|started|finished|created|size_mb|peak_bytes",
    re.I,
)
_NUMBERS_OF_THE_CLOCK = re.compile(
    r"\b\d+(?:\.\d+)? (?:s|seconds|minutes|hours|ms)\b|\d\d:\d\d(?::\d\d)?|\d{4}-\d\d-\d\d"
)
TEXTS = (".md", ".csv", ".tex", ".yaml", ".html", ".tsv", ".txt")


def record(folder: Path) -> None:
    """Run what is missing in `folder`; a command that fails ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "MIXLORA_CACHE": os.environ.get("MIXLORA_CACHE", str(ROOT / ".cache")),
    }
    for name, command in RUNS.items():
        done = folder / f"{name}.done"
        if done.exists():
            continue
        print(f"==> {name}: mixlora {' '.join(command)}", flush=True)
        arguments = [*command, f"output_dir={name}"]
        subprocess.run(
            [sys.executable, "-m", "mixlora_cli.cli", *arguments],
            check=True,
            cwd=folder,
            env=environment,
            stdout=(folder / f"{name}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        done.touch()


def compare(before: Path, after: Path) -> int:
    """Print what differs; the number of differing files."""
    one, other = contents(before), contents(after)
    differing = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    for name in differing:
        print(f"\n{name}: {'differs' if name in one and name in other else 'is there once only'}")
        lines = difflib.unified_diff(one.get(name, []), other.get(name, []), lineterm="", n=0)
        print("\n".join(f"  {line[:200]}" for line in [*lines][2:10]))
    print(f"\n{len(one.keys() | other.keys()) - len(differing)} files alike, {len(differing)} differ")
    return len(differing)


def contents(folder: Path) -> dict[str, list[str]]:
    """By file: its lines without what two runs of the same code do not share."""
    found = {}
    for name in RUNS:
        for file in sorted((folder / name).rglob("*")):
            if file.is_file() and "checkpoints" not in file.parts:
                lines = _lines(file)
                if lines is not None:
                    found[str(file.relative_to(folder))] = [_stable(line, folder) for line in lines]
    return found


def _lines(file: Path) -> list[str] | None:
    if file.suffix == ".safetensors":
        return _tensors(file)
    if file.suffix in (".json", ".jsonl"):
        rows = (
            file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        )
        return [line for row in rows for line in _flat(json.loads(row))]
    if file.suffix in TEXTS:
        return file.read_text(encoding="utf-8").splitlines()
    return None


def _tensors(file: Path) -> list[str]:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return [
        f"{n} {t.dtype} {hashlib.sha256(t.float().numpy().tobytes()).hexdigest()[:16]}"
        for n, t in tensors.items()
    ]


def _flat(value: Any, path: str = "") -> list[str]:
    """Each number or text of a JSON value with the way to it."""
    if isinstance(value, dict):
        return [
            line
            for key, inner in value.items()
            if not VOLATILE.search(key)
            for line in _flat(inner, f"{path}/{key}")
        ]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [line for i, inner in enumerate(value) for line in _flat(inner, f"{path}/{i}")]
    return [f"{path} {json.dumps(value)}"]


def _stable(line: str, folder: Path) -> str:
    line = line.replace(str(folder.resolve()), "FOLDER").replace(str(ROOT), "ROOT")
    return _NUMBERS_OF_THE_CLOCK.sub("TIME", line)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", folder]:
            record(Path(folder))
        case ["compare", before, after]:
            sys.exit(min(1, compare(Path(before), Path(after))))
        case _:
            sys.exit(__doc__)
