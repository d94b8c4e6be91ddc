"""`mixlora prepare`: models and data that have to be made once before the first training."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mixlora_cli.config import PrepareConfig


def prepare(config: PrepareConfig) -> list[Path]:
    """Prepare the model, the data, or both; what is there already is left alone. Returns their folders.

    Raises:
        UserError: a part is missing or not what it should be, or the disk is too small.
    """
    console = Console(soft_wrap=True, markup=False, highlight=False)
    folders = []
    if config.model is not None:
        from mixlora_cli.prepare.model import prepare_model

        folders.append(prepare_model(config))
        console.print(f"model: {folders[-1]}")
    if config.data is not None:
        from mixlora_cli.prepare.vision_flan import prepare_vision_flan

        folders.append(prepare_vision_flan(config))
        console.print(f"data: {folders[-1]}")
    return folders
