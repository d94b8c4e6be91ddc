"""`mixlora plan`: a training's configuration in, a table and plan.json out; no weight and no picture is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from mixlora_cli.analysis.planning.counts import Count, count_parameters, num_frozen, num_trained
from mixlora_cli.analysis.planning.data_size import num_instances
from mixlora_cli.analysis.planning.disk import Disk, disk
from mixlora_cli.analysis.planning.fit import Fit, advise, chosen_stage, fits_of
from mixlora_cli.analysis.planning.hardware import GPUS, Gpu
from mixlora_cli.analysis.planning.memory import Trained
from mixlora_cli.analysis.planning.network import Network, read_network
from mixlora_cli.analysis.planning.schedule import Schedule, Workload, make_schedule, read_workload
from mixlora_cli.config import PlanConfig
from mixlora_cli.models.skeleton import attach_to_skeleton, build_skeleton
from mixlora_cli.training.precision import choose_dtype

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Everything that was worked out."""

    config: PlanConfig
    gpu: Gpu
    counts: tuple[Count, ...]
    network: Network
    work: Workload
    instances_from: str
    fits: tuple[Fit, ...]
    stage: str
    """Of the configuration itself."""
    advice: str
    disk: Disk
    schedule: Schedule
    published: Schedule | None
    """The same training as the code published with the paper computes it; MixLoRA only."""

    @property
    def own(self) -> Fit:
        """The configured stage."""
        return next(fit for fit in self.fits if fit.stage == self.stage)


def plan(config: PlanConfig) -> Path:
    """Print the plan and write it to `<output_dir>/plan.json`, whose path is returned.

    Raises:
        UserError: the model's sizes are not known, the instances cannot be counted, the batch cannot be split.
    """
    from mixlora_cli.analysis.planning.report import as_dict, show

    made = make_plan(config)
    console = Console(soft_wrap=True)
    show(made, console)
    file = Path(config.output_dir) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(as_dict(made), indent=2) + "\n")
    console.print(f"written: {file}", markup=False, highlight=False)
    return file


def make_plan(config: PlanConfig) -> Plan:
    """Work everything out; see `plan` for errors."""
    instances, origin = (
        num_instances(config.data) if config.plan.instances is None else (config.plan.instances, "given")
    )
    network, counts = _network(config)
    work = read_workload(config.plan, config.train, network, instances)
    model = Trained(
        num_trained(counts), num_frozen(counts), _in_bf16(config), trains_base=network.trains_base
    )
    gpu = GPUS[config.plan.gpu]
    fits = fits_of(config, network, model, work, gpu)
    published = None
    if config.adapter.name == "mixlora":
        published = make_schedule(network, config.train, work, config.plan, gpu, dense=True)
    return Plan(
        config=config,
        gpu=gpu,
        counts=counts,
        network=network,
        work=work,
        instances_from=origin,
        fits=fits,
        stage=chosen_stage(config),
        advice=advise(fits),
        disk=disk(counts, network, instances, config.train.cache_features, config.train.keep_checkpoints),
        schedule=make_schedule(network, config.train, work, config.plan, gpu),
        published=published,
    )


def _network(config: PlanConfig) -> tuple[Network, tuple[Count, ...]]:
    skeleton = build_skeleton(config.model)
    network = read_network(
        skeleton,
        config.adapter,
        config.routing,
        config.rank,
        config.factors,
        config.model.train_projector,
        config.model.attn_implementation,
    )
    adapted = attach_to_skeleton(
        skeleton,
        config.adapter,
        config.routing,
        config.rank,
        config.factors,
        config.model.train_projector,
    )
    return network, count_parameters(adapted)


def _in_bf16(config: PlanConfig) -> bool:
    """Whether the GPU computes in bf16: `auto` does, since every GPU of the table has it in hardware."""
    return config.train.precision == "auto" or choose_dtype(config.train.precision) == torch.bfloat16
