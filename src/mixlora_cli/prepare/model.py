"""`mixlora prepare model=...`: assemble a model that is published in parts, or download one that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mixlora_cli.config import PrepareConfig, PrepareOptions
from mixlora_cli.errors import UserError
from mixlora_cli.models.prepared import prepared_folder
from mixlora_cli.prepare.disk import require_space
from mixlora_cli.prepare.llava_v1 import LlavaV1, open_llava_v1, write_llava_v1
from mixlora_cli.prepare.parts import Part, find_part
from mixlora_cli.prepare.projector import FILE as PROJECTOR_FILE

MANIFEST = "prepared.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_LANGUAGE_MODEL = ("config.json", "tokenizer*", "special_tokens_map.json", *_WEIGHTS)
_VISION_TOWER = ("config.json", "preprocessor_config.json", *_WEIGHTS)
_WHOLE = ("*.json", "*.model", "*.jinja", "*.safetensors")


def prepare_model(config: PrepareConfig) -> Path:
    """Make `config.model` loadable without network; returns its folder.

    Raises:
        UserError: the model needs no preparation; a part is missing, damaged or does not fit; the disk is too small.
    """
    model, options = config.model, config.prepare
    assert model is not None
    if model.source == "prepared":
        return _assemble(
            Path(options.output).expanduser() if options.output else prepared_folder(model), options
        )
    if model.source == "hub":
        assert model.name_or_path is not None
        if options.output is not None:
            raise UserError(
                f"prepare.output={options.output}: model={model.name} is used from the hub's cache; leave it out "
                "(HF_HOME moves the cache)"
            )
        return find_part("model.name_or_path", model.name_or_path, _WHOLE, model.revision).path
    raise UserError(
        f"model={model.name} needs no preparation: `mixlora train model={model.name}` makes it on first use"
    )


def _assemble(folder: Path, options: PrepareOptions) -> Path:
    folder = folder.absolute()
    wanted = {key: getattr(options, key) for key in ("language_model", "vision_tower", "projector")}
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    with _alone(folder):
        if _is_there(folder, wanted, options.overwrite):
            console.print(f"{folder} is there already; prepare.overwrite=true makes it anew")
            return folder
        parts = [
            find_part("prepare.language_model", options.language_model, _LANGUAGE_MODEL),
            find_part("prepare.vision_tower", options.vision_tower, _VISION_TOWER),
            find_part("prepare.projector", options.projector, (PROJECTOR_FILE,)),
        ]
        model = open_llava_v1(*parts)
        require_space(folder, model.num_bytes, "writing the assembled model")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed: nobody else works here now
        try:
            partial.mkdir(parents=True)
            _write(model, partial, console)
            (partial / MANIFEST).write_text(json.dumps(_manifest(wanted, parts, model), indent=2) + "\n")
            _replace(partial, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror or error}; free some space, "
                "or choose prepare.output=<folder>"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two commands do not assemble the same model."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another `mixlora prepare` is assembling it; wait for that one") from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; choose prepare.output=<folder>"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _is_there(folder: Path, wanted: dict[str, str], overwrite: bool) -> bool:
    """Whether the folder holds the wanted model.

    Raises:
        UserError: it holds something else.
    """
    if overwrite or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made_of = json.loads((folder / MANIFEST).read_text())["parts"]
        found = {key: made_of[key]["source"] for key in wanted}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: holds something else than a prepared model; choose another prepare.output"
        ) from None
    for key, source in wanted.items():
        if found[key] != source:
            raise UserError(
                f"prepare.{key}={source}: the model in {folder} was made with {found[key]}; "
                "prepare.overwrite=true replaces it, prepare.output=<folder> keeps both"
            )
    return True


def _write(model: LlavaV1, folder: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("assembling", total=model.num_bytes)
        write_llava_v1(model, folder, lambda count: bar.advance(task, count))


def _manifest(wanted: dict[str, str], parts: list[Part], model: LlavaV1) -> dict[str, object]:
    """What the model was made of; a snapshot's folder is named after its commit."""
    return {
        "parts": {
            key: {
                "source": source,
                "commit": part.path.name if part.path.parent.name == "snapshots" else None,
            }
            for (key, source), part in zip(wanted.items(), parts, strict=True)
        },
        "bytes": model.num_bytes,
        "parameters": sum(tensor.numel() for tensor in model.shapes.values()),
        "image_token_id": model.vocabulary.image_token_id,
    }


def _replace(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place in one step; what was there goes."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
