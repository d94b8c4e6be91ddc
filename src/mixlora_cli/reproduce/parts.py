"""The commands of a cell, its training and its evaluations: what is asked, where it lands, how long it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixlora_cli.config import EvalConfig, ReproduceConfig, TrainConfig
from mixlora_cli.reproduce.cell import EVALUATION, SEEN_EVALUATION, Part, plain
from mixlora_cli.reproduce.compose import composed, versions
from mixlora_cli.reproduce.estimate import answer_seconds, train_seconds
from mixlora_cli.training.run_folder import essentials

BASE = "llava_align"
"""The experiment without a training."""
SEEN_LIMIT = 300
"""Held-out instances of each seen task (section 6); the built-in data has fewer and gives all."""
_DIGITS = 10
# Groups and keys of an evaluation that change no answer, or that belong to the run that it evaluates.
_NOT_ASKED = ("output_dir", "run", "judge", "adapter", "routing", "model", "launch")
_HARMLESS = ("eval.batch_size", "eval.cache_features")


def training(
    config: ReproduceConfig, experiment: str, seed: int, task: str | None, name: str
) -> tuple[Part, Path]:
    """`mixlora train`, and the cell's folder: its name ends with a digest of the configuration.

    Raises:
        UserError: the configuration does not compose, or `mixlora train` would refuse it.
    """
    given = [
        f"experiment={config.scale}/{experiment}",
        f"seed={seed}",
        *tasks_override([task] if task else None),
    ]
    given += [*_budget(config, "train.steps"), *config.train]
    asked = composed("train", TrainConfig, given)
    wanted = essentials(asdict(asked))
    folder = Path(config.output_dir) / f"{name}-{_digest(wanted, asked)}"
    # Last, so that no override parts the name of the folder from what is in it.
    given += [f"output_dir={folder}", "resume=auto"]
    seconds = train_seconds(config, asked, given)
    part = Part(
        "train",
        ("train", *given),
        folder / "result.json",
        plain(wanted),
        seconds,
        _about(asked),
        asked.train.steps,
    )
    return part, folder


def base_folder(config: ReproduceConfig, name: str) -> Path:
    """The folder of the untuned base's evaluations."""
    asked = composed("eval", EvalConfig, [f"experiment={config.scale}/{BASE}", *config.evaluation])
    return Path(config.output_dir) / f"{name}-{_digest(asdict(asked.model), asked)}"


def evaluation(config: ReproduceConfig, experiment: str, folder: Path, tasks: Sequence[str] | None) -> Part:
    """`mixlora eval` on the unseen benchmarks, or on held-out instances of `tasks` alone.

    Raises:
        UserError: the configuration does not compose, or `mixlora eval` would refuse it.
    """
    is_base, name = experiment == BASE, EVALUATION if tasks is None else SEEN_EVALUATION
    given = [f"experiment={config.scale}/{BASE if is_base else 'shared/evaluation'}", *tasks_override(tasks)]
    if tasks is not None:
        given += ["eval.seen=true", "eval.benchmarks=[]", f"eval.limit={SEEN_LIMIT}"]
    given += [*_budget(config, "eval.limit"), *config.evaluation]
    # Composed for the base, because the run's folder need not be there yet.
    asked = composed("eval", EvalConfig, [*given, *([] if is_base else ["adapter=none"])])
    target = [] if is_base else [f"run={folder}"]
    arguments = ("eval", *given, *target, f"output_dir={folder / name}")
    result = folder / name / "results.json"
    return Part(name, arguments, result, plain(_asked_of_evaluation(asked)), answer_seconds(config, asked))


def tasks_override(tasks: Sequence[str] | None) -> list[str]:
    """`data.tasks=[...]`; nothing for all tasks."""
    return [] if tasks is None else [f"data.tasks=[{','.join(tasks)}]"]


def _asked_of_evaluation(asked: EvalConfig) -> dict[str, Any]:
    values: dict[str, Any] = dict(versions(asked.data, asked.model))
    for key, value in asdict(asked).items():
        if key in _NOT_ASKED:
            continue
        if isinstance(value, Mapping):
            values |= {f"{key}.{name}": leaf for name, leaf in value.items()}
        else:
            values[key] = value
    return {key: value for key, value in values.items() if key not in _HARMLESS}


def _about(asked: TrainConfig) -> dict[str, Any]:
    optim = asked.train
    return {
        "steps": optim.steps,
        "epochs": None if optim.steps else optim.epochs,
        "batch": optim.effective_batch or optim.batch_size * optim.accumulation,
        "learning_rate": optim.learning_rate,
    }


def _digest(values: Mapping[str, Any], asked: TrainConfig | EvalConfig) -> str:
    content = json.dumps({**plain(values), **versions(asked.data, asked.model)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]


def _budget(config: ReproduceConfig, key: str) -> list[str]:
    return [] if config.budget is None else [f"{key}={config.budget}"]
