"""The machine that numbers come from, and the code that they are about."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate needs it too
import torch

from mixlora_cli.analysis.bench.measurement import Value
from mixlora_cli.models.forward import multiplies_bf16
from mixlora_cli.training.run_folder import versions

MEASURED = (
    "method",
    "models",
    "training",
    "evaluation/generate.py",
    "evaluation/predictions.py",
    "evaluation/scorers.py",
    "evaluation/scoring.py",
    "evaluation/tallies.py",
    "analysis/bench/clock.py",
    "analysis/bench/counting.py",
    "analysis/bench/layers.py",
    "analysis/bench/published.py",
    "analysis/bench/scoring.py",
    "analysis/bench/whole.py",
    "analysis/bench/measure.py",
)
"""Files and folders of the package whose change makes older numbers worthless."""


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, number formats and versions."""
    about = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch_threads": torch.get_num_threads(),
        "bf16_in_hardware": multiplies_bf16(),
        "instructions": _instructions(),
        "versions": versions(),
    }
    return about


def fingerprint(machine: dict[str, Any]) -> dict[str, Value]:
    """What measurements depend on beside their case; equal fingerprints may share a file."""
    packages = machine["versions"]["packages"]
    return {
        "processor": machine["processor"],
        "cores": machine["cores"],
        "device": machine["device"],
        "torch threads": machine["torch_threads"],
        "torch": str(packages["torch"]),
        "peft": str(packages["peft"]),
        "transformers": str(packages["transformers"]),
        "code": code_digest(),
    }


def code_digest() -> str:
    """Hash of the package's files that are measured or that measure."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for name in MEASURED:
        place = package / name
        for file in [place] if place.is_file() else sorted(place.glob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def free_bytes(device: torch.device) -> int:
    """Memory that may still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _processor() -> str:
    """The name that the kernel knows; `platform` gives only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _instructions() -> str:
    """What torch's CPU kernels use: AVX2, AVX512, ..."""
    return str(torch.backends.cpu.get_cpu_capability())
