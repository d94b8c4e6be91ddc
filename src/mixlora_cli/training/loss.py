"""Cross entropy on answer tokens, with logits computed at those tokens only.

The language-model head is the widest matrix product of a small model, and most tokens (image, question) carry no label.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora_cli.data.encode import IGNORE
from mixlora_cli.models.head import head_reads


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts a labelled token, and which token that is.

    Args:
        labels: (batch, length); `labels[:, t]` is token t, or -100 without loss.

    Returns:
        `predicts` (batch, length) bool: the *next* token carries a label; `targets` (n,): those tokens in row order.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    predicts = following != IGNORE
    return predicts, following[predicts]


def head_sees_only(head: nn.Module, predicts: Tensor) -> AbstractContextManager[None]:
    """Inside, `head` maps hidden states (batch, length, d) to logits (n, vocabulary) of the `predicts` tokens alone."""
    return head_reads(head, lambda hidden: hidden[predicts.to(hidden.device)])


def token_loss(logits: Tensor, targets: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Sum of cross entropies in fp32 over `num_tokens`, the label tokens of the whole optimizer step.

    Dividing by the step's count instead of this batch's makes accumulation and data parallelism exact: every
    token weighs the same however the step was cut into batches. No target (n = 0) gives a zero with a gradient
    of zero.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)
