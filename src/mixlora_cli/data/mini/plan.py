"""From tasks to records: draw every instance of the data set, without drawing a pixel.

A plan is a function of the numbers of instances alone. Each task and split has random numbers of its own, and
no picture is drawn twice, so that no held-out instance is a training one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, TypeVar

from mixlora_cli.data.mini.canvas import Scene
from mixlora_cli.data.mini.objects import MiniObject, Split
from mixlora_cli.data.mini.seen import SEEN_TASKS, Task
from mixlora_cli.data.mini.unseen import UNSEEN_BENCHMARKS, Benchmark

_ATTEMPTS = 1000
Record = dict[str, Any]
Drawn = TypeVar("Drawn", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Counts:
    """How many instances a data set has."""

    train: int = 500
    """Training instances of each seen task."""
    heldout: int = 60
    """Held-out instances of each seen task."""
    unseen: float = 1.0
    """Share of each benchmark's pictures."""

    def pictures(self, benchmark: Benchmark) -> int:
        """Number of pictures of a benchmark, at least one."""
        return max(1, round(benchmark.num_pictures * self.unseen))


@dataclass(frozen=True)
class Plan:
    """Everything that is written to disk."""

    records: Mapping[str, list[Record]]
    """Records of "train", "heldout" and "unseen"."""
    pictures: Mapping[str, Scene]
    """File name under images/ -> what it shows."""
    metadata: Mapping[str, Any]

    def half(self, split: Split) -> Plan:
        """What belongs to the training tasks alone, or to the benchmarks alone."""
        names = {name for name, entry in self.metadata.items() if entry["split"] == split}
        return Plan(
            {
                key: members
                for key, members in self.records.items()
                if (key == "unseen") == (split == "unseen")
            },
            {name: picture for name, picture in self.pictures.items() if name.split("/")[0] in names},
            {name: entry for name, entry in self.metadata.items() if name in names},
        )


def make_plan(counts: Counts) -> Plan:
    """Draw all instances."""
    records: dict[str, list[Record]] = {"train": [], "heldout": [], "unseen": []}
    pictures: dict[str, Scene] = {}
    used: set[Scene] = set()
    for task in SEEN_TASKS.values():
        for split, count in (("train", counts.train), ("heldout", counts.heldout)):
            records[split] += _seen_records(task, split, count, used, pictures)
    for benchmark in UNSEEN_BENCHMARKS.values():
        records["unseen"] += _unseen_records(benchmark, counts.pictures(benchmark), used, pictures)
    return Plan(records, pictures, _metadata(records))


def contents(scene: Scene) -> list[str]:
    """What a picture shows, as sorted "kind:identity" strings.

    An object's identity is its code point, since an object and a shape may share a name.
    """
    found = set()
    for item in scene.items:
        identity = f"{item.content.code_point:x}" if isinstance(item.content, MiniObject) else item.content
        found.add(f"{item.kind}:{identity}")
    return sorted(found)


def _seen_records(
    task: Task, split: str, count: int, used: set[Scene], pictures: dict[str, Scene]
) -> list[Record]:
    rng = Random(f"mini/{task.name}/{split}")
    records = []
    for k in range(count):
        scene, question, answer = _with_new_picture(partial(task.instance, rng), used)
        name = f"{task.name}/{split}_{k:04d}.png"
        pictures[name] = scene
        records.append(_record(f"{task.name}_{split}_{k:04d}", task.name, name, scene, question, answer))
    return records


def _unseen_records(
    benchmark: Benchmark, count: int, used: set[Scene], pictures: dict[str, Scene]
) -> list[Record]:
    rng = Random(f"mini/{benchmark.name}/unseen")
    records = []
    for k in range(count):
        scene, questions = _with_new_picture(partial(benchmark.picture, rng, k), used)
        image_id = f"{benchmark.name}_{k:04d}"
        name = f"{benchmark.name}/{k:04d}.png"
        pictures[name] = scene
        for number, question in enumerate(questions):
            identity = f"{image_id}_{number}" if benchmark.pairs else image_id
            record = _record(identity, benchmark.name, name, scene, question.text, question.answer)
            record["benchmark"] = benchmark.name
            if benchmark.pairs:
                record["image_id"] = image_id
            records.append({**record, **question.extra})
    return records


def _with_new_picture(draw: Callable[[], Drawn], used: set[Scene]) -> Drawn:
    """Draw until the picture, the first of what is drawn, is none that the data set has already."""
    for _ in range(_ATTEMPTS):
        drawn = draw()
        if drawn[0] not in used:
            used.add(drawn[0])
            return drawn
    raise RuntimeError(f"no new picture in {_ATTEMPTS} attempts: {draw}")


def _record(identity: str, task: str, image: str, scene: Scene, question: str, answer: str) -> Record:
    return {
        "id": identity,
        "task_name": task,
        "image": image,
        "contents": contents(scene),
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _metadata(records: Mapping[str, list[Record]]) -> dict[str, Any]:
    """Definition, split, templates and numbers of instances of every task and benchmark."""
    numbers = {
        split: Counter(record["task_name"] for record in members) for split, members in records.items()
    }
    table: dict[str, Any] = {}
    entries: list[Task | Benchmark] = [*SEEN_TASKS.values(), *UNSEEN_BENCHMARKS.values()]
    for entry in entries:
        name, seen = entry.name, isinstance(entry, Task)
        table[name] = {
            "definition": entry.definition,
            "split": "seen" if seen else "unseen",
            "templates": list(entry.templates),
            "instances": {
                split: numbers[split][name] for split in (("train", "heldout") if seen else ("unseen",))
            },
        }
    return table
