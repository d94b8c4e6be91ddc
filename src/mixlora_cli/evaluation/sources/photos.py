"""Benchmarks whose pictures the user fetches: rows in JSON lines, pictures in a folder of COCO's or Flickr30k's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.sources.build import Instances, keep_records, record
from mixlora_cli.evaluation.sources.files import records_file
from mixlora_cli.evaluation.sources.origin import Origin, Question, question_of
from mixlora_cli.evaluation.sources.tables import Table, from_hub, from_lines


def open_photos(
    place: Path, origin: Origin, benchmark: str, on_error: Literal["stop", "skip"] = "stop"
) -> Instances:
    """Records over the pictures in `place`/images, else in `place` itself; the pictures are not copied.

    Raises UserError when the rows are nowhere, when none of the pictures is there (another folder), or when some
    are missing (a partial one) and `on_error` is "stop"; with "skip" those rows are left out and counted.
    """
    assert origin.photos is not None
    root = place if place.is_dir() else place.parent
    images = (root / "images" if (root / "images").is_dir() else root).resolve()
    table = _rows(place, origin, benchmark)
    rows = 0
    asked: list[
        tuple[int, str | None, str, Question]
    ] = []  # place, picture, the name it should have, question
    for index, row in enumerate(table.rows):
        rows += 1
        if (question := question_of(origin.ask, row, f"{table.described}, row {index}")) is not None:
            names = origin.photos(row)
            found = next((name for name in names if (images / name).is_file()), None)
            asked.append((index, found, names[0], question))
    _complain(place, images, origin, benchmark, [(found, name) for _, found, name, _ in asked], on_error)
    kept = [
        record(benchmark, index, found, question) for index, found, _, question in asked if found is not None
    ]
    records = keep_records(benchmark, kept)
    return Instances(records, images, table.described, rows, rows - len(kept))


def _rows(place: Path, origin: Origin, benchmark: str) -> Table:
    if file := records_file(place, origin.records, f"eval.sources.{benchmark}"):
        return from_lines(file, origin, benchmark)
    if not origin.hub:
        raise UserError(
            f"eval.sources.{benchmark}={place} has no {origin.records}; expected {origin.by_hand}"
        )
    return from_hub(origin, benchmark)


def _complain(
    place: Path,
    images: Path,
    origin: Origin,
    benchmark: str,
    located: list[tuple[str | None, str]],
    on_error: Literal["stop", "skip"],
) -> None:
    missing = [name for found, name in located if found is None]
    if not missing:
        return
    key = f"eval.sources.{benchmark}={place}"
    if len(missing) == len(located):
        raise UserError(
            f"{key} is another folder: none of the {len(located)} pictures is in {images} "
            f"(as {cut(missing[0])}, for one); expected {origin.by_hand}"
        )
    if on_error == "stop":
        raise UserError(
            f"{key} is partial: pictures of {len(missing)} of {len(located)} rows are missing in {images}, "
            f"{cut(missing[0])} for one; fetch the rest, or pass data.on_error=skip to go on without them"
        )
