"""How each part is measured: a case in, a `Measurement` out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixlora_cli.analysis.bench.clock import Variant, interleave
from mixlora_cli.analysis.bench.counting import count_operations, peak_bytes, resting_bytes, saved_bytes
from mixlora_cli.analysis.bench.layers import DTYPES, Bench, LayerCase, build_bench
from mixlora_cli.analysis.bench.machine import free_bytes
from mixlora_cli.analysis.bench.measurement import Measurement
from mixlora_cli.analysis.bench.plan import Case
from mixlora_cli.analysis.bench.scoring import write_predictions
from mixlora_cli.analysis.bench.whole import AdapterName, Answering, WholeModel
from mixlora_cli.config import Part
from mixlora_cli.data.encode import Item
from mixlora_cli.evaluation.generate import batches
from mixlora_cli.evaluation.scoring import score

ADAPTERS: tuple[AdapterName, ...] = ("lora", "mixlora")
BASE, BATCHED, ONE_BY_ONE = "base", "batched", "one_by_one"
ONE_BY_ONE_PUBLISHED = "one_by_one_published"
SCORING = "scoring"
SAME_ANSWERS = "same_answers"
"""Answers that are those of the base."""
PUBLISHED_COPIES = 4
"""(B, d_in, d_out) tensors alive at once in the published form: matrices, their gradient, working space for both."""


def measure(case: Case, whole: WholeModel) -> Measurement:
    """Measure one case on `whole.device`."""
    return _MEASURES[case.part](case, whole)


def _layer(case: Case, whole: WholeModel) -> Measurement:
    bench = _bench(case, whole.device)
    return Measurement("layer", case.values, seconds=interleave(bench.variants(), case.rounds, whole.device))


def _operations(case: Case, whole: WholeModel) -> Measurement:
    """Operations and bytes kept for the backward pass of each variant of a layer."""
    bench = _bench(case, whole.device)
    counts = {}
    for name, model in bench.models.items():
        bench.clear(name)
        operations = count_operations(lambda name=name: bench.forward(name), bench.gradient)  # type: ignore[misc]
        bench.clear(name)
        counts[name] = {
            "forward_flops": operations.forward,
            "backward_flops": operations.backward,
            "saved_bytes": saved_bytes(lambda name=name: bench.forward(name), model),  # type: ignore[misc]
        }
    return Measurement("operations", case.values, counts=counts)


def _bench(case: Case, device: torch.device) -> Bench:
    layer = LayerCase(
        d_in=case.number("d_in"),
        d_out=case.number("d_out"),
        dtype=case.text("dtype"),
        batch=case.number("batch"),
        tokens=case.number("tokens"),
        rank=case.number("rank"),
        seed=case.number("seed"),
    )
    pools = [int(pool) for pool in case.text("pools").split(",")]
    return build_bench(
        layer, case.number("factors"), pools, device, with_published=published_fits(layer, device)
    )


def published_fits(layer: LayerCase, device: torch.device) -> bool:
    """Whether the published form's matrices, one for each instance, have room in the memory that is free."""
    matrices = layer.batch * layer.d_in * layer.d_out * DTYPES[layer.dtype].itemsize
    return PUBLISHED_COPIES * matrices < free_bytes(device)


def _memory(case: Case, whole: WholeModel) -> Measurement:
    counts: dict[str, dict[str, int]] = {}
    for name in ADAPTERS:
        step = whole.step(name, case.number("batch_size"))
        step()  # the optimizer makes its state in its first step
        step.optimizer.zero_grad(set_to_none=True)
        resting = resting_bytes(step.resting())
        peak = peak_bytes(step, whole.device)
        counts[name] = {
            "saved_bytes": saved_bytes(step.loss, step.model),
            "resting_bytes": resting,
            "step_bytes": peak,
            "peak_bytes": resting + peak,
        }
    return Measurement("memory", case.values, counts=counts)


def _step(case: Case, whole: WholeModel) -> Measurement:
    variants: dict[str, Variant] = {
        name: Variant(whole.step(name, case.number("batch_size"))) for name in ADAPTERS
    }
    return Measurement("step", case.values, seconds=interleave(variants, case.rounds, whole.device))


def _generation(case: Case, whole: WholeModel) -> Measurement:
    items = whole.prompts(case.number("batch_size"))
    tokens = case.number("max_new_tokens")
    models: dict[str, Answering] = {BASE: whole.generator("none", tokens)}
    models |= {name: whole.generator(name, tokens) for name in ADAPTERS}
    answers = {name: answering(items) for name, answering in models.items()}
    # Untrained adapters change nothing; where rounding makes an answer longer, its time says less.
    counts = {name: {SAME_ANSWERS: _num_equal(texts, answers[BASE])} for name, texts in answers.items()}
    variants = {name: Variant(_answers(answering, [items])) for name, answering in models.items()}
    seconds = interleave(variants, case.rounds, whole.device)
    return Measurement("generation", case.values, seconds, counts)


def _num_equal(texts: Sequence[str], others: Sequence[str]) -> int:
    return sum(text == other for text, other in zip(texts, others, strict=True))


def _evaluation(case: Case, whole: WholeModel) -> Measurement:
    """MixLoRA answers all instances in batches, one at a time, and one at a time in the published code's form."""
    items, tokens = whole.prompts(case.number("instances")), case.number("max_new_tokens")
    answering, published = (whole.generator("mixlora", tokens, published=form) for form in (False, True))
    grouped, alone = batches(items, case.number("batch_size")), [[item] for item in items]
    calls = {
        BATCHED: _answers(answering, grouped),
        ONE_BY_ONE: _answers(answering, alone),
        ONE_BY_ONE_PUBLISHED: _answers(published, alone),
    }
    variants = {name: Variant(call) for name, call in calls.items()}
    return Measurement("evaluation", case.values, seconds=interleave(variants, case.rounds, whole.device))


def _scoring(case: Case, whole: WholeModel) -> Measurement:
    """Scores of stored answers, with their intervals, from the file to `results.json`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_predictions(folder, case.number("predictions"), case.number("seed"))
        variants = {SCORING: Variant(lambda: score(folder))}
        return Measurement("scoring", case.values, seconds=interleave(variants, case.rounds, whole.device))


def _answers(answering: Answering, groups: Sequence[Sequence[Item]]) -> Callable[[], None]:
    def run() -> None:
        for group in groups:
            answering(group)

    return run


_MEASURES: dict[Part, Callable[[Case, WholeModel], Measurement]] = {
    "layer": _layer,
    "operations": _operations,
    "memory": _memory,
    "step": _step,
    "generation": _generation,
    "evaluation": _evaluation,
    "scoring": _scoring,
}
