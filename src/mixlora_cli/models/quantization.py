"""A frozen base in four or eight bits (QLoRA): bitsandbytes quantises the decoder's linear layers as they are loaded.

Norms, embeddings, the output head, the vision side and adapters stay in the type that they have without it, so that
training and evaluation compute alike; nothing else of PEFT's `prepare_model_for_kbit_training` is needed, because
checkpointing here is not the reentrant kind.
"""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from mixlora_cli.config.groups import Quantization
from mixlora_cli.errors import UserError
from mixlora_cli.method.targets import decoder_linears

BLOCK = 64
"""Weights that share a scale in nf4."""


def require_bitsandbytes(quantization: Quantization) -> None:
    """Do nothing where nothing is quantised, or the package that does it is there.

    Raises:
        UserError: it is missing; names the command that installs it.
    """
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={quantization} needs the package bitsandbytes: pip install 'mixlora-cli[quant]'"
        )


def load_weights(
    auto_class: Any,
    source: str | Path,
    config: PreTrainedConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    **settings: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained(source, dtype=dtype, **settings)`, with quantised linear layers if asked.

    Args:
        auto_class: a class of transformers with `from_pretrained` and `from_config`.
        config: the configuration of `source`.
        dtype: of everything that is not quantised, and of the products with what is.

    Raises:
        UserError: bitsandbytes is missing, the checkpoint is quantised already, or it cannot be quantised.
    """
    own = getattr(config, "quantization_config", None)
    if own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
        raise UserError(
            f"{source} is quantised already ({getattr(method, 'value', method)}); give the checkpoint that it was made "
            "of, and model.quantization=nf4 (or int8)"
        )
    if quantization == "none":
        whole: PreTrainedModel = auto_class.from_pretrained(source, dtype=dtype, **settings)
        return whole
    require_bitsandbytes(quantization)
    asked = _settings(quantization, _linears(auto_class, source, config, quantization), dtype)
    model: PreTrainedModel = auto_class.from_pretrained(
        source, dtype=dtype, quantization_config=asked, **settings
    )
    for module in model.modules():
        # On some CPUs its layers would otherwise turn to bf16 products without a gradient as soon as one is not needed.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _linears(
    auto_class: Any, source: str | Path, config: PreTrainedConfig, quantization: Quantization
) -> str:
    """A regular expression of the whole names of the layers to quantise, found without any weight."""
    with torch.device("meta"):
        skeleton = auto_class.from_config(copy.deepcopy(config), attn_implementation="eager")
    try:
        names = decoder_linears(skeleton)
    except ValueError as error:
        raise UserError(
            f"model.quantization={quantization}: {source} has nothing to quantise: {error}"
        ) from error
    assert isinstance(names, str)
    if quantization == "nf4" and not torch.cuda.is_available():
        for name, module in skeleton.named_modules():
            if isinstance(module, nn.Linear) and module.in_features % BLOCK and re.fullmatch(names, name):
                # Seen in bitsandbytes 0.50.2: blocks that cross rows come back with each other's scales.
                raise UserError(
                    f"model.quantization=nf4: {name} of {source} has {module.in_features} inputs, and without a GPU "
                    f"bitsandbytes reads only multiples of {BLOCK} right; use a GPU, model.quantization=int8 or none"
                )
    return names


def _settings(quantization: Quantization, names: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales (Dettmers et al., 2023), or LLM.int8 (Dettmers et al., 2022)."""
    others = [rf"(?!(?:{names})$).*"]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def count_numbers(parameter: torch.Tensor) -> int:
    """Numbers that a parameter stands for: four-bit codes lie two in a byte, and one that ZeRO-3 took away is whole."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
