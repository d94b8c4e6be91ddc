"""Where `mixlora prepare` puts a model that it assembles, and whether it is there. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from mixlora_cli.config import ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.paths import cache_root


def prepared_folder(model: ModelConfig) -> Path:
    """`model.name_or_path` where it is given, else `models/<name>` under the cache: `models/llava-v1-7b`."""
    if model.name_or_path is not None:
        return Path(model.name_or_path).expanduser()
    return cache_root() / "models" / model.name.replace("_", "-")


def require_prepared(model: ModelConfig) -> None:
    """Do nothing for a model that needs no preparation, or whose preparation is complete.

    Raises:
        UserError: it has not been prepared; names the command that does it.
    """
    if model.source != "prepared":
        return
    folder = prepared_folder(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={model.name} is not in {folder}: assemble it once with `mixlora prepare model={model.name}`; "
            "if it is somewhere else, give model.name_or_path=<that folder> (or set MIXLORA_CACHE)"
        )
