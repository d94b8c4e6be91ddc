"""Weights, gradients and optimizer states by ZeRO stage: numbers one can work out by hand."""

import pytest

from mixlora_cli.analysis.planning.activations import Activations
from mixlora_cli.analysis.planning.hardware import GIB
from mixlora_cli.analysis.planning.memory import CONTEXT_BYTES, Need, Trained, state

BILLION = 1_000_000_000
ALL_WEIGHTS = Trained(trained=7 * BILLION, frozen=0, bf16=True, trains_base=True)
ADAPTER = Trained(trained=40_000_000, frozen=7 * BILLION, bf16=True, trains_base=False)


@pytest.mark.parametrize(
    ("stage", "bytes_a_weight"),
    [("zero1", 2 + 2 + 12 / 4), ("zero2", 2 + 14 / 4), ("zero3", 16 / 4), ("zero3_offload", 0)],
)
def test_zero_papers_formulas(stage: str, bytes_a_weight: float) -> None:
    found = state(stage, ALL_WEIGHTS, gpus=4)
    held = found.weights + found.gradients + found.optimizer
    assert held == pytest.approx(bytes_a_weight * 7 * BILLION)


def test_without_deepspeed_master_weights_are_fp32() -> None:
    one = state("none", ADAPTER, gpus=1)
    assert one.weights == 2 * 7 * BILLION + (4 + 2) * 40_000_000
    assert one.gradients == 4 * 40_000_000
    assert one.optimizer == 8 * 40_000_000
    assert state("none", ADAPTER, gpus=2).gradients == 2 * one.gradients  # reduction buckets


def test_fp32_training_has_no_copies() -> None:
    model = Trained(trained=1000, frozen=5000, bf16=False, trains_base=False)
    assert state("none", model, gpus=1).weights == 4 * 6000
    assert state("zero2", model, gpus=4).optimizer == 8 * 1000 / 4


def test_offload_moves_the_state_to_main_memory() -> None:
    found = state("zero3_offload", ALL_WEIGHTS, gpus=4)
    assert found.host == 16 * 7 * BILLION
    assert found.total == found.buffers > CONTEXT_BYTES


def test_buffers_are_no_larger_than_what_they_hold() -> None:
    assert state("zero2", ADAPTER, gpus=4).buffers == CONTEXT_BYTES + 2 * 40_000_000
    assert state("zero2", ALL_WEIGHTS, gpus=4).buffers == CONTEXT_BYTES + BILLION


def test_need_adds_fragmentation_and_compares_with_the_gpu() -> None:
    held = Activations(kept=6 * GIB, working=3 * GIB, logits=1 * GIB)
    need = Need("none", state("none", ADAPTER, gpus=1), held)
    assert need.total == need.state.total + 10.5 * GIB
    assert need.fits(need.total) and not need.fits(need.total - 1)


def test_unknown_stage_is_an_error() -> None:
    with pytest.raises(KeyError):
        state("zero4", ADAPTER, gpus=4)
