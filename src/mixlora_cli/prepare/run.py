"""`mixlora prepare`: models and data that have to be made once before the first training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from mixlora_cli.config import ModelConfig, PrepareConfig, PrepareOptions
from mixlora_cli.errors import UserError
from mixlora_cli.models.load import prepared_folder
from mixlora_cli.output import one_line_errors, require_writable
from mixlora_cli.progress import say
from mixlora_cli.store import publish_folder, sync_files, temp_of, write_errors, write_json

MANIFEST = "prepared.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_NEEDED = {
    "language_model": ("config.json", "tokenizer*", "special_tokens_map.json", *_WEIGHTS),
    "vision_tower": ("config.json", "preprocessor_config.json", *_WEIGHTS),
    "projector": ("mm_projector.bin",),
}
_WHOLE = ("*.json", "*.model", "*.jinja", "*.safetensors")


def prepare(config: PrepareConfig) -> list[Path]:
    """Prepare the model, the data, or both; what is there already is left alone. Returns their folders.

    Raises:
        UserError: a part is missing or not what it should be, or the disk is too small.
    """
    folders = []
    if config.model is not None:
        folders.append(prepare_model(config.model, config.prepare))
        say(f"model: {folders[-1]}", Console())
    if config.data is not None:
        from mixlora_cli.prepare.vision_flan import prepare_vision_flan

        folders.append(prepare_vision_flan(config))
        say(f"data: {folders[-1]}", Console())
    return folders


def prepare_model(model: ModelConfig, options: PrepareOptions) -> Path:
    """Make a model loadable without network: assemble it from its parts, or download it.

    Raises:
        UserError: the model needs no preparation; a part is missing, damaged or does not fit; the disk is too small.
    """
    if model.source == "prepared":
        folder = Path(options.output).expanduser() if options.output else prepared_folder(model)
        return _assemble_alone(folder.absolute(), options)
    if model.source != "hub":
        raise UserError(
            f"model={model.name} needs no preparation: `mixlora train model={model.name}` makes it on first use"
        )
    if options.output is not None:
        raise UserError(
            f"prepare.output={options.output}: model={model.name} is used from the hub's cache; leave it out "
            "(HF_HOME moves the cache)"
        )
    from mixlora_cli.prepare.parts import find_part

    assert model.name_or_path is not None
    return find_part("model.name_or_path", model.name_or_path, _WHOLE, model.revision).path


def _assemble_alone(folder: Path, options: PrepareOptions) -> Path:
    """Hold a lock beside the folder, so that two commands do not assemble the same model."""
    sources = {key: str(getattr(options, key)) for key in _NEEDED}
    require_writable(folder, "prepare.output")
    with one_line_errors(folder, "prepare.output"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
                if not options.overwrite and _is_there(folder, sources):
                    say(f"{folder} is there already; prepare.overwrite=true makes it anew")
                else:
                    _assemble(folder, sources)
        except Timeout:
            raise UserError(
                f"{folder}: another `mixlora prepare` is assembling it; wait for that one"
            ) from None
    return folder


def _is_there(folder: Path, sources: dict[str, str]) -> bool:
    """Whether the folder holds the model made of these parts.

    Raises:
        UserError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made_of = json.loads((folder / MANIFEST).read_text())["parts"]
        found = {key: made_of[key]["source"] for key in sources}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: holds something else than a prepared model; choose another prepare.output"
        ) from None
    for key, source in sources.items():
        if found[key] != source:
            raise UserError(
                f"prepare.{key}={source}: the model in {folder} was made with {found[key]}; "
                "prepare.overwrite=true replaces it, prepare.output=<folder> keeps both"
            )
    return True


def _assemble(folder: Path, sources: dict[str, str]) -> None:
    from mixlora_cli.prepare.llava_v1 import open_llava_v1, write_llava_v1
    from mixlora_cli.prepare.parts import find_part, require_space

    parts = {key: find_part(f"prepare.{key}", source, _NEEDED[key]) for key, source in sources.items()}
    model = open_llava_v1(**parts)
    require_space(folder, model.num_bytes, "writing the assembled model")
    made_of: dict[str, Any] = {
        key: {
            "source": part.source,
            # A snapshot's folder is named after its commit.
            "commit": part.path.name if part.path.parent.name == "snapshots" else None,
        }
        for key, part in parts.items()
    }
    temp = temp_of(folder)
    shutil.rmtree(temp, ignore_errors=True)  # of a run that was killed: nobody else works here now
    try:
        with write_errors(folder, lambda: "free some space, or choose prepare.output=<folder>"):
            temp.mkdir(parents=True)
            write_llava_v1(model, temp)
            about = {
                "parts": made_of,
                "bytes": model.num_bytes,
                "parameters": sum(weight.numel() for weight in model.weights.values()),
                "image_token_id": model.config.image_token_id,
            }
            write_json(temp / MANIFEST, about)
            sync_files(temp)
            publish_folder(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
