"""The file of finished cases survives being killed, and never mixes machines or versions of the code."""

from pathlib import Path

import pytest

from mixlora_cli.analysis.bench.measurement import FILE_NAME, Journal, Measurement, case_key
from mixlora_cli.errors import UserError

ONE = Measurement("layer", {"shape": "8", "batch": 1}, {"linear": [0.5, 0.25]})
TWO = Measurement("memory", {"model": "tiny"}, counts={"lora": {"peak_bytes": 3}})
HERE = {"processor": "a", "code": "1"}


def journal(
    folder: Path, fingerprint: dict[str, str | int | float] | None = None
) -> tuple[Journal, list[str]]:
    said: list[str] = []
    return Journal(folder, {**HERE, **(fingerprint or {})}, said.append), said


def test_reads_back_what_was_appended(tmp_path: Path) -> None:
    first, _ = journal(tmp_path / "new" / "folder")
    first.append(ONE)
    first.append(TWO)
    again, said = journal(tmp_path / "new" / "folder")
    assert again.done == {ONE.key: ONE, TWO.key: TWO} and said == []


def test_the_key_is_the_case_in_any_order() -> None:
    assert case_key("layer", {"batch": 1, "shape": "8"}) == ONE.key
    assert case_key("operations", ONE.case) != ONE.key
    assert case_key("layer", {"batch": 2, "shape": "8"}) != ONE.key


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_torn_line_is_dropped(tmp_path: Path, lost: int) -> None:
    first, _ = journal(tmp_path)
    first.append(ONE)
    first.append(TWO)
    content = first.path.read_bytes()
    first.path.write_bytes(content[:-lost])
    again, _ = journal(tmp_path)
    assert list(again.done) == [ONE.key]
    again.append(TWO)
    assert journal(tmp_path)[0].done == {ONE.key: ONE, TWO.key: TWO}
    assert first.path.read_bytes() == content


def test_a_file_cut_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    first, _ = journal(tmp_path)
    first.path.write_bytes(first.path.read_bytes()[:10])
    assert journal(tmp_path)[0].done == {}


def test_other_code_moves_the_file_aside(tmp_path: Path) -> None:
    journal(tmp_path)[0].append(ONE)
    again, said = journal(tmp_path, {"code": "2"})
    aside = tmp_path / "measurements-1.jsonl"
    assert again.done == {} and "0.25" in aside.read_text()
    assert said == [f"code changed since {again.path} was written: measuring anew, the old file is {aside}"]
    again.append(TWO)
    journal(tmp_path, {"code": "3"})
    assert (tmp_path / "measurements-2.jsonl").is_file()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match="give another output_dir, or overwrite=true"):
        journal(tmp_path)
