"""Which factors the tasks of a training use, and which of the tasks select as a prompt does.

    <run folder>/task-factors.npz    about (JSON), a, b

`a` and `b` (L, E, T) count the instances of task t that select factor e in layer l. With routing=task every instance of
a task selects alike, so one is looked at; else a seeded sample of the training's records. `about` says what the counts
depend on. The file is made anew where that has changed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from mixlora_cli.config import DataConfig
from mixlora_cli.data.encode import Item, encode_prompt, encode_prompts
from mixlora_cli.data.images import stamp
from mixlora_cli.data.loading import MANIFEST, load_records, parts_of, prepared_root
from mixlora_cli.data.records import Record
from mixlora_cli.data.sources import place_of
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models.generate import batches
from mixlora_cli.models.session import Run, Session
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import atomic, digest_of

Ints = npt.NDArray[np.int64]
FILE = "task-factors.npz"
FORMAT = 1
"""Raise when the file changes its meaning."""
INSTANCES = 8
"""Of each task, where instances of a task select differently."""
_BATCH = 16
_SHOWN = 5  # tasks of a factor in the JSON


@dataclass(frozen=True)
class TaskFactors:
    """How many instances of T tasks select each of E factors, in L layers."""

    tasks: Sequence[str]
    instances: Ints
    """(T,) instances of each task that were looked at; each stands for all of them with routing=task."""
    layers: Sequence[str]
    """Names of the decoder's adapted layers."""
    rank: int
    """r, factors that an instance selects."""
    counts_a: Ints
    """(L, E, T): instances of task t that select factor e of A in layer l."""
    counts_b: Ints
    """(L, E, T), of B."""

    @property
    def num_factors(self) -> int:
        """E."""
        return int(self.counts_a.shape[1])

    @property
    def by_chance(self) -> float:
        """What `alike` gives on average where chance draws the factors."""
        return self.rank / self.num_factors

    def alike(self, layers: Sequence[str], a: Any, b: Any) -> list[tuple[str, float]]:
        """The tasks by how alike they select to one prompt, the most alike first.

        The similarity is the share of the prompt's r factors that an instance of the task selects, too: the mean over
        instances, layers, A and B; from 0 to 1, `by_chance` for unrelated choices.

        Args:
            layers: names of the layers that the prompt's factors are of; those that are not known here are left out.
            a, b: (L, r) the prompt's factors of A and of B.
        """
        place = {name: number for number, name in enumerate(self.layers)}
        known = [number for number, name in enumerate(layers) if name in place]
        rows = np.array([[place[layers[number]]] for number in known], dtype=np.int64)
        shared = np.zeros(len(self.tasks))
        for counts, chosen in ((self.counts_a, a), (self.counts_b, b)):
            shared += counts[rows, np.asarray(chosen)[known]].sum(axis=(0, 1))
        shares = shared / self.instances / (2 * len(known) * self.rank)
        return sorted(zip(self.tasks, shares.tolist(), strict=True), key=lambda pair: -pair[1])

    def as_json(self) -> dict[str, Any]:
        """What a page shows: for each factor the tasks that use it most, as (number of the task, share)."""
        return {
            "tasks": list(self.tasks),
            "instances": int(self.instances.max()),
            "layers": list(self.layers),
            "rank": self.rank,
            "factors": self.num_factors,
            "a": _most(self.counts_a / self.instances),
            "b": _most(self.counts_b / self.instances),
        }


def _most(shares: npt.NDArray[np.float64]) -> list[list[list[list[float]]]]:
    """Of (L, E, T) the largest of each factor, as [t, share]; those that are zero are left out."""
    order = np.argsort(-shares, axis=-1, kind="stable")[..., :_SHOWN]
    return [
        [
            [[int(t), round(float(row[t]), 4)] for t in best if row[t] > 0]
            for row, best in zip(rows, bests, strict=True)
        ]
        for rows, bests in zip(shares, order, strict=True)
    ]


def task_factors(
    run: Run, session: Session, instances: int = INSTANCES, seed: int = 0, console: Console | None = None
) -> TaskFactors | None:
    """What the tasks of a run's training select: read from the run folder, else found out and kept there.

    Args:
        run: that `session` was opened for.
        session: with the embeddings of the training's tasks where the adapter routes by task.
        instances: looked at of each task, where they differ.
        seed: of the sample.
        console: for a bar, and for why there is nothing; the standard error unless given.

    Returns:
        None without factors that depend on the instance: no MixLoRA adapter, or one that chooses by chance. None, too,
        where the training's data cannot be found; then a line says so.
    """
    if run.selects_by not in ("tokens", "task"):
        return None
    wanted = _fingerprint(run, session, instances, seed)
    path = None if run.root is None else run.root / FILE
    if path is not None and (kept := _read(path, wanted)) is not None:
        return kept
    try:
        items = (
            _one_of_each_task(session) if run.selects_by == "task" else _sample(run, session, instances, seed)
        )
    except UserError as error:
        say(
            f"{run.label}: which factors the tasks of the training use is not known: {error}. It is found out once "
            f"where that data is, and kept in the run folder ({FILE})",
            console,
        )
        return None
    found = _count(items, session, console)
    if path is not None:
        # A folder that cannot be written costs only time.
        with suppress(OSError), atomic(path) as temp, temp.open("wb") as stream:
            about = {**wanted, "tasks": found.tasks, "layers": found.layers}
            about |= {"rank": found.rank}
            smallest = np.min_scalar_type(int(found.instances.max()))
            np.savez_compressed(
                stream,
                about=np.array(json.dumps(about)),
                instances=found.instances,
                a=found.counts_a.astype(smallest),
                b=found.counts_b.astype(smallest),
            )
    return found


def _fingerprint(run: Run, session: Session, instances: int, seed: int) -> dict[str, Any]:
    """What the counts depend on; "data" is None where that is not on this machine."""
    common = {
        "format": FORMAT,
        "adapter": run.digest,
        "base": session.base.fingerprint,
        "dtype": str(session.dtype),
    }
    if run.selects_by == "task":
        embeddings = {task: each.tolist() for task, each in (session.embeddings or {}).items()}
        return {**common, "data": digest_of(embeddings)}
    with suppress(UserError):
        return {**common, "data": None if run.data is None else _data_digest(run.data, instances, seed)}
    return {**common, "data": None}


def _data_digest(data: DataConfig, instances: int, seed: int) -> str | None:
    """Of which records are looked at, without reading them: places, and sizes and times of files."""
    marks: list[Any] = []
    if data.is_built_in:
        from mixlora_cli.data.mini import build, text  # the generator is only loaded where it is used

        marks.append(build.generator_digest("seen") if data.source == "mini" else text.DRAWN)
    elif data.source == "vision_flan":
        marks.append(stamp(prepared_root(data) / MANIFEST))
    else:
        for part in parts_of(data.train or {}):
            place = place_of(part.place)
            marks.append("on the hub" if place.on_hub else stamp(place.path))
    keys = ("source", "root", "train", "images", "task_key", "tasks", "max_per_task")
    return None if None in marks else digest_of([[asdict(data)[key] for key in keys], marks, instances, seed])


def _read(path: Path, wanted: Mapping[str, Any]) -> TaskFactors | None:
    """What was kept; None where it is of something else, or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            if wanted["data"] is None:
                about["data"] = None  # what was found out where the data was still holds
            if any(about[key] != value for key, value in wanted.items()):
                return None
            counts = [kept[side].astype(np.int64) for side in ("a", "b")]
            sizes = about["rank"], *counts
            return TaskFactors(about["tasks"], kept["instances"], about["layers"], *sizes)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _one_of_each_task(session: Session) -> list[Item]:
    """A prompt of each task, which for the router says nothing but its task.

    Raises:
        UserError: there are none.
    """
    turns = (Turn("human", "?"), Turn("gpt", "?"))
    if not session.embeddings:
        raise UserError("the adapter's folder has no definitions of its tasks")
    return [
        encode_prompt(Record(number, task, task, (), turns), session.base.chat)
        for number, task in enumerate(session.embeddings)
    ]


def _sample(run: Run, session: Session, instances: int, seed: int) -> list[Item]:
    """Prompts of the training's records, at most `instances` of each task.

    Raises:
        UserError: they cannot be found or read.
    """
    if run.data is None:
        raise UserError(f"{run.root} does not say which data the adapter was trained on")
    data = replace(run.data, max_per_task=min(instances, run.data.max_per_task or instances), on_error="skip")
    records = {
        record.index: record for record in load_records(data, "train", seed)
    }  # a weight may repeat one
    return list(encode_prompts([*records.values()], session.base.chat, "skip", "the training data"))


def _count(items: Sequence[Item], session: Session, console: Console | None) -> TaskFactors:
    assert session.tuner is not None
    layers = session.tuner.decoder_layers()
    rule = next(iter(layers.values())).rules["default"]
    tasks = list(dict.fromkeys(item.task for item in items))
    numbers = {task: number for number, task in enumerate(tasks)}
    counts = {side: np.zeros((len(layers), rule.num_factors, len(tasks)), dtype=np.int64) for side in "ab"}
    rows = np.arange(len(layers))[:, None, None]
    for batch in with_bar(batches(items, _BATCH), "which tasks use which factors", console):
        found = session.selections(batch)
        whose = np.array([numbers[item.task] for item in batch])[None, :, None]
        for side in "ab":
            chosen = torch.stack([getattr(found[name], f"index_{side}") for name in layers])  # (L, B, r)
            np.add.at(counts[side], (rows, chosen.cpu().numpy(), whose), 1)
    instances = np.bincount([numbers[item.task] for item in items])
    sizes = rule.rank, counts["a"], counts["b"]
    return TaskFactors(tasks, instances, list(layers), *sizes)
