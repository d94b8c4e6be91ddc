"""`mixlora report`: results.md and report.html from stored evaluations, without any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mixlora_cli.config import PageConfig, ReportConfig
from mixlora_cli.output import one_line_errors
from mixlora_cli.report.data_notes import data_notes
from mixlora_cli.report.evaluated import Evaluated, read_evaluated
from mixlora_cli.report.markdown import FILE_NAME as MARKDOWN
from mixlora_cli.report.markdown import write_markdown
from mixlora_cli.report.page import FILE_NAME as PAGE
from mixlora_cli.report.page import Card, write_page
from mixlora_cli.report.sample import sample
from mixlora_cli.report.thumbnails import Thumbnails, picture_folder
from mixlora_cli.store import write_text


def report(config: ReportConfig) -> Path:
    """Write the report of one evaluation beside it, or of several side by side; the path of the page.

    Raises UserError when an evaluation is not there or has not finished.
    """
    runs = [read_evaluated(run) for run in config.evaluations]
    folder = Path(config.output_dir).expanduser() if config.output_dir else runs[0].folder
    with one_line_errors(folder):
        return write_report(runs, folder, config.report)


def write_report(runs: Sequence[Evaluated], folder: Path, settings: PageConfig) -> Path:
    """Write results.md and report.html into `folder`, each whole or not at all; the path of the page."""
    runs = _told_apart(runs)
    thumbnails = Thumbnails(int(settings.picture_megabytes * 1e6))
    about = runs[0].results.about
    cards = []
    for shown in sample(runs, settings.sample, settings.seed):
        place = picture_folder(shown.instance, about, settings.images)
        cards.append(Card(shown, thumbnails(shown.instance, place)))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(run.label, run.results) for run in runs]
    notes = [*data_notes(rows), *_notes(thumbnails)]
    markdown = write_markdown(rows)
    write_text(folder / MARKDOWN, markdown, errors="replace")
    write_text(folder / PAGE, write_page(runs, cards, notes), errors="replace")
    Console(stderr=True).print(f"report: {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)
    return folder / PAGE


def _notes(thumbnails: Thumbnails) -> list[str]:
    notes = []
    if thumbnails.missing:
        notes.append(
            f"{thumbnails.missing} pictures of the sample were not found or cannot be read; "
            "report.images=FOLDER says where they are."
        )
    if thumbnails.left_out:
        notes.append(f"{thumbnails.left_out} pictures are left out to keep this file small.")
    return notes


def _told_apart(runs: Sequence[Evaluated]) -> list[Evaluated]:
    """Runs with equal labels get their folders' names."""
    often = Counter(run.label for run in runs)
    return [
        replace(run, label=f"{run.label} ({_name(run.folder)})") if often[run.label] > 1 else run
        for run in runs
    ]


def _name(folder: Path) -> str:
    place = folder.resolve()
    return place.parent.name if place.name == "eval" else place.name
