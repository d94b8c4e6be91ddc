"""Results as tables."""

from dataclasses import replace
from io import StringIO
from typing import Any

from rich.console import Console

from mixlora_cli.benchmarks.metrics import COGNITION, PERCEPTION
from mixlora_cli.benchmarks.registry import BENCHMARKS
from mixlora_cli.data.mini.unseen import SUBTASKS
from mixlora_cli.evaluation.results import (
    Results,
    Score,
    columns_of,
    loss_table,
    print_results,
    results_markdown,
    seen_table,
)


def score(column: str, value: float, unit: str = "%", parts: Any = None) -> Score:
    return Score(column.lower(), column, value, value - 5, value + 5.26, 20, unit, "rule", parts or {})


BASE = Results({"label": "base"}, (score("MME", 512.6, "points"), score("VSR", 50.0)), None, None)
PARTS = {"naming": {"accuracy": 90.0, "low": 80.0, "high": 95.5, "n": 20.0, "most_frequent": 12.5}}
TUNED = Results(
    {"label": "LoRA [r=4]", "limit": 20},
    (score("MME", 600, "points"), score("VSR", 62.5), score("Own", 10)),
    score("MMAvg", 40),
    score("Seen", 90, parts=PARTS),
)
ROWS = [("base", BASE), ("LoRA [r=4]", TUNED)]


def printed(rows: list[tuple[str, Results]], **console: Any) -> list[str]:
    stream = StringIO()
    print_results(rows, Console(file=stream, **console))
    return stream.getvalue().splitlines()


def test_markdown_in_the_papers_order() -> None:
    assert results_markdown(ROWS).splitlines()[:4] == [
        "|  | MME | Text-VQA | VSR | SNLI-VE | CIFAR-10 | CIFAR-100 | MNIST | POPE | MMAvg | Own | Seen |",
        f"| --- |{' ---: |' * 11}",
        "| base | 513 [508, 518] | - | 50.0 [45.0, 55.3] | - | - | - | - | - | - | - | - |",
        "| LoRA [r=4] | 600 [595, 605] | - | 62.5 [57.5, 67.8] | - | - | - | - | - | 40.0 [35.0, 45.3] "
        "| 10.0 [5.0, 15.3] | 90.0 [85.0, 95.3] |",
    ]


def test_without_a_benchmark_there_are_no_columns_of_benchmarks() -> None:
    seen = replace(TUNED, scores=(), mean=None)
    assert columns_of([("base", replace(BASE, scores=())), ("tuned", seen)]) == ["Seen"]
    assert columns_of([("tuned", replace(seen, scores=(score("Own", 10),)))]) == ["Own", "Seen"]
    assert len(columns_of([("base", replace(BASE, scores=()))])) == 9  # the table of nothing keeps its head


def test_the_printed_table_has_every_number_and_brackets_survive() -> None:
    lines = printed(ROWS)
    for expected in ("513", "[508, 518]", "[57.5, 67.8]", "LoRA [r=4]", "90.0 [80.0, 95.5]", "at most 20"):
        assert any(expected in line for line in lines)
    headings = next(line for line in lines if "MME" in line).split()
    assert headings == [
        *(each.column for each in BENCHMARKS.values() if each.in_paper),
        "MMAvg",
        "Own",
        "Seen",
    ]


def test_mme_over_some_of_its_subtasks_says_so() -> None:
    assert (BENCHMARKS["mme"].num_subtasks, BENCHMARKS["mini_mme"].num_subtasks) == (14, 8)
    assert len(PERCEPTION + COGNITION) == 14 and len(SUBTASKS) == 8
    parts = {name: {"score": 50.0} for name in ["perception", *PERCEPTION]}
    ten = score("MME", 500, "points", parts)
    assert ten.cell.joined(" ") == "500 [495, 505] 10 of 14 subtasks"
    assert replace(ten, name="mini_mme").cell.joined(" ") == "500 [495, 505]"  # whole
    assert replace(ten, name="of my own").cell.joined(" ") == "500 [495, 505]"  # not known
    assert any("10 of 14 subtasks" in line for line in printed([("base", replace(BASE, scores=(ten,)))]))


def test_the_seen_table_has_the_papers_names_and_only_models_with_seen_tasks() -> None:
    part = PARTS["naming"]
    seen = score("Seen", 90, parts={"STVQA+image_question_answer": part, "naming": part})
    table = seen_table([("base", BASE), ("LoRA", replace(TUNED, seen=seen))])
    assert table.headings == ("task", "most frequent answer", "LoRA")
    assert table.rows == (
        ("ST-VQA", "12.5", "90.0 [80.0, 95.5]"),
        ("naming", "12.5", "90.0 [80.0, 95.5]"),
        ("mean", "12.5", "90.0 [85.0, 95.3]"),
    )


def test_a_narrow_terminal_gets_the_table_on_its_side() -> None:
    lines = printed(ROWS, width=80, force_terminal=True, color_system=None)
    assert max(map(len, lines)) <= 80
    mme = next(line for line in lines if line.split()[:1] == ["MME"])
    assert mme.split() == ["MME", "513", "[508,", "518]", "600", "[595,", "605]"]


def test_benchmarks_of_ones_own_alone_have_a_table_without_the_papers_columns() -> None:
    own = Results({"label": "run"}, (score("Own", 10), score("Mine", 20)), None, None)
    assert results_markdown([("run", own)]).splitlines() == [
        "|  | Own | Mine |",
        "| --- | ---: | ---: |",
        "| run | 10.0 [5.0, 15.3] | 20.0 [15.0, 25.3] |",
        "",
        "[...]: 95 % interval. In per cent.",
    ]
    in_points = Results({"label": "run"}, (score("Own", 10, "points"),), None, None)
    assert results_markdown([("run", in_points)]).splitlines()[-1] == "[...]: 95 % interval."
    assert "VSR" in results_markdown([("run", own), ("base", BASE)]).splitlines()[0]


def test_the_loss_has_three_decimals_and_a_table_of_its_own() -> None:
    parts = {"naming": {"loss": 0.7, "low": 0.65, "high": 0.72, "n": 20.0, "tokens": 40.0}}
    parts["counting"] = {"loss": 1.5, "n": 1.0, "tokens": 2.0}
    loss = Score("seen loss", "Seen loss", 1.1, None, None, 21, "nats", "rule", parts)
    rows = [("base", BASE), ("LoRA", replace(TUNED, loss=loss))]
    table = loss_table(rows)
    assert table.headings == ("task", "LoRA")
    assert table.rows == (
        ("naming", "0.700 [0.650, 0.720]"),
        ("counting", "1.500 [-]"),
        ("mean", "1.100 [-]"),
    )
    lines = results_markdown(rows).splitlines()
    assert lines[0].endswith("| Own | Seen | Seen loss |")
    assert lines[3].endswith("| 90.0 [85.0, 95.3] | 1.100 [-] |")
    assert "in nats, lower is better." in lines[-1]
    shown = printed(rows)
    assert any("0.700 [0.650, 0.720]" in line for line in shown)
    assert "loss per answer token in nats [95 % interval], lower is better" in " ".join(map(str.strip, shown))
