"""Every task and benchmark of the small data set has a definition that task routing can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlora_cli.data.definitions import parse_definitions


def test_every_task_of_every_split_has_its_own(
    built: Path, read_records: Mapping[str, list[dict[str, Any]]]
) -> None:
    definitions = parse_definitions(json.loads((built / "metadata.json").read_text()), "metadata.json")
    tasks = [record["task_name"] for records in read_records.values() for record in records]
    needed = {task: definitions[task] for task in tasks}
    assert len(needed) == 26 + 8
    assert len(set(needed.values())) == 26 + 8
    assert all(7 <= len(text.split()) <= 45 and text.endswith(".") for text in needed.values())
