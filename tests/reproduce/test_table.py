"""Tables of cells whose numbers are known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from scipy.stats import t

from mixlora_cli.config import TableConfig, TableName
from mixlora_cli.errors import UserError
from mixlora_cli.reproduce.paper import TABLES, rows_of
from mixlora_cli.reproduce.table import build_table, pair_lines, table
from mixlora_cli.stats import mcnemar

TASKS = ("odd_one_out", "object_category", "count_digit", "flag_naming", "word_reading", "left_or_right")


def config(folder: Path, what: str = "table1", **more: Any) -> TableConfig:
    return TableConfig(runs=str(folder), output_dir=str(folder / "tables"), what=what, **more)  # type: ignore[arg-type]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_values_and_missing_rows(make_cell: Any, tmp_path: Path) -> None:
    make_cell("llava_align", right=2)
    make_cell("lora_r4", right=8)
    built = build_table(config(tmp_path))
    assert built.columns == (
        *("MME", "Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE", "MMAvg"),
    )
    lora = built.row("lora_r4").values
    assert (lora["VSR"].value, lora["MMAvg"].value) == (40.0, 40.0)
    assert lora["VSR"].low == pytest.approx(21.88, abs=0.01)  # Wilson, 8 of 20
    assert lora["MME"].value == pytest.approx(100 * 8 / 20 + 100 * 4 / 10)
    assert built.row("mixlora_e16_r4").values == {}
    assert "Trainings: 300 steps of 8 instances, learning rate 0.001." in built.notes
    (missing,) = [note for note in built.notes if note.startswith("Missing")]
    assert "LLaVA_FT" in missing and "MixLoRA E=16 r=4" in missing and " LoRA r=4," not in missing


def test_several_seeds_give_mean_and_t_interval(make_cell: Any, tmp_path: Path) -> None:
    for seed, right in enumerate((8, 10, 12)):
        make_cell("lora_r4", right=right, seed=seed)
    built = build_table(config(tmp_path))
    value = built.row("lora_r4").values["MNIST"]
    half = t.ppf(0.975, 2) * 10 / 3**0.5  # 40, 50, 60 per cent: standard deviation 10
    assert (value.value, built.row("lora_r4").seeds("MNIST")) == (50.0, [0, 1, 2])
    assert (value.low, value.high) == pytest.approx((50 - half, 50 + half))


def test_differences_are_tested_on_the_same_instances(make_cell: Any, tmp_path: Path) -> None:
    make_cell("lora_r4", right=4)
    make_cell("mixlora_e16_r4", right=12)
    lines = {line.column: line for line in pair_lines(build_table(config(tmp_path)))}
    assert len({line.pair for line in lines.values()}) == 1 and len(lines) == 9
    vsr = lines["VSR"]
    assert (*vsr.pair[:2], vsr.seeds) == ("mixlora_e16_r4", "lora_r4", (0,))
    assert vsr.paired.value == pytest.approx(40.0)
    assert vsr.paired.p == mcnemar(0, 8) == 2 / 256
    assert vsr.over_seeds is None and lines["MMAvg"].p_holm is None
    assert vsr.p_holm is not None and vsr.p_holm > vsr.paired.p
    assert lines["MMAvg"].paired.value == pytest.approx(40.0)


def test_differences_over_seeds(make_cell: Any, tmp_path: Path) -> None:
    for seed in range(3):
        make_cell("lora_r4", right=6 + seed, seed=seed)
        make_cell("mixlora_e16_r4", right=10 + seed, seed=seed)
    line = next(line for line in pair_lines(build_table(config(tmp_path))) if line.column == "MNIST")
    assert line.over_seeds is not None
    assert line.over_seeds.value == pytest.approx(20.0)
    assert line.over_seeds.low < 20 < line.over_seeds.high
    assert line.seed_by_seed is None  # each seed's difference is the same


def test_differences_on_instances_are_means_over_the_common_seeds(make_cell: Any, tmp_path: Path) -> None:
    for seed, (ours, theirs) in enumerate([(6, 10), (7, 9), (8, 8)]):
        make_cell("lora_r4", right=ours, seed=seed)
        make_cell("mixlora_e16_r4", right=theirs, seed=seed)
    make_cell("lora_r4", right=20, seed=3)  # the other one has no such seed
    lines = {line.column: line for line in pair_lines(build_table(config(tmp_path)))}
    assert lines["VSR"].seeds == (0, 1, 2)
    # Of 20 instances the first eight are alike or differ in two seeds by turns: 20, 10 and 0 per cent.
    assert lines["VSR"].paired.value == pytest.approx(10.0)
    assert lines["MMAvg"].paired.value == pytest.approx(10.0)
    # MME: accuracy 20, 10, 0 points; images with both right 3 and 5, 3 and 4, 4 and 4 of 10.
    assert lines["MME"].paired.value == pytest.approx(10.0 + 10.0)
    # Signs can be flipped in four instances: 1/3, 2/3, 2/3, 1/3. All + or all - are as far out as what was seen.
    assert lines["VSR"].paired.p == pytest.approx(2 / 2**4)
    assert lines["VSR"].p_holm is not None and lines["MMAvg"].p_holm is None
    assert lines["VSR"].over_seeds is not None
    same = lines[
        "VSR"
    ].seed_by_seed  # of 20, 10 and 0: the fourth seed of one side is in the line above alone
    assert same is not None and same.value == pytest.approx(10.0)
    assert same.high == pytest.approx(10 + 4.302652729911275 * 10 / 3**0.5)
    written = table(config(tmp_path))
    assert "| seed by seed | +20 [-30, 70] p=0.225 | +10.0 [-14.8, 34.8] p=0.225 |" in written[0].read_text()
    assert "seed by seed" in {row["by"] for row in read_csv(written[3])}


def test_seeds_with_the_same_scores_have_no_interval_and_no_test(make_cell: Any, tmp_path: Path) -> None:
    for seed in range(2):
        make_cell("lora_r4", right=6, seed=seed)
        make_cell("mixlora_e16_r4", right=10, seed=seed)
    built = build_table(config(tmp_path))
    value = built.row("lora_r4").values["MNIST"]
    assert (value.value, value.low, value.high) == (30.0, None, None)
    line = next(line for line in pair_lines(built) if line.column == "MNIST")
    assert (line.over_seeds, line.untested) == (None, "no spread over seeds")
    written = table(config(tmp_path))
    text = written[0].read_text()
    assert "| 30.0± [-] |" in text and "[-]: the same in every seed" in text
    assert "| means over seeds | - no spread over seeds |" in text
    (row,) = [
        row for row in read_csv(written[2]) if (row["experiment"], row["column"]) == ("lora_r4", "MNIST")
    ]
    assert (row["value"], row["low"], row["high"], row["seeds"]) == ("30.0", "", "", "0 1")
    assert {row["by"] for row in read_csv(written[3])} == {"seeds 0, 1"}


def test_figure_4_of_seeds_with_the_same_scores(make_cell: Any, tmp_path: Path) -> None:
    for seed in range(2):
        make_cell("mixlora_e16_r2", right=10, seed=seed)
    *_, png, _ = table(config(tmp_path, "figure4"))
    with Image.open(png) as picture:
        assert picture.width > 1000


def test_newest_configuration_counts_even_without_a_result(make_cell: Any, tmp_path: Path) -> None:
    make_cell("lora_r4", right=4, used=1.0)
    make_cell("lora_r8", right=4, used=1.0)
    make_cell("lora_r4", right=12, used=2.0)
    make_cell("lora_r8", right=12, used=2.0, finished=False)
    built = build_table(config(tmp_path))
    assert built.row("lora_r4").values["MNIST"].value == 60.0
    assert built.row("lora_r8").values == {}
    assert "Cells of earlier configurations passed over: lora_r4, lora_r8." in built.notes


def test_a_table_is_of_one_version_of_the_data(make_cell: Any, tmp_path: Path) -> None:
    """Kept cells that were evaluated on former benchmarks are no rows beside those evaluated since."""
    make_cell("llava_align", right=2, used=1.0, data="former")
    make_cell("lora_r4", right=4, seed=0, used=3.0, data="today's")
    make_cell("lora_r4", right=8, seed=1, used=2.0, data="former")
    make_cell("mixlora_e16_r4", right=8, seed=1, used=2.0, data="former")
    built = build_table(config(tmp_path))
    assert built.row("lora_r4").seeds() == [0] and built.row("lora_r4").values["VSR"].value == 20.0
    assert built.row("llava_align").values == built.row("mixlora_e16_r4").values == {}
    assert pair_lines(built) == []
    (left_out,) = [note for note in built.notes if note.startswith("Left out")]
    assert "LLaVA_Align seed 0, LoRA r=4 seed 1, MixLoRA E=16 r=4 seed 1;" in left_out

    make_cell("lora_r4", right=4, seed=0, used=3.0, data="former")
    built = build_table(config(tmp_path))
    assert built.row("lora_r4").seeds() == [0, 1] and built.row("llava_align").values
    assert not any(note.startswith("Left out") for note in built.notes)


def test_rows_that_were_trained_differently_say_so(make_cell: Any, tmp_path: Path) -> None:
    make_cell("lora_r4", right=4, steps=300)
    make_cell("lora_r8", right=4, steps=150)
    notes = build_table(config(tmp_path)).notes
    assert "Trainings of LoRA r=4: 300 steps of 8 instances, learning rate 0.001." in notes
    assert "Trainings of LoRA r=8: 150 steps of 8 instances, learning rate 0.001." in notes


def test_table_3_puts_specialists_together(make_cell: Any, tmp_path: Path) -> None:
    for number, task in enumerate(TASKS):
        make_cell("specialist_lora_r4", right=10 + number, task=task, seen=(task,))
    make_cell("lora_r4", right=5, seen=TASKS)
    built = build_table(config(tmp_path, "table3"))
    assert built.columns == (*TASKS, "AVG")
    specialist = built.row("specialist_lora_r4").values
    assert [specialist[task].value for task in TASKS] == pytest.approx([50, 55, 60, 65, 70, 75])
    assert specialist["AVG"].value == pytest.approx(62.5)
    assert built.row("lora_r4").values["AVG"].value == pytest.approx(25.0)
    lines = {line.column: line for line in pair_lines(built)}
    assert list(lines) == [*TASKS, "AVG"]
    assert lines["odd_one_out"].paired.value == pytest.approx(-25.0)
    assert lines["odd_one_out"].paired.p == mcnemar(5, 0)
    assert lines["AVG"].paired.value == pytest.approx(-37.5)

    for number, task in enumerate(TASKS):
        make_cell("specialist_lora_r4", right=10 + number, task=task, seen=(task,), seed=1)
    make_cell("lora_r4", right=7, seen=TASKS, seed=1)
    both = {line.column: line for line in pair_lines(build_table(config(tmp_path, "table3")))}
    assert both["odd_one_out"].seeds == (0, 1)
    assert both["odd_one_out"].paired.value == pytest.approx((-25.0 - 15.0) / 2)
    assert both["AVG"].paired.value == pytest.approx((-37.5 - 27.5) / 2)


def test_a_seed_that_lacks_a_task_does_not_hide_what_another_has(make_cell: Any, tmp_path: Path) -> None:
    for task in TASKS:
        make_cell("specialist_lora_r4", right=10, task=task, seen=(task,))
    make_cell("specialist_lora_r4", right=12, task=TASKS[0], seen=(TASKS[0],), seed=1)
    for seed in range(2):
        make_cell("lora_r4", right=5, seen=TASKS, seed=seed)
    lines = {line.column: line for line in pair_lines(build_table(config(tmp_path, "table3")))}
    assert [lines[task].seeds for task in TASKS] == [(0, 1), *([(0,)] * 5)]
    assert lines["AVG"].seeds == (0,) and lines["AVG"].paired.value == pytest.approx(-25.0)
    text = table(config(tmp_path, "table3"))[0].read_text()
    assert "seeds 0, 1, paired" in text and "p=0.062 (seed 0)" in text


def test_seeds_that_answered_other_instances_are_compared_on_what_all_answered(
    make_cell: Any, tmp_path: Path
) -> None:
    for seed in range(2):
        make_cell("mixlora_e16_r4", right=10, seed=seed)
    make_cell("lora_r4", right=5, seed=0)
    make_cell("lora_r4", right=5, seed=1, instances=8)
    lines = {line.column: line for line in pair_lines(build_table(config(tmp_path)))}
    assert lines["VSR"].seeds == (0, 1)
    assert lines["VSR"].paired.value == pytest.approx(100 * 3 / 8)  # of the first eight, 8 and 5 are right


def test_table_3_without_one_specialist_has_no_average(make_cell: Any, tmp_path: Path) -> None:
    for task in TASKS[1:]:
        make_cell("specialist_lora_r4", right=10, task=task, seen=(task,))
    built = build_table(config(tmp_path, "table3"))
    assert "AVG" not in built.row("specialist_lora_r4").values
    assert "LoRA specialists r=4 lacks odd_one_out, AVG." in built.notes


def test_files(make_cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cell("lora_r4", right=4)
    make_cell("mixlora_e16_r4", right=12)
    written = table(config(tmp_path))
    assert [path.name for path in written] == [
        *("table1.md", "table1.tex", "table1.csv", "table1-differences.csv"),
    ]
    printed = capsys.readouterr().out
    assert "20.0" in printed and "p=0.008" in printed and "written:" in printed
    markdown = written[0].read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| Model | Factors | Rank | MME | Text-VQA | VSR |")
    assert [row.split(" | ")[:3] for row in rows[2:15]] == [
        [f"| {row.labels[0]}", *row.labels[1:]] for row in rows_of("table1")
    ]
    assert "| LoRA | - | 4 | 40 [" in markdown and "| 20.0 [8.1, 41.6] |" in markdown
    assert "| LoRA | - | 2 | - | - |" in markdown
    latex = written[1].read_text()
    assert r"LLaVA\textsubscript{Align} & - & - & -" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{table*}") == 2
    assert r"20.0 {\scriptsize [8.1, 41.6]}" in latex
    values = read_csv(written[2])
    assert len(values) == 13 * 9
    (one,) = [row for row in values if (row["experiment"], row["column"]) == ("lora_r4", "MNIST")]
    assert (one["value"], one["seeds"], one["paper"], one["rank"]) == ("20.0", "0", "80.89", "4")
    (difference,) = [row for row in read_csv(written[3]) if row["column"] == "MNIST"]
    assert (difference["left"], difference["right"], difference["p"]) == (
        "mixlora_e16_r4",
        "lora_r4",
        str(2 / 256),
    )


def test_the_papers_numbers_stand_beside_ours_at_its_scale(make_cell: Any, tmp_path: Path) -> None:
    make_cell("lora_r4", right=4)
    paper = table(config(tmp_path, scale="paper"))[0].read_text()
    assert "[8.1, 41.6] p 80.89 |" in paper  # LoRA r=4 on MNIST
    assert "| MixLoRA | 16 | 4 | - p 1443.82 |" in paper
    assert "80.89" not in table(config(tmp_path))[0].read_text()


def test_figure_4(make_cell: Any, tmp_path: Path) -> None:
    for number, (factors, rank) in enumerate([(16, 2), (32, 2), (16, 4), (32, 4), (16, 8)]):
        make_cell(f"mixlora_e{factors}_r{rank}", right=10 + number)
        make_cell(f"mixlora_e{factors}_r{rank}_nocfs", right=8 + number // 2)
    *_, png, svg = table(config(tmp_path, "figure4"))
    with Image.open(png) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    assert svg.read_text().startswith("<?xml")


def test_every_layout_prints_from_nothing_but_one_cell(make_cell: Any, tmp_path: Path) -> None:
    make_cell("mixlora_e32_r4", right=10)
    make_cell("control_lora_r4", right=10, seen=TASKS)
    for name in ("table1", "table2", "figure4", "control"):
        assert table(config(tmp_path, name))
    assert set(TABLES) == set(get_args(TableName))


def test_choices_are_compared_on_seen_tasks(make_cell: Any, tmp_path: Path) -> None:
    make_cell("mixlora_e16_r4", right=8, seen=TASKS)
    for seed in (0, 1):
        make_cell("task_routing", right=10 + seed, seed=seed, seen=TASKS)
    built = build_table(config(tmp_path, "seen"))
    assert built.row("task_routing").values["AVG"].value == pytest.approx(52.5)
    assert built.row("routing_task").values == {}
    (average,) = [line for line in pair_lines(built) if line.column == "AVG"]
    assert average.pair[:2] == ("task_routing", "mixlora_e16_r4")
    assert (average.paired.value, average.seeds) == (pytest.approx(10.0), (0,))


def test_losses_have_a_column_where_cells_have_them(make_cell: Any, tmp_path: Path) -> None:
    make_cell("mixlora_e16_r4", right=8, seen=TASKS, loss=0.8)
    make_cell("lora_r4", right=8, seen=TASKS)  # from before there were losses
    assert "Seen loss" not in build_table(config(tmp_path, "table1")).columns
    for seed in (0, 1):
        make_cell("task_routing", right=10 + seed, seed=seed, seen=TASKS, loss=0.7 + seed / 50)
    built = build_table(config(tmp_path, "seen"))
    assert built.columns[-2:] == ("AVG", "Seen loss")
    assert built.row("task_routing").values["Seen loss"].value == pytest.approx(0.71)
    assert "MixLoRA E=16 r=4 lacks" not in " ".join(built.notes)
    assert "LoRA r=4 lacks Seen loss." in built.notes
    (line,) = [line for line in pair_lines(built) if line.column == "Seen loss"]
    assert (*line.pair[:2], line.seeds) == ("task_routing", "mixlora_e16_r4", (0,))
    paired = line.paired
    assert (paired.value, paired.low, paired.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert line.p_holm is None and paired.test == "paired bootstrap"
    text = table(config(tmp_path, "seen"))[0].read_text()
    assert "| 0.800 [0.800, 0.800] |" in text and "| 0.710± [0.583, 0.837] |" in text
    assert "| -0.100 [-0.100, -0.100] p<0.001 |" in text
    assert "lower is better. The mean over 6 tasks." in text


def test_losses_are_of_all_tasks_that_the_trainings_have(make_cell: Any, tmp_path: Path) -> None:
    more = (*TASKS, "arithmetic", "captioning")
    make_cell("mixlora_e16_r4", right=8, seen=more, loss=0.8)
    make_cell("task_routing", right=8, seen=(*more, "shape_naming"), loss=0.7)
    make_cell("lora_r16", right=8, seen=TASKS[1:], loss=0.1)  # lacks one of the table's own
    built = build_table(config(tmp_path, "seen"))
    assert built.loss_tasks == tuple(sorted(more))
    assert [built.row(name).values["Seen loss"].value for name in ("mixlora_e16_r4", "task_routing")] == (
        pytest.approx([0.8, 0.7])
    )
    assert "Seen loss" not in built.row("lora_r16").values
    assert built.columns[:-1] == (*TASKS, "AVG")
    assert [line.paired.value for line in pair_lines(built) if line.column == "Seen loss"] == [
        pytest.approx(-0.1)
    ]


def test_what_the_paper_does_not_have_has_no_paper_scale(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale=paper: `seen` exists at scale=mini alone"):
        config(tmp_path, "seen", scale="paper")


def test_a_folder_without_cells_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no cells there; expected the folder that `mixlora reproduce` wrote to"
    ):
        build_table(config(tmp_path))
