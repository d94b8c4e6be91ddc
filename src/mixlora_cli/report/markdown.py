"""results.md: the table in the paper's column order, what the judges say, and the rules."""

from __future__ import annotations

from collections.abc import Sequence

from mixlora_cli.evaluation.results import Results, results_markdown
from mixlora_cli.judging.verdicts import judged_table
from mixlora_cli.report.data_notes import data_notes
from mixlora_cli.tables import markdown

FILE_NAME = "results.md"


def write_markdown(rows: Sequence[tuple[str, Results]]) -> str:
    """The whole file as text."""
    escaped = [(_cell(label), results) for label, results in rows]
    limits = sorted({str(results.about["limit"]) for _, results in rows if results.about.get("limit")})
    sections = [f"# Results: {', '.join(label for label, _ in escaped)}\n"]
    if limits:
        sections.append(f"Samples of at most {' or '.join(limits)} instances of each benchmark.\n")
    if notes := data_notes(escaped):
        sections.append("\n".join(f"- {_cell(note)}" for note in notes) + "\n")
    sections.append(results_markdown(escaped))
    if judged := judged_table(escaped):
        sections.append(markdown(judged))
    if rules := _rules(rows):
        sections.append("## Rules\n\n" + "\n".join(rules) + "\n")
    return "\n".join(sections)


def _rules(rows: Sequence[tuple[str, Results]]) -> list[str]:
    found: dict[str, str] = {}
    for _, results in rows:
        for score in (*results.scores, results.mean, results.seen):
            if score is not None:
                found.setdefault(score.column, f"- {score.column}, {score.n} instances: {score.rule}")
    return list(found.values())


def _cell(text: str) -> str:
    """A text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
