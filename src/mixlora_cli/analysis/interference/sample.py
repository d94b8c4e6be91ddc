"""The instances of each task, drawn with the seed, and their batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixlora_cli.config import InterferenceConfig
from mixlora_cli.data.encode import Item, encode_records
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.fingerprint import records_digest
from mixlora_cli.evaluation.sampling import grouped
from mixlora_cli.models.base import Base


@dataclass(frozen=True)
class Sample:
    """One task's instances in the order in which they are put into batches."""

    task: str
    records: tuple[Record, ...]
    digest: str
    """Changes with an instance, with their order and with the size of a batch."""


def draw_samples(config: InterferenceConfig) -> list[Sample]:
    """At most `batches` whole batches of each task, in the order of `tasks`. No model is needed.

    Raises:
        UserError: an unknown task, only one, or a task that has not enough instances for two batches.
    """
    settings = config.interference
    if settings.split == "heldout" and config.data.source == "json" and config.data.heldout is None:
        raise UserError(
            "interference.split=heldout needs held-out records: give data.heldout=<file>, or interference.split=train"
        )
    by_task = grouped(_load(config), lambda record: record.task)
    tasks = list(by_task) if config.tasks is None else list(dict.fromkeys(config.tasks))
    if len(tasks) < 2:
        raise UserError(
            f"tasks=[{','.join(map(cut, tasks))}]: the {settings.split} data has no other task, and one "
            "cannot disturb itself; expected at least two"
        )
    images = locate_files(config.data, settings.split).images
    samples = []
    for task in tasks:
        records = by_task.get(task, [])
        num_batches = min(len(records) // settings.batch_size, settings.batches)
        if num_batches < 2:
            raise UserError(
                f"tasks: {cut(task)} has {len(records)} instances in the {settings.split} data, too few for "
                f"two batches of interference.batch_size={settings.batch_size}: leave the task out, or lower "
                "the batch size"
            )
        # A generator of its own: other tasks change nothing. Hashed by the generator, so alike in every process.
        order = random.Random(f"interference/{config.seed}/{task}").sample(
            records, num_batches * settings.batch_size
        )
        digest = hashlib.sha256(f"{records_digest(order, images)}/{settings.batch_size}".encode())
        samples.append(Sample(task, tuple(order), digest.hexdigest()[:16]))
    return samples


def _load(config: InterferenceConfig) -> list[Record]:
    """Checked records of the wanted tasks; the pictures of other tasks are not opened."""
    data = config.data
    tasks = data.tasks if config.tasks is None else list(dict.fromkeys(config.tasks))
    try:
        return load_records(replace(data, tasks=tasks), config.interference.split, config.seed)
    except UserError as error:
        if config.tasks is not None:
            raise UserError(str(error).replace("data.tasks=", "tasks=", 1)) from None
        raise


def encode_batches(sample: Sample, base: Base, config: InterferenceConfig) -> list[list[Item]]:
    """Batches of one task as training reads them, in the order of the sample.

    Raises:
        UserError: a record cannot be encoded and `data.on_error` is "stop"; or too few are left.
    """
    data, size = config.data, config.interference.batch_size
    source = f"the {config.interference.split} data of {sample.task}"
    encoded = encode_records(sample.records, base, data.max_length, data.on_error, source)
    batches = _whole(list(encoded.items), size)
    if len(batches) < 2:
        raise UserError(
            f"tasks: {sample.task} has {len(encoded)} instances that can be encoded, too few for two batches of "
            f"interference.batch_size={size}: leave the task out, or lower the batch size"
        )
    return batches


def _whole(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items) - size + 1, size)]
