"""Floating-point operations of a training step (two for each multiplication), forward and backward apart.

What is counted is what is really done: a frozen linear layer has no weight gradient, so its backward pass costs as
much as its forward pass; gradient checkpointing adds a second forward pass. Norms, activations, softmax and the
optimizer are not counted: together they are well below one percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_cli.analysis.planning.network import Linear, Network, Update

_BEFORE_ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Operations:
    """Of one batch on one GPU."""

    forward: float
    backward: float
    recomputation: float
    vision: float
    """Tower and projector forward, and the projector's backward where it is trained."""

    @property
    def total(self) -> float:
        """All that is done."""
        return self.forward + self.backward + self.recomputation + self.vision


@dataclass(frozen=True)
class Batch:
    """A batch as the GPU sees it: padded to one length."""

    instances: float
    length: float
    """Tokens of an instance, image tokens and padding included."""
    labels: float
    """Tokens of an instance that carry loss; the head works on these alone."""


def operations(
    network: Network, batch: Batch, checkpointing: bool, towers_cached: bool = False, dense: bool = False
) -> Operations:
    """Operations of one forward and backward pass.

    Args:
        towers_cached: the vision tower's features come from disk.
        dense: count MixLoRA as the code published with the paper computes it: it forms the (d_out, d_in) matrix BA of
            every instance and multiplies every token with it.
    """
    layers = network.num_layers * _layer_forward(network, batch, dense)
    head = 2 * batch.instances * batch.labels * network.hidden * network.vocabulary
    return Operations(
        forward=layers + head,
        # With checkpointing PEFT makes the embeddings' output require a gradient.
        backward=_layers_backward(network, batch, dense, network.trains_before_layers or checkpointing)
        + head,
        recomputation=layers - _not_recomputed(network, batch) if checkpointing else 0.0,
        vision=batch.instances * _vision(network, towers_cached),
    )


def _layer_forward(network: Network, batch: Batch, dense: bool) -> float:
    total = _attention(network, batch)
    for linear in network.linears:
        total += _base(linear, batch)
        if linear.adapted and network.update is not None:
            total += _update(linear, network.update, batch, dense)
            total += 2 * batch.instances * network.update.router_products(linear)
    return total


def _layers_backward(network: Network, batch: Batch, dense: bool, to_embeddings: bool) -> float:
    """Gradients of inputs, and of weights where they are trained.

    Args:
        to_embeddings: backward goes through the whole first layer, not only to its first weights.
    """
    # Eager: two products for each of the forward pass. Fused kernels compute the scores a second time: 5 for 2.
    attention = (2.0 if network.eager_attention else 2.5) * _attention(network, batch)
    one = attention
    saved_in_first = 0.0
    for linear in network.linears:
        one += _base(linear, batch) * (2 if network.trains_base else 1)
        ends_here = not to_embeddings and linear.name in _BEFORE_ATTENTION
        if ends_here:
            saved_in_first += _base(linear, batch)
        if linear.adapted and network.update is not None:
            one += 2 * _update(linear, network.update, batch, dense)
            one += 4 * batch.instances * network.update.router_products(linear) * network.update.routers_learn
            if ends_here and not dense:
                saved_in_first += 2 * batch.instances * batch.length * network.update.rank * linear.inputs
    return network.num_layers * one - saved_in_first


def _not_recomputed(network: Network, batch: Batch) -> float:
    """Recomputation stops at the last tensor that backward needs: a bare last layer's product is not needed."""
    last = network.linears[-1]
    return 0.0 if last.adapted else network.num_layers * _base(last, batch)


def _base(linear: Linear, batch: Batch) -> float:
    return 2 * batch.instances * batch.length * linear.products


def _update(linear: Linear, update: Update, batch: Batch, dense: bool) -> float:
    if dense:
        return 2 * batch.instances * linear.products * (update.rank + batch.length)
    return 2 * batch.instances * batch.length * update.rank * (linear.inputs + linear.outputs)


def _attention(network: Network, batch: Batch) -> float:
    """Scores and their product with the values, over all pairs: kernels that skip the future do up to half less."""
    return 4 * batch.instances * batch.length**2 * network.attention


def _vision(network: Network, cached: bool) -> float:
    """Of one picture. Forward through the tower: two operations a parameter and token, attention left out."""
    tower = 0 if cached else 2 * network.tower_parameters * network.tower_tokens
    projector = 2 * network.projector_parameters * network.image_tokens
    return tower + projector * (2 if network.trains_projector else 1)
