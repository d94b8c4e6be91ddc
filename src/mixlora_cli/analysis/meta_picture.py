"""What a picture is to a model, measured on the meta device: its tokens, and what the vision side computes for it.

The picture is one of 640 x 480 pixels, as photographs of common data sets are; where a model reads every picture at one
size, its own size does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.auto import image_processing_auto

from mixlora_cli.analysis.bench.counters import Operations
from mixlora_cli.config import ModelConfig
from mixlora_cli.models.load import checkpoint_source
from mixlora_cli.models.skeleton import published_pictures

META = torch.device("meta")
SIZE = (640, 480)
"""Width and height in pixels."""


@dataclass(frozen=True)
class Picture:
    """One picture as a model reads it."""

    tokens: int
    """Of the sequence that it takes the place of."""
    operations: Operations
    """Of the vision side; the backward pass is that of what is trained of it."""
    tower: int
    """Of these the tower's forward pass, the part that lies before the projector."""


def read_picture(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Picture:
    """Run the vision side of a model on the meta device.

    Args:
        model: on the meta device; trained parameters require a gradient.
        inputs: of `picture_inputs`.

    Raises:
        RuntimeError, TypeError, ValueError, ...: whatever code raises that needs to see the numbers of a tensor.
    """
    marks: list[int] = []
    vision: Any = model
    tower: nn.Module = model.get_encoder(modality="image")
    with FlopCounterMode(display=False) as counter, _MetaWins():  # type: ignore[no-untyped-call]

        def mark(*_: Any) -> None:
            marks.append(counter.get_total_flops())

        handles = [tower.register_forward_pre_hook(mark), tower.register_forward_hook(mark)]
        try:
            read = vision.get_image_features(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        forward = counter.get_total_flops()
        pooled = getattr(read, "pooler_output", read)
        features = [tensor for tensor in tree_leaves(pooled) if isinstance(tensor, Tensor)]
        trained = [tensor for tensor in features if tensor.requires_grad]
        torch.autograd.backward(trained, [torch.empty_like(tensor) for tensor in trained])
        backward = counter.get_total_flops() - forward
    tokens = sum(tensor.shape[:-1].numel() for tensor in features)
    done = sum(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))
    return Picture(tokens, Operations(forward, backward), done)


def picture_inputs(model: ModelConfig, config: Any) -> dict[str, Tensor]:
    """What the model's processor makes of a picture, on the CPU; empty for a model without a tower.

    Of a local folder its own processor; of a published model its settings in published.yaml; else the one size that
    the tower reads.
    """
    if getattr(config, "vision_config", None) is None:
        return {}
    made = _processed(model, config)
    if made is None:
        size = config.vision_config.image_size
        rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
        made = {"pixel_values": torch.ones(1, 3, rows, columns)}
    return made


def _processed(model: ModelConfig, config: Any) -> dict[str, Tensor] | None:
    settings = published_pictures(model)
    blank = Image.new("RGB", SIZE)
    if settings is not None:
        auto: Any = image_processing_auto
        # Asked for a class itself, the mapping wants torchvision.
        kind = getattr(transformers, auto.IMAGE_PROCESSOR_MAPPING_NAMES[config.model_type]["pil"])
        return dict(kind(**settings)(images=[blank], return_tensors="pt"))
    if model.source in ("tiny", "mini"):
        return None
    folder = checkpoint_source(model)
    if not (Path(folder) / "config.json").is_file():
        return None
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return dict(processor(images=[blank], return_tensors="pt"))


class _MetaWins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, an operation on a tensor of the meta device and one of the CPU takes place on the meta device.

    Pixels, sizes and places of patches stay on the CPU, where code can read them, until they meet a weight.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.device == META for tensor in tensors) or func is torch.ops.aten._to_copy.default:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # what is asked of a mask is whether it keeps everything
        args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        return func(*args, **kwargs)


def _on_meta(tensor: Tensor) -> Tensor:
    # Numbers without dimensions go with any device.
    return tensor.to(META) if tensor.ndim else tensor
