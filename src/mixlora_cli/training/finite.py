"""A run whose loss or gradient is no longer a number stops at once, and says where that began."""

from __future__ import annotations

import math

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mixlora_cli.errors import UserError


class FiniteGuard:
    """Looks at every loss and at every step's gradient, and remembers which records they came from."""

    def __init__(self) -> None:
        self._records: list[int | None] = []

    def check_loss(self, loss: Tensor, indices: Tensor | None, step: int) -> None:
        """Look at the loss of one batch.

        Args:
            indices: positions of the batch's records in the data; None where the collator gives none.
            step: the step that is being done, from 1.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        records = [None] if indices is None else indices.tolist()
        self._records += records
        if not torch.isfinite(loss):
            raise UserError(_message(f"loss is {loss.item()}", f"the batch of {_names(records)}", step))

    def check_gradient(self, norm: Tensor | float | None, step: int) -> None:
        """Look at the norm of a whole step's gradient, the same one in all processes; starts the next step.

        Raises:
            UserError: it is NaN or infinite, for which DeepSpeed gives -1.
        """
        records, self._records = self._records, []
        if norm is None or (math.isfinite(norm) and norm >= 0):
            return
        everywhere = gather_object(records)
        value = "not finite" if norm < 0 else float(norm)
        raise UserError(_message(f"the gradient's norm is {value}", _names(everywhere), step))


def _names(records: list[int | None]) -> str:
    return "records " + ", ".join("?" if record is None else str(record) for record in records)


def _message(what: str, where: str, step: int) -> str:
    return (
        f"{what} at step {step}, in {where}: training stopped; "
        "lower train.learning_rate, or look at these records (counted from 0 in their file)"
    )
