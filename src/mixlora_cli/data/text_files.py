"""Text files that a user gives (records, definitions, a benchmark's rows and YAML file), read by one rule.

UTF-8, with or without a byte order mark. What cannot be read is answered in one line that names the file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixlora_cli.errors import UserError

TOO_DEEP = "nested too deeply, thousands of brackets in one another"
_HUGE_NUMBER = "a number with thousands of digits; write it as a text, or leave it out"
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: Path, expected: str, name: str = "") -> str:
    """The text of a file, every line break as "\\n".

    Args:
        path: the file.
        expected: what the file should be, for messages.
        name: what messages call it; its path unless given.

    Raises:
        UserError: it is not there, cannot be read, or is not UTF-8 text.
    """
    name = name or str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 text at byte {error.start}; expected {expected}, save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); expected {expected}") from None
    return io.StringIO(text.removeprefix("\ufeff"), newline=None).getvalue()


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONDecodeError: it is no JSON.
        UserError: it is JSON that Python does not take up; `where` names the place in the message.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # what `int` says of thousands of digits
        raise UserError(f"{where}: malformed JSON: {_HUGE_NUMBER}") from None
    except RecursionError:
        raise UserError(f"{where}: malformed JSON: {TOO_DEEP}") from None


def read_json(path: Path, expected: str, name: str = "") -> Any:
    """The value of a JSON file whose texts are all Unicode; see `read_text`.

    Raises:
        UserError: it cannot be read as such.
    """
    name = name or str(path)
    try:
        value = parse_json(read_text(path, expected, name), name)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: cannot be read as JSON ({error}); expected {expected}") from None
    if found := lone_surrogate(value):
        raise UserError(f"{name}: text that is no Unicode: {found}; write the whole character")
    return value


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of JSON lines that are not blank, with their numbers from 1."""
    # not splitlines(): it also splits at characters that JSON allows inside strings
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def lone_surrogate(value: Any) -> str | None:
    """Names half a character in a decoded value, which no file and no tokenizer takes; None without one.

    JSON's escapes write characters beyond U+FFFF in two halves, and a text that was cut may end with one.
    """
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            if not each.isascii() and (found := _SURROGATE.search(each)):
                return f"lone surrogate U+{ord(found[0]):04X}"
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
    return None
