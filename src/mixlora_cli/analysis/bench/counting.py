"""What a computation costs by count, not by clock: operations, bytes kept for the backward pass, peak memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of matrix products (a multiplication and an addition count two)."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
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


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes that `forward()` keeps for the backward pass, parameters and buffers of `model` left out.

    A storage counts once and whole, however many tensors look at it or at a part of it: that is what stays allocated.
    """
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again meanwhile

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            storages[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
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
    return int(tensor.untyped_storage().data_ptr())
