"""Figures: drawn without a display, the same bytes from the same numbers, in colours for colour-blind eyes, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#9a8a00", "#555555")
"""Okabe and Ito's, the yellow darkened so that it shows on white."""
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
DIVERGING = "RdBu_r"
"""Colour map from harm (blue) to help (red)."""


@contextmanager
def figure(
    paths: Sequence[Path],
    rows: int = 1,
    columns: int = 1,
    font_size: float = 9,
    dpi: int = 130,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (rows, columns), written to `paths` (PNG, SVG) when the block has drawn it.

    Args:
        paths: files; folders are made, the kind follows from the suffix.
        rows: of panels; `columns` likewise.
        font_size: in points.
        dpi: of the PNG.
        options: of `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {
        "svg.hashsalt": "mixlora",
        "font.size": font_size,
        "font.family": "DejaVu Sans",
    }
    with pyplot.rc_context(settings):
        drawn, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        try:
            yield drawn, axes
            for path in sorted(paths, key=lambda each: each.suffix):  # .png first, which settles the layout
                path.parent.mkdir(parents=True, exist_ok=True)
                drawn.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
                drawn.set_layout_engine("none")  # arranging it again takes as long as drawing it
        finally:
            pyplot.close(drawn)


def line_style(place: int) -> dict[str, Any]:
    """Colour and dashes of the line in this place, as options of `plot`; the dashes tell them apart in grey."""
    return {"color": HUES[place % len(HUES)], "linestyle": _DASHES[place % len(_DASHES)]}


def name_axes(axes: Any, across: str, upwards: str) -> None:
    """Write what the axes are of, and leave out the frame's other two sides."""
    axes.set_xlabel(across)
    axes.set_ylabel(upwards)
    if across == "steps":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
