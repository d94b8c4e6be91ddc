"""The ways to pick an instance's factors, one entry of `ROUTERS` each, and what their routers read.

Importing this module imports nothing heavy: the configuration reads the names here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from mixlora_cli.method.config import MixLoraConfig
    from mixlora_cli.method.context import RoutingContext

    RouterInput = Callable[[RoutingContext, Tensor, Tensor, bool], Tensor]
    """(context, layer input as it came, the same by instance (B, ..., d_in), training) -> (N, width) in fp32."""


@dataclass(frozen=True)
class Router:
    """One way to pick factors (`routing=<name>`)."""

    name: str
    help: str
    """What it selects by, as one sentence."""
    source: Literal["tokens", "task", "chance"]
    """What the choice depends on: the instance's own hidden states, its task's embedding, or nothing."""
    reads: Callable[[MixLoraConfig], RouterInput] | None
    """The function that a configuration's routers read by; None = there are no routers, chance selects."""
    heeds: tuple[str, ...] = ()
    """Keys of `routing` that change what it does, beside those that all heed."""


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


def pooled_text(context: RoutingContext, source: Tensor, hidden: Tensor, training: bool) -> Tensor:
    """R_IFS(h) over the prompt's tokens that stand for no picture: (N, d_in). The prompt as for `pooled_prompt`.

    Of a picture's hundreds of tokens a mean over all says little about what is asked.

    Raises:
        ValueError: as for `pooled_prompt`, or which tokens are text is not known.
    """
    info = context.info
    if info.prompt is None and training and not context.generating:
        raise ValueError(
            "pool=text: training has to know the prompt; pass labels or prompt_mask (B, S), or completion_mask, to "
            "the model (label smoothing takes the labels away: use pool=all with it)"
        )
    if info.not_a_prompt:
        raise ValueError(info.not_a_prompt)
    return context.pooled(source, hidden, info.words())


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


_ALL = (
    Router(
        "instance",
        "Select factors by the instance: the router sees the pooled hidden states of the layer's input. The paper's "
        "method.",
        "tokens",
        lambda config: {"all": pooled_all, "prompt": pooled_prompt, "text": pooled_text}[config.pool],
        ("pool", "normalize", "router_init", "per", "decode", "balance_loss"),
    ),
    Router(
        "task",
        "Select factors by the task: the router sees an embedding of the task's definition (data.metadata).",
        "task",
        lambda config: task_embedding,
        ("encoder", "balance_loss"),
    ),
    Router(
        "random",
        "Select factors at random: the control that shows what routing is worth.",
        "chance",
        None,
        ("decode",),
    ),
)
ROUTERS: dict[str, Router] = {router.name: router for router in _ALL}
"""By name; another one is one more entry."""
