"""Where everything that can be computed again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$MIXLORA_CACHE`, else `$XDG_CACHE_HOME/mixlora`, else `~/.cache/mixlora`. The folder need not exist
    yet.
    """
    if own := os.environ.get("MIXLORA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "mixlora"
