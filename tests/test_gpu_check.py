"""The program that measures on a GPU, tried on the CPU with everything very small."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_cli.analysis import plan
from mixlora_cli.analysis.bench.counters import Rounds

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program, with two rounds of everything."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_cases
    import gpu_check

    monkeypatch.setattr(gpu_cases, "Rounds", lambda *_, **__: Rounds(2))
    before = signal.getsignal(signal.SIGALRM)
    yield gpu_check
    signal.signal(signal.SIGALRM, before)


def run(check: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, Any]:
    """Exit code and what the file then says of the parts."""
    line = ["gpu_check.py", "--device", "cpu", "--tiny", "--seconds", "300", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", line)
    return check.main(), json.loads(out.read_text())["parts"]


@pytest.mark.slow
def test_layers_and_steps(check, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "results.json"
    code, parts = run(check, monkeypatch, out, "--parts", "layers", "step")
    assert code == 0
    assert [parts[part]["ended"] for part in parts] == ["done", "done"]
    variants = ["linear", "lora", "mixlora_e16", "published", "dense"]
    layers, steps = parts["layers"]["cases"], parts["step"]["cases"]
    assert {name: list(rows) for name, rows in layers.items()} == {
        "64x96 8 x 12": variants,
        "64x96 1 x 12": variants,
    }
    assert list(steps) == ["checkpointing", "no checkpointing", "generation"]
    for rows in (*layers.values(), *steps.values()):
        assert rows["lora"]["to LoRA"]["value"] == 1
        assert all(row["rounds"] == 2 and row["ms"]["value"] > 0 for row in rows.values())
    for name in ("lora", "mixlora_e16", "published"):
        # Of 148 tokens; checkpointing keeps less of them.
        row = steps["no checkpointing"][name]
        assert row["tokens/s"] * row["ms"]["value"] == pytest.approx(8 * 148 * 1000, rel=1e-6)
        assert steps["checkpointing"][name]["peak GiB"] < row["peak GiB"]
    assert "step: done" in capsys.readouterr().out
    cases = sys.modules["gpu_cases"]
    assert (cases.TRAINING, cases.PADDING) == (plan.PUBLISHED_INSTANCES, plan.PADDING_RANDOM)
    # What is there stays; what failed is tried again.
    kept = json.loads(out.read_text())
    kept["parts"]["layers"]["cases"]["64x96 1 x 12"] = {"error": {"note": "lost"}}
    out.write_text(json.dumps(kept))
    code, again = run(check, monkeypatch, out, "--parts", "layers", "step")
    assert (code, again["step"]["cases"]) == (0, steps)
    assert again["layers"]["cases"]["64x96 8 x 12"] == layers["64x96 8 x 12"]
    assert list(again["layers"]["cases"]["64x96 1 x 12"]) == variants


def test_the_forms_of_a_layer_compute_the_same(check) -> None:
    import gpu_cases

    bench = gpu_cases.layers.build_bench(
        gpu_cases.layers.LayerCase(8, 6, "fp32", 3, 5, 4), 16, [], torch.device("cpu")
    )
    published = bench.models["published"]
    dense = gpu_cases.Dense(bench.models["linear"].proj, 4, 16, published.scaling)
    dense.load_state_dict(published.state_dict())
    bench.models["dense"] = dense
    outputs = [bench.forward(name) for name in ("dense", "published", "linear")]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_a_part_ends_when_its_time_is_over(check, tmp_path) -> None:
    """What was measured stays, and a command is asked to stop, so that it can save."""
    signal.signal(signal.SIGALRM, check.time_is_over)
    kept: dict[str, Any] = {}
    cases = {"quick": lambda _: {"row": {}}, "slow": lambda _: time.sleep(60)}
    assert check.measure(cases, kept, 0.3, lambda: None) == "out of time before slow was done"
    assert kept == {"quick": {"row": {}}}
    start = time.monotonic()
    rows = check.command(
        ["http.server", "0", "--bind", "127.0.0.1"], tmp_path / "log", torch.device("cpu"), start + 8
    )
    assert rows["http.server"]["note"].startswith("stopped, its time was over: ")
    assert not check.went_well(rows)
    assert time.monotonic() - start < 30
    rows = check.command(
        ["pytest", "--version"], tmp_path / "log", torch.device("cpu"), time.monotonic() + 60
    )
    assert rows["pytest"]["note"].startswith("exit code 0: pytest ")
    assert check.went_well(rows)
