"""`mixlora report`: results.md, figures and report.html from trainings and evaluations, without any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mixlora_cli.config import JudgeConfig, PageConfig, ReportConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.instances import source_notes
from mixlora_cli.evaluation.predictions import FILE_NAME
from mixlora_cli.evaluation.results import Results, Row, results_markdown
from mixlora_cli.evaluation.scoring import Evaluation, score_evaluation
from mixlora_cli.judging.judge import judge_answers, print_judged
from mixlora_cli.judging.verdicts import judged_table
from mixlora_cli.output import one_line_errors
from mixlora_cli.progress import say
from mixlora_cli.report.answers import Evaluated, evaluated, read_evaluated, sample
from mixlora_cli.report.page import Card, rules_of, write_page
from mixlora_cli.report.thumbnails import Thumbnails, picture_folder
from mixlora_cli.report.training import NOTHING, Drawn, Training, draw_trainings, read_training
from mixlora_cli.store import write_text
from mixlora_cli.tables import markdown

MARKDOWN, PAGE = "results.md", "report.html"
_Run = TypeVar("_Run", Evaluated, Training)


def report(config: ReportConfig) -> Path:
    """Write the report of an evaluation beside it, of a training without one into it, or of several; the page's path.

    Raises UserError when a folder has neither, or a file is broken; a training's evaluation that is cannot be shown,
    which is noted.
    """
    trainings: list[Training] = []
    runs: list[Evaluated] = []
    notes: list[str] = []
    for place in config.folders:
        if training := read_training(place):
            trainings.append(training)
        try:
            runs.append(read_evaluated(place))
        except UserError as error:
            if training is None:
                raise
            if any((training.folder / each / FILE_NAME).is_file() for each in (".", "eval")):
                notes.append(f"{error}.")
    folder = Path(config.output_dir or (runs[0] if runs else trainings[0]).folder).expanduser()
    with one_line_errors(folder):
        if not trainings:
            return write_report(runs, folder, config.report)
        drawn = draw_trainings(_told_apart(trainings), config.base, folder)
        drawn = replace(drawn, missing=[*notes, *drawn.missing])
        for note in drawn.missing:
            say(note)
        say(f"figures: {', '.join(str(path) for _, _, path in drawn.figures)}")
        return write_report(runs, folder, config.report, drawn)


def finish(evaluation: Evaluation, results: Results, judge: JudgeConfig, seed: int) -> Results:
    """Have the answers of a scored evaluation judged and write its report; the results with what the judge said.

    Raises UserError when the judge cannot go on; the report is written all the same, and the same command continues.
    """
    try:
        if judge.name != "none":
            judge_answers(evaluation.folder, judge)
    finally:
        if judge.name != "none":
            results = score_evaluation(evaluation)
        print_judged(results)
        write_report([evaluated(evaluation, results)], evaluation.folder, PageConfig(seed=seed))
    return results


def write_report(
    runs: Sequence[Evaluated], folder: Path, settings: PageConfig, drawn: Drawn = NOTHING
) -> Path:
    """Write report.html, and of evaluations results.md, each complete or not at all; the path of the page."""
    runs = _told_apart(runs)
    thumbnails = Thumbnails(int(settings.picture_megabytes * 1e6))
    cards = []
    for shown in sample(runs, settings.sample, settings.seed) if runs else ():
        place = picture_folder(shown.instance, runs[0].results.about, settings.images)
        cards.append(Card(shown, thumbnails(shown.instance, place)))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(run.label, run.results) for run in runs]
    notes = [*drawn.missing, *_data_notes(rows)]
    if thumbnails.missing:
        notes.append(
            f"{thumbnails.missing} pictures of the sample were not found or cannot be read; "
            "report.images=FOLDER says where they are."
        )
    if thumbnails.left_out:
        notes.append(f"{thumbnails.left_out} pictures are left out to keep this file small.")
    if runs:
        write_text(folder / MARKDOWN, _markdown(rows), errors="replace")
    write_text(folder / PAGE, write_page(runs, cards, notes, drawn), errors="replace")
    say(f"report: {folder / PAGE}")
    return folder / PAGE


def _told_apart(runs: Sequence[_Run]) -> list[_Run]:
    """Equal labels with the names of their runs' folders."""
    often = Counter(run.label for run in runs)
    return [
        replace(run, label=f"{run.label} ({_name(run)})") if often[run.label] > 1 else run for run in runs
    ]


def _name(run: Evaluated | Training) -> str:
    place = run.folder.resolve()
    return place.parent.name if place.name == "eval" else place.name


def _data_notes(rows: Sequence[Row]) -> list[str]:
    """Each note on incomplete sources once; with the labels of the evaluations that it is about unless it is all."""
    labels: dict[str, list[str]] = {}
    for label, results in rows:
        for note in source_notes(results.about.get("sources") or {}):
            labels.setdefault(note, []).append(label)
    return [
        f"{note}." if len(which) == len(rows) else f"{note}: {', '.join(which)}."
        for note, which in labels.items()
    ]


def _markdown(rows: Sequence[Row]) -> str:
    """results.md: the table in the paper's column order, what the judges say, and the rules."""

    def escaped(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    lines = [(escaped(label), results) for label, results in rows]
    limits = sorted({str(results.about["limit"]) for _, results in rows if results.about.get("limit")})
    sections = [f"# Results: {', '.join(label for label, _ in lines)}\n"]
    if limits:
        sections.append(f"Samples of at most {' or '.join(limits)} instances of each benchmark.\n")
    if notes := _data_notes(lines):
        sections.append("\n".join(f"- {escaped(note)}" for note in notes) + "\n")
    sections.append(results_markdown(lines))
    if judged := judged_table(lines):
        sections.append(markdown(judged))
    if rules := rules_of(rows):
        listed = "\n".join(f"- {column}, {count} instances: {rule}" for column, count, rule in rules)
        sections.append(f"## Rules\n\n{listed}\n")
    return "\n".join(sections)
