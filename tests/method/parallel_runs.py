"""What the processes of test_parallel.py run: a few steps of training, by themselves or together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from method_models import PAD, adapt, build_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
LENGTHS = (9, 4, 6, 11)
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """How processes share the work (`alone`, `ddp`, `fsdp2`), and the adapter's fields."""

    how: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a training left: whole tensors, by parameter name."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    weights: dict[str, Tensor]
    processes: int


def batch() -> dict[str, Tensor]:
    """Four texts of different lengths, padded on the right; their first two tokens carry no loss."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(4, 64, (length,), generator=generator) for length in LENGTHS]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = (ids != PAD).long()
    labels = torch.where(mask.bool(), ids, IGNORE)
    labels[:, :2] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(cases: list[Case]) -> list[Trained]:
    """Train each case; in several processes each takes its own rows of the batch."""
    if not dist.is_initialized() and any(case.how != "alone" for case in cases):
        dist.init_process_group("gloo")
    return [_train(case) for case in cases]


def _train(case: Case) -> Trained:
    model = adapt(build_llama(), **case.fields).train()
    alone = case.how == "alone"
    rank, processes = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    run_model = _WRAPPERS[case.how](model)
    # With the usual eps a step of a gradient that is nearly 0 is as large as any, and its direction is rounding.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    whole = batch()
    tokens = (whole["labels"][:, 1:] != IGNORE).sum()
    own = {name: rows.chunk(processes)[rank] for name, rows in whole.items()}
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = run_model(**own, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = F.cross_entropy(logits, own["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
        # Gradients are averaged over processes, and this one's tokens are a part of all.
        (total * processes / tokens).backward()
        shared = total.detach() / tokens
        if not alone:
            dist.all_reduce(shared)
        losses.append(shared.item())
        if step == 0:
            gradients = {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    weights = {n: _whole(p.detach()) for n, p in model.named_parameters() if "mixlora_" in n}
    return Trained(losses, gradients, weights, processes)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _shard(model: Any) -> nn.Module:
    """Each decoder block, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)
    return model


_WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "alone": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": _shard,
}
