"""Why a test of PEFT's does not hold for MixLoRA by design, told by what its failure says."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from peft.tuners.lora import LoraConfig

from mixlora_cli import MixLoraConfig

NOT_OURS = "not about the method"
"""The test never made a MixLoRA configuration or layer: it is about another method, or about LoRA's own options."""

LORA_OPTIONS = sorted({f.name for f in fields(LoraConfig)} - {f.name for f in fields(MixLoraConfig)})

REASONS: dict[str, str] = {
    "merging": r"MixLoRA cannot be merged into the base weights",
    "layers other than nn.Linear": r"only torch\.nn\.Linear can be adapted",
    "LoRA's own names and options": (
        r"lora_[A-Za-z]+|only supported for models with `LoraLayer`s|add_weighted_adapter"
        r"|has no attribute '(scaling|set_scale|scale_layer|_register_custom_module|cast_input_dtype_enabled)'"
        rf"|'MixLoraConfig' object has no attribute '({'|'.join(LORA_OPTIONS)})'"
    ),
    "beside a LoRA with LoRA's own options": (
        r"Cannot combine adapters with different peft types.*PeftType\.LORA"
    ),
    "PeftMixedModel, whose list of methods is closed": r"is not compatible with the `PeftMixedModel`",
    "models that only the hub has": (
        r"couldn't connect to 'https://huggingface.co'|Can't find 'adapter_config.json' at 'peft-internal"
        r"|'StableDiffusionPipeline' has no attribute 'from_pretrained'|OfflineModeIsEnabled|LocalEntryNotFound"
    ),
}
"""By reason, what the failure says."""


def reason_of(failure: pytest.ExceptionInfo[BaseException]) -> str | None:
    """The reason that covers a failure, or None: then it is a failure of the tuner's."""
    said = failure.exconly()
    return next((reason for reason, pattern in REASONS.items() if re.search(pattern, said)), None)
