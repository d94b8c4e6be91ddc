"""Which answers are shown, and what the confusion matrices count."""

from pathlib import Path

import pytest
from report_folder import COLOURS, prediction, write_folder
from rich.console import Console

from mixlora_cli import demo
from mixlora_cli.demo import answers_table
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.report.answers import UNREAD, confusions, read_evaluated, sample


def test_the_sample_is_bounded_seeded_and_of_every_outcome(folder: Path) -> None:
    run = read_evaluated(folder)
    shown = sample([run], size=2, seed=0)
    columns = list(dict.fromkeys(entry.column for entry in shown))
    assert columns == ["MME", "Text-VQA", "CIFAR-10", "POPE", "Seen: naming"]
    for column in columns:
        outcomes = [entry.outcome for entry in shown if entry.column == column]
        assert 1 <= outcomes.count("right") <= 2 and 1 <= outcomes.count("wrong") <= 2, column
    assert len(shown) == 19  # two of each, but Text-VQA has a single wrong answer
    assert sample([run], size=2, seed=0) == shown
    assert sample([run], size=2, seed=1) != shown
    assert len(sample([run], size=1000, seed=0)) == run.count
    assert sample([run], size=0, seed=0) == []


def test_the_order_of_the_file_changes_no_sample(folder: Path, tmp_path: Path, images: Path) -> None:
    run = read_evaluated(folder)
    turned = read_evaluated(write_folder(tmp_path / "turned", [*run.evaluation.predictions][::-1], images))
    assert sample([turned], 3, 0) == sample([run], 3, 0)


def test_right_and_wrong_are_what_the_rules_say(folder: Path) -> None:
    run = read_evaluated(folder)
    whole = sample([run], size=1000, seed=0)
    for score in run.results.scores:
        entries = [entry.answers[0] for entry in whole if entry.column == score.column]
        if score.unit == "%":
            assert 100 * sum(answer.mark for answer in entries) / len(entries) == pytest.approx(score.value)
        else:
            alone = [part["accuracy"] for part in score.parts.values()]
            assert 100 * sum(answer.mark for answer in entries) / len(entries) == pytest.approx(
                sum(alone) / 2
            )
    graded = {round(a.mark, 6) for entry in whole if entry.column == "Text-VQA" for a in entry.answers}
    assert graded == {0.0, 0.6, 1.0}


def test_several_runs_are_compared_on_the_instances_they_share(
    folder: Path, other: Path, tmp_path: Path, images: Path
) -> None:
    runs = [read_evaluated(folder), read_evaluated(other)]
    shown = sample(runs, size=4, seed=0)
    assert {entry.outcome for entry in shown} == {"right", "wrong", "differ"}
    for entry in shown:
        assert [answer.label for answer in entry.answers] == ["LoRA r=4", "MixLoRA E=16 r=4"]
        rights = {answer.right for answer in entry.answers}
        assert (entry.outcome == "differ") == (len(rights) == 2)
    few = [p for p in runs[1].evaluation.predictions if p.index < 3]
    changed = [*few[:2], prediction(2, "mini_cifar10", "blue", "red", question="Another?", labels=COLOURS)]
    third = read_evaluated(write_folder(tmp_path / "three", changed, images))
    assert sorted(entry.instance.index for entry in sample([runs[0], third], 100, 0)) == [0, 1]


def test_confusion_matrices_count_every_instance_once(folder: Path) -> None:
    run = read_evaluated(folder)
    found = {matrix.column: matrix for matrix in confusions(run)}
    assert list(found) == ["MME", "CIFAR-10", "POPE"]  # free answers have none
    colours = found["CIFAR-10"]
    assert colours.labels == COLOURS and sum(map(sum, colours.counts)) == 30
    score = next(score for score in run.results.scores if score.column == "CIFAR-10")
    assert sum(colours.counts[n][n] for n in range(3)) == round(30 * score.value / 100)
    given = [p.prediction for p in run.evaluation.predictions if p.benchmark == "mini_cifar10"]
    assert sum(row[3] for row in colours.counts) == given.count("a dog")
    maybe = [p.prediction for p in run.evaluation.predictions if p.benchmark == "mini_mme"].count("perhaps")
    assert sum(row[2] for row in found["MME"].counts) == maybe
    assert sum(row[2] for row in found["POPE"].counts) == 0  # its parser reads every answer


@pytest.mark.parametrize(
    ("given", "read"),
    [("Red", 0), ("It is green.", 1), ("red or blue", 3), ("", 3), ("reddish", 3), ("light blue!", 2)],
)
def test_labels_as_the_rule_reads_them(given: str, read: int, tmp_path: Path) -> None:
    alone = [prediction(0, "mini_cifar10", "blue", given, labels=COLOURS)]
    (matrix,) = confusions(read_evaluated(write_folder(tmp_path / "e", alone, None)))
    assert [sum(row[n] for row in matrix.counts) for n in range(4)] == [int(n == read) for n in range(4)]
    expected = [] if read == 2 else [("blue", (*COLOURS, UNREAD)[read], 1)]
    assert matrix.most_confused() == expected


def test_different_label_sets_make_no_matrix(tmp_path: Path) -> None:
    both = [
        prediction(0, "mini_cifar10", "blue", "red", labels=COLOURS),
        prediction(1, "mini_cifar10", "cat", "cat", labels=("cat", "dog")),
        prediction(2, "mini_vsr", "yes", "no", labels=("yes", "no")),
        prediction(3, "mini_vsr", "no", "no", labels=("no", "yes")),
    ]
    found = confusions(read_evaluated(write_folder(tmp_path / "e", both, None)))
    assert [(m.column, m.counts) for m in found] == [("VSR", ((0, 1, 0), (0, 1, 0)))]


def test_the_demo_shows_the_first_instance_of_each_task(folder: Path, other: Path) -> None:
    runs = [read_evaluated(each) for each in (folder, other)]
    table = answers_table(runs)
    first: dict[str, Prediction] = {}
    for instance in runs[0].evaluation.predictions:
        first.setdefault(instance.benchmark, instance)
    elsewhere = {each.key: each.prediction for each in runs[1].evaluation.predictions}
    assert len(table.rows) == len(first) > 3
    for task, question, right, *answers in table.rows:
        instance = first[str(task)]
        assert (question, right) == (instance.question, instance.target)
        assert answers == [instance.prediction, elsewhere[instance.key]]


def test_the_demo_prints_its_tables_and_keeps_them_as_a_picture(folder: Path, other: Path) -> None:
    console = Console(record=True, width=200)
    demo._compare([folder, other], folder.parent, console)
    said, drawn = console.export_text(), (folder.parent / "table.svg").read_text()
    for title in ("Before and after: what is said about a picture", "Seen tasks, held-out instances"):
        assert title in said and title.replace(" ", "&#160;") in drawn
