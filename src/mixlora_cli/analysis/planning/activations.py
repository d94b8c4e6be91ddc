"""Bytes that a forward pass leaves on the GPU for its backward pass.

Counted per token from what autograd saves in transformers' LLaMA layers with PEFT's LoRA or our MixLoRA on top; a test
holds the sums against `torch.autograd.graph.saved_tensors_hooks`. A frozen linear layer saves nothing but its weight.
Left out is what an instance adds once, whatever its length: below one percent of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_cli.analysis.planning.network import Linear, Network, Update
from mixlora_cli.analysis.planning.operations import Batch

_FLOAT = 4
_READERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read one tensor."""


@dataclass(frozen=True)
class Numerics:
    """Sizes of numbers in bytes."""

    element: int
    """Of activations: 2 for bf16, 4 for fp32."""
    residual: int
    """Of the stream between layers: fp32 where the base itself is trained, because its embeddings are fp32 then."""
    dropout_mask: int = 1
    """Of one entry of LoRA's dropout mask: a byte on a GPU; on a CPU torch keeps it in the activations' type."""


@dataclass(frozen=True)
class Activations:
    """Of one batch, in bytes."""

    kept: float
    """Over all layers, from forward to backward."""
    working: float
    """Beside that while one layer's backward runs: with checkpointing its recomputed activations, gradients."""
    logits: float
    """Logits of the label tokens in bf16 and fp32, their log-probabilities and gradient."""

    @property
    def total(self) -> float:
        """At the fullest moment, taken as all three at once."""
        return self.kept + self.working + self.logits


def activations(network: Network, batch: Batch, numerics: Numerics, checkpointing: bool) -> Activations:
    """What one batch needs, with or without gradient checkpointing."""
    tokens = batch.instances * batch.length
    layer = saved_by_layer(network, batch, numerics)
    stream = tokens * network.hidden * numerics.residual
    # Gradients of the widest tensors in flight: gate, up, their product, and one more being written.
    working = 4.0 * tokens * network.intermediate * numerics.element
    logits = batch.instances * batch.labels * network.vocabulary * (numerics.element + 3 * _FLOAT)
    if checkpointing:
        kept = network.num_layers * stream + tokens * _norm(network, numerics)
        return Activations(kept, working + layer, logits)
    return Activations(saved_by_decoder(network, batch, numerics), working, logits)


def saved_by_decoder(network: Network, batch: Batch, numerics: Numerics) -> float:
    """Bytes of all decoder layers and the last norm, without checkpointing."""
    first = saved_by_layer(network, batch, numerics, network.trains_before_layers)
    others = saved_by_layer(network, batch, numerics)
    return (
        first + (network.num_layers - 1) * others + batch.instances * batch.length * _norm(network, numerics)
    )


def saved_by_layer(
    network: Network, batch: Batch, numerics: Numerics, input_needs_gradient: bool = True
) -> float:
    """Bytes of one decoder layer.

    Args:
        input_needs_gradient: false for a first layer before which nothing is trained: it saves less.
    """
    per_token = _norm(network, numerics) * (2 if input_needs_gradient else 1)
    per_token += _attention(network, batch, numerics)
    per_token += 3.0 * network.intermediate * numerics.element  # gate, its activation, up
    per_token += _inputs(network, numerics)
    if network.update is not None:
        adapted = [linear for linear in network.linears if linear.adapted]
        per_token += network.update.rank * numerics.element * len(adapted)
        if network.update.dropout and network.update.fused:
            per_token += sum(linear.inputs for linear in adapted)  # masks of one byte a number
        elif network.update.dropout:
            per_token += sum(
                linear.inputs * numerics.dropout_mask
                for linear in adapted
                if input_needs_gradient or linear.name not in _READERS[0]
            )
    return batch.instances * batch.length * per_token


def _norm(network: Network, numerics: Numerics) -> float:
    """An RMS norm's fp32 input, and its normalised output where its scale is trained."""
    return float(network.hidden * _FLOAT * (2 if network.trains_base else 1))


def _attention(network: Network, batch: Batch, numerics: Numerics) -> float:
    """Queries, keys, values; eager: scores in fp32 and in the products' type; fused: output, mask, a sum a head."""
    heads = 3.0 * network.attention * numerics.element
    if network.eager_attention:
        scores = _FLOAT + (numerics.element if numerics.element != _FLOAT else 0)
        return heads + network.num_heads * batch.length * scores
    # The output is o_proj's input too, where that is kept as it is.
    shared = network.trains_base or (network.update is not None and not _copies(network.update))
    output = 0 if shared and _reads(network, "o_proj") else network.attention * numerics.element
    return heads + output + batch.length * numerics.element + network.num_heads * _FLOAT


def _reads(network: Network, name: str) -> bool:
    return network.trains_base or any(linear.adapted for linear in network.linears if linear.name == name)


def _inputs(network: Network, numerics: Numerics) -> float:
    """Inputs that weight gradients need: of A, through LoRA's dropout a copy for each; of trained linear layers."""
    kept = [linear for linear in network.linears if network.trains_base or linear.adapted]
    own_copy = (network.update is not None and _copies(network.update)) or (
        # Autocast casts the fp32 stream down once for each layer that reads it.
        network.trains_base and numerics.element != numerics.residual
    )
    distinct = kept if own_copy else _distinct(kept)
    return float(sum(linear.inputs for linear in distinct) * numerics.element)


def _copies(update: Update) -> bool:
    """Whether each layer keeps a thinned copy of its input."""
    return update.dropout and not update.fused


def _distinct(linears: list[Linear]) -> list[Linear]:
    """One of each group of layers that read the same tensor."""
    seen: dict[tuple[str, ...], Linear] = {}
    for linear in linears:
        group = next((readers for readers in _READERS if linear.name in readers), (linear.name,))
        seen.setdefault(group, linear)
    return list(seen.values())
