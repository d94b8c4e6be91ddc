"""What was computed of a picture, remembered by its size and mark of change. Losing it costs only time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mixlora_cli.data.images import Stamp


class Memory:
    """Texts by picture name, in one file for each `subject` (a picture folder)."""

    def __init__(self, folder: Path, subject: str) -> None:
        self._file = folder / f"{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
        self._entries = self._read()
        self._changed = False

    def get(self, name: str, stamp: Stamp | None) -> list[str] | None:
        """What was remembered of the picture, if it is still the same."""
        entry = self._entries.get(name)
        return None if entry is None or stamp is None or tuple(entry[0]) != stamp else entry[1]

    def put(self, name: str, stamp: Stamp, texts: Sequence[str]) -> None:
        """Remember until `save`."""
        self._entries[name] = (list(stamp), list(texts))
        self._changed = True

    def save(self) -> None:
        """Write beside and rename; a cache that cannot be written is no error."""
        if not self._changed:
            return
        part = self._file.with_suffix(f".{os.getpid()}.part")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._entries), encoding="utf-8")
            part.replace(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _read(self) -> dict[str, tuple[list[int], list[str]]]:
        try:
            raw = json.loads(self._file.read_text("utf-8"))
            return {
                str(name): ([int(part) for part in stamp], [str(text) for text in texts])
                for name, (stamp, texts) in raw.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
