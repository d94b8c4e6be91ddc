"""Which cases a configuration means, and the command end to end on narrow layers and `model=tiny`."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mixlora_cli
from mixlora_cli.analysis.bench import run, whole
from mixlora_cli.analysis.bench.counters import interleave
from mixlora_cli.analysis.bench.peers import trl_version
from mixlora_cli.analysis.bench.run import PRODUCTS, bench, make_plan, pools_of, tokens_for
from mixlora_cli.analysis.bench.whole import WholeModel, measure
from mixlora_cli.config import (
    PARTS,
    AdapterConfig,
    BenchConfig,
    BenchSettings,
    DataConfig,
    ModelConfig,
    RoutingConfig,
)
from mixlora_cli.errors import UserError
from mixlora_cli.method.layer import MixLoraLayer

CONFIG = BenchConfig(
    model=ModelConfig(name="tiny", source="tiny"),
    data=DataConfig(name="mini", source="mini"),
    bench=BenchSettings(),
    output_dir="out",
)


def test_other_ways_to_select_are_cases_of_their_own() -> None:
    """Those of the paper's keep their names, so that what was measured stays."""
    usual = make_plan(CONFIG, "fp32")
    plus = replace(
        CONFIG,
        adapter=AdapterConfig("mixlora", pairing="tied"),
        routing=RoutingConfig("instance", pool="text", normalize=True),
    )
    changed = {case.part: case.case.get("mixlora") for case in make_plan(plus, "fp32")}
    about = "pairing=tied pool=text normalize=True"
    assert changed == {
        "layer": None,
        "operations": None,
        "memory": about,
        "step": about,
        "peers": about,
        "generation": about,
        "evaluation": about,
        "scoring": None,
    }
    assert not any("mixlora" in case.case for case in usual)


def with_settings(**values: Any) -> BenchConfig:
    return replace(CONFIG, bench=replace(CONFIG.bench, **values))


def test_the_full_plan() -> None:
    plan = make_plan(CONFIG, "fp32")
    layers = [case for case in plan if case.part == "layer"]
    asked = {(case.case["shape"], case.case["dtype"], case.case["batch"]) for case in layers}
    shapes = ("576", "1024", "4096", "4096x11008")
    assert asked == {(s, d, b) for s in shapes for d in ("fp32", "bf16") for b in (1, 8)}
    sizes = {(case.number("d_in"), case.number("d_out")) for case in layers}
    assert sizes == {(576, 576), (1024, 1024), (4096, 4096), (4096, 11008)}
    assert all(case.case["pools"] == "16,32,64" and case.number("rounds") >= 20 for case in layers)
    assert len(plan) == 16 + 16 + 6 and len({case.key for case in plan}) == len(plan)
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
        (4096, 11008, 8, "bf16", 16),  # never fewer
        (20_000, 20_000, 64, "fp32", 16),
    ],
)
def test_wide_layers_read_fewer_tokens(d_in: int, d_out: int, batch: int, dtype: str, tokens: int) -> None:
    assert tokens_for(d_in, d_out, batch, dtype) == tokens
    assert tokens == 16 or batch * tokens * d_in * d_out <= PRODUCTS[dtype]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts of the cases that are really measured."""
    parts: list[str] = []

    def counting(case: Any, model: WholeModel) -> Any:
        parts.append(case.part)
        return measure(case, model)

    monkeypatch.setattr(run, "measure", counting)
    return parts


@pytest.mark.slow
def test_everything_is_measured_and_written(
    make_config: Any, counted: list[str], tmp_path: Path, capsys: Any
) -> None:
    findings = bench(make_config())
    assert counted == sorted([*PARTS, "layer", "operations"], key=PARTS.index)
    folder = tmp_path / "bench"
    results = json.loads((folder / "results.json").read_text())
    assert results["format"] == "mixlora-bench/1"
    assert tuple(dict.fromkeys(case["part"] for case in results["cases"])) == PARTS
    verdicts = {goal["goal"]: goal["verdict"] for goal in results["goals"]}
    assert [v == "not measured" for v in verdicts.values()] == (
        [True] * 5 + [False] * 4 + [not trl_version()] + [False] * 5 + [True]
    )
    layer = results["cases"][0]
    assert layer["seconds"]["lora"]["rounds"] == 3 and layer["seconds"]["lora"]["median"] > 0
    assert set(layer["extra_seconds"]) == {"lora", "mixlora_e4", "mixlora_e8", "published"}
    generation = next(case for case in results["cases"] if case["part"] == "generation")
    assert {tuple(c.items()) for c in generation["counts"].values()} == {(("same_answers", 2),)}
    assert {"ratio.png", "ratio.svg"} <= {path.name for path in folder.iterdir()}
    markdown = (folder / "performance.md").read_text()
    assert markdown.count("\n### ") == 8 and "](ratio.svg)" in markdown and "mixlora" in markdown
    assert "whole training step <= 1.05x of LoRA's" in capsys.readouterr().out
    assert len(findings.measurements) == 10


def test_the_same_command_measures_nothing_twice(
    make_config: Any, counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "bench" / run.FILE_NAME
    bench(make_config(parts=["operations"], shapes=["32"]))
    bench(make_config(parts=["operations"]))
    assert len(counted) == 2
    content = file.read_bytes()
    file.write_bytes(content[:-20])  # killed while it wrote the second case
    bench(make_config(parts=["operations"]))
    assert len(counted) == 3 and file.read_bytes() == content
    bench(make_config(parts=["operations"], overwrite=True))
    assert len(counted) == 5 and file.with_suffix(".1.jsonl").read_bytes() == content
    monkeypatch.setattr(run, "code_digest", lambda: "other")
    bench(make_config(parts=["operations"]))
    assert len(counted) == 7 and file.with_suffix(".2.jsonl").is_file()
    assert "(code changed): kept as measurements.2.jsonl, measuring anew" in capsys.readouterr().err
    file.write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match="give another output_dir, or overwrite=true"):
        bench(make_config(parts=["operations"]))


def test_measurements_depend_on_the_code_that_they_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest covers what measures, and the folders that it imports from, but not what reports."""
    read: list[str] = []
    digest_of = run.digest_of

    def seen(parts: dict[str, str]) -> str:
        read.extend(parts)
        return digest_of(parts)

    monkeypatch.setattr(run, "digest_of", seen)
    assert run.code_digest() == run.code_digest()
    package = Path(mixlora_cli.__file__).parent
    timed = (whole.build_trainer, whole.Generator, whole.score, MixLoraLayer, interleave, run.measure)
    assert {Path(inspect.getfile(each)).relative_to(package).as_posix() for each in timed} <= set(read)
    assert not any(name in read for name in ("analysis/bench/report.py", "analysis/plan.py", "cli.py"))


def test_an_interrupted_benchmark_continues(
    make_config: Any, counted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_at_second = run.measure

    def interrupted(case: Any, model: WholeModel) -> Any:
        if len(counted) == 1:
            raise KeyboardInterrupt
        return stop_at_second(case, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "measure", interrupted)
        bench(make_config(parts=["operations"]))
    assert "stopped at 1/2 cases: the same command continues" in capsys.readouterr().err
    bench(make_config(parts=["operations"]))
    assert len(counted) == 2


def test_a_matrix_for_each_instance_needs_room(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "free_bytes", lambda device: 4 * 2 * 32 * 40 * 4)
    findings = bench(make_config(parts=["operations"]))
    assert ["published" in done.counts for done in findings.measurements] == [True, False]


def test_threads_are_put_back(make_config: Any) -> None:
    findings = bench(make_config(parts=["operations"], shapes=["32"], threads=2))
    assert findings.machine["torch_threads"] == 2
    assert torch.get_num_threads() == 1
