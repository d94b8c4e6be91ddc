"""scripts/compare_grids.py: two folders of cells, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_grids.py"


def compared(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def grids(make_cell: Any, tmp_path: Path) -> tuple[Path, Path]:
    """LoRA r=4 with seeds 0 and 1, 8 and 12 of 20 right, repeated with 10 and 12 and other losses.

    And r=16, repeated as it was; and a cell that only one folder has.
    """
    folders = tmp_path / "before", tmp_path / "after"
    names = ("lora_r4-seed0", "lora_r4-seed1", "lora_r16-seed0", "lora_r8-seed0")
    for folder, rights, loss in zip(folders, ((8, 12, 6, 5), (10, 12, 6)), (0.5, 0.75), strict=True):
        for name, right in zip(names, rights, strict=False):
            place = folder / f"{name}-0123456789"
            make_cell(name.partition("-")[0], right=right, used=float(right)).rename(_parent(place))
            row = {"step": 300, "loss_steps": 100, "loss": 0.6 if name == "lora_r16-seed0" else loss}
            (place / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folders


def _parent(place: Path) -> Path:
    place.parent.mkdir(exist_ok=True)
    return place


def test_repetitions_beside_seeds(grids: tuple[Path, Path]) -> None:
    result = compared(*grids)
    assert result.returncode == 0, result.stderr
    assert (
        "| lora_r4-seed0 | 80 | 100 | +20 [" in result.stdout and "| 40.0 | 50.0 | +10.0 [" in result.stdout
    )
    assert "3 cells, 3 of them trained.\nThe same to the last digit: lora_r16-seed0.\n" in result.stdout
    assert "| lora_r4-seed1 | 120 | 120 | +0 [-23, 23] |" in result.stdout
    # MMAvg: 10 and 0 between repetitions; 20 before and 10 after between the seeds.
    assert (
        "- MMAvg: 7.1 between repetitions (zero excluded by 1), 7.1 of rows with several seeds; 15.8"
        in result.stdout
    )
    assert "- loss: 0.250 between repetitions, 0.250 of rows with several seeds; 0.000" in result.stdout
    assert "Left out: 1 in " in result.stdout and ", 0 in " in result.stdout


def test_nothing_in_common_is_an_error(grids: tuple[Path, Path], tmp_path: Path) -> None:
    result = compared(grids[0], tmp_path)
    assert result.returncode == 1 and "no evaluated cell in common" in result.stderr
    assert "Usage" in compared(*grids, "one", "two").stderr
