"""The adapter that is exported, and the folder that the result goes to: what can be refused before a model loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixlora_cli.config import ExportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.subject import MixLoraSubject, mixlora_at, refuse_adapter_folder
from mixlora_cli.output import LOCK

FILE_NAME = "export.json"
FORMAT = "mixlora-export/1"


def find_source(config: ExportConfig) -> MixLoraSubject:
    """Resolve `run` and check what the adapter allows.

    Raises:
        UserError: there is no finished MixLoRA adapter, or `export.rank` is more than its pools hold.
    """
    assert config.run is not None  # the configuration's own check
    source = mixlora_at(
        config.run,
        config.model,
        own_weights="they are static already, there is nothing to export",
        other_kind="is static already: serve {folder} as it is",
    )
    adapter = source.adapter
    rank = config.export.rank
    if rank is not None and rank > adapter.factors:
        raise UserError(
            f"export.rank={rank}: must be <= {adapter.factors}, the factors in a pool; the mean update has no more"
        )
    if adapter.routing == "random" and config.export.per_task:
        raise UserError(
            "export.per_task=true: with routing=random chance selects alike for every task, so all adapters would be "
            "one; give export.per_task=false"
        )
    return source


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless an export may be written into `folder`."""
    refuse_adapter_folder(folder)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}:
        return
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"output_dir={folder} holds files that no export wrote; give a folder of its own")
    if not overwrite:
        raise UserError(
            f"output_dir={folder} holds an export; choose another output_dir=, or overwrite=true to replace it"
        )
    _adapters_in(folder / FILE_NAME)


def begin_output(folder: Path, adapters: Sequence[str]) -> None:
    """Remove an earlier export's adapters and note the names of those to come; other files stay."""
    file = folder / FILE_NAME
    if file.is_file():
        for name in _adapters_in(file):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"format": FORMAT, "finished": False, "adapters": [{"folder": n} for n in adapters]})
    )


def _adapters_in(file: Path) -> list[str]:
    """Names of the adapter folders that an export wrote beside `file`; UserError where it is another's file."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        names = [str(entry["folder"]) for entry in content["adapters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no file of this version's export: move it away, or give another output_dir="
        ) from error
    return [name for name in names if name == Path(name).name and name not in ("", ".", "..")]
