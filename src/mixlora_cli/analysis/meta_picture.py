"""What a picture is to a model, measured on the meta device: its tokens, and what the vision side computes for it.

The picture is one of 640 x 480 pixels, as photographs of common data sets are; where a model reads every picture at one
size, its own size does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.models.auto import image_processing_auto

from mixlora_cli.analysis.bench.counters import Operations
from mixlora_cli.config import ModelConfig
from mixlora_cli.models.load import build_chat
from mixlora_cli.models.skeleton import is_published, published_pictures

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
    cacheable: bool
    """All pictures have one size, so that the features of the tower can be kept."""


def read_picture(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int | None = None) -> Picture:
    """Run the vision side of a model on the meta device.

    Args:
        model: on the meta device; trained parameters require a gradient.
        inputs: of `picture_inputs`.
        tokens: likewise.

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
    tokens = sum(tensor.shape[:-1].numel() for tensor in features) if tokens is None else tokens
    done = sum(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))
    pixels, layer = inputs["pixel_values"], getattr(model.config, "vision_feature_layer", None)
    cacheable = set(inputs) == {"pixel_values"} and pixels.ndim == 4 and len(pixels) == 1
    return Picture(tokens, Operations(forward, backward), done, cacheable and isinstance(layer, int))


def picture_inputs(model: ModelConfig, config: Any) -> tuple[dict[str, Tensor], int | None]:
    """What a model reads of a picture.

    Of a published model by the settings of its image processor in published.yaml, of a built-in one at the one size
    that it reads, of another one by its own processor.

    Returns:
        The tensors of `get_image_features`, on the CPU, and the tokens that stand for the picture where a processor
        tells: as many as there are features, and those around them.

    Raises:
        UserError: the processor cannot be loaded.
    """
    blank = Image.new("RGB", SIZE)
    if not is_published(model) and model.source in ("hub", "prepared"):
        chat = build_chat(model)
        inputs, ((text,),) = chat.process([[blank]])
        return inputs, len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    settings = published_pictures(model) if is_published(model) else None
    if settings is not None:
        auto: Any = image_processing_auto
        # Asked for a class itself, the mapping wants torchvision.
        kind = getattr(transformers, auto.IMAGE_PROCESSOR_MAPPING_NAMES[config.model_type]["pil"])
        return dict(kind(**settings)(images=[blank], return_tensors="pt")), None
    size = config.vision_config.image_size
    return {"pixel_values": torch.ones(1, 3, size, size)}, None


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
