"""The findings as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixlora_cli.analysis.bench import comparisons
from mixlora_cli.analysis.bench.comparisons import compare, pools
from mixlora_cli.analysis.bench.estimates import Estimate, spread
from mixlora_cli.analysis.bench.goals import Judgement
from mixlora_cli.analysis.bench.grid import MISSING, Grid, mebibytes, milliseconds, ratio_text
from mixlora_cli.analysis.bench.layers import LINEAR, LORA, PUBLISHED, mixlora
from mixlora_cli.analysis.bench.measure import SAME_ANSWERS, SCORING
from mixlora_cli.analysis.bench.measurement import Measurement
from mixlora_cli.analysis.bench.results import Findings, extras
from mixlora_cli.config import Part

LAYER_COLUMNS = ("layer", "format", "batch x tokens")


def all_grids(findings: Findings) -> list[Grid]:
    """Goals first, then each part that was measured."""
    grids = [goals_grid(findings.judgements)]
    makers: dict[Part, Sequence[Callable[[list[Measurement]], Grid]]] = {
        "layer": (ratios_grid, times_grid),
        "operations": (operations_grid,),
        "memory": (memory_grid,),
        "scoring": (scoring_grid,),
    }
    for part, wanted in makers.items():
        cases = [done for done in findings.measurements if done.part == part]
        grids += [make(cases) for make in wanted if cases]
    timed = [done for done in findings.measurements if done.part in ("step", "generation", "evaluation")]
    return [*grids, whole_grid(timed)] if timed else grids


def goals_grid(judgements: Sequence[Judgement]) -> Grid:
    """A line for each goal."""
    return Grid(
        "Goals",
        "Measured: the worst of the cases that a goal speaks of, with its 95 % interval. "
        "(?): the interval reaches over the bound, more rounds would tell.",
        ("goal", "verdict", "measured", "cases met", "worst case"),
        tuple(_goal_row(judgement) for judgement in judgements),
    )


def _goal_row(judgement: Judgement) -> tuple[str, ...]:
    if judgement.worst is None:
        return judgement.goal.text, judgement.verdict, MISSING, MISSING, MISSING
    return (
        judgement.goal.text,
        judgement.verdict if judgement.certain else f"{judgement.verdict} (?)",
        ratio_text(judgement.worst.estimate),
        f"{judgement.num_met}/{judgement.num_cases}",
        _name(judgement.worst.measurement),
    )


def _name(done: Measurement) -> str:
    if "shape" in done.case:
        return ", ".join(_layer_labels(done))
    return f"model {done.case['model']}" if "model" in done.case else done.part


def _layer_labels(done: Measurement) -> tuple[str, str, str]:
    return str(done.case["shape"]), str(done.case["dtype"]), f"{done.case['batch']} x {done.case['tokens']}"


def _all_pools(cases: Sequence[Measurement]) -> list[int]:
    return sorted({pool for done in cases for pool in pools(done)})


def _estimates(done: Measurement) -> dict[tuple[str, int], Estimate]:
    return {(found.name, found.factors): found.estimate for found in compare(done)}


def ratios_grid(cases: list[Measurement]) -> Grid:
    """The layers' ratios with their intervals."""
    sizes = _all_pools(cases)
    rows = []
    for done in cases:
        found, factors = _estimates(done), int(done.case["factors"])
        rows.append(
            (
                *_layer_labels(done),
                *(ratio_text(found.get((comparisons.EXTRA, size))) for size in sizes),
                ratio_text(found.get((comparisons.TIME, factors))),
                ratio_text(found.get((comparisons.FLAT, pools(done)[-1])), 3),
                ratio_text(found.get((comparisons.FASTER, factors))),
            )
        )
    return Grid(
        "One layer, forward and backward: ratios",
        "Extra: time above the frozen linear layer alone, MixLoRA over LoRA of the same rank. Time: whole layer, "
        "MixLoRA over LoRA. Pools: whole layer, largest pool over smallest. Published: whole layer, published form "
        "over MixLoRA. [...]: 95 % interval. Not resolved: LoRA was not slower than the frozen layer alone.",
        (*LAYER_COLUMNS, *(f"extra E={size}" for size in sizes), "time", "pools", "published"),
        tuple(rows),
        len(LAYER_COLUMNS),
    )


def times_grid(cases: list[Measurement]) -> Grid:
    """The layers' times: the frozen layer whole, the others above it."""
    sizes = _all_pools(cases)
    names = [LORA, *map(mixlora, sizes), PUBLISHED]
    rows = []
    for done in cases:
        above = extras(done)
        rounds = spread(done.seconds[LINEAR])
        cells = (milliseconds(above[name].value) if name in above else MISSING for name in names)
        rows.append((*_layer_labels(done), str(rounds.rounds), milliseconds(rounds.median), *cells))
    return Grid(
        "One layer, forward and backward: milliseconds",
        "Medians over the rounds. linear: the frozen layer alone; the others: what they take more, in the same round.",
        (
            *LAYER_COLUMNS,
            "rounds",
            "linear",
            "+ LoRA",
            *(f"+ MixLoRA E={size}" for size in sizes),
            "+ published",
        ),
        tuple(rows),
        len(LAYER_COLUMNS),
    )


def operations_grid(cases: list[Measurement]) -> Grid:
    """What does not depend on the machine."""
    sizes = _all_pools(cases)
    rows = []
    for done in cases:
        found, kept = _estimates(done), done.counts
        ours = mixlora(int(done.case["factors"]))
        rows.append(
            (
                *_layer_labels(done),
                *(ratio_text(found.get((comparisons.FLOPS, size)), 4) for size in sizes),
                *(mebibytes(kept[name]["saved_bytes"]) for name in (LORA, ours)),
                ratio_text(found[comparisons.SAVED, int(done.case["factors"])], 3),
            )
        )
    return Grid(
        "One layer: operations and memory, counted",
        "Operations: matrix products, forward and backward, MixLoRA over LoRA. Kept: MiB that stay allocated for the "
        "backward pass, parameters left out.",
        (*LAYER_COLUMNS, *(f"operations E={size}" for size in sizes), "kept LoRA", "kept MixLoRA", "ratio"),
        tuple(rows),
        len(LAYER_COLUMNS),
    )


def memory_grid(cases: list[Measurement]) -> Grid:
    """Memory of a training step."""
    titles = {
        "peak_bytes": "peak",
        "resting_bytes": "  weights and optimizer state",
        "step_bytes": "  above them, during a step",
        "saved_bytes": "kept for the backward pass",
    }
    rows = []
    for done in cases:
        ours, lora = done.counts[comparisons.MIXLORA], done.counts[LORA]
        rows += [
            (title, mebibytes(lora[name]), mebibytes(ours[name]), f"{ours[name] / lora[name]:.3f}")
            for name, title in titles.items()
        ]
    return Grid(
        f"Memory of a training step, {_about(cases[0])}: MiB",
        "Every allocation of a step is counted; weights that do not move are in the peak.",
        ("", "LoRA", "MixLoRA", "ratio"),
        tuple(rows),
    )


def scoring_grid(cases: list[Measurement]) -> Grid:
    """Seconds to score stored predictions."""
    rows = []
    for done in cases:
        one = spread(done.seconds[SCORING])
        quartiles = f"[{milliseconds(one.lower_quartile)}, {milliseconds(one.upper_quartile)}]"
        rows.append(
            (f"{int(done.case['predictions']):,}", f"{milliseconds(one.median)} {quartiles}", str(one.rounds))
        )
    return Grid(
        "Scoring stored predictions: milliseconds",
        "Medians, [quartiles]. From the predictions file to results.json, intervals included; one process.",
        ("predictions", "ms", "rounds"),
        tuple(rows),
        1,
    )


def whole_grid(cases: list[Measurement]) -> Grid:
    """Times of the whole model."""
    rows = []
    for done in cases:
        for name, times in done.seconds.items():
            one = spread(times)
            quartiles = f"[{milliseconds(one.lower_quartile)}, {milliseconds(one.upper_quartile)}]"
            rows.append((done.part, name, f"{milliseconds(one.median)} {quartiles}", str(one.rounds)))
        rows += [
            (
                done.part,
                found.name,
                ratio_text(found.estimate, 3),
                str(len(next(iter(done.seconds.values())))),
            )
            for found in compare(done)
        ]
    return Grid(
        f"The whole model, {_about(cases[0])}: milliseconds and ratios",
        "Medians, [quartiles]; ratios of medians, [95 % interval]. step: from a batch to updated weights. generation: "
        f"one batch of prompts, untrained adapters, so that all answer the same.{_other_answers(cases)} "
        "evaluation: all instances once.",
        ("part", "what", "ms or ratio", "rounds"),
        tuple(rows),
        2,
    )


def _about(done: Measurement) -> str:
    return f"model {done.case['model']}, {done.case['precision']}, batch {done.case['batch_size']}"


def _other_answers(cases: Sequence[Measurement]) -> str:
    for done in cases:
        equal = [counts[SAME_ANSWERS] for counts in done.counts.values() if SAME_ANSWERS in counts]
        if equal and min(equal) < max(equal):
            return f" (Here rounding made {max(equal) - min(equal)} of {max(equal)} answers differ.)"
    return ""
