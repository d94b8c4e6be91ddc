"""Whether there is room, asked before hours of downloading or writing."""

from __future__ import annotations

import shutil
from pathlib import Path

from mixlora_cli.errors import UserError


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Do nothing where `needed` bytes fit on the disk of `folder`, which need not exist yet.

    Args:
        purpose: what the space is for, the start of the message: "unpacking the pictures".

    Raises:
        UserError: they do not fit; says how much is needed and how much is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{purpose} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: free some space, "
            "or use another disk (prepare.output=<folder> for the result, HF_HOME for downloads)"
        )
