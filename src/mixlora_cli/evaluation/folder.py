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


def open_evaluation(folder: Path) -> tuple[files.Header, files.PredictionReader]:
    """Header and reader of the predictions in an evaluation folder.

    Raises UserError when there are none, or fewer lines than answers are wanted.
    """
    path = folder / files.FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: run `mixlora eval` first")
    header = files.read_header(path)
    with path.open("rb") as file:
        lines = sum(1 for line in file if line.endswith(b"\n")) - 1
    if header is None or lines < header.count:
        raise _unfinished(path, lines, header)
    return header, files.PredictionReader(path)


def check_finished(folder: Path, header: files.Header, reader: files.PredictionReader) -> None:
    """Behind a whole pass of the reader. Raises UserError when instances are missing (lines may repeat some)."""
    if len(reader.done) < header.count:
        raise _unfinished(folder / files.FILE_NAME, len(reader.done), header)


def _unfinished(path: Path, answers: int, header: files.Header | None) -> UserError:
    there = f"{answers} of {header.count}" if header else "none"
    return UserError(
        f"{path} is not finished ({there} answers): run the same `mixlora eval` again, it continues"
    )
