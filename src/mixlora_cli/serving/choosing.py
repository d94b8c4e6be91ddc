"""Which task of the training a free question belongs to, learned from the questions that the training asked.

An adapter with routing=task selects by a task's definition, and a person who asks names no task. Questions are texts of
another kind than definitions: the definition whose embedding is nearest is seldom the one of the question's task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_PENALTY = 0.05
"""Of the weights, for each feature."""


class TaskChooser:
    """A linear classifier of questions' embeddings, each task against all others: ridge regression on +1 and -1."""

    def __init__(self, questions: Mapping[str, Sequence[str]], embeddings: Mapping[str, Tensor]) -> None:
        """`questions` by task, and the embedding (d,) of each."""
        self._tasks = list(questions)
        texts = [(text, number) for number, task in enumerate(self._tasks) for text in questions[task]]
        features = torch.stack([embeddings[text].double() for text, _ in texts])  # (n, d)
        self._mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        self._scale = torch.where(spread > 0, spread, 1.0)
        features = (features - self._mean) / self._scale
        wanted = -torch.ones(len(texts), len(self._tasks), dtype=torch.float64)
        wanted[range(len(texts)), [number for _, number in texts]] = 1.0
        self._bias = wanted.mean(dim=0)
        gram = features @ features.T + _PENALTY * features.shape[1] * torch.eye(
            len(texts), dtype=torch.float64
        )
        self._weight = features.T @ torch.linalg.solve(gram, wanted - self._bias)  # (d, T)

    def choose(self, embedding: Tensor) -> str | None:
        """The task of a question with this embedding (d,); None where it is like the questions of no task."""
        scores = (embedding.double() - self._mean) / self._scale @ self._weight + self._bias
        best = int(scores.argmax())
        return self._tasks[best] if scores[best] > 0 else None
