"""Task definitions as users have them: an object by task, or a list of entries that name their task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mixlora_cli.errors import UserError, cut

TASK_KEYS = ("task_name", "task", "name")
TEXT_KEYS = ("definition", "description", "instruction")
FORMS = 'write {"task name": {"definition": "..."}} or {"task name": "..."}'
_NAMED = 5  # tasks that a message lists


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
    if not isinstance(raw, list) or not any(_text(entry) for entry in raw):
        raise UserError(f"{source}: expected an object of task names, got {_what(raw)}; {FORMS}")
    definitions: dict[str, str] = {}
    for position, entry in enumerate(raw):
        task = next((entry[key] for key in TASK_KEYS if key in _keys(entry)), None)
        if not isinstance(task, str):
            raise UserError(
                f"{source}: entry {position} names no task; expected one of {', '.join(TASK_KEYS)}"
            )
        text = _checked(entry, task, source)
        if definitions.setdefault(task, text) != text:
            raise UserError(f"{source}: task {cut(task)} has two different definitions; expected one")
    return definitions


def require_definitions(
    tasks: Iterable[str], definitions: Mapping[str, str], source: str | None
) -> dict[str, str]:
    """Definitions of exactly these tasks.

    Raises:
        UserError: some task has none; names those tasks and the file that should hold them.
    """
    wanted = list(dict.fromkeys(tasks))
    missing = [task for task in wanted if task not in definitions]
    if missing:
        names = ", ".join(map(cut, missing[:_NAMED])) + (
            f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else ""
        )
        place = (
            f"give data.metadata=<file> with them; {FORMS}"
            if source is None
            else f"add them to {source}, by the records' task_name"
        )
        raise UserError(
            f"routing=task reads a definition of each task, and {len(missing)} of {len(wanted)} tasks have none "
            f"({names}): {place}"
        )
    return {task: definitions[task] for task in wanted}


def _what(raw: Any) -> str:
    if not isinstance(raw, list):
        return f"a {type(raw).__name__}"
    # Vision-Flan's published metadata.json is such a file: its training records once more.
    records = any("conversations" in _keys(entry) for entry in raw)
    return f"a list of {len(raw)} {'training records' if records else 'entries'} without any definition"


def _keys(entry: Any) -> Iterable[str]:
    return entry if isinstance(entry, Mapping) else ()


def _text(entry: Any) -> str | None:
    """The first text that defines a task; None without one."""
    texts = [entry] if isinstance(entry, str) else [entry[key] for key in TEXT_KEYS if key in _keys(entry)]
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _checked(entry: Any, task: str, source: str) -> str:
    text = _text(entry)
    if text is None:
        raise UserError(f"{source}: task {cut(task)} has no text in 'definition'")
    return text
