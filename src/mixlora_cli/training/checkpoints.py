"""Checkpoints that can be trusted: written beside, sealed with a list of their files, renamed, then older ones go.

checkpoints/checkpoint-<step>/complete.json is the seal: every other file and its size. A file of the right size is
whole, because all of them are on the disk before the folder gets its name.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

from mixlora_cli.store import TEMP, publish_folder, write_text

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def drafts_of(checkpoints: Path) -> Path:
    """The folder in which a checkpoint is written, under its own name, before it is put among the others."""
    return checkpoints / f"new{TEMP}"


def publish(draft: Path, checkpoints: Path, keep: int | None) -> Path:
    """Put a finished checkpoint among the others; only then delete older ones, and torn ones.

    Args:
        draft: the checkpoint in `drafts_of(checkpoints)`, on the disk.
        keep: checkpoints that may stay; None = all.
    """
    seal(draft)
    checkpoint = checkpoints / draft.name
    publish_folder(draft, checkpoint)
    draft.parent.rmdir()
    for other in _by_steps(checkpoints):
        if flaw(other) is not None:
            shutil.rmtree(other, ignore_errors=True)
    rotate_checkpoints(str(checkpoints), save_total_limit=keep, use_mtime=True)
    return checkpoint


def seal(folder: Path) -> None:
    """Note the files of a checkpoint and their sizes in bytes, in a last file."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_text(folder / SEAL, json.dumps(sizes, indent=2) + "\n")


def flaw(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / SEAL).read_text())
    except (OSError, ValueError):
        return f"it has no readable {SEAL}, which is written last"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def newest_complete(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint with the most steps, and the flaws of those with more."""
    torn: dict[Path, str] = {}
    for checkpoint in reversed(_by_steps(checkpoints)):
        found = flaw(checkpoint)
        if found is None:
            return checkpoint, torn
        torn[checkpoint] = found
    return None, torn


def _by_steps(checkpoints: Path) -> list[Path]:
    named = [(_NAME.fullmatch(path.name), path) for path in checkpoints.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]
