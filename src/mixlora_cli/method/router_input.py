"""What the routers read about an instance: the mean of the layer's own input, or its task's embedding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext

RouterInput = Callable[[RoutingContext, Tensor, Tensor, bool], Tensor]
"""(context, layer input as it came, the same by instance (B, ..., d_in), training) -> (N, width) in fp32."""


def choose_router_input(config: MixLoraConfig) -> RouterInput | None:
    """The function that this configuration routes by; None where chance selects."""
    if config.routing == "random":
        return None
    if config.routing == "task":
        return task_embedding
    return pooled_prompt if config.pool == "prompt" else pooled_all


def pooled_all(context: RoutingContext, source: Tensor, hidden: Tensor, training: bool) -> Tensor:
    """R_IFS(h) of Eq. 5 over every token that is not padding: (N, d_in).

    Raises:
        ValueError: the pass does not read a whole prompt.
    """
    info = context.info
    if info.not_a_prompt:
        raise ValueError(info.not_a_prompt)
    return context.pooled(source, hidden, info.tokens)


def pooled_prompt(context: RoutingContext, source: Tensor, hidden: Tensor, training: bool) -> Tensor:
    """R_IFS(h) over the tokens that carry no loss: (N, d_in). Outside training, what is read first is the prompt.

    Raises:
        ValueError: a training pass that does not say which tokens are the prompt, an instance without any, or a pass
            that does not read a whole prompt.
    """
    info = context.info
    if info.prompt is None and training and not context.generating:
        raise ValueError(
            "pool=prompt: training has to know the prompt; pass labels or prompt_mask (B, S), or completion_mask, "
            "to the model (label smoothing takes the labels away: use pool=all with it)"
        )
    if info.prompt is None:
        return pooled_all(context, source, hidden, training)
    info.check_prompts()
    return context.pooled(source, hidden, info.prompt)


def task_embedding(context: RoutingContext, source: Tensor, hidden: Tensor, training: bool) -> Tensor:
    """The embeddings of the instances' task definitions (App. A): (N, task_embedding_dim).

    Raises:
        ValueError: there are none, or not one for each instance.
    """
    task, count = context.info.task, context.info.count_of(hidden)
    if task is None or len(task) != count:
        shape = None if task is None else tuple(task.shape)
        raise ValueError(
            f"task_embeddings={shape}: routing=task needs one embedding for each instance, ({count}, d); "
            "pass task_embeddings to the model or to generate"
        )
    return task.to(hidden.device).float()
