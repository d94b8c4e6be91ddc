"""`mixlora import`: read, check, convert, write, and say what was chosen and why."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mixlora_cli.prepare.published.convert import convert
from mixlora_cli.prepare.published.files import read_tensor_files
from mixlora_cli.prepare.published.names import Published, sort_tensors, wanted
from mixlora_cli.prepare.published.settings import Settings, choose_settings
from mixlora_cli.prepare.published.sizes import Sizes, measure
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.config import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.store import readable_as_usual

_DIFFERENCES = {
    "instance": (
        "padding: the published code averages it into what the selectors read, here it never counts; one instance at "
        "a time, as its evaluation runs, has none"
    ),
    "task": "padding of task definitions: the published training averages it in, here it never counts",
    "random": "the draw of the factors: the published code uses Python's generator, mixlora torch's",
}
_PRECISION = (
    "precision: the published evaluation selects in fp16, mixlora in fp32; ties may fall the other way"
)


def import_checkpoint(options: ImportConfig) -> Path:
    """Turn a published checkpoint into an adapter folder, which is not there unless it is complete.

    Returns:
        The folder: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: the checkpoint cannot be read, is not complete, contradicts itself or needs what is not here.
    """
    published = sort_tensors(read_tensor_files(options.folder, wanted))
    sizes = measure(published)
    settings = choose_settings(options, sizes, bool(published.projector), published.base_layers)
    weights = convert(published, settings.config)
    write(options.destination, settings.config, weights)
    for line in summary(options, published, sizes, settings, weights):
        print(line)
    return options.destination


def write(folder: Path, config: MixLoraConfig, weights: dict[str, Tensor]) -> None:
    """Write the two files beside `folder` first and rename them into place.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            inside = scratch / folder.name  # made here, so that it gets the usual permissions
            inside.mkdir()
            config.save_pretrained(str(inside))
            save_file(weights, inside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            readable_as_usual(inside / ADAPTER_WEIGHTS)
            inside.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output={folder}: cannot be written: {error}") from error


def summary(
    options: ImportConfig, published: Published, sizes: Sizes, settings: Settings, weights: dict[str, Tensor]
) -> list[str]:
    """Lines for people: what was read, chosen and written, and what stays different."""
    numbers = sum(tensor.numel() for name, tensor in weights.items() if "mixlora_" in name)
    lines = {
        "read": (
            f"{options.folder / published.main_file}: {sizes.num_layers} decoder layers x {len(sizes.linears)} linear "
            f"layers, {numbers:,} numbers"
        ),
        **settings.reasons,
        "projector": _describe_projector(published),
        "differs": _DIFFERENCES[settings.config.routing],
    }
    if settings.config.routing != "random":
        lines["and"] = _PRECISION
    lines["wrote"] = str(options.destination)
    lines["next"] = f"mixlora eval run={options.destination} model={_model(published)}"
    width = max(len(name) for name in lines)
    return [f"{name:<{width}}  {text}" for name, text in lines.items()]


def _describe_projector(published: Published) -> str:
    if not published.projector:
        return "none in the checkpoint: the base keeps its own"
    one = any(position is None for position, _ in published.projector)
    layers = "one linear layer, as in LLaVA-v1" if one else "two linear layers, as in LLaVA-1.5"
    return f"{layers} (from {published.projector_file}); it replaces the base's"


def _model(published: Published) -> str:
    """The published training starts from LLaVA-v1; a projector of two layers tells of another base."""
    two = any(position is not None for position, _ in published.projector)
    return "<the base that it was trained on>" if two else "llava_v1_7b"
