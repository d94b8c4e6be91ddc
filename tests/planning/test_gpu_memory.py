"""Weights, gradients and optimizer states by ZeRO stage: numbers one can work out by hand."""

import pytest

from mixlora_cli.analysis.gpu_memory import CONTEXT_BYTES, GIB, Need, Trained, need, quantise

BILLION = 1_000_000_000
ALL_WEIGHTS = Trained(trained=7 * BILLION, frozen=0, bf16=True, trains_base=True)
ADAPTER = Trained(trained=40_000_000, frozen=7 * BILLION, bf16=True, trains_base=False)


def at_rest(stage: str, model: Trained, gpus: int) -> Need:
    return need(stage, model, gpus, activations=0, logits=0)


@pytest.mark.parametrize(
    ("stage", "bytes_a_weight"),
    [("zero1", 2 + 2 + 12 / 4), ("zero2", 2 + 14 / 4), ("zero3", 16 / 4), ("zero3_offload", 0)],
)
def test_zero_papers_formulas(stage: str, bytes_a_weight: float) -> None:
    found = at_rest(stage, ALL_WEIGHTS, gpus=4)
    held = found.weights + found.gradients + found.optimizer
    assert held == pytest.approx(bytes_a_weight * 7 * BILLION)
    assert found.total == held + found.overhead
    assert found.host == (16 * 7 * BILLION if stage == "zero3_offload" else 0)


def test_without_deepspeed_master_weights_are_fp32() -> None:
    one = at_rest("none", ADAPTER, gpus=1)
    assert one.weights == 2 * 7 * BILLION + (4 + 2) * 40_000_000
    assert one.gradients == 4 * 40_000_000
    assert one.optimizer == 8 * 40_000_000
    assert at_rest("none", ADAPTER, gpus=2).gradients == 2 * one.gradients  # reduction buckets


def test_fp32_training_has_no_copies() -> None:
    model = Trained(trained=1000, frozen=5000, bf16=False, trains_base=False)
    assert at_rest("none", model, gpus=1).weights == 4 * 6000
    assert at_rest("zero2", model, gpus=4).optimizer == 8 * 1000 / 4


def test_buffers_are_no_larger_than_what_they_hold() -> None:
    assert at_rest("none", ADAPTER, gpus=4).overhead == CONTEXT_BYTES
    assert at_rest("zero2", ADAPTER, gpus=4).overhead == CONTEXT_BYTES + 2 * 40_000_000
    assert at_rest("zero2", ALL_WEIGHTS, gpus=4).overhead == CONTEXT_BYTES + BILLION
    assert at_rest("zero3", ALL_WEIGHTS, gpus=4).overhead == CONTEXT_BYTES + 3 * BILLION


def test_need_adds_the_batch_and_fragmentation() -> None:
    found = need("none", ADAPTER, 1, activations=9 * GIB, logits=1 * GIB)
    assert found.total == pytest.approx(at_rest("none", ADAPTER, 1).total + 10.5 * GIB)


def test_unknown_stage_is_an_error() -> None:
    with pytest.raises(KeyError):
        at_rest("zero4", ADAPTER, gpus=4)


def test_qloras_bits_a_weight() -> None:
    """Four bits, 8 for each block of 64, and 32 for each 256 blocks: 0.127 more (Dettmers et al., 2023, section 3)."""
    few = quantise([(4096, 4096), (11_008, 4096)], "nf4")
    assert 8 * few.bytes / few.numbers == pytest.approx(4.127, abs=5e-4)
    assert (few.numbers, few.largest) == ((4096 + 11_008) * 4096, 11_008 * 4096)
    assert quantise([(3, 5), (2, 7)], "int8").bytes == 15 + 14 + 4 * (3 + 2)


def test_quantised_layers_take_their_own_room_and_that_of_one_copy() -> None:
    few = quantise([(4096, 4096)] * 400, "nf4")
    model = Trained(ADAPTER.trained, ADAPTER.frozen, bf16=True, trains_base=False, quantised=few)
    for stage in ("none", "zero2"):
        whole, small = at_rest(stage, ADAPTER, 1), at_rest(stage, model, 1)
        assert whole.weights - small.weights == pytest.approx(2 * few.numbers - few.bytes)
        assert small.overhead - whole.overhead == 2 * 4096 * 4096
