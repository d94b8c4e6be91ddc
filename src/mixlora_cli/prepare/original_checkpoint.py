"""`mixlora import`: a checkpoint of the code published with the paper as an adapter folder.

Files are read as data, tensors checked against one another, and what was chosen is said with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixlora_cli.config import ImportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.adapters import ADAPTER_WEIGHTS
from mixlora_cli.prepare.original_settings import Sizes, choose_settings
from mixlora_cli.prepare.weight_files import WeightFile, read_weights
from mixlora_cli.routers import ROUTERS
from mixlora_cli.store import folder_beside, readable_as_usual

_MAIN_FILES = (
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# Files of other versions of the code that hold what the main file may lack.
_BESIDES = ("non_lora_trainables.bin", "mm_projector.bin")
_PREFIX = "base_model.model.model."
"""Of all names in a PEFT folder whose base is a LLaVA of transformers."""

# "loarB" is the published spelling.
_ROUTERS = {
    "cmoa_selector.loraA_selector.weight": "router_a",
    "cmoa_selector.loraB_selector.weight": "router_b",
    "cmoa_loarB_extra_selector.loraB_selector.weight": "conditional_router_b",
    "cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight": "router_ab",
}
_INDEPENDENT = {"router_a", "router_b"}
_CONDITIONAL = {"router_a", "conditional_router_b", "router_ab"}
_MARKS = ("lora_", "cmoa_selector.", "cmoa_loarB_extra_selector.", "mixlora", "mm_projector.")
_LAYER = re.compile(
    r"(?:module\.)?(?:base_model\.model\.)?model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.(.+)"
)
_BASE = re.compile(r"(?:^|\.)model\.layers\.(\d+)\.")
# A file of PEFT's own leaves out the adapter's name, which is always "default".
_FACTOR = re.compile(r"lora_([AB])\.(?:default\.)?(\d+)")
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.((?:\d+\.)?(?:weight|bias))")
_REFUSED = (
    (r"mixlora_", "this is an adapter of mixlora itself; use it as it is: mixlora eval run=FOLDER"),
    (
        r"mixlora|\.experts\.",
        "this is another method that is called MixLoRA (experts behind a gate), which mixlora does not have",
    ),
    (r"mm_projector", "the projector itself is adapted (mix_mm_projector=True), which mixlora does not have"),
    (
        r"loraA_choice",
        "B is selected by the numbers of A's factors (lora_a_choice), which mixlora does not have",
    ),
    (
        r"\.lora_(?:[AB]|embedding_[AB])(?:\.\w+)?(?:\.weight)?$",
        "this is plain LoRA, not MixLoRA; a PEFT folder can be used as it is: mixlora eval run=FOLDER",
    ),
    (
        r"",
        "expected only factors and selectors of the language model's linear layers, as the published code saves them",
    ),
)
"""Why a tensor of an adapter cannot be imported, by what its name contains; the first that fits."""

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


class Place(NamedTuple):
    """A linear layer of the language model."""

    layer: int
    linear: str
    """Such as "self_attn.q_proj"."""

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.linear}"


Linears = dict[Place, dict[str, Tensor]]


@dataclass
class Checkpoint:
    """The trained part of a published checkpoint, in the published shapes."""

    main_file: str
    base_layers: int | None
    """Decoder layers of the frozen base, where its tensors lie beside the adapter's."""
    linears: Linears = field(default_factory=dict)
    """By part: lora_A.<number> (1, d_in), lora_B.<number> (1, d_out), routers (E, width), router_ab (E, r * d_in)."""
    projector: dict[str, Tensor] = field(default_factory=dict)
    """By name: "weight" and "bias" of one linear layer, or "0.weight", "0.bias", "2.weight" ... of a sequence."""
    projector_file: str | None = None


def import_checkpoint(options: ImportConfig) -> Path:
    """Turn a published checkpoint into an adapter folder, which is not there unless it is complete.

    Returns:
        The folder: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: the checkpoint cannot be read, is not complete, contradicts itself or needs what is not here.
    """
    checkpoint = sort_tensors(read_files(options.folder))
    linears = {place: _convert_linear(place, parts) for place, parts in sorted(checkpoint.linears.items())}
    sizes = _measure(linears)
    config, reasons = choose_settings(options, sizes, bool(checkpoint.projector), checkpoint.base_layers)
    weights = _convert_projector(checkpoint, sizes.hidden_size)
    for place, parts in linears.items():
        for kind, tensor in parts.items():
            weights[f"{_PREFIX}language_model.{place}.mixlora_{kind}.weight"] = tensor
    folder = options.destination
    try:
        with folder_beside(folder) as temp:
            config.save_pretrained(str(temp))
            save_file(weights, temp / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            readable_as_usual(temp / ADAPTER_WEIGHTS)
            temp.rename(folder)
    except OSError as error:
        raise UserError(f"--output={folder}: cannot be written: {error}") from error
    numbers = sum(tensor.numel() for parts in linears.values() for tensor in parts.values())
    read = (
        f"{options.folder / checkpoint.main_file}: {sizes.num_layers} decoder layers x {len(sizes.linears)} linear "
        f"layers, {numbers:,} numbers"
    )
    _say_what_was_chosen({"read": read, **reasons}, checkpoint, config.routing, folder)
    return folder


def read_files(folder: Path) -> list[WeightFile]:
    """Read the main file of a checkpoint and those beside it, the most authoritative first.

    Raises:
        UserError: there is no such file, or one is broken, holds no tensors or would have to be run to be read.
    """
    main = next((name for name in _MAIN_FILES if (folder / name).is_file()), None)
    if main is None:
        raise UserError(
            f"{folder}: no checkpoint here, expected {', '.join(_MAIN_FILES)}; {_what_to_give(folder)}"
        )
    names = [main, *(name for name in _BESIDES if (folder / name).is_file())]
    return [read_weights(folder / name, lambda name: any(mark in name for mark in _MARKS)) for name in names]


def _what_to_give(folder: Path) -> str:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if checkpoints:
        return f"give one of the checkpoints in it, such as {checkpoints[-1]}"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        return "its weights are still sharded by DeepSpeed: run the zero_to_fp32.py that DeepSpeed put there first"
    return "give the output folder of the published training code"


def sort_tensors(files: Sequence[WeightFile]) -> Checkpoint:
    """Put every tensor in its place; what an earlier file has, a later one does not replace.

    Raises:
        UserError: there is no adapter, or a tensor that the published code's supported settings do not make.
    """
    layers = [int(found[1]) for file in files for name in file.others if (found := _BASE.search(name))]
    checkpoint = Checkpoint(files[0].name, max(layers) + 1 if layers else None)
    for file in files:
        projector: dict[str, Tensor] = {}
        for name, tensor in file.tensors.items():
            if tensor.numel() == 0:
                raise UserError(
                    f"{file.name}: {name} is empty, the checkpoint was saved without gathering its shards (ZeRO-3); "
                    "run DeepSpeed's zero_to_fp32.py on the original folder and import the result"
                )
            if found := _PROJECTOR.fullmatch(name):
                projector[found[1]] = tensor
                continue
            layer = _LAYER.fullmatch(name)
            part = layer and (_ROUTERS.get(layer[3]) or _FACTOR.fullmatch(layer[3]))
            if not layer or not part:
                reason = next(reason for pattern, reason in _REFUSED if re.search(pattern, name))
                raise UserError(f"{file.name}: {name}: {reason}")
            kind = part if isinstance(part, str) else f"lora_{part[1]}.{part[2]}"
            parts = checkpoint.linears.setdefault(Place(int(layer[1]), layer[2]), {})
            parts.setdefault(kind, tensor)
        if projector and not checkpoint.projector:
            checkpoint.projector, checkpoint.projector_file = projector, file.name
    if not checkpoint.linears:
        others = sum(len(file.others) + len(file.tensors) for file in files)
        raise UserError(
            f"{files[0].name}: no factors among its {others} tensors (names such as "
            "...q_proj.lora_A.default.0); is it a model tuned without MixLoRA?"
        )
    return checkpoint


def _convert_linear(place: Place, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check the published tensors of one linear layer and give them mixlora's names and shapes.

    Returns:
        factors_a (E, d_in), factors_b (E, d_out), router_a and router_b (E, width), router_ab (r, d_in, E).

    Raises:
        UserError: one is missing, or shapes contradict one another; names the tensor.
    """
    pool_a, pool_b = (_stack(f"{place}.lora_{side}", f"lora_{side}.", parts) for side in "AB")
    factors, d_in = pool_a.shape
    if len(pool_b) != factors:
        raise UserError(f"{place}: {factors} factors of A, but {len(pool_b)} of B")
    routers = {kind: tensor.clone() for kind, tensor in parts.items() if kind in _ROUTERS.values()}
    kinds = set(routers)
    if kinds == {"router_a"}:
        raise UserError(
            f"{place}: a selector of A alone: B takes the same numbers as A (independent_rank=False) or the file is "
            "not complete; neither can be imported"
        )
    if kinds and kinds not in (_INDEPENDENT, _CONDITIONAL):
        raise UserError(
            f"{place}: selectors {', '.join(sorted(kinds))}; expected {', '.join(sorted(_INDEPENDENT))}, or with CFS "
            f"{', '.join(sorted(_CONDITIONAL))}"
        )
    for kind, router in routers.items():
        _check_values(f"{place}: {kind}", router)
        if router.dim() != 2 or len(router) != factors:
            raise UserError(f"{place}: {kind} has shape {tuple(router.shape)}, expected ({factors}, width)")
    if "conditional_router_b" in routers:
        routers["router_b"] = routers.pop("conditional_router_b")
    widths = [routers[kind].shape[1] for kind in ("router_a", "router_b") if kinds]
    if len(set(widths)) > 1:
        raise UserError(
            f"{place}: the selectors of A and B read {widths[0]} and {widths[1]} features; they must read the same"
        )
    if "router_ab" in routers:
        columns = routers["router_ab"].shape[1]
        if widths[0] != d_in or columns % d_in:
            raise UserError(
                f"{place}: router_ab has {columns} columns and the selectors read {widths[0]} features; expected a "
                f"multiple of d_in={d_in}, and {d_in}"
            )
        routers["router_ab"] = unfold_router_ab(routers["router_ab"], columns // d_in).contiguous()
    return {"factors_a": pool_a, "factors_b": pool_b, **routers}


def _stack(name: str, prefix: str, parts: dict[str, Tensor]) -> Tensor:
    """Factors (1, features), which must be numbered 0, 1, 2, ... -> (E, features)."""
    pool = {int(kind[len(prefix) :]): tensor for kind, tensor in parts.items() if kind.startswith(prefix)}
    if not pool:
        raise UserError(
            f"{name}: no factors, though the layer has other parts; the checkpoint is not complete"
        )
    missing = sorted(set(range(max(pool) + 1)) - set(pool))
    if missing:
        raise UserError(
            f"{name}: factor {missing[0]} is missing, though factor {max(pool)} is there; "
            "the checkpoint is not complete"
        )
    features = pool[0].shape[-1] if pool[0].dim() else 0
    for number, factor in sorted(pool.items()):
        _check_values(f"{name}.{number}", factor)
        if len(pool) == 1 and factor.dim() == 2 and len(factor) > 1:
            raise UserError(
                f"{name}.{number} has shape {tuple(factor.shape)}: a layer with plain LoRA (mix_start_layer or "
                "mix_loraA=False), which cannot be imported"
            )
        if factor.shape != (1, features):
            raise UserError(f"{name}.{number} has shape {tuple(factor.shape)}, expected (1, {features})")
    return torch.cat([pool[number] for number in sorted(pool)])


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise UserError(f"{name} has type {tensor.dtype}, expected floating-point numbers (quantised?)")
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} has values that are no finite numbers; the training diverged or the file is damaged"
        )


def unfold_router_ab(weight: Tensor, rank: int) -> Tensor:
    """(E, r * d_in), the columns of A's first selected factor before the second's -> W_AB (r, d_in, E) of Eq. 7."""
    return weight.reshape(len(weight), rank, -1).permute(1, 2, 0)


def _measure(linears: Linears) -> Sizes:
    """Compare the layers, and read off them what they tell together.

    Raises:
        UserError: a layer is missing, or two contradict one another.
    """
    first = min(linears)
    num_layers = max(place.layer for place in linears) + 1
    names = sorted({place.linear for place in linears})
    for place, parts in linears.items():
        for what, mine in _common(parts).items():
            theirs = _common(linears[first])[what]
            if mine != theirs:
                raise UserError(
                    f"{place}: {what} {mine}, but {theirs} in {first}; all layers must have the same"
                )
        like = Place(first.layer, place.linear)
        if like in linears and _shapes(parts) != _shapes(linears[like]):
            raise UserError(f"{place}: {_shapes(parts)}, but {like}: {_shapes(linears[like])}")
    everywhere = [Place(layer, name) for layer in range(num_layers) for name in names]
    missing = [place for place in everywhere if place not in linears]
    if missing:
        raise UserError(
            f"{missing[0]}: no factors, though other layers have some ({len(missing)} such places); "
            "the checkpoint is not complete"
        )
    task_width = _task_width(linears)
    parts = linears[first]
    if "router_a" not in parts:
        cond_type = None
    elif "router_ab" in parts:
        cond_type = "input_lora_a_param"
    else:
        cond_type = "input" if task_width is None else "task_embed"
    query = next((place for place in linears if place.linear.endswith(".q_proj")), None)
    return Sizes(
        num_layers=num_layers,
        linears=tuple(names),
        hidden_size=None if query is None else linears[query]["factors_a"].shape[1],
        factors=len(parts["factors_a"]),
        rank=len(parts["router_ab"]) if "router_ab" in parts else None,
        cond_type=cond_type,
        task_width=task_width,
    )


def _common(parts: dict[str, Tensor]) -> dict[str, object]:
    """What has to be the same in all layers."""
    return {
        "factors": len(parts["factors_a"]),
        "routers": ", ".join(sorted(kind for kind in parts if kind.startswith("router"))) or "none",
        "rank": len(parts["router_ab"]) if "router_ab" in parts else None,
    }


def _shapes(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in sorted(parts.items()))


def _task_width(linears: Linears) -> int | None:
    """The common width of the routers' input, if it is not that of the layers' own input."""
    widths = {place: parts["router_a"].shape[1] for place, parts in linears.items() if "router_a" in parts}
    own = {place: linears[place]["factors_a"].shape[1] for place in widths}
    odd = [place for place in widths if widths[place] != own[place]]
    if not odd:
        return None
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{odd[0]}: its selectors read {widths[odd[0]]} features, its input has {own[odd[0]]}; "
            "selectors that read several things (cond_type with input and instr, task_def or attr) cannot be imported"
        )
    return widths[odd[0]]


def _convert_projector(checkpoint: Checkpoint, hidden_size: int | None) -> dict[str, Tensor]:
    """`mm_projector` as one linear layer (LLaVA-v1) or two (LLaVA-1.5) -> `linear_1`, `linear_2`.

    Raises:
        UserError: it has other layers, or shapes that do not fit together.
    """
    if not checkpoint.projector:
        return {}
    file, projector = checkpoint.projector_file, checkpoint.projector
    positions = sorted({name.rpartition(".")[0] for name in projector})
    if positions not in ([""], ["0", "2"]):
        raise UserError(
            f"{file}: the projector has layers {', '.join(positions)}; expected one linear layer (LLaVA-v1) or layers "
            "0 and 2 (LLaVA-1.5)"
        )
    weights = [f"{position}.weight".lstrip(".") for position in positions]
    if not projector.keys() >= set(weights):
        raise UserError(f"{file}: the projector has a bias but no weight; the checkpoint is not complete")
    if not all(value.is_floating_point() and torch.isfinite(value).all() for value in projector.values()):
        raise UserError(f"{file}: the projector's values are not all finite floating-point numbers")
    layers = [projector[name] for name in weights]
    if any(layer.dim() != 2 for layer in layers):
        raise UserError(f"{file}: a weight of the projector is no matrix; the checkpoint is not complete")
    if len(layers) == 2 and layers[0].shape[0] != layers[1].shape[1]:
        raise UserError(
            f"{file}: the projector's layers do not fit: {tuple(layers[0].shape)}, {tuple(layers[1].shape)}"
        )
    if hidden_size not in (None, layers[-1].shape[0]):
        raise UserError(
            f"{file}: the projector makes {layers[-1].shape[0]} features, the language model has {hidden_size}"
        )
    return {
        f"{_PREFIX}multi_modal_projector.linear_{2 if name.startswith('2') else 1}.{name.rpartition('.')[2]}": (
            tensor.contiguous().clone()
        )
        for name, tensor in projector.items()
    }


def _say_what_was_chosen(reasons: dict[str, str], checkpoint: Checkpoint, routing: str, folder: Path) -> None:
    """Print for people what was read, chosen and written, and what stays different."""
    # The published training starts from LLaVA-v1; a projector of two layers tells of another base.
    projector, model = "none in the checkpoint: the base keeps its own", "llava_v1_7b"
    if checkpoint.projector:
        one = "weight" in checkpoint.projector
        layers = "one linear layer, as in LLaVA-v1" if one else "two linear layers, as in LLaVA-1.5"
        projector = f"{layers} (from {checkpoint.projector_file}); it replaces the base's"
        model = "llava_v1_7b" if one else "<the base that it was trained on>"
    lines = reasons | {"projector": projector, "differs": _DIFFERENCES[routing]}
    if ROUTERS[routing].source != "chance":
        lines["and"] = _PRECISION
    lines |= {"wrote": str(folder), "next": f"mixlora eval run={folder} model={model}"}
    width = max(len(name) for name in lines)
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
