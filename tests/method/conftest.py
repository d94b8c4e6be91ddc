"""Models and prompts for the method's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for method_models, method_oracle

from method_models import adapt, build_llava, prompt


@pytest.fixture
def device() -> torch.device:
    """Where models are, and where what they read is put; test_gpu.py has another."""
    return torch.device("cpu")


@pytest.fixture
def make_model(device: torch.device) -> Callable[..., PeftModel]:
    return lambda seed=0, **fields: adapt(build_llava(seed), **fields).to(device)


@pytest.fixture
def prompts() -> list[tuple[list[int], Tensor]]:
    """Three prompts of different lengths."""
    return [prompt(length, seed) for seed, length in enumerate((3, 8, 5))]
