"""Which cases a configuration means."""

from dataclasses import replace
from typing import Any

import pytest

from mixlora_cli.analysis.bench.plan import PRODUCTS, make_plan, pools_of, tokens_for
from mixlora_cli.config import PARTS, BenchConfig, BenchSettings, DataConfig, ModelConfig, parse_shape

CONFIG = BenchConfig(
    model=ModelConfig(name="tiny", source="tiny"),
    data=DataConfig(name="mini", source="mini"),
    bench=BenchSettings(),
    output_dir="out",
)


def with_settings(**values: Any) -> BenchConfig:
    return replace(CONFIG, bench=replace(CONFIG.bench, **values))


def test_the_full_plan() -> None:
    plan = make_plan(CONFIG, "fp32")
    layers = [case for case in plan if case.part == "layer"]
    asked = {(case.text("shape"), case.text("dtype"), case.number("batch")) for case in layers}
    shapes = ("576", "1024", "4096", "4096x11008")
    assert asked == {(s, d, b) for s in shapes for d in ("fp32", "bf16") for b in (1, 8)}
    assert all(case.text("pools") == "16,32,64" and case.number("rounds") >= 20 for case in layers)
    assert len(plan) == 16 + 16 + 5 and len({case.key for case in plan}) == len(plan)
    assert tuple(dict.fromkeys(case.part for case in plan)) == PARTS


def test_parts_and_filters() -> None:
    plan = make_plan(
        with_settings(parts=["step", "layer"], shapes=["64"], dtypes=["bf16"], batches=[3]), "bf16"
    )
    assert [case.part for case in plan] == ["layer", "step"]
    assert plan[0].label == "layer 64 bf16 batch 3"
    assert plan[1].label == "step bf16 batch 8"


def test_quick_fills_only_what_is_null() -> None:
    quick = make_plan(with_settings(quick=True, rounds=7), "fp32")
    (layer, *_), (step,) = ([case for case in quick if case.part == part] for part in ("layer", "step"))
    assert (layer.number("rounds"), layer.number("warmup"), step.number("batch_size")) == (7, 1, 2)


def test_the_compared_pool_is_always_there() -> None:
    assert pools_of(replace(CONFIG, factors=8)) == [8, 16, 32, 64]
    assert pools_of(replace(CONFIG, factors=48, rank=20)) == [32, 48, 64]


@pytest.mark.parametrize(
    ("d_in", "d_out", "batch", "dtype", "tokens"),
    [
        (576, 576, 8, "fp32", 256),
        (1024, 1024, 8, "fp32", 256),
        (4096, 4096, 1, "fp32", 256),
        (4096, 4096, 8, "fp32", 64),
        (4096, 11008, 1, "fp32", 128),
        (1024, 1024, 8, "bf16", 64),
        (4096, 4096, 1, "bf16", 32),
    ],
)
def test_wide_layers_read_fewer_tokens(d_in: int, d_out: int, batch: int, dtype: str, tokens: int) -> None:
    assert tokens_for(d_in, d_out, batch, dtype) == tokens
    assert batch * tokens * d_in * d_out <= PRODUCTS[dtype]


def test_never_fewer_than_sixteen() -> None:
    assert tokens_for(4096, 11008, 8, "bf16") == 16
    assert tokens_for(20_000, 20_000, 64, "fp32") == 16


def test_shapes() -> None:
    assert parse_shape("576") == (576, 576)
    assert parse_shape("4096x11008") == (4096, 11008)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shapes": ["12y"]}, r"bench.shapes=12y: a width, or two joined by x"),
        ({"shapes": []}, r"bench.shapes=\[\]: give at least one, or null"),
        ({"batches": [0]}, "bench.batches=0: must be > 0"),
        ({"rounds": 0}, "bench.rounds=0: must be > 0 or null"),
        ({"min_seconds": -1}, "bench.min_seconds=-1: must be >= 0 or null"),
        ({"parts": []}, "choose of layer, operations"),
        ({"pools": [2]}, "rank=4: must be <= 2, the smallest pool"),
    ],
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(**values)
