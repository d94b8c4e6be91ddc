"""`mixlora doctor`: what this machine has, and of what it lacks what that means and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement  # transformers and hydra need it too

from mixlora_cli import __version__
from mixlora_cli.errors import FAILURE, INSTALL_MINI, LANGUAGE_MODEL
from mixlora_cli.paths import cache_root
from mixlora_cli.tables import Table, show

NEEDS = {
    "mixlora-cli": "mixlora needs",
    "mixlora-cli[mini]": "model=mini and data=mini need",
    "mixlora-cli[serve]": "mixlora serve needs",
    "mixlora-cli[deepspeed]": "deepspeed=zero1, zero2, zero3 and zero3_offload need",
    "mixlora-cli[quant]": "model.quantization=nf4 and int8 need",
    "mixlora-cli[slurm]": "hydra/launcher=slurm needs",
}
DISK = 1e9  # bytes that a first training writes: base 0.54 GB, pictures 0.1 GB, features, checkpoints
MEMORY = 4e9  # bytes; `mixlora demo` took 3.3 GB


class Finding(NamedTuple):
    """A line of the table, and what it lacks: a sentence with the command that mends it, or nothing."""

    what: str
    found: str
    lack: str = ""
    needed: bool = False
    """Whether the lack keeps `mixlora train` from training the small model."""


def doctor() -> int:
    """Print the table and the sentences; exit code 1 where something that the small model needs is lacking."""
    findings: list[Finding] = []
    unknown = False
    for look in (packages, computing, memory, disk, hub):
        try:
            findings.extend(look())
        except Exception as error:  # the other lines are worth showing all the same
            unknown = True
            findings.append(Finding(look.__name__, f"cannot be looked at ({type(error).__name__}: {error})"))
    lacks = sorted((each for each in findings if each.lack), key=lambda each: not each.needed)
    notes = [f"{'stops mixlora train: ' if each.needed else ''}{each.lack}" for each in lacks]
    stops = any(each.needed for each in lacks)
    ready = [] if stops or unknown else ["ready to train the small model: mixlora demo"]
    rows = tuple((each.what, each.found) for each in findings)
    show(Table("", ("", "found"), rows, num_labels=2, notes=(*ready, *(notes or ["Nothing is missing."]))))
    return FAILURE if stops else 0


def packages() -> Iterator[Finding]:
    """Versions, and what the package and its extras require and do not find."""
    names = ("torch", "transformers", "peft", "accelerate", "deepspeed")
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("mixlora", ", ".join([__version__, *(f"{name} {_version(name) or '-'}" for name in names)]))
    try:
        requires("mixlora-cli")
    except PackageNotFoundError:
        lack = (
            "mixlora runs without being installed, so what it requires is not known: pip install -e '.[mini]'"
        )
        yield Finding("mixlora-cli", "not installed", f"{lack} in the folder of its pyproject.toml")
        return
    for package, needs in NEEDS.items():
        of_mini, wrong = package == "mixlora-cli[mini]", missing_packages(package)
        mends = INSTALL_MINI if of_mini else f"pip install '{package}'"
        of_use = package != "mixlora-cli[slurm]" or shutil.which("sbatch")
        lack = f"{needs} {', '.join(wrong)}: {mends}" if wrong and of_use else ""
        yield Finding(
            package, "incomplete" if wrong else "complete", lack, of_mini or package == "mixlora-cli"
        )


def missing_packages(package: str) -> list[str]:
    """What the package, or the extra in its brackets, requires and does not find, as far as that is known."""
    wrong: list[str] = []
    known: tuple[str, ...] = ()
    with suppress(PackageNotFoundError):  # it runs without being installed
        known = tuple(requires("mixlora-cli") or ())
    for text in (*known, f"{LANGUAGE_MODEL}; extra == 'mini'"):
        need, extra = Requirement(text), text.partition("extra == ")[2].strip("'\"")
        asked = need.marker is None or need.marker.evaluate({"extra": extra})
        if asked and package == (f"mixlora-cli[{extra}]" if extra else "mixlora-cli"):
            found = _version(need.name)
            if found is None or not need.specifier.contains(found, prereleases=True):
                wrong.append(f"{need.name}{need.specifier}" + (f" (not {found})" if found else ""))
    return wrong


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def computing() -> Iterator[Finding]:
    """Processors, GPUs and number formats, by the modules that training imports."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU cores", str(usable))
    try:
        import torch

        from mixlora_cli.models.forward import multiplies_bf16
    except Exception as error:  # a broken library raises whatever it likes
        lack = f"torch, transformers and PEFT cannot be loaded ({type(error).__name__}: {error}): "
        lack += "pip install --force-reinstall torch transformers peft"
        yield Finding("GPUs", "unknown", lack, needed=True)
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    lack = (
        f"torch {torch.__version__} does not see the GPU of nvidia-smi: pip install --force-reinstall torch"
    )
    unseen = not gpus and shutil.which("nvidia-smi") is not None
    named = ", ".join(f"{gpu.name} ({_gb(gpu.total_memory)})" for gpu in gpus)
    yield Finding("GPUs", named or "none", lack if unseen else "")
    yield Finding("fast bf16", "yes" if multiplies_bf16() else "no: train.precision=auto is float32")


def memory() -> Iterator[Finding]:
    """Main memory."""
    import psutil  # type: ignore[import-untyped]

    state = psutil.virtual_memory()
    lack = f"a training may need {_gb(MEMORY)} of memory; with less: mixlora train train.batch_size=2"
    found = f"{_gb(state.total)}, of which {_gb(state.available)} free"
    yield Finding("memory", found, lack if state.available < MEMORY else "")


def disk() -> Iterator[Finding]:
    """The cache and the working folder: whether they can be written, and how much room there is."""
    held = 0
    for place, _, names in os.walk(cache_root()):
        for name in names:
            with suppress(OSError):  # a training may remove it meanwhile
                held += os.lstat(os.path.join(place, name)).st_size
    yield _room("cache", cache_root(), f"{_gb(held)} in it, ", "export MIXLORA_CACHE=FOLDER")
    yield _room("working folder", Path.cwd(), "", "mixlora train output_dir=FOLDER")


def _room(what: str, folder: Path, held: str, elsewhere: str) -> Finding:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    found = f"{_gb(free)} free" if writable else "cannot be written"
    lack = f"{folder}: {found}, and a training writes up to {_gb(DISK)}: {elsewhere}"
    return Finding(what, f"{folder}: {held}{found}", "" if writable and free >= DISK else lack, needed=True)


def hub() -> Iterator[Finding]:
    """Whether the model hub answers, which training the small model does not need."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3).close()
        yield Finding("model hub", f"{address} answers")
    except (OSError, ValueError) as error:
        lack = "without the hub there are the built-in models and data, your own folders and what was downloaded "
        lack += "before; where there is a mirror: export HF_ENDPOINT=URL"
        yield Finding("model hub", f"{address} does not answer ({getattr(error, 'reason', error)})", lack)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
