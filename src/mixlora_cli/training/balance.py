"""The loss that keeps trained routers from using few factors only, at the weight that the configuration gives it."""

from __future__ import annotations

from torch import Tensor

from mixlora_cli.method.context import RoutingContext


class BalanceLoss:
    """`weight` times the mean of the batches' `RoutingContext.balance_loss`, over all that a step accumulates."""

    def __init__(self, context: RoutingContext, weight: float) -> None:
        self.weight = weight
        self._context = context
        self._sum: Tensor | None = None
        self._num_steps = 0.0
        context.collect_balance = True

    def share(self, num_batches: int) -> Tensor:
        """What the forward pass that has just run adds to its loss.

        Losses of a step's batches are added up, and gradients are averaged over processes: a share of 1 / num_batches
        makes this the mean over both. (The answers' loss is a sum over the step's tokens instead.)

        Args:
            num_batches: batches that the present step accumulates on each process.
        """
        loss: Tensor = self._context.balance_loss()
        seen = loss.detach() / num_batches
        self._sum = seen if self._sum is None else self._sum + seen
        self._num_steps += 1 / num_batches
        return loss * (self.weight / num_batches)

    def read(self) -> Tensor:
        """Unweighted mean over the steps of this process since the last call."""
        assert self._sum is not None
        mean = self._sum / self._num_steps
        self._sum, self._num_steps = None, 0.0
        return mean
