"""Why a test of PEFT's does not hold for MixLoRA by design, told by what its failure says or its name."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from peft.tuners.lora import LoraConfig

from mixlora_cli import MixLoraConfig

NOT_OURS = "not about the method"
"""The test made no MixLoRA configuration or layer: it is about other methods or LoRA's own options."""

LORA_OPTIONS = sorted({f.name for f in fields(LoraConfig)} - {f.name for f in fields(MixLoraConfig)})
LORA = "LoRA's own names, options and functions"
TARGETS = "default targets: all linear layers, not LoRA's table"

REASONS: dict[str, str] = {
    "merging": r"MixLoRA cannot be merged into the base weights",
    "layers other than nn.Linear": r"only torch\.nn\.Linear can be adapted|has no torch\.nn\.Linear",
    "the output layer, where the layer's input routes": r"is the output layer, which reads only the tokens",
    "rank_pattern": r"rank_pattern=.*cannot be had",
    "beside a LoRA with LoRA's own options": (
        r"Cannot combine adapters with different peft types.*PeftType\.LORA"
    ),
    "hot swapping, which PEFT has for LoRA alone": (
        r"Hotswapping only supports LORA"
        r"|No adapter layers found on the model, make sure call `prepare_model_for"
    ),
    "PeftMixedModel, whose list of methods is closed": r"is not compatible with the `PeftMixedModel`",
    "the same refusal in other words": r"Regex pattern did not match[^\0]*goes with",
    "models that only the hub has": (
        r"couldn't connect to 'https://huggingface.co'|Can't find 'adapter_config.json' at 'peft-internal"
        r"|'StableDiffusionPipeline' has no attribute 'from_pretrained'"
    ),
    LORA: (
        r"lora_[A-Za-z]+|LoraLayer|LoraModel|LoraConfig|'lora\.Linear'|'LORA'|Incompatible PEFT types found"
        r"|add_weighted_adapter"
        r"|has no attribute '(r|scaling|_register_custom_module|cast_input_dtype_enabled)'"
        rf"|'MixLoraConfig' object has no attribute '({'|'.join(LORA_OPTIONS)})'"
    ),
}
"""By reason, what the failure says; the first that matches counts."""

TESTS: dict[str, str] = {
    "TestDefaultTargetModules::test_default_target_modules_list_of_str": TARGETS,
    "TestDefaultTargetModules::test_default_target_modules_str": TARGETS,
    "TestExcludedModuleNames::test_realistic_example": TARGETS,
    "TestTargetedModuleNames::test_realistic_example": TARGETS,
    "TestPeftCustomKwargs::test_module_matching_lora": TARGETS,
    # Counts instances of LoraLayer.
    "TestPeftCustomKwargs::test_maybe_include_all_linear_does_not_target_classifier_head": LORA,
    "TestFindMinimalTargetModules::test_get_peft_model_applies_find_target_modules": LORA,
    "TestScaling::test_scaling_simple": LORA,
    "TestScaling::test_scaling_multiple_adapters": LORA,
    # LoRA's number of parameters.
    "TestModelAndLayerStatus::test_nb_params_small": LORA,
    # `target_parameters=[...]` beside an empty list of modules.
    "TestInjectAdapterFromStateDict::test_inject_from_state_dict_transformers_target_parameters_fails": LORA,
    # Takes away a weight by LoRA's name; test_transformers_integration.py does it by ours.
    "test_from_pretrained_missing_keys_warning": LORA,
    "TestLoraInitialization::test_unmatched_rank_pattern_key_warns": "rank_pattern",
    # The model card's tag "lora".
    "TestModelCard::test_model_card_has_expected_tags": LORA,
    "TestModelCard::test_custom_models_dont_have_transformers_tag": LORA,
    # A set where a list was given.
    "TestPeftConfig::test_save_pretrained_with_target_modules": LORA,
}
"""The few whose failure says nothing."""


def reason_of(function: str, failure: pytest.ExceptionInfo[BaseException]) -> str | None:
    """The reason that covers a failure, or None: then it is a failure of the tuner's.

    Args:
        function: file::Class::function.
    """
    said = failure.exconly()
    by_message = next((reason for reason, pattern in REASONS.items() if re.search(pattern, said)), None)
    return by_message or TESTS.get(function.split("::", maxsplit=1)[1])
