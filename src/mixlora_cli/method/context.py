"""How a model's adapted layers learn about the forward pass that they are part of, without any global variable.

One `RoutingContext` belongs to one adapted model and is shared by reference with its layers. Hooks on the model fill it
before each forward pass; `generate` is wrapped so that an answer's passes are known to belong together.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mixlora_cli.method.pooling import Spans, contiguous_spans, masked_mean
from mixlora_cli.method.reading import Reading, cached_length, read_inputs

OWN_ARGUMENTS = ("prompt_mask", "task_embeddings", "routing_seeds")
"""Arguments of the model that only routing reads; they are taken away before the model sees them."""

_FILLED_BY = "_mixlora_reading"
# Kept on the cache itself: a later pass that brings it along goes on with the pass that filled it. A table of caches on
# our side would make a compiled model compile again when the first cache has gone.


@dataclass
class _Generation:
    """One call of `generate`."""

    task: Tensor | None
    seeds: Tensor | None
    num_inputs: int | None
    prompt: Reading | None = None
    step: int = 0


@dataclass
class _Pooled:
    """The last pooled input, held by a weak reference: q, k and v read one tensor, and so do gate and up."""

    source: weakref.ref[Tensor]
    version: int
    mask: Tensor | None
    with_graph: bool
    mean: Tensor


class RoutingContext:
    """What the layers of one adapted model share: the present `Reading` and the last pooled input."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.root: nn.Module | None = None
        self._generation: _Generation | None = None
        self.collect_balance = False
        """Layers whose routers learn leave a balance term in each training pass; read them by `balance_loss`."""
        self.balance_terms: list[Tensor] = []
        self._pooled: _Pooled | None = None
        self._spans: tuple[Tensor, Spans | None] | None = None
        self._depth = 0
        self._parameters: dict[nn.Module, list[str]] = {}
        self._checkpointing: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    # -- attaching to a model -----------------------------------------------------------------------------------------

    def attach(self, root: nn.Module, layer_class: type[nn.Module]) -> None:
        """Watch the forward passes of `root`; called again, it takes up layers that were added since.

        Every transformers model on the way from `root` to an adapted layer is watched, because training code may call
        the inner ones; of nested calls the outermost counts.

        Args:
            root: the model that holds the adapted layers.
            layer_class: class of the adapted layers.
        """
        self.detach()
        self.root = root
        holders = [m for m in root.modules() if any(isinstance(inner, layer_class) for inner in m.modules())]
        for module in (m for m in holders if m is root or isinstance(m, PreTrainedModel)):
            # The class's own signature: others may wrap the instance's `forward` later.
            self._parameters[module] = list(inspect.signature(type(module).forward).parameters)[1:]
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._after, always_call=True),
            ]
        self._checkpointing = [m for m in holders if hasattr(m, "gradient_checkpointing")]
        if isinstance(root, PreTrainedModel):
            vars(root)["generate"] = self.generate

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointing:
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, _RestoringCheckpoint):
                module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]
        if self.root is not None:
            vars(self.root).pop("generate", None)
        self._handles, self._checkpointing, self._parameters, self.root = [], [], {}, None

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._depth += 1
        if self._depth > 1:
            return args, kwargs
        self._pooled, self._spans = None, None
        self.balance_terms.clear()
        inputs = dict(zip(self._parameters[module], args, strict=False)) | kwargs
        self.reading = self._place(read_inputs(inputs), inputs)
        for layer in self._checkpointing:
            self._restore_in_checkpoint(layer)
        return args, {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            # Holds the graph that led to it where routers get gradients.
            self._pooled, self._spans = None, None
            cache = getattr(output, "past_key_values", None)
            if cache is not None:
                setattr(cache, _FILLED_BY, self.reading)

    def _place(self, reading: Reading, inputs: Mapping[str, Any]) -> Reading:
        """Tell a pass that goes on with a prompt from one that reads a new one."""
        cache = inputs.get("past_key_values")
        past = cached_length(cache)
        generation = self._generation
        before: Reading | None
        if generation is None:
            before = getattr(cache, _FILLED_BY, None) if past > 0 else None
        else:
            reading = self._in_generation(reading, generation, inputs)
            before = generation.prompt
            if before is not None and past == 0 and reading.length <= before.length:
                before = None
            generation.step += 1
            if before is None:
                generation.prompt, generation.step = reading, 0
        if before is None:
            return reading
        step = before.step + 1 if generation is None else generation.step
        return replace(reading, continues=True, kept=before.kept, step=step)

    @staticmethod
    def _in_generation(reading: Reading, generation: _Generation, inputs: Mapping[str, Any]) -> Reading:
        source = inputs.get("input_ids")
        source = inputs.get("inputs_embeds") if source is None else source
        rows = 0 if source is None else len(source)
        num_inputs = generation.num_inputs or rows
        # `generate` repeats each input for its beams or returned sequences before it reads the prompt.
        copies = rows // num_inputs if rows and rows % num_inputs == 0 else 1

        def repeated(given: Tensor | None) -> Tensor | None:
            if given is None or len(given) * copies != rows:
                return given
            return given.repeat_interleave(copies, dim=0)

        return replace(
            reading, copies=copies, task=repeated(generation.task), seeds=repeated(generation.seeds)
        )

    @property
    def generating(self) -> bool:
        """Inside `generate`: this pass's choice is wanted again soon."""
        return self._generation is not None

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`; its passes after the first go on with the prompt, with a cache or without.

        `task_embeddings` and `routing_seeds` (one row for each input) are taken here for all passes.
        """
        assert self.root is not None
        task, seeds = kwargs.pop("task_embeddings", None), kwargs.pop("routing_seeds", None)
        kwargs.pop("prompt_mask", None)
        sources = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        num_inputs = next((len(s) for s in sources if isinstance(s, Tensor)), None)
        outer, self._generation = self._generation, _Generation(task, seeds, num_inputs)
        try:
            return cast("Any", type(self.root)).generate(self.root, *args, **kwargs)
        finally:
            self._generation = outer

    # -- gradient checkpointing ---------------------------------------------------------------------------------------

    @contextmanager
    def replaying(self, reading: Reading) -> Iterator[None]:
        """Inside, layers see `reading`. The pooled input is shared neither into the block nor out of it."""
        outer, self.reading, self._pooled = self.reading, reading, None
        try:
            yield
        finally:
            self.reading, self._pooled = outer, None

    def _restore_in_checkpoint(self, layer: nn.Module) -> None:
        function = vars(layer).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _RestoringCheckpoint):
            layer._gradient_checkpointing_func = _RestoringCheckpoint(self, function)  # type: ignore[assignment]

    # -- pooling ------------------------------------------------------------------------------------------------------

    def pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`masked_mean` of a layer's input (B, S, d) or (B, d), computed once for layers that read the same tensor."""
        if torch.compiler.is_compiling():
            return _mean(hidden, mask, None)
        version = 0 if hidden.is_inference() else hidden._version
        last, with_graph = self._pooled, torch.is_grad_enabled()
        if (
            last is not None
            and last.source() is hidden
            and (last.version, last.with_graph) == (version, with_graph)
            and last.mask is mask
        ):
            return last.mean
        mean = _mean(hidden, mask, self._spans_of(mask))
        self._pooled = _Pooled(weakref.ref(hidden), version, mask, with_graph, mean)
        return mean

    def _spans_of(self, mask: Tensor | None) -> Spans | None:
        """Found once for all layers of a pass; on other devices it would have to wait for the result."""
        if mask is None or mask.device.type != "cpu":
            return None
        if self._spans is None or self._spans[0] is not mask:
            self._spans = (mask, contiguous_spans(mask))
        return self._spans[1]

    # -- load balance -------------------------------------------------------------------------------------------------

    def balance_loss(self) -> Tensor:
        """Mean `load_balance` of the last training pass over its layers, and over A and B: a scalar with its graph.

        Raises:
            ValueError: no layer left a term, so no router would learn from it.
        """
        if not self.balance_terms:
            raise ValueError(
                "no router learns in this pass: a balance loss needs router_grad=straight_through, collect_balance "
                "before the forward pass, and, with gradient checkpointing, use_reentrant=False"
            )
        return torch.stack(self.balance_terms).mean()


@dataclass
class _RestoringCheckpoint:
    """A checkpoint function under which a layer sees the same `Reading` when it is computed again for its gradient."""

    context: RoutingContext
    checkpoint: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, reading, collecting = self.context, self.context.reading, self.context.collect_balance
        terms: list[Tensor] | None = context.balance_terms

        def run_as_then(*inner: Any, **inner_kwargs: Any) -> Any:
            nonlocal terms
            outside = context.collect_balance, context.balance_terms
            # A second pass must save the same tensors as the first, but its terms are not wanted again.
            context.collect_balance, context.balance_terms = collecting, [] if terms is None else terms
            terms = None
            try:
                with context.replaying(reading):
                    return run(*inner, **inner_kwargs)
            finally:
                context.collect_balance, context.balance_terms = outside

        return self.checkpoint(run_as_then, *args, **kwargs)


def _mean(hidden: Tensor, mask: Tensor | None, spans: Spans | None) -> Tensor:
    """`masked_mean` that takes any number of token dimensions; a row of (B, d) is its own mean."""
    if hidden.dim() == 2:
        return hidden.float()
    tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    # A layer of another part of the model (a vision tower's, say) reads other tokens: the mask is not about those.
    if mask is None or mask.shape != tokens.shape[:2]:
        mask, spans = None, None
    return masked_mean(tokens, mask, spans)
