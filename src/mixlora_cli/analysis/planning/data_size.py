"""How many instances a training would see, without reading pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mixlora_cli.config import DataConfig
from mixlora_cli.data.loading import prepared_root, read_manifest
from mixlora_cli.data.mini.plan import Counts
from mixlora_cli.data.mini.tasks import SEEN_TASKS
from mixlora_cli.data.records import read_annotations
from mixlora_cli.errors import UserError

PUBLISHED_INSTANCES = 191_105
"""Vision-Flan with up to 1,000 instances a task (Shen et al., section 5.1)."""
_PUBLISHED_PER_TASK = 1_000


def num_instances(data: DataConfig) -> tuple[int, str]:
    """Training instances after `data.tasks` and `data.max_per_task`, and where the number comes from.

    Raises:
        UserError: they cannot be counted.
    """
    if data.source == "vision_flan":
        return _vision_flan(data)
    if data.source == "mini":
        return _limited(dict.fromkeys(SEEN_TASKS, Counts().train), data), "counted"
    if data.train is None:
        raise UserError(
            "plan.instances=null: nothing to count; give data.train=<file> or plan.instances=<number>"
        )
    raws, _ = read_annotations(Path(data.train))
    tasks = Counter(str(raw.get("task_name")) for _, raw in raws if isinstance(raw, dict))
    return _limited(dict(tasks), data), "counted"


def _vision_flan(data: DataConfig) -> tuple[int, str]:
    manifest = read_manifest(prepared_root(data))
    if manifest is not None:
        return _limited(manifest["tasks"], data), "counted"
    if data.tasks is None:
        return PUBLISHED_INSTANCES, "published"
    return _PUBLISHED_PER_TASK * len(data.tasks), "published, 1,000 a task"


def _limited(tasks: dict[str, int], data: DataConfig) -> int:
    wanted = tasks if data.tasks is None else {task: tasks.get(task, 0) for task in data.tasks}
    limit = data.max_per_task
    return sum(count if limit is None else min(count, limit) for count in wanted.values())
