"""The predictions file and what scoring makes of it; cuts, foreign files and changed settings hold for every log."""

import json
import re
from pathlib import Path

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import (
    Header,
    Prediction,
    open_predictions,
    rank_file,
    read_predictions,
    take_in_rank_files,
)
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.evaluation.scoring import score

HEADER = Header({"model": "m1", "data": "d1"}, count=3, about={"label": "base", "limit": None})


def prediction(index: int, text: str = 'a "cat"\nи\u2028') -> Prediction:
    return Prediction(
        "unseen", index, "mini_cifar10", f"id{index}", "what?", "cat", text, labels=("cat", "dog")
    )


def write(path: Path, indices: range, header: Header = HEADER) -> list[Prediction]:
    predictions = [prediction(index) for index in indices]
    with open_predictions(path, header) as log:
        for each in predictions:
            log.append([each])
    return predictions


def indices(path: Path) -> list[int]:
    return [each.index for each in read_predictions(path).predictions]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "predictions.jsonl"


def test_what_is_written_is_read(path: Path) -> None:
    predictions = write(path, range(3))
    contents = read_predictions(path)
    assert (contents.header, contents.predictions) == (HEADER, predictions)
    header, line, *_ = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(header)["format"] == "mixlora-predictions/1"
    assert list(json.loads(line)) == [  # what is empty is left away
        "split", "index", "benchmark", "id", "question", "target", "prediction", "labels"
    ]  # fmt: skip


def test_any_cut_leaves_a_file_that_continues(path: Path) -> None:
    predictions = write(path, range(2))
    whole = path.read_bytes()
    borders = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    near = {border + shift for border in borders for shift in (-1, 0, 1, 2)} | set(range(0, len(whole), 41))
    for length in sorted(length for length in near if length <= len(whole)):
        path.write_bytes(whole[:length])
        with open_predictions(path, HEADER) as log:
            assert log.done == {each.key for each in predictions[: max(whole[:length].count(b"\n") - 1, 0)]}
            log.append([each for each in predictions if each.key not in log.done])
        assert path.read_bytes() == whole


def test_zeros_at_the_end_after_a_power_cut_are_a_cut_line(path: Path) -> None:
    write(path, range(1))
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert indices(path) == [0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({2: "{"}, "line 3 cannot be read"),
        ({0: '{"id": 1}'}, "no file of this version"),
        ({2: '{"id": 1}'}, "holds a line that is no prediction"),
    ],
)
def test_files_that_are_not_ours_are_refused_and_left_alone(
    lines: dict[int, str], message: str, path: Path
) -> None:
    write(path, range(3))
    text = path.read_text(encoding="utf-8").split("\n")
    for number, line in lines.items():
        text[number] = line
    path.write_text("\n".join(text), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_predictions(path)
    assert path.read_text(encoding="utf-8").split("\n") == text


def test_an_instance_written_twice_counts_once(path: Path) -> None:
    with open_predictions(path, HEADER) as log:
        log.append([prediction(0, "first"), prediction(0, "second")])
    assert [each.prediction for each in read_predictions(path).predictions] == ["first"]


def test_other_settings_never_mix(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, range(2))
    old = path.read_bytes()
    with open_predictions(path, Header(HEADER.fingerprint, 3, {"label": "other"})) as log:
        assert len(log.done) == 2  # label and limit alone do not start anew
    for number, changes in enumerate(({"data": "d2"}, {"data": "d3", "adapter": "a"}), start=1):
        with open_predictions(path, Header({**HEADER.fingerprint, **changes}, count=3)) as log:
            assert len(log.done) == 0
        assert path.with_name(f"predictions.{number}.jsonl").exists()
    assert path.with_name("predictions.1.jsonl").read_bytes() == old
    said = capsys.readouterr().out
    assert "continuing: 2 of 3 answers are there already" in said
    assert "(data changed): kept as predictions.1.jsonl, starting anew" in said
    assert "(data, adapter changed): kept as predictions.2.jsonl" in said


def test_files_of_other_processes_are_taken_in_whatever_their_number(path: Path) -> None:
    write(path, range(2))
    write(rank_file(path, 1), range(1, 4))  # one of them is in the file already
    write(rank_file(path, 12), range(4, 6))
    cut = rank_file(path, 12)
    cut.write_bytes(cut.read_bytes()[:-5])
    path.write_bytes(path.read_bytes() + b'{"half')
    take_in_rank_files(path)
    assert indices(path) == [0, 1, 2, 3, 4]
    assert len(path.read_bytes().splitlines()) == 6
    assert sorted(path.parent.iterdir()) == [path]


def test_files_of_other_settings_are_moved_aside(path: Path) -> None:
    write(path, range(2))
    write(rank_file(path, 1), range(3, 5), Header({"model": "m2"}, count=6))
    rank_file(path, 2).write_bytes(b'{"format": "mixl')  # killed while its header was written
    take_in_rank_files(path)
    assert indices(path) == [0, 1]
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "predictions.jsonl", "predictions.rank1.1.jsonl"
    ]  # fmt: skip


def test_scoring_reads_predictions_alone(path: Path) -> None:
    with open_predictions(path, HEADER) as log:
        log.append([prediction(0), prediction(1, "dog")])
    with pytest.raises(UserError, match=r"not finished \(2 of 3 answers\)"):
        score(path.parent)
    with open_predictions(path, HEADER) as log:
        log.append([prediction(2, "Cat")])
    results = score(path.parent)
    assert results.scores[0].value == pytest.approx(200 / 3)
    assert results.label == "base"
    assert results.about["fingerprint"] == {"model": "m1", "data": "d1"}
    assert read_results(path.parent) == results
    content = json.loads((path.parent / "results.json").read_text())
    assert content["scores"][0]["column"] == "CIFAR-10"
    assert sorted(each.name for each in path.parent.iterdir()) == ["predictions.jsonl", "results.json"]


@pytest.mark.parametrize(("text", "message"), [(None, "run `mixlora eval` first"), ("[]", "no results file")])
def test_missing_and_foreign_results_say_what_to_do(text: str | None, message: str, tmp_path: Path) -> None:
    if text is None:
        with pytest.raises(UserError, match=message):
            score(tmp_path)
    else:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_results(tmp_path)
