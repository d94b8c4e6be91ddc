"""The whole command on the tiny model: files, figures, comparison, what is computed again and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mixlora_cli.analysis.interference import run
from mixlora_cli.analysis.interference.files import read_stored
from mixlora_cli.analysis.interference.gradients import GradientTaker
from mixlora_cli.analysis.interference.run import interference
from mixlora_cli.analysis.interference.scores import score
from mixlora_cli.commands import COMMANDS
from mixlora_cli.config import DataConfig, ModelConfig
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import run_command
from mixlora_cli.models import forward
from tiny_data import as_arguments
from tiny_runs import NUM_FACTORS, RANK

from .conftest import TASKS, MakeConfig, MakeRun

FIGURES = [f"{name}.{kind}" for name in ("average", "layers") for kind in ("png", "svg")]


def result(folder: Path) -> Any:
    return json.loads((folder / "interference.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "timing.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and most tests are not about them."""
    monkeypatch.setattr(run, "draw_all", lambda *_: [])


def test_lora_and_mixlora_through_the_command_line(
    make_run: MakeRun, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora, mixlora = make_run("lora"), make_run("mixlora")
    tasks = ",".join(f"'{task}'" for task in TASKS)
    common = [
        *as_arguments(data),
        f"tasks=[{tasks}]",
        "interference.batches=3",
        "interference.batch_size=2",
        "interference.cache_features=false",
        "launch.nproc=1",
    ]
    command = COMMANDS["interference"]
    assert run_command(command, [f"run={lora.root}", *common]) == 0
    compared = [f"run={mixlora.root}", f"compare={lora.root}", "measure.lambdas=[0.01]", *common]
    assert run_command(command, compared) == 0
    folder = mixlora.root / "interference"
    assert {*FIGURES, *(f"compare_{name}" for name in FIGURES)} <= {path.name for path in folder.iterdir()}
    found = result(folder)
    assert found["tasks"] == list(TASKS) and set(found["batches"].values()) == {3}
    assert set(found["blocks"]) == {"attention", "mlp"} and len(found["layers"]) == 2 * 2 * 2
    assert found["compare"]["with"] == f"LoRA r={RANK}" and found["about"]["pictures"] == "pixels"
    for row in found["measured"]:
        assert row["steps"] == 9 and row["relative_error_same_factors"] < 0.1
    before = result(lora.root / "interference")["negative"]
    rows = [(m, v, row) for m, by in found["compare"]["scores"].items() for v, row in by.items()]
    for matrix, variant, row in rows:
        assert row["before"] == before[matrix][variant]["value"]
        assert row["after"] == found["negative"][matrix][variant]["value"]
        if row["before"] > 0:
            assert row["removed"] == pytest.approx(1 - row["after"] / row["before"])
    assert len(rows) == 8 and any(row["before"] > 0 for *_, row in rows)
    # 7 linear layers in each of 2 transformer layers, A and B; 3 tasks of 3 batches, each against 3 tasks
    assert pq.read_metadata(folder / "interference.parquet").num_rows == 28 * 3 * 3 * 3
    assert pq.read_metadata(folder / "layers.parquet").num_rows == 28 * 9
    for value in (found["average"][m]["mean"]["value"] for m in "AB"):
        assert [value[k][k] for k in range(3)] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.usefixtures("no_figures")
def test_a_family_with_positions_in_three_dimensions(
    family: ModelConfig, make_run: MakeRun, make_config: MakeConfig
) -> None:
    """Records with and without a picture in one batch; layers are the decoder's, and a real step is as estimated."""
    run = make_run(model=family)
    folder = interference(make_config(run.root, lambdas=[0.01], cache_features=True))
    found = result(folder)
    assert found["about"]["pictures"] == "pixels"  # of no fixed size: there are no features to keep
    assert set(found["blocks"]) == {"attention", "mlp"} and len(found["layers"]) == 2 * 2 * 2
    assert all(row["relative_error_same_factors"] < 0.1 for row in found["measured"])
    layers = pq.read_table(folder / "layers.parquet").to_pydict()["layer"]
    assert {name.partition(".layers.")[0] for name in layers} == {"model.language_model"}


@pytest.mark.usefixtures("no_figures")
def test_gradients_are_those_of_training_over_all_factors(make_run: MakeRun, make_config: MakeConfig) -> None:
    """Against `AdapterTrainer.compute_loss` and plain `backward`."""
    from transformers import TrainingArguments

    from mixlora_cli.training.trainer import AdapterTrainer

    seen: dict[str, Any] = {}
    original = GradientTaker.gradient

    def keep(self: GradientTaker, task: str, number: int, items: Any) -> Any:
        found = original(self, task, number, items)
        if not seen:
            seen.update(taker=self, items=items, found=found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientTaker, "gradient", keep)
        done = make_run()
        interference(make_config(done.root))
    taker = seen["taker"]
    trainer = AdapterTrainer(
        model=taker.session.model, args=TrainingArguments(str(done.root / "x"), use_cpu=True, report_to=[])
    )
    trainer.compute_loss(taker.session.model, dict(taker.session.collator(seen["items"]))).backward()
    assert len(seen["found"]) == 28
    for (group, parameter), gradient in zip(taker.factors.items(), seen["found"], strict=True):
        assert parameter.shape[0] == NUM_FACTORS, group
        assert torch.allclose(parameter.grad.flatten(), gradient, atol=1e-7), group
    pool = seen["found"][0].view(NUM_FACTORS, -1)
    used = {int(f) for s in taker.session.tuner.selections().values() for f in s.index_a.flatten()}
    assert len(used) > RANK and pool.abs().sum() > 0


@pytest.mark.usefixtures("no_figures")
def test_interrupted_anywhere_it_goes_on_to_the_same_files(
    make_run: MakeRun, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = make_run(routing="random")  # the hardest: what is drawn must not depend on what ran before
    config = make_config(done.root, output_dir=str(done.root / "whole"), lambdas=[0.1])
    interference(config)
    expected, calls = contents(done.root / "whole"), 0
    original = GradientTaker.gradient
    for stop_at in (5, 5, 7):  # in the second task's first pass, in the third's, in a second pass
        calls = 0

        def stopping(self: GradientTaker, *args: Any, limit: int = stop_at) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(GradientTaker, "gradient", stopping)
            with pytest.raises(KeyboardInterrupt):
                interference(replace(config, output_dir=str(done.root / "parts")))
    interference(replace(config, output_dir=str(done.root / "parts")))
    assert contents(done.root / "parts") == expected


def test_drawing_needs_no_model(
    make_run: MakeRun, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = make_run("lora")
    config = make_config(done.root)
    interference(config)
    folder = done.root / "interference"
    before = contents(folder)
    stored = read_stored(folder)
    assert stored is not None
    monkeypatch.setattr(run, "build_base", None)
    interference(config)  # the same settings: drawn again
    assert contents(folder) == before
    interference(replace(config, draw_only=True, draw=replace(config.draw, score="median", layers=[1])))
    assert contents(folder)["interference.json"] == before["interference.json"]
    assert contents(folder)["layers.png"] != before["layers.png"]
    value = score(stored.measurement.only([g.matrix == "A" for g in stored.measurement.groups]), "mean").value
    assert value.tolist() == result(folder)["average"]["A"]["mean"]["value"]


@pytest.mark.usefixtures("no_figures")
def test_another_number_format_is_another_measurement(
    make_run: MakeRun, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`precision=auto` is not the same on every machine."""
    lora, mixlora = make_run("lora"), make_run("mixlora")
    interference(make_config(lora.root))
    monkeypatch.setattr(forward, "choose_dtype", lambda _: torch.bfloat16)
    with pytest.raises(UserError, match="holds a measurement with other precision; give another output_dir="):
        interference(make_config(lora.root))
    with pytest.raises(UserError, match="was measured in float32, this one in bfloat16; measure both with"):
        interference(make_config(mixlora.root, compare=str(lora.root)))


@pytest.mark.usefixtures("no_figures")
def test_real_steps_approach_the_estimate_and_leave_the_weights_alone(
    make_run: MakeRun, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[Any, list[torch.Tensor]]] = []
    original = run.measure_steps

    def watched(taker: GradientTaker, *args: Any) -> Any:
        kept.append((taker, [p.detach().clone() for p in taker.factors.values()]))
        return original(taker, *args)

    monkeypatch.setattr(run, "measure_steps", watched)
    done = make_run("lora")
    interference(make_config(done.root, lambdas=[0.3, 0.03, 0.003]))
    taker, before = kept[0]
    assert all(torch.equal(p, b) for p, b in zip(taker.factors.values(), before, strict=True))
    rows = result(done.root / "interference")["measured"]
    for matrix in "AB":
        errors = [row["relative_error"] for row in rows if row["matrix"] == matrix]
        assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.02, errors
        assert {row["rerouted"] for row in rows} == {0}


@pytest.mark.usefixtures("no_figures")
def test_other_tasks_reuse_the_directions_that_are_there(make_run: MakeRun, make_config: MakeConfig) -> None:
    done = make_run("lora")
    interference(make_config(done.root, tasks=list(TASKS[:2])))
    interference(make_config(done.root, overwrite=True))
    rows = [
        json.loads(line) for line in (done.root / "interference" / "timing.jsonl").read_text().splitlines()
    ]
    first = [row["task"] for row in rows if row["pass"] == "first pass"]
    assert first == [*TASKS[:2], TASKS[2]] and result(done.root / "interference")["tasks"] == list(TASKS)


@pytest.mark.usefixtures("no_figures")
def test_that_pictures_are_features_is_said_and_kept(
    make_run: MakeRun, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    done = make_run("lora")
    interference(make_config(done.root, cache_features=True))
    assert result(done.root / "interference")["about"]["pictures"] == "tower features, cached in fp16"
    assert "note: pictures are features of the frozen tower, kept in fp16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_two_processes_find_what_one_finds(make_run: MakeRun, make_config: MakeConfig) -> None:
    from mixlora_cli.launch import interference as launched

    config = make_config(make_run("mixlora").root)
    interference(replace(config, output_dir=config.output_dir + "-one"))
    launched(replace(config, launch=replace(config.launch, nproc=2)))
    one, two = (result(Path(folder)) for folder in (config.output_dir + "-one", config.output_dir))
    assert {k: v for k, v in one.items() if k != "about"} == {k: v for k, v in two.items() if k != "about"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["countng", "reading"]}, "tasks=countng: no such task in .*did you mean counting"),
        (
            {"tasks": ["rare", "reading"]},
            "tasks: rare has 1 instances in the train data, too few for two batches",
        ),
        ({"split": "heldout"}, "interference.split=heldout needs held-out records"),
        ({"compare": "/nowhere"}, "compare=/nowhere: no interference.json there; measure that run first"),
        ({"draw_only": True}, "draw_only=true: nothing was measured in"),
        ({"only": TASKS[0]}, r"tasks=\[counting\]: the train data has no other task"),
        ({"name": "full"}, "run=.* trained the model's own weights and has no low-rank adapter"),
    ],
)
def test_refused_in_one_line_before_a_model_is_loaded(
    make_run: MakeRun, make_config: MakeConfig, data: DataConfig, values: dict[str, Any], message: str
) -> None:
    values = dict(values)
    if "only" in values:
        values |= {"tasks": None, "data": replace(data, tasks=[values.pop("only")])}
    with pytest.raises(UserError, match=f"^{message}") as caught:
        interference(make_config(make_run(values.pop("name", "lora")).root, **values))
    assert "\n" not in str(caught.value)
