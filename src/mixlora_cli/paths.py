"""Where the package keeps the files that it ships."""

from __future__ import annotations

from pathlib import Path


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
