"""Where the package keeps the files that it ships, and everything that can be computed again."""

from __future__ import annotations

import errno
import hashlib
import os
from functools import cache
from pathlib import Path

from mixlora_cli.errors import UserError

STAGE_ONE = Path(__file__).parent / "models" / "assets" / "mini_stage_one.safetensors"
"""What `mixlora align` made of the small model: read by whatever builds that."""
WITHOUT_FEATURES = ", or go without (train.cache_features=false, eval.cache_features=false)"


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


def cache_root() -> Path:
    """`$MIXLORA_CACHE`, else `$XDG_CACHE_HOME/mixlora`, else `~/.cache/mixlora`; the folder need not exist yet."""
    if own := os.environ.get("MIXLORA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "mixlora"


def require_cache() -> None:
    """Make the folder, where features are to be kept, before a model is loaded.

    Raises:
        UserError: it cannot be made or written.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    except OSError as error:
        raise unusable(root, error, WITHOUT_FEATURES) from error


def unusable(folder: Path, error: OSError, instead: str = "") -> UserError:
    """What to do about a cache that cannot be written; `instead` says what else is possible."""
    return UserError(
        f"the cache in {folder} cannot be written: {error.strerror or error}; free some space, "
        f"set MIXLORA_CACHE to a folder elsewhere{instead}"
    )
