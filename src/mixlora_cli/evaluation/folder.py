"""Where a finished evaluation lies, and its answers."""

from __future__ import annotations

from pathlib import Path

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation import predictions as files


def find_evaluation(folder: str | Path) -> Path:
    """The folder with predictions: `folder` itself, or `eval` in the run folder that it is.

    Raises UserError when there are none in either.
    """
    place = Path(folder).expanduser()
    for candidate in (place, place / "eval"):
        if (candidate / files.FILE_NAME).is_file():
            return candidate
    missing = "there is no" if place.is_dir() else "no such folder; expected one with"
    raise UserError(
        f"run={folder}: {missing} {files.FILE_NAME}; give the folder of a `mixlora eval`, or its run's"
    )


def read_finished(folder: Path) -> files.Contents:
    """The predictions in an evaluation folder.

    Raises UserError when there are none or the evaluation has not finished.
    """
    path = folder / files.FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `mixlora eval` first")
    contents = files.read_predictions(path)
    header = contents.header
    if header is None or len(contents.predictions) < header.count:
        there = f"{len(contents.predictions)} of {header.count}" if header else "none"
        raise UserError(
            f"{path} is not finished ({there} answers): run the same `mixlora eval` again, it continues"
        )
    return contents
