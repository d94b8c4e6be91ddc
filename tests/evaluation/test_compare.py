"""`mixlora compare` on predictions files whose differences are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli import cli
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.compare import (
    Comparison,
    Line,
    as_json,
    compare,
    comparisons_markdown,
    paired_over_seeds,
    read_group,
)
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions
from mixlora_cli.evaluation.scoring import score
from mixlora_cli.stats import mcnemar


def answer(index: int, benchmark: str, target: str, prediction: str, **more: object) -> Prediction:
    return Prediction("unseen", index, benchmark, str(index), f"{index}?", target, prediction, **more)  # type: ignore[arg-type]


def written(folder: Path, label: str, answers: list[Prediction]) -> Path:
    header = Header({"model": label}, len(answers), {"label": label, "limit": None})
    with open_predictions(folder / "eval" / "predictions.jsonl", header) as log:
        log.append(answers)
    score(folder / "eval")
    return folder


def about_picture(index: int, target: str, prediction: str) -> Prediction:
    return answer(index, "mme", target, prediction, category="scene", image_id=str(index // 2))


def run(folder: Path, right: int, label: str, shift: int = 0, digits: str = "mnist") -> Path:
    """The first `right` of 40 MNIST answers are right, and as many halves of Text-VQA; MME: pairs of 10 images."""
    people = ("stop",) * 3 + ("go",) * 7
    answers = [answer(i, digits, "7", "7" if i < right else "1", labels=("1", "7")) for i in range(40)]
    for i in range(40):
        given = "stop" if i < right else "no idea"
        answers.append(answer(i, "textvqa", "go", given, answers=people))
    answers += [about_picture(i, ("Yes", "No")[i % 2], "yes" if i < right else "no") for i in range(20)]
    for i in range(40):
        given = "cat" if i < right else "dog"
        answers.append(replace(answer(i, "naming", "cat", given), split="heldout"))
    return written(folder, label, answers[shift:])


def line_of(found: Comparison, column: str) -> Line:
    return next(line for line in found.lines if line.column == column)


def test_two_runs(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, right, name) for name, right in (("lora", 10), ("mixlora", 18))]
    (found,) = compare([read_group(str(folder)) for folder in folders])
    lines = {line.column: line for line in found.lines}
    assert list(lines) == ["MME", "Text-VQA", "MNIST", "Seen"]
    mnist = lines["MNIST"]
    assert (mnist.first.value, mnist.second.value, mnist.n) == (25.0, 45.0, 40)
    assert mnist.difference is not None
    assert mnist.difference.value == pytest.approx(20.0)
    assert mnist.difference.p == mcnemar(0, 8) == 2 / 256
    assert mnist.p_holm is not None
    assert mnist.p_holm >= mnist.difference.p
    text = lines["Text-VQA"].difference
    assert text is not None
    assert text.value == pytest.approx(0.9 * 20)
    assert text.low < 18 < text.high
    # MME: always "no" is right for half; "yes" for the first images moves which half, not how many.
    mme = lines["MME"]
    assert mme.difference is not None
    assert mme.difference.value == pytest.approx(mme.second.value - mme.first.value)
    seen = lines["Seen"].difference
    assert seen is not None
    assert seen.value == pytest.approx(20.0)
    assert "| MNIST | 25.0 | 45.0 | +20.0 [" in comparisons_markdown([found])


def test_only_instances_of_both_count(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 10, "a"), run(tmp_path / "b", 10, "b", shift=10)
    (found,) = compare([read_group(str(first)), read_group(str(second))])
    mnist = line_of(found, "MNIST")
    assert (mnist.n, mnist.answered) == (30, (40, 30))
    assert (mnist.first.value, mnist.second.value) == (0.0, 0.0)  # the ten right ones are not shared
    assert mnist.difference is not None
    assert mnist.difference.value == 0.0
    assert mnist.difference.p == 1.0
    assert "| MNIST | 0.0 | 0.0 | 0.0 [" in comparisons_markdown([found])
    assert "| 30 of 40 and 30 |" in comparisons_markdown([found])


def test_both_sides_and_the_difference_are_of_the_shared_instances(tmp_path: Path) -> None:
    # Every question has the answer yes, so that it is clear which answers are right.
    whole = [about_picture(i, "Yes", "yes" if i < 14 else "no") for i in range(20)]
    part = [about_picture(i, "Yes", "yes" if i % 4 != 3 else "no") for i in range(8, 20)]
    folders = [written(tmp_path / str(len(answers)), "m", answers) for answers in (whole, part)]
    (found,) = compare([read_group(str(folder)) for folder in folders])
    (mme,) = found.lines
    # Of images 4 to 9 the first has 4 to 6 right, the second every other: 50 + 50 and 75 + 50 points.
    assert (mme.first.value, mme.second.value) == pytest.approx((100.0, 125.0))
    assert mme.difference is not None
    assert mme.difference.value == pytest.approx(25.0)
    assert (mme.n, mme.answered) == (12, (20, 12))


def test_seeds_are_averaged(tmp_path: Path) -> None:
    lora = ",".join(str(run(tmp_path / f"l{right}", right, "LoRA")) for right in (10, 12, 14))
    mix = ",".join(str(run(tmp_path / f"m{right}", right, "MixLoRA")) for right in (20, 22))
    (found,) = compare([read_group(lora), read_group(mix)])
    assert (found.first.label, found.second.label) == ("LoRA (3 seeds)", "MixLoRA (2 seeds)")
    mnist = line_of(found, "MNIST")
    assert (mnist.first.value, mnist.second.value) == (30.0, 52.5)
    assert mnist.first.low is not None
    assert mnist.difference is not None
    assert mnist.difference.test == "Welch's t over seeds"
    single = read_group(str(tmp_path / "m20"))
    (found,) = compare([read_group(lora), single])
    assert all(line.difference is None for line in found.lines)
    assert {line.untested for line in found.lines} == {"single run on one side"}


def test_seeds_with_the_same_scores_are_not_tested(tmp_path: Path) -> None:
    lora = ",".join(str(run(tmp_path / name, 10, "LoRA")) for name in ("l0", "l1"))
    mix = ",".join(str(run(tmp_path / name, 12, "MixLoRA")) for name in ("m0", "m1"))
    (found,) = compare([read_group(lora), read_group(mix)])
    mnist = line_of(found, "MNIST")
    assert (mnist.difference, mnist.untested, mnist.p_holm) == (None, "no spread over seeds", None)
    text = comparisons_markdown([found])
    assert "| MNIST | 25.0 [-] | 30.0 [-] | +5.0 | - | - | no spread over seeds | 40 |" in text
    (stored,) = as_json([found])["comparisons"]
    line = next(line for line in stored["lines"] if line["column"] == "MNIST")
    assert (line["difference"], line["untested"]) == (None, "no spread over seeds")
    assert line["first"] == {"value": 25.0, "interval": None, "runs": 2}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"digits": "mini_mnist"}, r"MNIST: .*m1 was not evaluated on mnist, which .*l0 was"),
        ({"shift": 10}, r"mnist: .*l0 and .*m1 did not answer the same instances \(40 and 30\)"),
    ],
)
def test_seeds_that_answered_other_instances_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    lora = ",".join(str(run(tmp_path / f"l{n}", 10 + n, "LoRA")) for n in (0, 1))
    mix = f"{run(tmp_path / 'm0', 10, 'MixLoRA')},{run(tmp_path / 'm1', 12, 'MixLoRA', **other)}"
    with pytest.raises(UserError, match=message):
        compare([read_group(lora), read_group(mix)])
    with pytest.raises(UserError, match=message):  # a single run on one side
        compare([read_group(lora), read_group(mix.split(",")[1])])


def test_other_questions_under_the_same_index_are_refused(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 10, "a"), run(tmp_path / "b", 10, "b")
    path = second / "eval" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"3?"', '"other?"'))
    with pytest.raises(
        UserError, match="instance 3 is another question in each; evaluate both on the same data"
    ):
        compare([read_group(str(first)), read_group(str(second))])


def mixlora(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mixlora", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(run(tmp_path / name, right, "LoRA r=4")) for name, right in (("a", 10), ("b", 18))]
    assert mixlora(["compare", *folders, "-o", str(tmp_path / "out")], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "McNemar, exact" in shown
    assert "+20.0 [" in shown
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    (pair,) = content["comparisons"]
    assert pair["first"] == {"label": f"LoRA r=4 [{folders[0]}]", "runs": [folders[0]]}
    mnist = next(line for line in pair["lines"] if line["column"] == "MNIST")
    assert mnist["difference"]["p"] == 2 / 256
    assert (tmp_path / "out" / "compare.md").read_text().startswith("first: LoRA r=4 [")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "Missing argument 'runs'; mixlora compare --help lists all options"),
        (["compare", "a"], "compare: expected two or more runs"),
        (["compare", "nowhere", "b"], "run=nowhere: no such folder"),
        (["compare", "a", "b", "--x"], "No such option: --x; mixlora compare --help lists all options"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mixlora(arguments, monkeypatch) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def with_losses(folder: Path, label: str, shift: float, tokens: int = 3, tasks: int = 2) -> str:
    """Ten held-out instances of each task; their loss a token is `shift` above 1, 2, ... 10 thirds."""
    answers = [
        replace(
            answer(10 * task + i, f"task{task}", "cat", "cat"),
            split="heldout",
            nll=(1 + i) + tokens * shift * (1 + task),
            tokens=tokens,
        )
        for task in range(tasks)
        for i in range(10)
    ]
    return str(written(folder, label, answers))


def test_losses_are_compared_on_the_same_instances(tmp_path: Path) -> None:
    first, second = (with_losses(tmp_path / name, name, shift) for name, shift in (("a", 0.1), ("b", 0.0)))
    (found,) = compare([read_group(first), read_group(second)])
    line = line_of(found, "Seen loss")
    assert [each.column for each in found.lines] == ["Seen", "Seen loss"]
    assert (line.unit, line.n, line.first.value, line.second.value) == (
        "nats", 20, pytest.approx(5.5 / 3 + 0.15), pytest.approx(5.5 / 3)
    )  # fmt: skip
    assert line.difference is not None and line.difference.test == "paired bootstrap"
    # By pairs the difference is the same in each instance of a task, though losses themselves spread far.
    ends = line.difference.value, line.difference.low, line.difference.high
    assert ends == pytest.approx((-0.15, -0.15, -0.15))
    assert line.difference.p < 0.001 and line.p_holm == 2 * line.difference.p
    text = comparisons_markdown([found])
    assert "| Seen loss | 1.983 | 1.833 | -0.150 [-0.150, -0.150] | < 0.001 |" in text
    assert "in nats, lower is better." in text
    (stored,) = as_json([found])["comparisons"]
    assert stored["lines"][1]["unit"] == "nats"
    (without,) = compare([read_group(str(run(tmp_path / name, 10, name))) for name in ("c", "d")])
    assert "lower is better" not in comparisons_markdown([without])


def test_losses_over_seeds_and_where_there_is_none(tmp_path: Path) -> None:
    ours, theirs = (
        ",".join(with_losses(tmp_path / f"{name}{n}", name, base + n / 100) for n in range(3))
        for name, base in (("a", 0.5), ("b", 0.2))
    )
    (found,) = compare([read_group(ours), read_group(theirs)])
    line = line_of(found, "Seen loss")
    assert line.difference is not None and line.difference.test == "Welch's t over seeds"
    assert line.difference.value == pytest.approx(-0.3 * 1.5)
    paired = paired_over_seeds(read_group(ours), read_group(theirs))["Seen loss"]
    assert (paired.value, paired.low, paired.high) == pytest.approx((-0.45, -0.45, -0.45))
    old = written(
        tmp_path / "old", "old", [replace(answer(i, "task0", "cat", ""), split="heldout") for i in range(10)]
    )
    (found,) = compare([read_group(str(old)), read_group(with_losses(tmp_path / "new", "new", 0, tasks=1))])
    assert [each.column for each in found.lines] == ["Seen"]


@pytest.mark.parametrize("copies", [1, 2])
def test_losses_of_other_tokens_are_not_tested(copies: int, tmp_path: Path) -> None:
    ours, theirs = (
        ",".join(with_losses(tmp_path / f"{tokens}-{n}", "m", n / 10, tokens) for n in range(copies))
        for tokens in (3, 4)
    )
    (found,) = compare([read_group(ours), read_group(theirs)])
    line = line_of(found, "Seen loss")
    assert (line.difference, line.untested) == (None, "the same answers have other tokens in each")
    assert "| - | - | the same answers have other tokens in each | 20 |" in comparisons_markdown([found])
