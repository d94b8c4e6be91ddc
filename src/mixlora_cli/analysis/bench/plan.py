"""From the configuration to the list of cases: what is measured, on what, how often."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_cli.analysis.bench.clock import Rounds
from mixlora_cli.analysis.bench.measurement import Value, case_key
from mixlora_cli.config import BenchConfig, BenchSettings, Part, Precision, parse_shape

PRODUCTS = {"fp32": 2**33, "bf16": 2**29}
"""Multiplications of one pass over a frozen layer that its tokens are chosen to stay below: a good second on two cores,
of which many have no bf16 in hardware."""
FEWEST_TOKENS, MOST_TOKENS = 16, 256


@dataclass(frozen=True)
class Choice:
    """What the nulls of `BenchSettings` stand for."""

    shapes: tuple[str, ...]
    batches: tuple[int, ...]
    pools: tuple[int, ...]
    most_tokens: int
    rounds: int
    warmup: int
    min_seconds: float
    step_batch_size: int
    answer_batch_size: int
    max_new_tokens: int
    instances: int
    evaluation_rounds: int
    predictions: int


FULL = Choice(
    shapes=("576", "1024", "4096", "4096x11008"),
    batches=(1, 8),
    pools=(16, 32, 64),
    most_tokens=MOST_TOKENS,
    rounds=20,
    warmup=2,
    min_seconds=5.0,
    step_batch_size=8,
    answer_batch_size=8,
    max_new_tokens=16,
    instances=16,
    evaluation_rounds=5,
    predictions=100_000,
)
QUICK = Choice(
    shapes=("576", "1024"),
    batches=(8,),
    pools=(16, 64),
    most_tokens=32,
    rounds=5,
    warmup=1,
    min_seconds=0.5,
    step_batch_size=2,
    answer_batch_size=2,
    max_new_tokens=4,
    instances=4,
    evaluation_rounds=2,
    predictions=2_000,
)


@dataclass(frozen=True)
class Case:
    """One thing to measure: values that name it and say all that it depends on."""

    part: Part
    values: dict[str, Value]

    @property
    def key(self) -> str:
        """As `Measurement.key`."""
        return case_key(self.part, self.values)

    @property
    def label(self) -> str:
        """For the progress bar."""
        names = [str(self.values[name]) for name in ("shape", "dtype", "precision") if name in self.values]
        batch = self.values.get("batch", self.values.get("batch_size"))
        return " ".join([self.part, *names, *([] if batch is None else [f"batch {batch}"])])

    def number(self, name: str) -> int:
        """A value that is an integer."""
        return int(self.values[name])

    def text(self, name: str) -> str:
        """A value that is a text."""
        return str(self.values[name])

    @property
    def rounds(self) -> Rounds:
        """How often it runs; each case shuffles on its own."""
        values = self.values
        return Rounds(
            self.number("rounds"),
            self.number("warmup"),
            float(values.get("min_seconds", 0.0)),
            self.number("seed"),
        )


def make_plan(config: BenchConfig, precision: str) -> list[Case]:
    """All cases in the order of `Part`; `precision` is that of the whole model, "fp32" or "bf16"."""
    layers = _layer_cases(config)
    operations = [_operations(case) for case in layers]
    by_part = {
        "layer": layers,
        "operations": operations,
        **{case.part: [case] for case in _model_cases(config, precision)},
    }
    return [case for part in by_part for case in by_part[part] if part in config.bench.parts]


def pools_of(config: BenchConfig) -> list[int]:
    """Sizes of the pools, `factors` always among them, ascending."""
    settings = config.bench
    chosen = settings.pools or [pool for pool in _choice(settings).pools if pool >= config.rank]
    return sorted({config.factors, *chosen})


def tokens_for(d_in: int, d_out: int, batch: int, dtype: Precision, most: int = MOST_TOKENS) -> int:
    """Tokens of each instance: a power of two, `most` for narrow layers, fewer for wide ones (see `PRODUCTS`)."""
    affordable = PRODUCTS[dtype] // (d_in * d_out * batch)
    rounded = 1 << max(affordable.bit_length() - 1, 0)
    return max(FEWEST_TOKENS, min(most, rounded))


def _choice(settings: BenchSettings) -> Choice:
    return QUICK if settings.quick else FULL


def _rounds(config: BenchConfig) -> dict[str, Value]:
    settings, otherwise = config.bench, _choice(config.bench)
    return {
        "rounds": otherwise.rounds if settings.rounds is None else settings.rounds,
        "warmup": otherwise.warmup if settings.warmup is None else settings.warmup,
    }


def _layer_cases(config: BenchConfig) -> list[Case]:
    settings, otherwise = config.bench, _choice(config.bench)
    seconds = otherwise.min_seconds if settings.min_seconds is None else settings.min_seconds
    cases = []
    for shape in settings.shapes or otherwise.shapes:
        d_in, d_out = parse_shape(shape)
        for dtype in settings.dtypes:
            for batch in settings.batches or otherwise.batches:
                tokens = settings.tokens or tokens_for(d_in, d_out, batch, dtype, otherwise.most_tokens)
                values: dict[str, Value] = {
                    "shape": shape,
                    "d_in": d_in,
                    "d_out": d_out,
                    "dtype": dtype,
                    "batch": batch,
                    "tokens": tokens,
                    "rank": config.rank,
                    "factors": config.factors,
                    "pools": ",".join(map(str, pools_of(config))),
                    "seed": config.seed,
                    **_rounds(config),
                    "min_seconds": seconds,
                }
                cases.append(Case("layer", values))
    return cases


def _operations(layer: Case) -> Case:
    kept = {
        name: value for name, value in layer.values.items() if name not in ("rounds", "warmup", "min_seconds")
    }
    return Case("operations", kept)


def _model_cases(config: BenchConfig, precision: str) -> list[Case]:
    settings, otherwise = config.bench, _choice(config.bench)
    common: dict[str, Value] = {
        "model": config.model.name,
        "data": config.data.name,
        "precision": precision,
        "rank": config.rank,
        "factors": config.factors,
        "seed": config.seed,
    }
    step: dict[str, Value] = {"batch_size": settings.step_batch_size or otherwise.step_batch_size}
    answers: dict[str, Value] = {
        "batch_size": settings.answer_batch_size or otherwise.answer_batch_size,
        "max_new_tokens": settings.max_new_tokens or otherwise.max_new_tokens,
    }
    evaluation: dict[str, Value] = {
        "instances": settings.instances or otherwise.instances,
        "rounds": settings.evaluation_rounds or otherwise.evaluation_rounds,
        "warmup": 1,
    }
    fixed: dict[str, Value] = {"seed": config.seed, "rounds": evaluation["rounds"], "warmup": 1}
    return [
        Case("memory", {**common, **step}),
        Case("step", {**common, **step, **_rounds(config)}),
        Case("generation", {**common, **answers, **_rounds(config)}),
        Case("evaluation", {**common, **answers, **evaluation}),
        Case("scoring", {"predictions": settings.predictions or otherwise.predictions, **fixed}),
    ]
