"""Trainings in processes of their own that end in the middle: `python killed_runs.py jobs.pickle`.

Everything is imported once; each job then runs in a fork. The ends are real ones: SIGKILL by the process to itself,
or the kernel's limit on the size of files, which cuts a write in two.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mixlora_cli.config import TrainConfig
from mixlora_cli.errors import UserError
from mixlora_cli.training import train as run_module
from mixlora_cli.training.trainer import AdapterTrainer

USER_ERROR = 2


@dataclass(frozen=True)
class Job:
    """A training and how it ends; with none of the ends it runs to its own."""

    config: TrainConfig
    at_step: int | None = None
    """Killed when this step's weights are updated, and nothing of it is logged or saved."""
    at_save: tuple[int, int] | None = None
    """Killed just before the nth thing (from 0) that the saving of this step does to a file or folder of the run."""
    at_bytes: int | None = None
    """Killed when a file is written beyond so many bytes, in the middle of that write."""
    full_at_bytes: int | None = None
    """A write beyond so many bytes fails, as on a full disk, from the second checkpoint on."""


class _At(TrainerCallback):
    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.job.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


class _FileEvents:
    """Counts what is done to files below a folder while `step` is saved and kills the process before the nth."""

    EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod")

    def __init__(self, root: str, step: int, nth: int) -> None:
        self.root, self.step, self.nth = root, step, nth
        self.count, self.active = 0, False
        sys.addaudithook(self)
        save = AdapterTrainer._save_checkpoint

        def saving(trainer: AdapterTrainer, *arguments: Any) -> None:
            self.active = trainer.state.global_step == step
            save(trainer, *arguments)
            if self.active:
                print(json.dumps({"events": self.count}), flush=True)
            self.active = False

        AdapterTrainer._save_checkpoint = saving  # type: ignore[method-assign]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in self.EVENTS and str(arguments[0]).startswith(self.root):
            if self.count == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def _limit_files(size: int, kill: bool) -> None:
    """Let no file grow beyond `size` bytes, once the first checkpoint is there."""
    save = AdapterTrainer._save_checkpoint

    def saving(trainer: AdapterTrainer, *arguments: Any) -> None:
        if any(Path(str(trainer.args.output_dir)).glob("checkpoint-*")):
            # Python itself ignores the signal and makes it an error.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(trainer, *arguments)

    AdapterTrainer._save_checkpoint = saving  # type: ignore[method-assign]


def _run(job: Job) -> None:
    build = run_module.build_trainer

    def build_and_watch(*arguments: Any, **more: Any) -> Any:
        return build(*arguments[:-1], [_At(job), *arguments[-1]], **more)

    run_module.build_trainer = build_and_watch
    if job.at_save is not None:
        _FileEvents(job.config.output_dir, *job.at_save)
    if job.at_bytes is not None:
        _limit_files(job.at_bytes, kill=True)
    if job.full_at_bytes is not None:
        _limit_files(job.full_at_bytes, kill=False)
    try:
        run_module.train(job.config)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        os._exit(USER_ERROR)
    os._exit(0)


def _in_a_fork(job: Job, out: Path) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            _run(job)
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "said": out.read_text()}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    jobs = [Job(**fields) for fields in pickle.loads(path.read_bytes())]
    print(json.dumps([_in_a_fork(job, path.with_suffix(f".{n}")) for n, job in enumerate(jobs)]))
