"""Answers that git keeps packed come back as they were, byte by byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mixlora_cli.evaluation.predictions import read_predictions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from pack_predictions import pack, unpack  # noqa: E402


def test_packed_and_unpacked_files_are_the_same_bytes(tmp_path: Path) -> None:
    header = json.dumps({"format": "mixlora-predictions/1", "count": 2})
    asked = [
        {"index": 0, "question": 'Is it "red"?', "prediction": "", "image": "é.png"},
        {"index": 1, "prediction": '\n"x" 猫'},
    ]
    lines = [header, *(json.dumps(record, ensure_ascii=False) for record in asked)]
    files = [tmp_path / "one" / "eval" / "predictions.jsonl", tmp_path / "two" / "predictions.jsonl"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        lines.append(lines[1].replace('""', '"another"'))
    before = [file.read_bytes() for file in files]
    assert pack(tmp_path) == 2 and not any(file.exists() for file in files)
    assert unpack(tmp_path) == 2
    assert [file.read_bytes() for file in files] == before
    files[0].write_text('{"index":0,"prediction":"a"}\n')  # not as mixlora writes it
    with pytest.raises(ValueError, match="does not come back byte by byte"):
        pack(tmp_path)
    assert files[0].exists()


@pytest.mark.parametrize("grid, count", [("mini", 116), ("mini_repeated", 19)])
def test_kept_cells_are_readable(grid: str, count: int, tmp_path: Path) -> None:
    """Each evaluation has as many answers as its header says, and its results are of these."""
    kept = ROOT / "results" / grid
    (tmp_path / "cells.parquet").write_bytes((kept / "cells.parquet").read_bytes())
    assert unpack(tmp_path) == count
    for file in tmp_path.rglob("predictions.jsonl"):
        header, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == header["count"] > 0
        assert [p.prediction for p in read_predictions(file).predictions] == [
            row["prediction"] for row in rows
        ]
        assert (kept / file.parent.relative_to(tmp_path) / "results.json").is_file()
