"""What `mixlora report` shows of trainings."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mixlora_cli.config import PageConfig, ReportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.results import Results, Score, write_results
from mixlora_cli.report.run import report

CONFIG = {"adapter": {"name": "lora"}, "rank": 4, "train": {"steps": 40}}
ROUTED = {**CONFIG, "adapter": {"name": "mixlora"}, "routing": {"name": "task"}, "factors": 8}
ENDS, LOSSES = [1, 10, 20, 30], [4.0, 2.0, 1.5, 0.5]
Axes = dict[str, list[Any]]


def write_run(root: Path, config: dict[str, Any], scale: float = 1.0, **looks: float) -> Path:
    """Logged after the first step and then every ten; not finished."""
    root.mkdir(exist_ok=True)
    rows = [
        {"step": end, "loss": scale * loss, "loss_steps": end - begin, "routing": looks}
        for begin, end, loss in zip([0, *ENDS], ENDS, LOSSES, strict=False)
    ]
    (root / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "config.yaml").write_text(json.dumps(config))
    return root


def write_seen(folder: Path, digest: str = "1", **accuracy: float) -> Path:
    folder.mkdir(parents=True)
    parts = {task: {"accuracy": x, "low": x - 5, "high": x + 5} for task, x in accuracy.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    seen = Score("seen", "Seen", mean, mean - 1, mean + 2, 9, "%", "exact match", parts)
    about = {"fingerprint": {"data": f"unseen:7 heldout:{digest}"}}
    write_results(Results(about, (), None, seen), folder / "results.json")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Axes:
    """The axes of each figure, by its file's name."""
    found, save = Axes(), Figure.savefig

    def saved(whole: Figure, path: Path, **options: Any) -> None:
        found[path.name] = whole.axes
        save(whole, path, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    monkeypatch.chdir(tmp_path)  # where the untuned base's evaluation is looked for
    return found


def reported(*runs: Path, **keys: Any) -> str:
    where = {"runs": [str(run) for run in runs]} if runs[1:] else {"run": str(runs[0])}
    return report(ReportConfig(PageConfig(), **where, **keys)).read_text()


def test_a_training_that_goes_on_without_an_evaluation(
    tmp_path: Path, drawn: Axes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", CONFIG)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # is being written
    page, error = reported(run), capsys.readouterr().err
    points, line = drawn["training-loss.png"][0].lines
    assert points.get_xdata().tolist() == ENDS and points.get_ydata().tolist() == LOSSES
    smooth = [(4 + 18 + 15) / 20, (4 + 18 + 15 + 5) / 30, (4 + 18 + 15 + 5) / 30, (15 + 5) / 20]
    assert line.get_ydata().tolist() == pytest.approx(smooth)
    assert "<b>LoRA r=4</b>: step 30 of 40 so far, training loss 1.400 over the last 30" in page
    assert page.count("data:image/png") == 1 and "<script" not in page and "Answers" not in page
    needs = f"needs `mixlora eval run={run} eval.seen=true` once it has finished, "
    needs += "`mixlora eval adapter=none eval.seen=true` with the training's keys of model and data."
    assert (
        needs in html.unescape(page)
        and error.count("\n") == 3
        and needs in error
        and f"{run}/report.html" in error
    )


def test_two_points_are_joined_as_they_are(tmp_path: Path, drawn: Axes) -> None:
    run = write_run(tmp_path / "run", CONFIG)
    kept = (run / "metrics.jsonl").read_text().splitlines()[:2]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    page = reported(run)
    points, line = drawn["training-loss.png"][0].lines
    assert line.get_ydata().tolist() == points.get_ydata().tolist() == LOSSES[:2]
    assert "Points: losses as logged." in page and "Lines: means" not in page


def test_two_runs_side_by_side_before_and_after(tmp_path: Path, drawn: Axes) -> None:
    one = write_run(tmp_path / "one", ROUTED, entropy_a=0.5, entropy_b=0.75, unused_a=0.25, unused_b=0.25)
    two = write_run(tmp_path / "two", CONFIG, scale=2)
    write_seen(one / "eval", naming=60, counting=80)
    write_seen(two / "eval-seen", naming=50, counting=30)
    write_seen(tmp_path / "runs/mini-base/eval", "2", naming=10, counting=20)
    page = reported(one, two, output_dir=str(tmp_path / "both"))
    assert "needs `" not in page and "not all of the same held-out instances" in page
    losses = drawn["training-loss.png"][0].lines
    assert losses[2].get_ydata().tolist() == [2 * loss for loss in LOSSES]
    entropy, unused = (axes.lines for axes in drawn["training-factors.png"])
    assert [line.get_label() for line in entropy] == [f"MixLoRA E=8 r=4 task, {side}" for side in "AB"]
    assert [set(line.get_ydata()) for line in (*entropy, *unused)] == [{0.5}, {0.75}, {0.25}]
    (tasks,) = drawn["training-tasks.png"]
    bars = [each for each in tasks.containers if hasattr(each, "datavalues")]
    assert [bar.get_label() for bar in bars] == ["before training", "MixLoRA E=8 r=4 task", "LoRA r=4"]
    assert [text.get_text() for text in tasks.get_yticklabels()] == ["mean", "counting", "naming"]
    assert [bar.datavalues.tolist() for bar in bars] == [[15, 20, 10], [70, 80, 60], [40, 30, 50]]
    (interval,) = bars[1].errorbar.lines[2]
    assert [ends[:, 0].tolist() for ends in interval.get_segments()] == [[69, 72], [75, 85], [55, 65]]
    assert "not all of the same" not in reported(one, base=str(write_seen(tmp_path / "base", naming=10)))
    with pytest.raises(UserError, match=r"base=.*no results of seen tasks there"):
        reported(one, base=str(tmp_path))


def test_a_training_with_its_evaluation(folder: Path) -> None:
    page = reported(write_run(folder.parent, CONFIG))
    assert "Training and evaluation: LoRA r=4</title>" in page and "<h2>Training loss</h2>" in page
    assert "<h2>Answers</h2>" in page and (folder / "training-tasks.png").is_file()
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:9]))
    assert f"is not finished (8 of {len(lines) - 1} answers)" in reported(folder.parent)


ROW = '{"step": 1, "loss": 2.0, "loss_steps": 1}\n'
BROKEN = {
    ("metrics.jsonl", ROW[:9]): "there is no predictions.jsonl",
    ("metrics.jsonl", f"{ROW}x\n{ROW}"): "line 2 cannot be read",
    ("metrics.jsonl", ROW.replace("_steps", "")): "KeyError: 'loss_steps'",
    ("config.yaml", "adapter: ["): "is not as `mixlora train` writes it",
    ("eval/results.json", "{"): "is no results file of this version",
}


@pytest.mark.parametrize(("file", "content"), BROKEN)
def test_broken_files_are_one_line(tmp_path: Path, file: str, content: str) -> None:
    run = write_run(tmp_path / "run", CONFIG)
    (run / "eval").mkdir()
    (run / file).write_text(content)
    with pytest.raises(UserError) as error:
        reported(run)
    assert BROKEN[file, content] in str(error.value) and "\n" not in str(error.value)
