"""The folder of one run: what it was asked, with which versions, how it went, and what it trained.

- config.yaml: the resolved configuration
- versions.json: Python, packages, platform, git commit, command line; processes, threads and number format
- metrics.jsonl: one line for each logged step
- definitions.json, questions.json: of each task its definition and some questions, with routing=task
- routing.jsonl: how each layer uses its factors, one line for each look (MixLoRA)
- checkpoints/checkpoint-<step>/: for resume=auto, each complete or not there
- adapter/: the trained adapter
- result.json: summary, written last: a run that has it is finished
- .writing: while a process writes here (`mixlora_cli/output.py`)

What ends in .partial is being written; a killed run leaves it behind, and the next one removes it.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers.trainer_utils import rotate_checkpoints

from mixlora_cli import __version__
from mixlora_cli.config import RequestsConfig, TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.launch import launched_processes
from mixlora_cli.models.forward import number_format
from mixlora_cli.store import TEMP, publish_folder, remove_temporary, sync_files, write_json, write_text

RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "tokenizers")
HARMLESS_KEYS = (
    "output_dir",
    "resume",
    "overwrite",
    "wandb.",
    "model.billions",  # decides only what train's other keys are where nobody gives them
    "launch.",  # the number of processes is compared itself, whoever started them
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.workers",
    "routing.health_every",
)
"""Keys that may differ when a run is resumed, because they do not change what it computes; prefixes end with a dot."""


class RunFolder:
    """Paths and guards of one run folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.versions = root / "versions.json"
        self.metrics = root / "metrics.jsonl"
        self.routing = root / "routing.jsonl"
        self.definitions = root / "definitions.json"
        self.questions = root / "questions.json"
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.result = root / "result.json"

    @property
    def started(self) -> bool:
        """Whether a run has begun training here."""
        return self.config.is_file()

    @property
    def finished(self) -> bool:
        """Whether a run has ended here and its adapter is complete."""
        try:
            self.read_result()
        except (OSError, ValueError):
            return False
        return True

    def read_result(self) -> dict[str, Any]:
        """The summary of a finished run."""
        summary: dict[str, Any] = json.loads(self.result.read_text())
        return summary

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        return newest_complete(self.checkpoints)[0]

    def open(self, config: TrainConfig) -> Path | None:
        """Check that training may start here, before anything heavy is loaded, and say where it starts.

        Returns:
            The checkpoint to resume from; None to start new.

        Raises:
            UserError: a run is here and neither `resume` nor `overwrite` says what to do with it, or it cannot
                be resumed.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"output_dir={self.root} is a file; give a folder")
        if self.finished:
            if not config.overwrite:
                raise UserError(
                    f"output_dir={self.root} holds a finished run; choose another output_dir=, "
                    "or overwrite=true to replace it"
                )
            return None
        if config.resume is None:
            if self.started and not config.overwrite:
                raise UserError(
                    f"output_dir={self.root} holds an unfinished run; resume=auto continues it, "
                    "overwrite=true starts again"
                )
            return None
        # Stronger than overwrite=true: who began with it and was interrupted adds resume=auto to the same command.
        checkpoint = self.newest_checkpoint() if config.resume == "auto" else _checkpoint_at(config.resume)
        if self.started and checkpoint is not None:
            refuse_changes(OmegaConf.to_container(OmegaConf.load(self.config)), asdict(config))
            self._refuse_other_circumstances(config.train.precision)
        return checkpoint

    def _refuse_other_circumstances(self, precision: Any) -> None:
        """What the configuration does not say, or not here: the number of processes, and what precision=auto means.

        With more or fewer processes other batches would follow, and DeepSpeed's checkpoints are cut for as many as
        wrote them.
        """
        before = json.loads(self.versions.read_text()) if self.versions.is_file() else {}
        processes, format_here = launched_processes(), number_format(precision)
        if before.get("processes", processes) != processes:
            raise UserError(
                f"resume: the run began with {before['processes']} processes, now there are {processes}; start as many "
                f"(launch.nproc x launch.nnodes = {before['processes']}), or give another output_dir="
            )
        if before.get("number_format", format_here) != format_here:
            raise UserError(
                f"resume: the run began in {before['number_format']}, but train.precision={precision} is "
                f"{format_here} on this machine; go on where it began, or give another output_dir="
            )

    def begin(self, config: TrainConfig, checkpoint: Path | None) -> None:
        """Write the configuration and the versions; a run that starts new first removes what an earlier one left."""
        if checkpoint is None:
            self.clear()
        for folder in (self.root, self.checkpoints):
            remove_temporary(folder)
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        circumstances = {
            "threads": torch.get_num_threads(),
            "number_format": number_format(config.train.precision),
        }
        write_json(self.versions, {**versions(), **circumstances})

    def clear(self) -> None:
        """Remove an earlier run's files; other files in the folder (Hydra's, the user's) stay."""
        # The mark of a finished run goes first: one that is half removed must not look finished. Its configuration
        # goes last: checkpoints must not outlive it, for they are resumed only under the same one.
        self.result.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.adapter):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (
            self.versions,
            self.metrics,
            self.routing,
            self.definitions,
            self.questions,
            self.config,
        ):
            file.unlink(missing_ok=True)


def versions() -> dict[str, Any]:
    """What a run depends on beside its configuration; absent packages and no git checkout are null."""
    packages: dict[str, str | None] = {"mixlora-cli": __version__}
    for name in RECORDED_PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git_commit": _git_commit(),
        "processes": launched_processes(),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with "+changes" where files were edited since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def refuse_changes(before: Any, now: Any, harmless: tuple[str, ...] = HARMLESS_KEYS) -> None:
    """Compare the nested configuration that a run began with to the one that it is resumed with.

    Raises:
        UserError: they differ in a key that is not `harmless`; names each with both values.
    """
    old, new = essentials(before, harmless), essentials(now, harmless)
    changed = [
        f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"resume: the configuration is not the one that the run began with: {', '.join(changed)}; "
            "give the same values, or another output_dir="
        )


def essentials(config: Mapping[str, Any], harmless: tuple[str, ...] = HARMLESS_KEYS) -> dict[str, Any]:
    """Dotted keys and values of a training's configuration that decide what it computes."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and node:
            for key, child in node.items():
                yield from walk(child, f"{path}.{key}" if path else str(key))
        else:
            yield path, list(node) if isinstance(node, tuple) else node

    prefixes = tuple(key for key in harmless if key.endswith("."))
    found = {
        key: value for key, value in walk(config, "") if key not in harmless and not key.startswith(prefixes)
    }
    return as_first_written(found)


NEUTRAL: dict[str, Any] = {
    "model.template_options": None,
    "model.picture_options": None,
    "model.quantization": "none",
    "adapter.gate": "hard",
    "adapter.pairing": "separate",
    "adapter.shared_factors": 0,
    "routing.normalize": False,
    "routing.router_init": "random",
    "routing.per": "layer",
    "routing.balance_step": 0.0,
    "train.router_learning_rate": None,
    "train.fsdp": False,
    "train.compile": False,
    "train.packing": False,
    "data.task_key": None,
    "data.streaming": False,
    "eval.server": None,
    "eval.server_model": None,
    "eval.requests": asdict(RequestsConfig()),
}
"""Keys that came later, each with the value at which a training, or an evaluation, is what it was before: there they
leave no trace."""
FIRST_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def as_first_written(essential: dict[str, Any]) -> dict[str, Any]:
    """Under the names of the first version, so that runs and folders that are named by a digest stay what they are."""
    values = {key: value for key, value in essential.items() if NEUTRAL.get(key, ...) != value}
    if "model.chat_template" in values:
        values["model.template"] = values.pop("model.chat_template")
    if "model.train_also" in values:
        also = values.pop("model.train_also")
        values["model.train_projector"] = also if also and also != [PROJECTOR] else bool(also)
    if values.get("adapter.target_modules", ...) is None:
        values["adapter.target_modules"] = FIRST_TARGETS
    return values


PROJECTOR = "multi_modal_projector"


def as_written_now(model: Mapping[str, Any]) -> dict[str, Any]:
    """Group `model` of a saved configuration under today's names."""
    values = dict(model)
    if "template" in values:
        values["chat_template"] = values.pop("template")
    if "train_projector" in values:
        values["train_also"] = [PROJECTOR] if values.pop("train_projector") else []
    return values


MANIFEST = "complete.json"
"""File of a checkpoint, written last: every other file and its size in bytes.

A file of the right size is complete, because all of them are on the disk before the folder gets its name.
"""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def temp_checkpoints(checkpoints: Path) -> Path:
    """The folder in which a checkpoint is written, under its own name, before it is put among the others."""
    return checkpoints / f"new{TEMP}"


def publish_checkpoint(temp: Path, checkpoints: Path, keep: int | None) -> Path:
    """Put a finished checkpoint among the others; only then delete older ones, and incomplete ones.

    Args:
        temp: the checkpoint in `temp_checkpoints(checkpoints)`, on the disk.
        keep: checkpoints that may stay; None = all.
    """
    write_manifest(temp)
    checkpoint = checkpoints / temp.name
    publish_folder(temp, checkpoint)
    temp.parent.rmdir()
    for other in _by_steps(checkpoints):
        if missing_from(other) is not None:
            shutil.rmtree(other, ignore_errors=True)
    rotate_checkpoints(str(checkpoints), save_total_limit=keep, use_mtime=True)
    return checkpoint


def write_manifest(checkpoint: Path) -> None:
    """Note the files of a checkpoint and their sizes."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_json(checkpoint / MANIFEST, sizes)


def missing_from(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; None if it is complete."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def newest_complete(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The complete checkpoint with the most steps, and what those with more steps lack."""
    incomplete: dict[Path, str] = {}
    for checkpoint in reversed(_by_steps(checkpoints)):
        lacks = missing_from(checkpoint)
        if lacks is None:
            return checkpoint, incomplete
        incomplete[checkpoint] = lacks
    return None, incomplete


def _checkpoint_at(resume: str) -> Path:
    path = Path(resume)
    lacks = missing_from(path)
    if lacks is not None:
        raise UserError(
            f"resume={resume}: no complete checkpoint there: {lacks}; "
            "resume=auto takes the newest complete one of output_dir"
        )
    return path


def _by_steps(checkpoints: Path) -> list[Path]:
    named = [
        (_CHECKPOINT.fullmatch(path.name), path) for path in checkpoints.glob("checkpoint-*") if path.is_dir()
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def publish_adapter(temp: Path, adapter: Path) -> None:
    """Put an adapter that is written to `temp` in its place."""
    sync_files(temp)
    publish_folder(temp, adapter)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, in order; none if there is no file. A last line cut short by a kill is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of metrics."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file of rows with a `step` down to those up to `step`, which are returned; creates an empty file."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
