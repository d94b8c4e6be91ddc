"""Where the package keeps the files that it ships."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

STAGE_ONE = Path(__file__).parent / "models" / "assets" / "mini_stage_one.safetensors"
"""What `mixlora align` made of the small model: read by whatever builds that."""


def conf_dir() -> Path:
    """Folder of the configuration tree: in an installed package, or at the top of a checkout.

    Raises:
        FileNotFoundError: neither exists, so the installation is broken.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "conf", package.parents[1] / "conf")
    for folder in candidates:
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no configuration files in {' or '.join(map(str, candidates))}: reinstall mixlora-cli"
    )


@cache
def stage_one_digest() -> str:
    """Twelve hex digits of the stage-one file that ships: other weights, other digits."""
    return hashlib.sha256(STAGE_ONE.read_bytes()).hexdigest()[:12]
