"""Is the routing alive? What the routers choose while they train, by layer, and a warning when they collapse.

`routing.jsonl` gets one line for each look, with a list by layer for each measure; `metrics.jsonl` and wandb get the
means. A window reaches from one look to the next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixlora_cli.config import RoutingConfig
from mixlora_cli.data.encode import EncodedDataset
from mixlora_cli.method import health
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.model import MixLoraModel
from mixlora_cli.training.balance import BalanceLoss
from mixlora_cli.training.metrics import ROUTING, drop_rows_after
from mixlora_cli.training.routing_probe import Probe, adapted_layers, selected
from mixlora_cli.training.routing_summary import describe_collapse, has_collapsed, summarise

if TYPE_CHECKING:
    from mixlora_cli.training.trainer import AdapterTrainer

PROBE_INSTANCES = 4


def tend_routing(trainer: AdapterTrainer, routing: RoutingConfig, path: Path, console: Console) -> None:
    """Give the trainer of a MixLoRA model what `routing` asks for: a balance loss, and reports into `path`."""
    model = getattr(trainer.model, "base_model", None)
    if not isinstance(model, MixLoraModel):
        return
    if routing.balance_loss:
        trainer.balance = BalanceLoss(model.context, routing.balance_loss)
    if routing.health_every and adapted_layers(model):
        trainer.health = RoutingHealth(trainer, model, routing.health_every, path, console)
        trainer.add_callback(trainer.health)


class RoutingHealth(TrainerCallback):
    """Tallies the factors of each training instance on the device, and sums up when a look is due.

    The trainer calls `observe` after each forward pass and `report` when it logs, on every process.
    """

    def __init__(
        self, trainer: AdapterTrainer, model: MixLoraModel, every: int, path: Path, console: Console
    ) -> None:
        layers = adapted_layers(model)
        self.every = every
        self.path = path
        self.console = console
        self._names = list(layers)
        self._layers = list(layers.values())
        self._accelerator = trainer.accelerator
        rule = self._layers[0].rules["default"]
        self._rank = rule.rank
        self._tally = health.new_tally(len(layers), rule.num_factors, trainer.args.device)
        dataset = trainer.train_dataset
        assert isinstance(dataset, EncodedDataset)
        self._task_of = _task_numbers(dataset).to(trainer.args.device)
        self._task_tally = torch.zeros(
            int(self._task_of.max()) + 1, dtype=torch.int64, device=trainer.args.device
        )
        # What chance selects differs each time by definition.
        self._probe = (
            None if rule.router_input is None else _build_probe(trainer, model, self._layers, dataset)
        )
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
        health.count(self._tally, *selected(self._layers))
        tasks = self._task_of[indices]
        self._task_tally.scatter_add_(0, tasks, torch.ones_like(tasks))

    def report(self, step: int) -> dict[str, float]:
        """If a look is due, write its line, start the next window and return the means for the Trainer's log."""
        if not self._due:
            return {}
        self._due = False
        table = self._look(step)
        summary = summarise(table)
        if self._writes:
            with self.path.open("a") as file:
                file.write(json.dumps(table) + "\n")
        if not self._warned and has_collapsed(summary):
            self._warned = True
            self.console.print(f"warning: {describe_collapse(step, summary)}", markup=False, highlight=False)
        return {ROUTING + name: value for name, value in summary.items() if value is not None}

    def _look(self, step: int) -> dict[str, Any]:
        """The window's measures by layer, over all processes; the next window starts empty."""
        rows, columns = self._tally.shape
        both = torch.cat([self._tally.flatten(), self._task_tally])
        total: Tensor = self._accelerator.reduce(both, "sum").cpu()
        tally, tasks = total[: rows * columns].view(rows, columns), total[rows * columns :]
        self._tally.zero_()
        self._task_tally.zero_()
        measures = _measure(tally, tasks, self._rank)
        if self._probe is not None and self._probed is not None:
            before, self._probed = self._probed, self._probe()
            measures["churn_a"], measures["churn_b"] = (
                health.churn(old, new).cpu() for old, new in zip(before, self._probed, strict=True)
            )
        values = torch.stack(list(measures.values())).tolist()
        num_factors = (columns - 1) // 2
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
            **{name: [_number(value) for value in row] for name, row in zip(measures, values, strict=True)},
        }


def _measure(tally: Tensor, tasks: Tensor, rank: int) -> dict[str, Tensor]:
    counts_a, counts_b, shared = health.split_tally(tally)
    variety_a, variety_b = (health.variety(counts, tasks, rank) for counts in (counts_a, counts_b))
    return {
        "entropy_a": health.normalised_entropy(counts_a),
        "entropy_b": health.normalised_entropy(counts_b),
        "unused_a": health.unused_share(counts_a),
        "unused_b": health.unused_share(counts_b),
        "variety_a": variety_a,
        "variety_b": variety_b,
        "agreement": shared.double() / counts_a.sum(dim=-1).clamp(min=1),
        "collapsed": health.collapsed(variety_a, variety_b).double(),
    }


def _build_probe(
    trainer: AdapterTrainer, model: MixLoraModel, layers: Sequence[MixLoraLinear], dataset: EncodedDataset
) -> Probe:
    """The first instances; never more than a step reads, so that a look costs less than a step however small it is."""
    a_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    items = [dataset[i] for i in range(min(PROBE_INSTANCES, a_step, len(dataset)))]
    batch: dict[str, Tensor] = trainer.data_collator(items)  # type: ignore[arg-type]

    def read() -> None:
        assert trainer.model is not None
        trainer.read(trainer.model, trainer._prepare_inputs(dict(batch)))

    return Probe(model, layers, read)


def _task_numbers(dataset: EncodedDataset) -> Tensor:
    """A number for each record's task, at the place of its `Record.index`."""
    numbers: dict[str, int] = {}
    table = torch.zeros(max(item.index for item in dataset.items) + 1, dtype=torch.int64)
    for item in dataset.items:
        table[item.index] = numbers.setdefault(item.task, len(numbers))
    return table


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
