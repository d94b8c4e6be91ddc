"""Models and prompts for the method's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for method_models, method_oracle

from method_models import adapt, build_llava, prompt


@pytest.fixture
def make_model() -> Callable[..., PeftModel]:
    return lambda seed=0, **fields: adapt(build_llava(seed), **fields)


@pytest.fixture
def prompts() -> list[tuple[list[int], Tensor]]:
    """Three prompts of different lengths."""
    return [prompt(length, seed) for seed, length in enumerate((3, 8, 5))]
