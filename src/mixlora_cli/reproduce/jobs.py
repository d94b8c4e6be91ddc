"""From a table's rows to jobs: the commands that make a row, their folder and their time; and what is there of them.

The rows are Hydra's experiments, but each runs in processes of its own and not as a job of Hydra's multirun: a crash,
or a kernel that kills for memory, then ends one cell and not the sweep; a cell that is there is not run again; and a
row is trained and evaluated before the next, so that the table fills row by row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixlora_cli.config import EvalConfig, PlanConfig, ReproduceConfig, TrainConfig
from mixlora_cli.data.mini.build import generator_digest, mini_root
from mixlora_cli.data.mini.objects import Split
from mixlora_cli.data.mini.plan import Counts
from mixlora_cli.data.mini.seen import SEEN_TASKS as MINI_TASKS
from mixlora_cli.errors import UserError
from mixlora_cli.hydra_app import composed
from mixlora_cli.paths import stage_one_digest
from mixlora_cli.reproduce.paper import BASE, ROWS, SEEN_TASKS, TABLES, Row, rows_of
from mixlora_cli.store import write_json
from mixlora_cli.training.run_folder import RunFolder, as_first_written, essentials

RECORD = "cell.json"
EVALUATION = "eval"
"""Folder of the unseen benchmarks' evaluation inside a cell; where `mixlora compare` and others look."""
SEEN_EVALUATION = "eval-seen"
"""Folder of the evaluation on held-out instances of the six seen tasks."""
SEEN_LIMIT = 300
"""Held-out instances of each seen task (section 6); the built-in data has fewer and gives all."""
DEFAULT_SEEDS = {"mini": [0, 1, 2], "paper": [0]}
_HOUR = 3600.0
_DIGITS = 10
# Groups and keys of an evaluation that change no answer, or that belong to the run that it evaluates.
_NOT_ASKED = ("output_dir", "run", "judge", "adapter", "routing", "model", "launch")
_HARMLESS = ("eval.batch_size", "eval.cache_features")

_LORA, _LARGE, _COMPARED = "lora_r16", "mixlora_e32_r8", "mixlora_e16_r4"
"""Rows of the figures: the interference of the last is shown beside that of the first, which is measured before."""
_ABILITIES = {
    "mini": "[statement_truth,mini_snli_ve],[number_reading,mini_textvqa],[above_or_below,mini_vsr],"
    "[object_presence,mini_pope],[object_category,mini_cifar100]",
}
"""Figure 6: a seen task and the unseen benchmark that asks for the same ability. For scale=paper give `drawing=`: the
names depend on the held-out file that is used."""


@dataclass(frozen=True)
class Step:
    """One command of a job, a process of its own."""

    name: str
    """"train", "eval", "eval-seen" or a figure's."""
    arguments: tuple[str, ...]
    """Of `mixlora`."""
    result: Path
    """Written last: a step that has it is finished."""
    asked: Mapping[str, Any]
    """What decides the result; a step that was finished with something else is done anew."""
    seconds: float | None = None
    """How long it should take; None: nobody knows."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a table tells of a training: steps, epochs, batch, learning_rate."""


@dataclass(frozen=True)
class Job:
    """One cell of a grid: an experiment with one seed (and for specialists one task) and one configuration."""

    experiment: str
    seed: int
    task: str | None
    folder: Path
    """Its name says what it is and ends with a digest of the configuration."""
    steps: tuple[Step, ...]
    after: Path | None = None
    """Folder of a job that has to end before this one begins; it comes earlier in the grid, if at all."""

    @property
    def title(self) -> str:
        """What a person calls it: "lora_r4 seed 0"."""
        task = "" if self.task is None else f" {self.task}"
        return f"{self.experiment}{task} seed {self.seed}"

    def missing(self) -> list[Step]:
        """Steps that are not there, not made with what is asked now, or not with the adapter that is there."""
        return [step for step in self.steps if not self.has(step)]

    def has(self, step: Step) -> bool:
        """Whether a step is finished."""
        if not step.result.is_file():
            return False
        if (
            step.name == "train"
        ):  # the run folder itself knows; whoever deleted cell.json need not train again
            config: Any = OmegaConf.to_container(OmegaConf.load(RunFolder(self.folder).config))
            return _plain(essentials(config)) == step.asked
        if read_record(self.folder).get("parts", {}).get(step.name, {}).get("asked") != step.asked:
            return False
        return all(self.has(each) for each in self.steps if each.name == "train")

    def begin(self, step: Step, when: float) -> None:
        """Note what is asked before a missing step runs; results of other settings or another adapter go."""
        for each in self.steps if step.name == "train" else (step,):
            if each.name != "train":
                each.result.unlink(missing_ok=True)
        self.note(step, when=when)

    def note(self, step: Step | None = None, seconds: float | None = None, when: float = 0.0) -> None:
        """Write in `cell.json` what the cell is, when it was last asked for, what `step` was asked and took."""
        record = read_record(self.folder)
        parts = record.get("parts", {})
        if step is not None:
            parts[step.name] = {"asked": dict(step.asked), "seconds": seconds}
        content = {
            "experiment": self.experiment,
            "seed": self.seed,
            "task": self.task,
            "about": next((dict(each.about) for each in self.steps if each.about), {}),
            "used": when or record.get("used", 0.0),
            "parts": parts,
        }
        write_json(self.folder / RECORD, content)


def read_record(folder: Path) -> dict[str, Any]:
    """`cell.json` of a cell's folder; empty when there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def build_grid(config: ReproduceConfig) -> list[Job]:
    """All jobs, in the order in which they are run: every row with the first seed, then the further seeds.

    Raises:
        UserError: an experiment, an override or the name of a row in `replicated` or `only` is wrong.
    """
    named = {row.name: row for row in ROWS}
    is_table = config.what in TABLES
    rows = (
        rows_of(str(config.what)) if is_table else tuple(named[name] for name in (_LORA, _LARGE, _COMPARED))
    )
    _check_names("replicated", config.replicated, {row.name for table in TABLES for row in rows_of(table)})
    _check_names("only", config.only, {row.name for row in rows})
    rows = tuple(row for row in rows if config.only is None or row.name in config.only)
    first, *others = config.seeds or DEFAULT_SEEDS[config.scale]
    wanted = [(row, first) for row in rows]
    if is_table:  # one training is enough for a picture
        replicated = {row.name for row in rows if config.replicated is None or row.name in config.replicated}
        wanted += [(row, seed) for seed in others for row in rows if row.name in replicated - {BASE}]
    return [
        _job(config, row, seed, task)
        for row, seed in wanted
        for task in (SEEN_TASKS[config.scale] if row.per_task else (None,))
    ]


def _check_names(key: str, names: Sequence[str] | None, known: Collection[str]) -> None:
    if unknown := [name for name in names or [] if name not in known]:
        raise UserError(f"{key}={unknown[0]}: no such row; rows are {', '.join(sorted(known))}")


def _job(config: ReproduceConfig, row: Row, seed: int, task: str | None) -> Job:
    steps: list[Step] = []
    if row.name == BASE:
        base = composed("eval", EvalConfig, [f"experiment={config.scale}/{BASE}", *config.evaluation])
        model = essentials({"model": asdict(base.model)})
        model = {key.removeprefix("model."): value for key, value in model.items()}
        folder = _folder(config, row.name, seed, task, model, base)
    else:
        steps = [_training(config, row.name, seed, task)]
        folder = steps[0].result.parent
    if config.what in TABLES:
        layout = TABLES[config.what]
        tasks = (task,) if task else () if layout.of_every_task else SEEN_TASKS[config.scale]
        evaluation = _evaluation(config, row.name, folder, tasks if layout.on_seen_tasks else None)
        return Job(row.name, seed, task, folder, (*steps, evaluation))
    lora = _training(config, _LORA, seed, None).result.parent
    steps += _drawings(config, row.name, folder, lora)
    return Job(row.name, seed, task, folder, tuple(steps), lora if row.name == _COMPARED else None)


def _folder(
    config: ReproduceConfig,
    experiment: str,
    seed: int,
    task: str | None,
    wanted: Mapping[str, Any],
    asked: TrainConfig | EvalConfig,
) -> Path:
    which = f"-{task.replace('/', '-').replace('+', '-')}" if task else ""
    content = json.dumps({**_plain(wanted), **_versions(asked, "seen")}, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
    return Path(config.output_dir) / f"{experiment}{which}-seed{seed}-{digest}"


def _training(config: ReproduceConfig, experiment: str, seed: int, task: str | None) -> Step:
    given = [f"experiment={config.scale}/{experiment}", f"seed={seed}", *_tasks([task] if task else None)]
    given += [*_budget(config, "train.steps"), *config.train]
    asked = composed("train", TrainConfig, given)
    wanted, optim = essentials(asdict(asked)), asked.train
    folder = _folder(config, experiment, seed, task, wanted, asked)
    # Last, so that no override parts the name of the folder from what is in it.
    given += [f"output_dir={folder}", "resume=auto"]
    batch = optim.effective_batch or optim.batch_size * optim.accumulation
    # MixLoRA and full tuning take longer than LoRA, whose speed is known; the time left that is shown corrects that.
    seconds = None if optim.steps is None else optim.steps * batch / config.speed.train
    about = {
        "steps": optim.steps,
        "epochs": None if optim.steps else optim.epochs,
        "batch": batch,
        "learning_rate": optim.learning_rate,
    }
    return Step(
        "train",
        ("train", *given),
        folder / "result.json",
        _plain(wanted),
        _planned(given) if config.scale == "paper" else seconds,
        about,
    )


def _planned(arguments: Sequence[str]) -> float | None:
    """What `mixlora plan` says of a training; None where it refuses."""
    from mixlora_cli.analysis.plan import make_plan  # loads libraries that mini does without

    kept = [text for text in arguments if not text.startswith("resume=")]
    try:
        return make_plan(composed("plan", PlanConfig, kept)).schedule.hours * _HOUR
    except UserError:
        return None


def _evaluation(config: ReproduceConfig, experiment: str, folder: Path, tasks: Sequence[str] | None) -> Step:
    """`mixlora eval` on the unseen benchmarks, or on held-out instances of `tasks` alone, () being all."""
    is_base, name = experiment == BASE, EVALUATION if tasks is None else SEEN_EVALUATION
    given = [f"experiment={config.scale}/{BASE if is_base else 'shared/evaluation'}", *_tasks(tasks)]
    if tasks is not None:
        given += ["eval.seen=true", "eval.benchmarks=[]", f"eval.limit={SEEN_LIMIT}"]
    given += [*_budget(config, "eval.limit"), *config.evaluation]
    # Composed for the base, because the run's folder need not be there yet.
    asked = composed("eval", EvalConfig, [*given, *([] if is_base else ["adapter=none"])])
    target = [] if is_base else [f"run={folder}"]
    arguments = ("eval", *given, *target, f"output_dir={folder / name}")
    wanted: dict[str, Any] = dict(_versions(asked, "unseen" if tasks is None else "seen"))
    for key, value in asdict(asked).items():
        leaves = {f"{key}.{leaf}": each for leaf, each in value.items()} if isinstance(value, Mapping) else {}
        wanted |= {} if key in _NOT_ASKED else leaves or {key: value}
    wanted = as_first_written({key: value for key, value in wanted.items() if key not in _HARMLESS})
    return Step(
        name, arguments, folder / name / "results.json", _plain(wanted), _answer_seconds(config, asked)
    )


def _answer_seconds(config: ReproduceConfig, asked: EvalConfig) -> float | None:
    """Of an evaluation on the built-in data, at the known speed; None for other data."""
    if asked.data.source != "mini":
        return None
    sizes: Collection[int] = _unseen_sizes().values()
    if asked.eval.benchmarks == []:
        sizes = [Counts().heldout] * len(asked.data.tasks or MINI_TASKS)
    return sum(min(size, asked.eval.limit or size) for size in sizes) / config.speed.answer


@cache
def _unseen_sizes() -> Counter[str]:
    """Instances of each unseen benchmark of the built-in data, which is drawn on first use as a training would."""
    records = json.loads((mini_root() / "unseen.json").read_text(encoding="utf-8"))
    return Counter(str(record["benchmark"]) for record in records)


def _drawings(config: ReproduceConfig, experiment: str, folder: Path, lora: Path) -> list[Step]:
    """The drawings that come from a row's training; Figure 7 reads what Figure 2 measured in the cell `lora`."""
    given = [f"data={'mini' if config.scale == 'mini' else 'vision_flan'}", *config.drawing]
    few = None if config.budget is None else max(config.budget, 2)
    if experiment != _LARGE:
        compared = [f"compare={lora / 'interference'}"] if experiment == _COMPARED else []
        batches = [] if few is None else [f"interference.batches={few}"]
        return [_drawing("interference", "interference", folder, [*given, *compared, *batches])]
    instances = [] if few is None else [f"tsne.instances={few}"]
    version = {"data version": generator_digest("unseen")} if config.scale == "mini" else {}
    maps = [_drawing("tsne", "tsne", folder, [*given, *instances], version)]
    if pairs := _ABILITIES.get(config.scale):
        maps.append(_drawing("tsne", "tsne-pairs", folder, [*given, f"pairs=[{pairs}]", *instances], version))
    return maps


def _drawing(
    command: str, name: str, folder: Path, arguments: Sequence[str], version: Mapping[str, str] | None = None
) -> Step:
    """`version` is that of benchmarks which it draws."""
    given = (command, f"run={folder}", *arguments, f"output_dir={folder / name}")
    asked = {"arguments": list(given), **(version or {})}
    return Step(name, given, folder / name / f"{command}.json", asked)


def _tasks(tasks: Sequence[str] | None) -> list[str]:
    return [f"data.tasks=[{','.join(tasks)}]"] if tasks else []


def _budget(config: ReproduceConfig, key: str) -> list[str]:
    return [] if config.budget is None else [f"{key}={config.budget}"]


def _versions(asked: TrainConfig | EvalConfig, split: Split) -> dict[str, str]:
    """What decides a result beside the configuration: what the built-in data draws for training and held-out instances
    ("seen") or for benchmarks ("unseen"), the built-in base's weights.
    """
    data, model = asked.data.source, asked.model.source
    return {
        "data version": generator_digest(split) if data == "mini" else data,
        "base version": stage_one_digest() if model == "mini" else model,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that what was asked and what is asked compare."""
    content: dict[str, Any] = json.loads(json.dumps(dict(values), sort_keys=True))
    return content
