"""The interactive page holds every point and each distinct picture once, and nothing of the data becomes code."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mixlora_cli.analysis.selections.run import tsne
from mixlora_cli.config import DataConfig

from .conftest import ATTACK, SEEN, UNSEEN, MakeConfig, MakeRun


class _Page(HTMLParser):
    """Elements, their addresses, and what stands in script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")
        ]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.tags[-1] == "script":
            self.scripts[-1] += data


@pytest.mark.usefixtures("no_pictures")
def test_page_holds_everything_and_nothing_foreign(
    make_run: MakeRun, make_config: MakeConfig, data: DataConfig
) -> None:
    folder = tsne(make_config(make_run().root, tasks=[*UNSEEN, *SEEN], sides=["b", "a"]))
    text = (folder / "tsne.html").read_text()
    assert not re.search(r"https?:|//[a-z]", text) and "import(" not in text and "fetch(" not in text
    page = _Page()
    page.feed(text)
    assert page.tags.count("script") == 2 and page.addresses == []
    content = json.loads(page.scripts[0])
    assert len(content["instances"]) == 32
    assert all(
        len(panel[axis]) == 32 for panel in content["panels"] for axis in ("x", "y", "factors", "group")
    )
    points = pq.read_table(folder / "points.parquet").to_pylist()
    for panel, start in zip(content["panels"], range(0, len(points), 32), strict=True):
        mine = points[start : start + 32]
        np.testing.assert_allclose(panel["x"], [point["x"] * content["grid"] for point in mine], atol=0.5)
        np.testing.assert_allclose(panel["y"], [point["y"] * content["grid"] for point in mine], atol=0.5)
    # The attack of the data arrives as text.
    assert ATTACK not in text and sum(ATTACK in one["question"] for one in content["instances"]) == 2
    assert "innerHTML" not in page.scripts[1]
    records = [
        r for split in ("unseen", "heldout") for r in json.loads(Path(str(getattr(data, split))).read_text())
    ]
    with_picture = {r["id"] for r in records if "image" in r}
    assert {one["id"] for one in content["instances"] if one["picture"] is not None} == with_picture
    # 26 files with a picture; copies are embedded once.
    distinct = len(
        {(i, int(r["id"].split("-")[1]) // 2) for r in records if "image" in r for i in [r["id"][0]]}
    )
    assert len(content["pictures"]) == distinct == len(set(content["pictures"])) < len(with_picture)
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in content["pictures"])


@pytest.mark.usefixtures("no_pictures")
def test_pictures_keep_to_their_budget(make_run: MakeRun, make_config: MakeConfig) -> None:
    folder = tsne(make_config(make_run().root, page_mb=0.003))
    page = _Page()
    page.feed((folder / "tsne.html").read_text())
    content = json.loads(page.scripts[0])
    assert 0 < sum(map(len, content["pictures"])) <= 3000
    assert any("pictures had no room in this page" in note for note in content["notes"])
