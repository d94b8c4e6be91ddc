"""What a finished benchmark hands over: tables, a plot, performance.md, and results.json.

    {"format", "machine": {processor, cores, torch_threads, bf16_in_hardware, versions, ...},
     "cases": [{"part", "case": {...},
                "seconds": {variant: {"median", "lower_quartile", "upper_quartile", "rounds"}},
                "extra_seconds": {variant: {"value", "low", "high"}},       layers: above the frozen linear alone
                "counts": {variant: {name: integer}},
                "ratios": [{"name", "factors", "value", "low", "high"}]}],
     "goals": [{"goal", "verdict", "certain", "value", "low", "high", "case", "num_met", "num_cases"}]}

Seconds of every single round are in `measurements.jsonl`. `low` and `high` are the ends of a 95 % interval; null is a
number that the rounds do not tell (LoRA was not slower than the frozen layer alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.analysis.bench.counters import Measurement
from mixlora_cli.analysis.bench.goals import (
    EXTRA,
    FASTER,
    FLAT,
    FLOPS,
    GOALS,
    MIXLORA,
    SAVED,
    TIME,
    Comparison,
    Findings,
    as_asked,
    extras,
    over,
)
from mixlora_cli.analysis.bench.layers import LINEAR, LORA, PUBLISHED, mixlora
from mixlora_cli.analysis.bench.peers import LEFT_OUT, PEERS, PEFT_LOOP
from mixlora_cli.analysis.bench.whole import SAME_ANSWERS, SCORING
from mixlora_cli.config import Part
from mixlora_cli.plots import HUES, figure
from mixlora_cli.stats import ABSENT, Estimate
from mixlora_cli.store import write_json, write_text
from mixlora_cli.tables import Table, markdown

FORMAT = "mixlora-bench/1"
RESULTS, MARKDOWN, PLOT = "results.json", "performance.md", "ratio"


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """Write results.json, performance.md and the plot, complete or not at all; returns their paths."""
    write_json(folder / RESULTS, as_dict(findings))
    plots = draw_ratios(findings.comparisons, folder)
    write_text(folder / MARKDOWN, as_markdown(findings, has_plot=bool(plots)))
    return [folder / RESULTS, folder / MARKDOWN, *plots]


def as_dict(findings: Findings) -> dict[str, Any]:
    """The content of results.json."""
    return {
        "format": FORMAT,
        "machine": dict(findings.machine),
        "cases": [
            {
                "part": done.part,
                "case": dict(done.case),
                "seconds": {name: _spread(times) for name, times in done.seconds.items()},
                "extra_seconds": {name: asdict(estimate) for name, estimate in extras(done).items()},
                "counts": {name: dict(counts) for name, counts in done.counts.items()},
                "ratios": [
                    {"name": name, "factors": factors, **asdict(estimate)}
                    for (name, factors), estimate in findings.estimates(done).items()
                ],
            }
            for done in findings.measurements
        ],
        "goals": [
            {
                "goal": one.goal.text,
                "verdict": one.verdict,
                "certain": one.certain,
                **asdict(Estimate(None) if one.worst is None else one.worst.estimate),
                "case": None if one.worst is None else dict(one.worst.measurement.case),
                "num_met": one.num_met,
                "num_cases": one.num_cases,
            }
            for one in findings.judgements
        ],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of one variant over the counted rounds."""
    low, middle, high = (float(value) for value in np.percentile(np.asarray(seconds), (25, 50, 75)))
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "rounds": len(seconds)}


def as_markdown(findings: Findings, has_plot: bool) -> str:
    """Machine, command, goals, tables and the plot: ready to be put into a document."""
    about = findings.machine
    bf16 = "with" if about["bf16_in_hardware"] else "without"
    where = "" if about["device"] == "cpu" else f", on {about['device']}"
    packages = about["versions"]["packages"]
    command = " ".join(["mixlora bench", *about["versions"]["command"][1:]])
    goals, *others = all_tables(findings)
    parts = [
        f"Measured on {about['processor']} ({about['cores']} cores, {about['memory_gib']} GiB, "
        f"{about['instructions']}, {bf16} bf16 in hardware){where}, {about['torch_threads']} threads; "
        f"torch {packages['torch']}, PEFT {packages['peft']}, transformers {packages['transformers']}.\n",
        f"To measure again:\n\n```bash\n{command}\n```\n",
        markdown(goals, level=3),
    ]
    if has_plot:
        parts.append(f"![Extra time of MixLoRA over that of LoRA, by width]({PLOT}.svg)\n")
    return "\n".join([*parts, markdown(others, level=3)] if others else parts)


# -- tables -----------------------------------------------------------------------------------------------------------


def all_tables(findings: Findings) -> list[Table]:
    """Goals first, then each part that was measured."""
    makers: dict[Part, Sequence[Callable[[Findings, list[Measurement]], Table]]] = {
        "layer": (_layer_ratios, _layer_times),
        "operations": (_layer_operations,),
        "memory": (_memory,),
        "peers": (_peers,),
        "scoring": (_scoring,),
    }
    tables = [_goals(findings)]
    for part, wanted in makers.items():
        cases = [done for done in findings.measurements if done.part == part]
        tables += [make(findings, cases) for make in wanted if cases]
    timed = [done for done in findings.measurements if done.part in ("step", "generation", "evaluation")]
    return [*tables, _whole_model(findings, timed)] if timed else tables


def _goals(findings: Findings) -> Table:
    rows: list[tuple[str, ...]] = []
    for one in findings.judgements:
        if one.worst is None:
            rows.append((one.goal.text, one.verdict, ABSENT, ABSENT, ABSENT))
            continue
        done = one.worst.measurement
        where = f"model {done.case['model']}" if "model" in done.case else done.part
        where = ", ".join(_layer_labels(done)) if "shape" in done.case else where
        verdict = one.verdict if one.certain else f"{one.verdict} (?)"
        met = f"{one.num_met}/{one.num_cases}"
        rows.append((one.goal.text, verdict, _ratio_text(one.worst.estimate), met, where))
    return Table(
        "Goals",
        ("goal", "verdict", "measured", "cases met", "worst case"),
        tuple(rows),
        notes=(
            "Measured: the worst of the cases that a goal speaks of, with its 95 % interval. "
            "(?): the interval reaches over the bound, more rounds would tell.",
        ),
    )


def _layer_table(
    title: str, note: str, cases: list[Measurement], cells: Callable[[Measurement, list[int]], dict[str, str]]
) -> Table:
    """A row for each layer; `cells` gives its numbers by heading, told the E of all cases."""
    pools = sorted({pool for done in cases for pool in done.pools})
    found = [cells(done, pools) for done in cases]
    rows = [(*_layer_labels(done), *row.values()) for done, row in zip(cases, found, strict=True)]
    return Table(title, ("layer", "format", "batch x tokens", *found[0]), tuple(rows), 3, (note,))


def _layer_labels(done: Measurement) -> tuple[str, str, str]:
    return str(done.case["shape"]), str(done.case["dtype"]), f"{done.case['batch']} x {done.case['tokens']}"


def _layer_ratios(findings: Findings, cases: list[Measurement]) -> Table:
    def cells(done: Measurement, pools: list[int]) -> dict[str, str]:
        found, factors = findings.estimates(done), done.number("factors")
        return {
            **{f"extra E={pool}": _ratio_text(found.get((EXTRA, pool))) for pool in pools},
            "time": _ratio_text(found.get((TIME, factors))),
            "pools": _ratio_text(found.get((FLAT, done.pools[-1])), 3),
            "published": _ratio_text(found.get((FASTER, factors))),
        }

    return _layer_table(
        "One layer, forward and backward: ratios",
        "Extra: time above the frozen linear layer alone, MixLoRA over LoRA of the same rank. Time: whole layer, "
        "MixLoRA over LoRA. Pools: whole layer, largest pool over smallest. Published: whole layer, published form "
        "over MixLoRA. [...]: 95 % interval. Not resolved: LoRA was not slower than the frozen layer alone.",
        cases,
        cells,
    )


def _layer_times(findings: Findings, cases: list[Measurement]) -> Table:
    def cells(done: Measurement, pools: list[int]) -> dict[str, str]:
        above, linear = extras(done), _spread(done.seconds[LINEAR])
        headings = {
            LORA: "+ LoRA",
            **{mixlora(pool): f"+ MixLoRA E={pool}" for pool in pools},
            PUBLISHED: "+ published",
        }
        return {
            "rounds": str(linear["rounds"]),
            "linear": _milliseconds(linear["median"]),
            **{
                heading: _milliseconds(above[name].value) if name in above else ABSENT
                for name, heading in headings.items()
            },
        }

    return _layer_table(
        "One layer, forward and backward: milliseconds",
        "Medians over the rounds. linear: the frozen layer alone; the others: what they take more, in the same round.",
        cases,
        cells,
    )


def _layer_operations(findings: Findings, cases: list[Measurement]) -> Table:
    def cells(done: Measurement, pools: list[int]) -> dict[str, str]:
        found, factors = findings.estimates(done), done.number("factors")
        return {
            **{f"operations E={pool}": _ratio_text(found.get((FLOPS, pool)), 4) for pool in pools},
            "kept LoRA": _mebibytes(done.counts[LORA]["saved_bytes"]),
            "kept MixLoRA": _mebibytes(done.counts[mixlora(factors)]["saved_bytes"]),
            "ratio": _ratio_text(found[SAVED, factors], 3),
        }

    return _layer_table(
        "One layer: operations and memory, counted",
        "Operations: matrix products, forward and backward, MixLoRA over LoRA. Kept: MiB that stay allocated for the "
        "backward pass, parameters left out.",
        cases,
        cells,
    )


def _memory(findings: Findings, cases: list[Measurement]) -> Table:
    titles = {
        "peak_bytes": "peak",
        "resting_bytes": "  weights and optimizer state",
        "step_bytes": "  above them, during a step",
        "saved_bytes": "kept for the backward pass",
    }
    pairs = [(done.counts[MIXLORA], done.counts[LORA]) for done in cases]
    return Table(
        f"Memory of a training step, {_about(cases[0])}: MiB",
        ("", "LoRA", "MixLoRA", "ratio"),
        tuple(
            (title, _mebibytes(lora[name]), _mebibytes(ours[name]), f"{ours[name] / lora[name]:.3f}")
            for ours, lora in pairs
            for name, title in titles.items()
        ),
        notes=("Every allocation of a step is counted; weights that do not move are in the peak.",),
    )


def _peers(findings: Findings, cases: list[Measurement]) -> Table:
    rows: list[tuple[str, ...]] = []
    for done in cases:
        found = {name: estimate for (name, _), estimate in findings.estimates(done).items()}
        rows += [
            (
                name,
                PEERS[name],
                _ratio_text(found[over("time", name, PEFT_LOOP)], 3),
                _median_text(times)[0],
                _mebibytes(done.counts[name]["peak_bytes"]),
                _ratio_text(found[over("peak memory", name, PEFT_LOOP)], 3),
            )
            for name, times in done.seconds.items()
        ]
    return Table(
        f"Whole training steps beside others', {_about(cases[0])}",
        ("step", "what it is", "ratio", "ms", "peak MiB", "ratio of peaks"),
        tuple(rows),
        2,
        (
            f"Ratios: of medians, [95 % interval], to {PEFT_LOOP}. ms: medians, [quartiles]. All take the same ready "
            "batches, where features of the frozen picture tower stand for pictures if they can be kept.",
            *(
                f"Left out: {name}, because {LEFT_OUT[name]}."
                for name in PEERS
                if name not in cases[0].seconds
            ),
        ),
    )


def _scoring(findings: Findings, cases: list[Measurement]) -> Table:
    return Table(
        "Scoring stored predictions: milliseconds",
        ("predictions", "ms", "rounds"),
        tuple((f"{done.number('predictions'):,}", *_median_text(done.seconds[SCORING])) for done in cases),
        notes=(
            "Medians, [quartiles]. From the predictions file to results.json, intervals included; one process.",
        ),
    )


def _whole_model(findings: Findings, cases: list[Measurement]) -> Table:
    rows: list[tuple[str, ...]] = []
    for done in cases:
        rows += [(done.part, name, *_median_text(times)) for name, times in done.seconds.items()]
        rounds = str(len(next(iter(done.seconds.values()))))
        rows += [
            (done.part, name, _ratio_text(estimate, 3), rounds)
            for (name, _), estimate in findings.estimates(done).items()
        ]
    return Table(
        f"The whole model, {_about(cases[0])}: milliseconds and ratios",
        ("part", "what", "ms or ratio", "rounds"),
        tuple(rows),
        2,
        (
            "Medians, [quartiles]; ratios of medians, [95 % interval]. step: from a batch to updated weights. "
            "generation: one batch of prompts, untrained adapters, so that all answer the same."
            f"{_other_answers(cases)} evaluation: all instances once; plain_loop: LoRA, in batches as they come, with "
            "pictures and not their kept features.",
        ),
    )


def _about(done: Measurement) -> str:
    case, other = done.case, done.case.get("mixlora")
    about = f"model {case['model']}, {case['precision']}, batch {case['batch_size']}"
    return f"{about}, MixLoRA with {other}" if other else about


def _other_answers(cases: Sequence[Measurement]) -> str:
    for done in cases:
        equal = [counts[SAME_ANSWERS] for counts in done.counts.values() if SAME_ANSWERS in counts]
        if equal and min(equal) < max(equal):
            return f" (Here rounding made {max(equal) - min(equal)} of {max(equal)} answers differ.)"
    return ""


def _ratio_text(estimate: Estimate | None, digits: int = 2) -> str:
    """`0.53 [0.41, 0.66]`; a count's ratio, which does not vary, has no interval."""
    if estimate is None:
        return ABSENT
    return "not resolved" if estimate.value is None else estimate.text(digits)


def _median_text(seconds: Sequence[float]) -> tuple[str, str]:
    """Median and quartiles in milliseconds, and the number of rounds."""
    one = _spread(seconds)
    quartiles = f"[{_milliseconds(one['lower_quartile'])}, {_milliseconds(one['upper_quartile'])}]"
    return f"{_milliseconds(one['median'])} {quartiles}", str(one["rounds"])


def _milliseconds(seconds: float | None) -> str:
    return ABSENT if seconds is None else _three_digits(1e3 * seconds)


def _mebibytes(count: int) -> str:
    return _three_digits(count / 2**20)


def _three_digits(value: float) -> str:
    """Three significant digits, or whole ones from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


# -- plot -------------------------------------------------------------------------------------------------------------


def draw_ratios(found: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write `ratio.png` and `ratio.svg`: the layers' extra time by width, a panel for each number format.

    Nothing where no layer was measured.
    """
    shown = [one for one in found if one.name == EXTRA and as_asked(one)]
    dtypes = [dtype for dtype in ("fp32", "bf16") if any(_dtype(one) == dtype for one in shown)]
    if not dtypes:
        return []
    paths = [folder / f"{PLOT}.png", folder / f"{PLOT}.svg"]
    size = (4.6 * len(dtypes), 4.2)
    with figure(paths, 1, len(dtypes), font_size=10, dpi=160, figsize=size, sharey=True) as (_, panels):
        for axes, dtype in zip(panels[0], dtypes, strict=True):
            _panel(axes, dtype, [one for one in shown if _dtype(one) == dtype])
        panels[0][0].set_ylabel("extra time, MixLoRA / LoRA\n(above the frozen layer alone)")
    return paths


def _dtype(one: Comparison) -> str:
    return str(one.measurement.case["dtype"])


def _panel(axes: Any, dtype: str, found: Sequence[Comparison]) -> None:
    shapes = list(dict.fromkeys(str(one.measurement.case["shape"]) for one in found))
    batches = sorted({one.measurement.number("batch") for one in found})
    for number, batch in enumerate(batches):
        points = [
            (shapes.index(str(one.measurement.case["shape"])), one.estimate.value, one.estimate)
            for one in found
            if one.measurement.case["batch"] == batch and one.estimate.value is not None
        ]
        if not points:
            continue
        shift = 0.08 * (number - (len(batches) - 1) / 2)
        # An end that is not known is left out.
        below = [0.0 if one.low is None else value - one.low for _, value, one in points]
        over = [0.0 if one.high is None else one.high - value for _, value, one in points]
        axes.errorbar(
            [place + shift for place, _, _ in points],
            [value for _, value, _ in points],
            yerr=[below, over],
            marker="o",
            capsize=3,
            color=HUES[number % 4],
            label=f"batch {batch}",
        )
    for goal in GOALS:
        if (goal.comparison, goal.dtype) == (EXTRA, dtype):
            axes.axhline(goal.limit, linestyle="--", color="0.3", label=f"goal: at most {goal.limit}")
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.set_title(f"{dtype}, E={found[0].factors}, r={found[0].measurement.case['rank']}")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_xlabel("width of the layer")
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)
