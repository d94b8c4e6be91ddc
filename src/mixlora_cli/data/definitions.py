"""Task definitions: read from a file in any of their forms, or made of what the records ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from mixlora_cli.config import DataConfig
from mixlora_cli.data.loading import Split, definitions_file, load_records, task_names
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError, cut
from mixlora_cli.progress import say

TASK_KEYS = ("task_name", "task", "name")
TEXT_KEYS = ("definition", "description", "instruction")
_FORMS = 'write {"task name": {"definition": "..."}} or {"task name": "..."}'
_NAMED = 5  # tasks that a message lists
_QUESTIONS, _QUESTION_LENGTH = 3, 300
ASKED = 8
"""Questions of a task that a run folder keeps."""
HOW_MADE = f"their names and first {_QUESTIONS} questions"
"""What `made_definitions` makes definitions of, for messages."""


def load_definitions(data: DataConfig) -> dict[str, str]:
    """Definition of each task; empty when the configuration names no file of them.

    Raises:
        UserError: the file cannot be read as such.
    """
    path = definitions_file(data)
    if path is None:
        return {}
    source = f"data.metadata={path}"
    return parse_definitions(read_json(path, "a JSON file of task definitions", source), source)


def made_definitions(records: Iterable[Record]) -> dict[str, str]:
    """For each task its name and the questions of its first records, which stand in for a definition."""
    first: dict[str, list[str]] = {}
    for record in records:
        questions = first.setdefault(record.task, [])
        if len(questions) < _QUESTIONS:
            questions.append(_question_of(record)[:_QUESTION_LENGTH])
    return {
        task: "\n".join([task.replace("_", " "), *dict.fromkeys(filter(None, questions))])
        for task, questions in first.items()
    }


def _question_of(record: Record) -> str:
    """The first question in one line, without the places of pictures."""
    text = next(turn.text for turn in record.conversation if turn.role == "human")
    return " ".join(text.replace(IMAGE_MARKER, " ").split())


def asked_questions(records: Iterable[Record], most: int = ASKED) -> dict[str, list[str]]:
    """For each task the questions of its first records, without repetitions."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        questions = found.setdefault(record.task, {})
        if len(questions) < most and (text := _question_of(record)):
            questions[text] = None
    return {task: list(questions) for task, questions in found.items() if questions}


def trained_definitions(data: DataConfig) -> dict[str, str]:
    """Definitions of the tasks that the training records name, where the training read a file of definitions.

    Those of the whole file where the records are streamed, as the training had them, or are not there any more. Empty
    where no file is named.

    Raises:
        UserError: the file is not there.
    """
    definitions = load_definitions(data)
    if definitions and not data.streaming:
        with suppress(UserError):
            named = data.tasks or task_names(data)
            return {task: definitions[task] for task in named if task in definitions}
    return definitions


def definitions_of(
    data: DataConfig, tasks: Iterable[str], made: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Definitions of exactly these tasks.

    Args:
        data: names the file of definitions, or none.
        tasks: whose definitions are wanted.
        made: where no file is named: those that the training has made. What they lack is made of the unseen and the
            held-out records in the same way; None: nothing is made.

    Raises:
        UserError: some task has none; names those tasks and the file that should hold them.
    """
    definitions, path = load_definitions(data), definitions_file(data)
    wanted = list(dict.fromkeys(tasks))
    if path is None and made is not None:
        definitions = dict(made)
        given: dict[Split, Any] = {"unseen": data.unseen, "heldout": data.heldout}
        for split in given:
            if given[split] is not None and not definitions.keys() >= set(wanted):
                definitions = made_definitions(load_records(data, split)) | definitions
        if new := [task for task in wanted if task in definitions and task not in made]:
            say(f"{len(new)} tasks that the training does not know are defined by {HOW_MADE}")
    if missing := [task for task in wanted if task not in definitions]:
        more = f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else ""
        place = f"add them to {path}, by the records' task_name"
        if path is None:
            place = f"give data.metadata=<file> with them; {_FORMS}"
        raise UserError(
            f"routing=task reads a definition of each task, and {len(missing)} of {len(wanted)} tasks have none "
            f"({', '.join(map(cut, missing[:_NAMED]))}{more}): {place}"
        )
    return {task: definitions[task] for task in wanted}


def parse_definitions(raw: Any, source: str) -> dict[str, str]:
    """Definition of each task.

    Args:
        raw: decoded JSON: `{task: {"definition": str, ...}}`, `{task: str}` (what the code published with the paper
            holds for Vision-Flan), or `[{"task_name": str, "definition": str, ...}]`; `description` and `instruction`
            are read where there is no `definition`.
        source: where it comes from, for messages.

    Raises:
        UserError: it has another form, or a task has no definition or several.
    """
    if isinstance(raw, Mapping):
        return {str(task): _checked(entry, str(task), source) for task, entry in raw.items()}
    if not isinstance(raw, list) or not any(map(_text, raw)):
        what = f"a {type(raw).__name__}"
        if isinstance(raw, list):
            # Vision-Flan's published metadata.json is such a file: its training records once more.
            records = any(isinstance(entry, Mapping) and "conversations" in entry for entry in raw)
            noun = "training records" if records else "entries"
            what = f"a list of {len(raw)} {noun} without any definition"
        raise UserError(f"{source}: expected an object of task names, got {what}; {_FORMS}")
    definitions: dict[str, str] = {}
    for position, entry in enumerate(raw):
        keys = entry if isinstance(entry, Mapping) else {}
        task = next((keys[key] for key in TASK_KEYS if key in keys), None)
        if not isinstance(task, str):
            raise UserError(
                f"{source}: entry {position} names no task; expected one of {', '.join(TASK_KEYS)}"
            )
        text = _checked(entry, task, source)
        if definitions.setdefault(task, text) != text:
            raise UserError(f"{source}: task {cut(task)} has two different definitions; expected one")
    return definitions


def _text(entry: Any) -> str | None:
    """The first text that defines a task; None without one."""
    texts = [entry]
    if isinstance(entry, Mapping):
        texts = [entry[key] for key in TEXT_KEYS if key in entry]
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _checked(entry: Any, task: str, source: str) -> str:
    text = _text(entry)
    if text is None:
        raise UserError(f"{source}: task {cut(task)} has no text in 'definition'")
    return text
