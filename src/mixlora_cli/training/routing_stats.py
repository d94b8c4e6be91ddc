"""Is the routing alive? What the routers choose while they train, by layer, and a warning when they collapse.

`routing.jsonl` gets one line for each look, with a list by layer for each measure; `metrics.jsonl` and wandb get the
means. A window reaches from one look to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.data.encode import EncodedDataset
from mixlora_cli.method import health
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.model import MixLoraModel, selected
from mixlora_cli.progress import say
from mixlora_cli.training.callbacks import ROUTING
from mixlora_cli.training.run_folder import append_row, drop_rows_after

if TYPE_CHECKING:
    from mixlora_cli.training.trainer import AdapterTrainer

PROBE_INSTANCES = 4
COUNTED_TASKS = 256
"""Of more tasks the use of factors is not counted task by task."""
JUDGED_FROM = 32
"""Instances in a window from which on its variety says anything."""


class RoutingHealth(TrainerCallback):
    """Tallies the factors of each training instance on the device, and sums up when a look is due.

    The trainer calls `observe` after each forward pass and `report` when it logs, on every process.
    """

    def __init__(
        self, trainer: AdapterTrainer, model: MixLoraModel, every: int, path: Path, console: Console
    ) -> None:
        layers = model.decoder_layers()
        device = trainer.args.device
        self.every = every
        self.path = path
        self.console = console
        self._names = list(layers)
        self._layers = list(layers.values())
        self._accelerator = trainer.accelerator
        rule = self._layers[0].rules["default"]
        self._rank = rule.rank
        self._tally = health.new_tally(len(layers), rule.num_factors, device)
        dataset = trainer.train_dataset
        assert isinstance(dataset, EncodedDataset)
        self._task_of = _task_numbers(dataset).to(device)
        self._task_tally = torch.zeros(int(self._task_of.max()) + 1, dtype=torch.int64, device=device)
        apart = len(self._task_tally) if len(self._task_tally) <= COUNTED_TASKS else 0
        shape = (len(layers), apart, 2 * rule.num_factors)
        self._by_task = torch.zeros(shape, dtype=torch.int64, device=device)
        # What chance selects differs each time by definition.
        by_chance = rule.router_input is None
        self._probe = None if by_chance else _build_probe(trainer, model, self._layers, dataset)
        self._probed: tuple[Tensor, Tensor] | None = None
        self._due = self._warned = self._writes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start a window; lines that lie after the step the run starts from are dropped."""
        self._writes = state.is_world_process_zero
        if self._writes:
            drop_rows_after(self.path, state.global_step)
        self._probed = None if self._probe is None else self._probe()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A look is due; it appears in the row that is logged for this step."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._due = control.should_log = True

    def observe(self, indices: Tensor) -> None:
        """Count the factors of the forward pass that has just run.

        Args:
            indices: (B,) `Record.index` of its instances.
        """
        chosen, tasks = selected(self._layers), self._task_of[indices]
        health.count(self._tally, *chosen)
        if self._by_task.numel():
            health.count_by_task(self._by_task, tasks, *chosen)
        self._task_tally.scatter_add_(0, tasks, torch.ones_like(tasks))

    def report(self, step: int) -> dict[str, float]:
        """If a look is due, write its line, start the next window and return the means for the Trainer's log."""
        if not self._due:
            return {}
        self._due = False
        table = self._look(step)
        summary = summarise(table)
        if self._writes:
            append_row(self.path, table)
        if not self._warned and has_collapsed(summary):
            self._warned = True
            say(f"warning: {describe_collapse(step, summary)}", self.console)
        return {ROUTING + name: value for name, value in summary.items() if value is not None}

    def _look(self, step: int) -> dict[str, Any]:
        """The window's measures by layer, over all processes; the next window starts empty."""
        tallies = (self._tally, self._task_tally, self._by_task)
        together = torch.cat([each.flatten() for each in tallies])
        total: Tensor = self._accelerator.reduce(together, "sum").cpu()
        parts = torch.split(total, [each.numel() for each in tallies])
        tally, tasks, by_task = (part.view(each.shape) for part, each in zip(parts, tallies, strict=True))
        for each in tallies:
            each.zero_()
        measures = _measure(tally, tasks, by_task, self._rank)
        if self._probe is not None and self._probed is not None:
            before, self._probed = self._probed, self._probe()
            measures["churn_a"], measures["churn_b"] = (
                health.churn(old, new).cpu() for old, new in zip(before, self._probed, strict=True)
            )
        values = torch.stack(list(measures.values())).tolist()
        num_factors = (self._tally.shape[1] - 1) // 2
        return {
            "step": step,
            "instances": int(tasks.sum()),
            "tasks": int((tasks > 0).sum()),
            "rank": self._rank,
            "factors": num_factors,
            "agreement_by_chance": round(self._rank / num_factors, 6),
            "layers": self._names,
            "churn_a": None,
            "churn_b": None,
            **{
                name: [None if math.isnan(value) else round(value, 6) for value in row]
                for name, row in zip(measures, values, strict=True)
            },
        }


def _measure(tally: Tensor, tasks: Tensor, by_task: Tensor, rank: int) -> dict[str, Tensor]:
    counts_a, counts_b, agreeing = health.split_tally(tally)
    # Of one task, or of too many, nothing is known.
    known = bool(by_task.numel()) and int((tasks > 0).sum()) > 1
    nothing = torch.full((len(tally),), math.nan, dtype=torch.float64)
    information_a, information_b = (
        health.task_information(counts, rank) if known else nothing for counts in by_task.chunk(2, dim=2)
    )
    variety_a, variety_b = (health.variety(counts, tasks, rank) for counts in (counts_a, counts_b))
    return {
        "entropy_a": health.normalised_entropy(counts_a),
        "entropy_b": health.normalised_entropy(counts_b),
        "unused_a": health.unused_share(counts_a),
        "unused_b": health.unused_share(counts_b),
        "variety_a": variety_a,
        "variety_b": variety_b,
        "information_a": information_a,
        "information_b": information_b,
        "agreement": agreeing.double() / counts_a.sum(dim=-1).clamp(min=1),
        "collapsed": health.collapsed(variety_a, variety_b).double(),
    }


def _task_numbers(dataset: EncodedDataset) -> Tensor:
    """A number for each record's task, at the place of its `Record.index`."""
    numbers: dict[str, int] = {}
    table = torch.zeros(max(item.index for item in dataset.items) + 1, dtype=torch.int64)
    for item in dataset.items:
        table[item.index] = numbers.setdefault(item.task, len(numbers))
    return table


def _build_probe(
    trainer: AdapterTrainer, model: MixLoraModel, layers: Sequence[MixLoraLinear], dataset: EncodedDataset
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that gives the `selected` factors of the first instances now, and leaves no trace.

    Never more instances than a step reads, so that a look costs less than a step however small it is.
    """
    a_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    items = [dataset[i] for i in range(min(PROBE_INSTANCES, a_step, len(dataset)))]
    batch: dict[str, Tensor] = trainer.data_collator(items)  # type: ignore[arg-type]

    def probe() -> tuple[Tensor, Tensor]:
        assert trainer.model is not None
        with undisturbed(model, layers), torch.no_grad():
            trainer.read(trainer.model, trainer._prepare_inputs(dict(batch)))
            return selected(layers)

    return probe


@contextmanager
def undisturbed(model: MixLoraModel, layers: Sequence[MixLoraLinear]) -> Iterator[None]:
    """Inside, the model is in evaluation mode; outside, nothing of it shows.

    Modes of all modules, the routing context, the layers' last selections and the random generators are put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    context = dict(vars(model.context))
    selections = [dict(layer.last_selection) for layer in layers]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        # The loss that balances the routers is about the batches that they learn from.
        model.context.collect_balance = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            vars(model.context).update(context)
            for layer, selection in zip(layers, selections, strict=True):
                layer.last_selection = selection


def summarise(table: Mapping[str, Any]) -> dict[str, float | None]:
    """One look's means over layers, the worst layers, and how many have collapsed (None: nothing to judge by)."""
    summary: dict[str, float | None] = {
        name: table[name] for name in ("instances", "tasks", "agreement_by_chance")
    }
    summary["layers"] = len(table["layers"])
    for name in ("entropy", "unused", "variety", "information", "churn"):
        for side in "ab":
            summary[f"{name}_{side}"] = _mean(table[f"{name}_{side}"])
    summary["agreement"] = _mean(table["agreement"])
    for side in "ab":
        summary[f"entropy_{side}_min"] = min(table[f"entropy_{side}"])
        summary[f"unused_{side}_max"] = max(table[f"unused_{side}"])
    judged = table["instances"] >= JUDGED_FROM and None not in table["variety_a"]
    summary["collapsed_layers"] = sum(table["collapsed"]) if judged else None
    return summary


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return round(sum(known) / len(known), 6) if known else None


def has_collapsed(summary: Mapping[str, Any]) -> bool:
    """Whether more than half of the layers have a router that gives all instances nearly the same factors."""
    collapsed = summary["collapsed_layers"]
    return collapsed is not None and collapsed > summary["layers"] / 2


def describe_collapse(step: int, summary: Mapping[str, Any]) -> str:
    """The warning, without its colour: where, how much, what helps."""
    return (
        f"routing has collapsed in {summary['collapsed_layers']:.0f} of {summary['layers']:.0f} layers at step {step}: "
        f"a router gives nearly the same factors to all {summary['instances']:.0f} instances of "
        f"{summary['tasks']:.0f} tasks (routing.jsonl has the layers); routers that learn "
        "(adapter.router_grad=straight_through) with a higher routing.balance_loss, say 0.01, spread the use"
    )


def routing_result(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a finished run says of its routing: the last look, and a warning if it ever collapsed; nothing without any.

    The warning says when that was first, and how it ended.

    Args:
        rows: of `metrics.jsonl`.
    """
    looks = [row for row in rows if row.get("routing")]
    if not looks:
        return {}
    judged = [row for row in looks if row["routing"].get("collapsed_layers") is not None]
    first = next((row for row in judged if has_collapsed(row["routing"])), None)
    warning = None
    if first is not None:
        last = judged[-1]
        end = f"{last['routing']['collapsed_layers']:.0f} of {last['routing']['layers']:.0f} layers"
        warning = f"{describe_collapse(first['step'], first['routing'])}; at step {last['step']}: {end}"
    return {"routing": looks[-1]["routing"], "routing_warning": warning}
