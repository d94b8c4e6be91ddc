"""The rows: what each trains at either scale, the paper's numbers, and that a row is added in one place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from runpy import run_path
from statistics import fmean
from typing import Any

import pytest

from mixlora_cli.analysis.plan import count_parameters, total
from mixlora_cli.config import EvalConfig, OptimConfig, ReproduceConfig, SpeedConfig, TableConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.reproduce import paper
from mixlora_cli.reproduce.grid import reproduce
from mixlora_cli.reproduce.jobs import composed
from mixlora_cli.reproduce.paper import (
    BASE,
    ROWS,
    SEEN_TASKS,
    TABLES,
    In,
    Row,
    columns_of,
    published,
    rows_of,
)
from mixlora_cli.reproduce.table import table

ROOT = Path(__file__).parents[2]
TEXT = ROOT.parent / "shared" / "paper.txt"
needs_text = pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not beside this checkout")

MINI = sorted(row.name for row in ROWS if row.name != BASE)
PAPER = sorted(row.name for row in ROWS if row.name != BASE and not row.only_mini)
CONTROL = {
    "control_lora_r4",
    "control_lora_r16",
    "control_mixlora_e16_r4",
    "control_task_routing",
    "control_plus",
}
STUDY = {name for name in MINI if name.startswith("study_")}
BEYOND = {*CONTROL, *STUDY, "straight_through", "pool_prompt", "cfs_released", "task_routing", "lora_equal"}
SPECIALISTS = {"specialist_lora_r4", "specialist_lora_r16"}
LORA = {f"lora_r{rank}": rank for rank in (2, 4, 8, 16, 32)}
MIXLORA = {f"mixlora_e{factors}_r{rank}": (factors, rank) for factors in (16, 32) for rank in (2, 4, 8)}
PARTS = ("adapter", "routing", "train", "data", "model", "rank", "factors")
EQUAL = 0.01
"""Of two losses: what is nearer than a hundredth is not told apart in docs/findings.md."""


@cache
def trained(name: str, scale: str = "mini", *overrides: str) -> TrainConfig:
    task = [f"data.tasks=[{SEEN_TASKS[scale][0]}]"] if name in SPECIALISTS else []
    return composed("train", TrainConfig, [f"experiment={scale}/{name}", *task, *overrides])


def differing(one: TrainConfig, other: TrainConfig) -> set[str]:
    """The keys, as on the command line, in which two differ; but for where they write."""
    found = set()
    for part in PARTS:
        ours, theirs = getattr(one, part), getattr(other, part)
        if isinstance(ours, int):
            found |= {part} if ours != theirs else set()
        else:
            found |= {f"{part}.{key}" for key, value in vars(ours).items() if value != getattr(theirs, key)}
    return found


def test_the_rows() -> None:
    paper_rows = {*LORA, *MIXLORA, *(f"{name}_nocfs" for name in MIXLORA), *SPECIALISTS, "llava_ft"}
    assert set(PAPER) == {*paper_rows, "routing_instance", "routing_random", "routing_task"}
    assert set(MINI) - set(PAPER) == BEYOND


@pytest.mark.parametrize("name", PAPER)
def test_trainings_at_the_papers_scale_share_its_recipe(name: str, tmp_path: Path) -> None:
    config = trained(name, "paper")
    assert config.train == OptimConfig(
        epochs=3.0,
        steps=None,
        batch_size=8,
        accumulation=1,
        effective_batch=128,
        learning_rate=4e-5,
        scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="bf16",
        gradient_checkpointing=True,
        group_by_length=False,
        cache_features=False,
        log_every=10,
        save_every=500,
        keep_checkpoints=2,
        workers=4,
    )
    assert (config.model.name, config.model.chat_template) == ("llava_v1_7b", "v1")
    assert config.model.train_also == []
    assert (config.data.name, config.data.max_length, config.data.max_per_task) == ("vision_flan", 1792, 1000)
    assert config.deepspeed.name == ("zero2" if name == "llava_ft" else "none")
    assert config.routing.name == (name.removeprefix("routing_") if "routing" in name else "instance")
    (tmp_path / "definitions.json").write_text("{}")
    assert trained(name, "paper", f"data.metadata={tmp_path}/definitions.json").routing == config.routing


@pytest.mark.parametrize(
    ("name", "rank"), [*LORA.items(), ("specialist_lora_r4", 4), ("specialist_lora_r16", 16)]
)
def test_lora_rows(name: str, rank: int) -> None:
    config = trained(name, "paper")
    assert (config.adapter.name, config.rank, config.adapter.dropout) == ("lora", rank, 0.05)
    assert config.adapter.alpha is None  # 2 * rank


@pytest.mark.parametrize(("name", "sizes"), MIXLORA.items())
def test_mixlora_rows_with_and_without_cfs(name: str, sizes: tuple[int, int]) -> None:
    factors, rank = sizes
    for suffix, cfs, folder in (("", "paper", ""), ("_nocfs", "none", "-nocfs")):
        config = trained(name + suffix, "paper")
        adapter, routing = config.adapter, config.routing
        assert (config.factors, config.rank) == sizes
        assert (adapter.name, adapter.cfs, adapter.router_grad) == ("mixlora", cfs, "none")
        assert (adapter.alpha, adapter.dropout) == (None, 0.05)  # alpha = 2 * factors
        assert (routing.name, routing.pool) == ("instance", "all")
        assert config.output_dir == f"runs/paper/mixlora-instance-e{factors}-r{rank}{folder}-seed0"


@pytest.mark.parametrize("routing", ["instance", "random", "task"])
def test_routings_of_table_2(routing: str) -> None:
    config = trained(f"routing_{routing}", "paper")
    assert (config.routing.name, config.factors, config.rank) == (routing, 32, 4)
    assert config.output_dir == f"runs/paper/mixlora-{routing}-e32-r4-seed0"
    assert (config == trained("mixlora_e32_r4", "paper")) == (
        routing == "instance"
    )  # one run for both tables


@pytest.mark.parametrize(("scale", "names"), [("mini", MINI), ("paper", PAPER)])
def test_every_row_has_its_own_folder(scale: str, names: list[str]) -> None:
    folders = [trained(name, scale).output_dir for name in names if name != "routing_instance"]
    assert len(set(folders)) == len(folders)


def test_a_specialist_needs_its_task() -> None:
    with pytest.raises(UserError, match=r"data\.tasks=\[\]: must name at least one task"):
        composed("train", TrainConfig, ["experiment=paper/specialist_lora_r4"])
    one = trained("specialist_lora_r16", "paper", "data.tasks=[VQAv2]", "seed=3")
    assert one.data.tasks == ["VQAv2"]
    assert one.output_dir == "runs/paper/specialist-lora-r16-VQAv2-seed3"


def test_the_base_is_evaluated_and_never_trained() -> None:
    base = composed("eval", EvalConfig, ["experiment=paper/llava_align"])
    assert (base.model.name, base.data.name, base.adapter.name) == ("llava_v1_7b", "vision_flan", "none")
    assert base.output_dir == "runs/llava_v1_7b-base/eval"
    with pytest.raises(UserError, match=r"^eval: unknown key; .* mixlora eval"):
        composed("train", TrainConfig, ["experiment=paper/llava_align"])
    base = composed("eval", EvalConfig, ["experiment=mini/llava_align"])
    run = composed("eval", EvalConfig, ["experiment=mini/shared/evaluation", "run=."])
    assert (base.model.name, base.data.name, base.adapter.name) == ("mini", "mini", "none")
    assert base.eval == run.eval and base.data == run.data
    assert composed("eval", EvalConfig, ["adapter=none"]).model.name == "mini"


def searched(name: str, config: TrainConfig) -> dict[float, float]:
    """The loss at each rate that was tried for these ranks and factors, or for this row of the study, as
    docs/findings.md takes it.
    """
    folder, row = "mini_routers", "task_tied" if name == "study_task" else name.partition("_")[2]
    if name not in STUDY | {"control_plus"} or row in ("lora_r4", "lora_r16", "lora_equal", "instance"):
        folder, row = "mini", f"lora_r{config.rank}" if config.rank != 63 else "lora_equal"
        if config.adapter.name == "mixlora":
            row = f"mixlora_e{config.factors}_r{config.rank}"
    mean_loss = run_path(str(ROOT / "scripts" / "mean_loss.py"))["mean_loss"]
    files = (ROOT / "results" / folder / "search").glob(f"{row}-lr*.jsonl")
    return {float(file.stem.partition("-lr")[2]): mean_loss(file, 241, 300)[0] for file in files}


@pytest.mark.parametrize("name", MINI)
def test_the_mini_rows_share_one_recipe_and_are_the_papers(name: str) -> None:
    mini, recipe = trained(name), trained("lora_r4")
    own = {"train.steps"} if name in SPECIALISTS | CONTROL | STUDY else set()
    shared = {key for key in differing(mini, recipe) if key.startswith(("train.", "model."))}
    assert shared <= own | {"train.learning_rate"}
    assert (mini.model.name, mini.data.name) == ("mini", "mini")
    if mini.adapter.name != "full":  # each with the rate that was best in one search
        losses, rate = searched(name, mini), mini.train.learning_rate
        assert len(losses) >= 2
        assert losses[rate] <= min(losses.values()) + EQUAL
        if name in STUDY:  # none is searched less than another: the rates on either side were tried
            assert {rate / 2, rate * 2} < set(losses)
    if name not in BEYOND | SPECIALISTS:
        theirs = trained(name, "paper")
        named = {key for key in differing(mini, theirs) if key.startswith(("adapter.", "routing."))}
        assert named <= {"adapter.dropout", "routing.health_every"}
        if mini.adapter.name != "full":
            assert (mini.rank, mini.factors) == (theirs.rank, theirs.factors)


@pytest.mark.parametrize(
    ("name", "usual", "key", "value"),
    [
        ("straight_through", "mixlora_e16_r4", "adapter.router_grad", "straight_through"),
        ("cfs_released", "mixlora_e16_r4", "adapter.cfs", "released"),
        ("pool_prompt", "mixlora_e16_r4", "routing.pool", "prompt"),
        ("task_routing", "mixlora_e16_r4", "routing.name", "task"),
        ("control_task_routing", "control_mixlora_e16_r4", "routing.name", "task"),
    ],
)
def test_a_choice_changes_one_thing(name: str, usual: str, key: str, value: str) -> None:
    ours, theirs = trained(name), trained(usual)
    assert differing(ours, theirs) == {key}
    part, _, leaf = key.partition(".")
    assert getattr(getattr(ours, part), leaf) == value


@pytest.mark.parametrize("name", sorted(CONTROL))
def test_the_control_sees_what_the_specialists_see(name: str) -> None:
    control, specialist = trained(name), trained("specialist_lora_r4")
    assert control.data.tasks == list(SEEN_TASKS["mini"])
    assert control.data.max_per_task == specialist.data.max_per_task
    assert control.train.steps == len(SEEN_TASKS["mini"]) * (specialist.train.steps or 0)


def num_parameters(name: str) -> tuple[int, int]:
    """(trained, all) parameters that an experiment adds."""
    config = trained(name)
    base = build_skeleton(config.model)
    adapted = attach_to_skeleton(base, config.adapter, config.routing, config.rank, config.factors)
    counts = count_parameters(adapted)
    added = sum(sum(counts[kind].values()) for kind in ("factors", "routers") if kind in counts)
    return total(counts)[0], added


def test_lora_of_equal_size() -> None:
    """Routers keep their initial values: LoRA r=16 trains as much as E=16, r=4. Routers counted, r=63 comes nearest."""
    assert num_parameters("mixlora_e16_r4") == (4_884_480, 19_261_440)
    assert num_parameters("lora_r16") == (4_884_480, 4_884_480)
    assert num_parameters("straight_through")[0] == 19_261_440
    equal = num_parameters("lora_equal")[0]
    one_rank = equal // trained("lora_equal").rank
    assert equal == 19_232_640 and abs(equal - 19_261_440) < one_rank / 2


@pytest.mark.slow
def test_a_sweep_runs_the_six_tasks_of_table_3(tmp_path: Path) -> None:
    """Every job composes, has its own folder, and stops at the data that is not there."""
    words = ("train", "-m", "experiment=paper/specialist_lora_r16", "data.root=nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "mixlora_cli.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "MIXLORA_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    jobs = [line for line in done.stderr.splitlines() if line.startswith("error: job ")]
    assert len(jobs) == 6, done.stderr
    assert all("mixlora prepare model=llava_v1_7b" in line for line in jobs)
    for task in ("scienceqa", "coco", "fairface", "INATURALIST", "STVQA", "PACS"):
        assert sum(f"data.tasks=[{task}+" in line for line in jobs) == 1


def test_a_row_is_added_in_one_place(
    make_cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stands = (In("table2", (1.0, 2.0), ("Toy", "None", ABSENT := "-", "7")),)
    toy = Row("toy", "Toy r=7", ("Toy", ABSENT, "7"), ("lora_r4",), "rank=7 adapter.dropout=0.25", stands)
    monkeypatch.setattr(paper, "ROWS", (*ROWS, toy))
    for scale in ("mini", "paper"):
        config = trained("toy", scale)
        assert (config.adapter.name, config.rank, config.adapter.dropout) == ("lora", 7, 0.25)
    monkeypatch.setattr("mixlora_cli.reproduce.jobs._unseen_sizes", lambda: {"mini_mme": 160})
    folder, speed = str(tmp_path), SpeedConfig(train=2.0, answer=4.0)
    reproduce(ReproduceConfig(output_dir=folder, speed=speed, what="table2", seeds=[0], dry_run=True))
    assert "4 cells, 0 there, 4 trainings" in (printed := capsys.readouterr().out)
    assert "  toy seed 0: train 0:20:00, eval 0:00:40" in printed
    make_cell("toy", right=8)
    table(TableConfig(runs=folder, output_dir=folder, what="table2", scale="paper"))
    assert "| Toy | None | - | 7 | 80 [" in (markdown := (tmp_path / "table2.md").read_text())
    assert "] p 1.00 | 40.0 [" in markdown and "] p 2.00 |" in markdown


def numbers_of(name: str, row: str) -> list[float | None]:
    return [published(name, row, column) for column in columns_of(name, "paper")]


def printed_rows(first_heading: str, next_heading: str) -> list[list[str]]:
    """Lines of a table in the paper's text, split into cells, without its heading."""
    text = TEXT.read_text()
    start = text.index(first_heading)
    lines = text[start : text.index(next_heading, start)].splitlines()[1:]
    return [line.split("\t") for line in lines if "\t" in line]


@needs_text
@pytest.mark.parametrize(("name", "first"), [("table1", "MME"), ("table3", "ScienceQA")])
def test_rows_and_numbers_in_the_papers_order(name: str, first: str) -> None:
    printed = printed_rows(f"Model\tFactors\tRank\t{first}", f"Table {name[-1]}:")
    for cells, row in zip(printed, rows_of(name), strict=True):
        model, factors, rank, *values = cells
        assert re.sub(r"[ {}]", "", model) == row.labels[0]
        assert (factors, rank) == row.labels[1:]
        assert [float(value) for value in values] == numbers_of(name, row.name)


@needs_text
def test_table_2_and_headings() -> None:
    # The text has its last two rows run together: "MixLoRA MixLoRA	Instance Task	32 32	4 4	1509.61 1381.87	..."
    rows = printed_rows("Model\tRouting\tFactors\tRank\tMME\tMMAvg", "Table 2:")
    single = [list(cells) for line in rows for cells in zip(*(cell.split() for cell in line), strict=True)]
    assert [cells[:4] for cells in single] == [list(row.labels) for row in rows_of("table2")]
    for cells, row in zip(single, rows_of("table2"), strict=True):
        assert list(map(float, cells[4:])) == numbers_of("table2", row.name)
    headings = (*TABLES["table1"].headings, *columns_of("table1", "paper"))
    assert "\t".join(headings).lower() in TEXT.read_text().lower()


@pytest.mark.parametrize(("name", "averaged"), [("table1", slice(1, 8)), ("table3", slice(0, 6))])
def test_averages_are_those_of_their_rows(name: str, averaged: slice) -> None:
    """The paper's own averages hold: a slip in one of the numbers would show here, too."""
    for row in rows_of(name):
        values = [float(value or "nan") for value in numbers_of(name, row.name)]
        assert fmean(values[averaged]) == pytest.approx(values[-1], abs=0.006)


@pytest.mark.parametrize(
    ("name", "row", "column", "number"),
    [
        ("table1", "mixlora_e16_r4", "MMAvg", 64.10),
        ("table1", "mixlora_e16_r4", "MME", 1443.82),
        ("table2", "routing_random", "MME", 1007.40),
        ("table3", "lora_r4", "PACS", 99.33),
        ("figure4", "mixlora_e16_r4", "MMAvg", 64.10),
        ("figure4", "mixlora_e16_r4_nocfs", "MMAvg", None),
        ("beyond", "straight_through", "MME", None),
        ("table1", "lora_r4", "my own benchmark", None),
    ],
)
def test_a_number_by_table_row_and_column(name: str, row: str, column: str, number: float | None) -> None:
    assert published(name, row, column) == number
