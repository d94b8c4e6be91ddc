"""Definitions of Vision-Flan's tasks: from its metadata where that has them, else what a task's questions begin with.

The `metadata.json` on the hub repeats the records and defines no task. But most tasks put one instruction, written by
their annotator, in front of every question; that instruction is what the questions of the task have in common.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mixlora_cli.data.definitions import parse_definitions
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError

MIN_WORDS = 4
"""A shorter common beginning ("What is the") is an accident, not an instruction."""
MIN_QUESTIONS = 2
"""The only question of a task begins like itself; that says nothing about the task."""
_SENTENCE_END = re.compile(r"[.!?:](?=\s)|\n")

Definitions = dict[str, dict[str, str]]
"""{task: {"definition": text, "origin": "metadata" or "questions"}}"""


def find_definitions(records: Iterable[Record], metadata: Path | None) -> Definitions:
    """Definition of each task that has one, by task name."""
    given = {} if metadata is None else _given(metadata)
    beginnings = common_beginnings(records)
    found: Definitions = {}
    for task in sorted(beginnings):
        if task in given:
            found[task] = {"definition": given[task], "origin": "metadata"}
        elif text := beginnings[task]:
            found[task] = {"definition": text, "origin": "questions"}
    return found


def _given(metadata: Path) -> Mapping[str, str]:
    """Empty where the metadata is of another kind: the records once more, say."""
    try:
        return parse_definitions(read_json(metadata, "task definitions"), str(metadata))
    except UserError:
        return {}


def common_beginnings(records: Iterable[Record]) -> dict[str, str | None]:
    """For each task the whole sentences or lines that all its first questions begin with; None where there are none."""
    shared: dict[str, str] = {}
    counts: dict[str, int] = {}
    for record in records:
        # The line break makes the end of a question an end that others share or do not.
        question = record.conversation[0].text.replace(IMAGE_MARKER, "").strip() + "\n"
        known = shared.get(record.task)
        shared[record.task] = question if known is None else os.path.commonprefix([known, question])  # noqa: RUF071  # texts, not paths
        counts[record.task] = counts.get(record.task, 0) + 1
    return {
        task: _whole_sentences(text) if counts[task] >= MIN_QUESTIONS else None
        for task, text in shared.items()
    }


def _whole_sentences(text: str) -> str | None:
    """`text` up to the last end of a sentence or line in it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cut = text[: ends[-1]].strip() if ends else ""
    return cut if len(cut.split()) >= MIN_WORDS else None
