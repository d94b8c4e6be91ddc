"""What the routers read about an instance: the mean of the layer's own input, or its task's embedding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext

Describe = Callable[[RoutingContext, Tensor, bool], Tensor]
"""(context, layer input (B, ..., d_in), training) -> (B, width) in fp32."""


def choose_description(config: MixLoraConfig) -> Describe | None:
    """The function that this configuration routes by; None where chance selects."""
    if config.routing == "random":
        return None
    if config.routing == "task":
        return task_embedding
    return pooled_prompt if config.pool == "prompt" else pooled_all


def pooled_all(context: RoutingContext, hidden: Tensor, training: bool) -> Tensor:
    """R_IFS(h) of Eq. 5 over every token that is not padding: (B, d_in)."""
    return context.pooled(hidden, context.reading.tokens)


def pooled_prompt(context: RoutingContext, hidden: Tensor, training: bool) -> Tensor:
    """R_IFS(h) over the tokens that carry no loss: (B, d_in). Outside training, what is read first is the prompt.

    Raises:
        ValueError: a training pass that does not say which tokens are the prompt.
    """
    reading = context.reading
    if reading.prompt is None and training:
        raise ValueError(
            "pool=prompt: training has to know the prompt; pass labels or prompt_mask (B, S) to the model"
        )
    return context.pooled(hidden, reading.tokens if reading.prompt is None else reading.prompt)


def task_embedding(context: RoutingContext, hidden: Tensor, training: bool) -> Tensor:
    """The embeddings of the instances' task definitions (App. A): (B, task_embedding_dim).

    Raises:
        ValueError: there are none, or not one for each instance.
    """
    task = context.reading.task
    if task is None or len(task) != len(hidden):
        shape = None if task is None else tuple(task.shape)
        raise ValueError(
            f"task_embeddings={shape}: routing=task needs one embedding for each instance, ({len(hidden)}, d); "
            "pass task_embeddings to the model or to generate"
        )
    return task.to(hidden.device).float()
