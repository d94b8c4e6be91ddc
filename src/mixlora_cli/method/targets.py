"""Where a model is adapted if nobody says so: every linear layer that reads the text, in a model of any kind."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def decoder_linears(model: PreTrainedModel, as_list: bool = False) -> str | list[str]:
    """The linear layers of `get_decoder()` but the output layer; of an encoder-decoder model both halves.

    Towers for pictures and their projectors lie outside of the decoder; layers past which kernels read are left out.

    Returns:
        A regular expression of whole names with `\\d+` for the blocks' numbers, or, `as_list`, the ends of the names.

    Raises:
        ValueError: there is no linear layer.
    """
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    decoder = model if both else model.get_decoder()
    output = output_layer(model)
    # Some models call the output layer by that name.
    decoder = model.base_model if decoder is output else decoder
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    names = [
        f"{prefix}.{name}".strip(".")
        for name, module in decoder.named_modules()
        if _is_linear(module)
        and module is not output
        and "pooler" not in name
        and not is_read_past(decoder, name)
    ]
    if not names:
        raise ValueError(
            f"target_modules=None: the decoder of {type(model).__name__} has no torch.nn.Linear; name the layers"
        )
    if as_list:
        # PEFT counts blocks only in names that do not begin where the model does.
        return [name.partition(".")[2] or name for name in names]
    patterns = {re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(name)) for name in names}
    return "|".join(sorted(patterns))


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of hidden states; None where there is none."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def is_read_past(model: nn.Module, name: str) -> bool:
    """Whether a state-space mixer's kernel reads this layer's weight and never calls the layer, at least on GPUs."""
    mixer, _, own = name.rpartition(".")
    kernel = model.get_submodule(mixer)
    return own in ("x_proj", "dt_proj", "out_proj") and hasattr(kernel, "A_log") and hasattr(kernel, "D")


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, one that is quantised, or one that is adapted already; not a part of such."""
    if isinstance(module, BaseTunerLayer):
        return isinstance(module.get_base_layer(), nn.Linear)
    # Routers of mixtures may be linear layers that give something else.
    return isinstance(module, nn.Linear) and "Router" not in type(module).__name__
