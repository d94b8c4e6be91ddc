"""What somebody who reads the numbers should know of where the rows came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def source_notes(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each source with fewer rows than the whole split, and for each with rows left out.

    `sources`: by benchmark, {"source", "rows", "left_out", "split_rows"}, as `results.json` has them under
    `about.sources`; each key may be absent.
    """
    lines = []
    for name, about in sources.items():
        rows, whole = about.get("rows"), about.get("split_rows")
        if rows is not None and whole is not None and rows != whole:
            lines.append(
                f"{name}: {about.get('source', 'the source')} has {rows} rows, the whole split {whole}"
            )
        if left_out := about.get("left_out"):
            lines.append(
                f"{name}: {left_out} of {rows} rows left out (no agreed label, or no usable picture)"
            )
    return lines
