"""What a computation costs: by the clock, fairly on a machine whose speed drifts, and by count.

All variants run once in each round, in an order that is drawn anew: what slows the machine down for a while slows all
of them, and none always runs after the same other one. Counts are operations, bytes kept for the backward pass and
peak memory, and do not vary.
"""

from __future__ import annotations

import gc
import json
import math
import random
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate needs it too
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mixlora_cli.config import Part

Value = str | int | float
MAX_ROUNDS = 500
"""However quick a case is."""


@dataclass(frozen=True)
class Variant:
    """One way to compute."""

    run: Callable[[], object]
    """What is timed."""
    before: Callable[[], None] = lambda: None
    """Done before each run, outside the time."""


@dataclass(frozen=True)
class Rounds:
    """How often a case runs."""

    count: int
    warmup: int = 0
    min_seconds: float = 0.0
    """More rounds than `count` are run until the counted ones took so long (at most `MAX_ROUNDS`)."""
    seed: int = 0
    """Of the order within the rounds."""


@dataclass(frozen=True)
class Measurement:
    """One case, and once it was measured, what came out."""

    part: Part
    case: Mapping[str, Value]
    """What is asked, all that it depends on: shape, number format, batch, rounds, ..."""
    seconds: Mapping[str, list[float]] = field(default_factory=dict)
    """By variant, one number for each counted round."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By variant: operations, bytes, or whatever else does not vary."""

    @property
    def key(self) -> str:
        """What identifies the case within the file: the part and everything that the case is made of."""
        return json.dumps([self.part, dict(self.case)], sort_keys=True)

    @property
    def label(self) -> str:
        names = [str(self.case[name]) for name in ("shape", "dtype", "precision") if name in self.case]
        batch = self.case.get("batch", self.case.get("batch_size"))
        return " ".join([self.part, *names, *([] if batch is None else [f"batch {batch}"])])

    @property
    def pools(self) -> list[int]:
        """E of the variants of a layer, ascending."""
        return [int(pool) for pool in str(self.case["pools"]).split(",")]

    @property
    def rounds(self) -> Rounds:
        """How often it runs; each case shuffles on its own."""
        seconds = float(self.case.get("min_seconds", 0.0))
        return Rounds(self.number("rounds"), self.number("warmup"), seconds, self.number("seed"))

    def number(self, name: str) -> int:
        return int(self.case[name])


def interleave(
    variants: Mapping[str, Variant],
    rounds: Rounds,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every counted round: `times[name][i]` is that of round i."""
    order = random.Random(rounds.seed)
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # its pauses would fall on one variant or another
    try:
        for _ in range(rounds.warmup):
            for name in order.sample(names, len(names)):
                _seconds(variants[name], device, clock)
        start = clock()
        for number in range(max(rounds.count, MAX_ROUNDS)):
            if number >= rounds.count and clock() - start >= rounds.min_seconds:
                break
            for name in order.sample(names, len(names)):
                times[name].append(_seconds(variants[name], device, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def _seconds(variant: Variant, device: torch.device, clock: Callable[[], float]) -> float:
    variant.before()
    _wait(device)
    start = clock()
    variant.run()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of matrix products (a multiplication and an addition count two)."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count_operations(forward: Callable[[], Tensor], gradient: Tensor) -> Operations:
    """Operations of `forward()` and of its backward pass from `gradient`, as torch's flop counter sees them.

    Products inside custom autograd functions count as well: the counter watches what is dispatched.
    """
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        output = forward()
        before = counter.get_total_flops()
        output.backward(gradient)  # type: ignore[no-untyped-call]
    return Operations(before, counter.get_total_flops() - before)


def saved_bytes(forward: Callable[[], object], model: nn.Module, copies: Iterable[Tensor] = ()) -> int:
    """Bytes that `forward()` keeps for the backward pass, parameters and buffers of `model` left out.

    A storage counts once and whole, however many tensors look at it or at a part of it: that is what stays allocated.

    Args:
        forward: what is run.
        model: whose weights do not count.
        copies: of weights, which do not count either; read when `forward` is done.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again meanwhile

    def keep(tensor: Tensor) -> Tensor:
        storages[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers(), *copies)}
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    del result
    return total


def resting_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that `run` has allocated at any time beyond what was allocated before it.

    On a GPU torch's allocator knows; elsewhere the storages of all tensors that are made are followed to their end,
    which leaves out what a kernel needs only while it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    live = _LiveStorages()
    with live:
        run()
    return live.peak


def free_bytes(device: torch.device) -> int:
    """Memory that may still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, each until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What goes in was there before, or was seen when it came out.
        before = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in before:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.now -= size


def _product_operations(accumulator: Any, left: Any, right: Any, *rest: Any, **options: Any) -> int:
    """Operations of (..., m, k) x (..., k, n), from their shapes."""
    operations: int = 2 * math.prod(left) * right[-1]
    return operations


# Torch's counter knows these products only where they make a new tensor.
_IN_PLACE = {torch.ops.aten.addmm_: _product_operations, torch.ops.aten.baddbmm_: _product_operations}


def _address(tensor: Tensor) -> int:
    """Of the storage itself, since on the meta device none has data."""
    return int(tensor.untyped_storage()._cdata)
