import json
from pathlib import Path

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Header, Prediction, open_predictions, read_predictions
from mixlora_cli.evaluation.results import read_results
from mixlora_cli.evaluation.scoring import score

HEADER = Header({"model": "m1", "data": "d1"}, count=3, about={"label": "base", "limit": None})


def prediction(index: int, text: str = 'a "cat"\nи\u2028') -> Prediction:
    return Prediction(
        "unseen", index, "mini_cifar10", f"id{index}", "what?", "cat", text, labels=("cat", "dog")
    )


def written(path: Path, count: int) -> list[Prediction]:
    predictions = [prediction(index) for index in range(count)]
    with open_predictions(path, HEADER) as writer:
        for each in predictions:
            writer.append([each])
    return predictions


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    predictions = written(path, 3)
    contents = read_predictions(path)
    assert contents.header == HEADER
    assert contents.predictions == predictions


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_half_written_last_line_is_dropped_and_overwritten(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "predictions.jsonl"
    predictions = written(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    contents = read_predictions(path)
    assert contents.predictions == predictions[:2]
    with open_predictions(path, HEADER) as writer:
        assert set(writer.done) == {("unseen", "mini_cifar10", 0), ("unseen", "mini_cifar10", 1)}
        writer.append([predictions[2]])
    assert path.read_bytes() == whole


def test_any_cut_leaves_a_file_that_continues(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    predictions = written(path, 2)
    whole = path.read_bytes()
    borders = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    near = {border + shift for border in borders for shift in (-1, 0, 1, 2)} | set(range(0, len(whole), 41))
    for length in sorted(length for length in near if length <= len(whole)):
        path.write_bytes(whole[:length])
        with open_predictions(path, HEADER) as writer:
            writer.append([each for each in predictions if each.key not in writer.done])
        assert path.read_bytes() == whole


def test_zeros_at_the_end_after_a_power_cut_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    written(path, 1)
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert len(read_predictions(path).predictions) == 1


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 3 cannot be read"):
        open_predictions(path, HEADER)


def test_an_instance_written_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with open_predictions(path, HEADER) as writer:
        writer.append([prediction(0, "first"), prediction(0, "second")])
    assert [each.prediction for each in read_predictions(path).predictions] == ["first"]


def test_other_settings_never_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictions.jsonl"
    written(path, 2)
    old = path.read_bytes()
    for number, changes in enumerate(({"data": "d2"}, {"data": "d3", "adapter": "a"}), start=1):
        with open_predictions(path, Header({**HEADER.fingerprint, **changes}, count=3)) as writer:
            assert len(writer.done) == 0
        assert (tmp_path / f"predictions.{number}.jsonl").exists()
    assert (tmp_path / "predictions.1.jsonl").read_bytes() == old
    said = capsys.readouterr().out
    assert "(data changed): kept as predictions.1.jsonl" in said
    assert "(data, adapter changed): kept as predictions.2.jsonl" in said


def test_label_and_limit_alone_do_not_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    written(path, 2)
    with open_predictions(path, Header(HEADER.fingerprint, 3, {"label": "other"})) as writer:
        assert len(writer.done) == 2


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(UserError, match="no file of this version"):
        open_predictions(path, HEADER)
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n'


def test_scoring_reads_predictions_alone(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with open_predictions(path, HEADER) as writer:
        writer.append([prediction(0), prediction(1, "dog")])
    with pytest.raises(UserError, match=r"not finished \(2 of 3 answers\)"):
        score(tmp_path)
    with open_predictions(path, HEADER) as writer:
        writer.append([prediction(2, "Cat")])
    results = score(tmp_path)
    assert results.scores[0].value == pytest.approx(200 / 3)
    assert results.label == "base"
    assert results.about["fingerprint"] == {"model": "m1", "data": "d1"}
    assert read_results(tmp_path) == results
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["scores"][0]["column"] == "CIFAR-10"
    assert not list(tmp_path.glob("*.part*"))


def test_missing_and_foreign_results_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `mixlora eval` first"):
        score(tmp_path)
    with pytest.raises(UserError, match="run `mixlora eval` first"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="no results file"):
        read_results(tmp_path)
