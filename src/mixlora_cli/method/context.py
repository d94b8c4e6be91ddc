"""How a model's adapted layers learn about the forward pass that they are part of, without any global variable.

One `RoutingContext` belongs to one adapted model and is shared by reference with its layers. Hooks on the model tell it
when a forward pass begins and ends; what is known of a pass belongs to the thread that runs it, so that several threads
can use one model. (Threads' own variables, and not contextvars, since `torch.compile` cannot trace those.)
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mixlora_cli.method.forward_info import (
    CACHES,
    CONTINUOUS_BATCHING,
    Answer,
    ForwardInfo,
    cache_of,
    cached_length,
    read_inputs,
    text_of,
    token_mask,
)
from mixlora_cli.method.generation import Generation
from mixlora_cli.method.pooling import masked_mean

OWN_ARGUMENTS = ("prompt_mask", "completion_mask", "task_embeddings", "routing_seeds")
"""Arguments of the model that only routing reads; they are taken away before the model sees them."""

_T = TypeVar("_T")

_ANSWER = "_mixlora_answer"
# Kept on the cache itself: a later pass that brings it along goes on with the pass that filled it. A table of caches on
# our side would make a compiled model compile again when the first cache has gone.


@dataclass
class _Pooled:
    """The last pooled input, held by a weak reference: q, k and v read one tensor, and so do gate and up."""

    source: weakref.ref[Tensor]
    version: int
    mask: Tensor | None
    with_graph: bool
    mean: Tensor


@dataclass
class _Frame:
    """A watched module that is running in this thread, inside of others."""

    owner: RoutingContext
    module: nn.Module | None
    info: ForwardInfo
    outer: _Frame | None
    caller: FrameType | None = None
    """Python's frame that runs the module; None = not known."""
    cache: Any = None
    """What the pass was given to go on with."""
    wants_cache: bool = False
    """The pass is to hand on what it reads."""
    pooled: _Pooled | None = None


class _OfAThread:
    def __init__(self) -> None:
        self.frame: _Frame | None = None
        self.generation: tuple[RoutingContext, Generation, Any] | None = None
        """Owner, the call of `generate`, and the same of the call that it is nested in."""
        self.adapters: tuple[RoutingContext, list[str]] | None = None


class _Threads(threading.local):
    def __init__(self) -> None:
        # In an object of its own: what a graph of `torch.compile` writes to a thread's variable itself is lost where
        # the graph breaks.
        self.own = _OfAThread()


_threads = _Threads()


class RoutingContext:
    """What the layers of one adapted model share: the way to the `ForwardInfo` of the pass at hand."""

    def __init__(self) -> None:
        self.root: nn.Module | None = None
        self.collect_balance = False
        """Layers whose routers learn leave a balance term in each training pass; read them by `balance_loss`."""
        self.balance_terms: list[Tensor] = []
        self._parameters: dict[type[nn.Module], list[str]] = {}
        self._leaves: dict[type[nn.Module], bool] = {}
        self._checkpointing: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._generators: list[PreTrainedModel] = []
        self.holders: dict[tuple[str, str], str] = {}
        """By (adapter, block): the layer that selects for its block (per=block)."""
        self.collecting: dict[tuple[str, str], list[Tensor]] | None = None
        """By (layer, adapter): what routers read while statistics of it are taken; None = at no other time."""
        self.picture_tokens: tuple[int, ...] | None = None
        """Ids of tokens that stand for pictures; None = no adapter asks which do."""
        self._has_generated = False
        self._has_warned = False

    # -- attaching to a model -----------------------------------------------------------------------------------------

    def attach(self, root: nn.Module, layer_class: type[nn.Module]) -> None:
        """Watch the forward passes of `root`; called again, it takes up layers that were added since.

        Every transformers model on the way from `root` to an adapted layer is watched, because training code may call
        the inner ones, and because a tower among them reads something else than the batch's text.

        Args:
            root: the model that holds the adapted layers.
            layer_class: class of the adapted layers.
        """
        self.detach()
        self.root = root
        holders = [m for m in root.modules() if any(isinstance(inner, layer_class) for inner in m.modules())]
        watched = [m for m in holders if m is root or isinstance(m, PreTrainedModel)]
        for module in watched:
            # The class's own signature: others may wrap the instance's `forward` later.
            self._parameters[type(module)] = list(inspect.signature(type(module).forward).parameters)[1:]
            self._leaves[type(module)] = isinstance(module, PreTrainedModel) and not _holds_models(module)
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._after, always_call=True),
            ]
        self._checkpointing = [m for m in holders if hasattr(m, "gradient_checkpointing")]
        self._generators = [
            m for m in watched if isinstance(m, PreTrainedModel) and hasattr(type(m), "generate")
        ]
        for model in self._generators:
            vars(model)["generate"] = _Generate(self, model)
            vars(model)["init_continuous_batching"] = _refuse_continuous_batching

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointing:
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, _RestoringCheckpoint):
                module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]
        for model in self._generators:
            for name in ("generate", "init_continuous_batching"):
                vars(model).pop(name, None)
        self._generators = []
        self._handles, self._checkpointing, self._parameters, self.root = [], [], {}, None
        self._leaves = {}

    # -- one forward pass ---------------------------------------------------------------------------------------------

    @property
    def info(self) -> ForwardInfo:
        """What is known of the pass at hand; of a layer that is called by itself, nothing."""
        frame = self._frame()
        return ForwardInfo(bare=True) if frame is None else frame.info

    def _frame(self) -> _Frame | None:
        """The innermost running module of this model in this thread."""
        frame = _threads.own.frame
        while frame is not None and frame.owner is not self:
            frame = frame.outer
        return frame

    @contextmanager
    def within(self, info: ForwardInfo) -> Iterator[None]:
        """Inside, layers see `info`. A pooled input is shared neither into the block nor out of it."""
        outer = _threads.own.frame
        _threads.own.frame = _Frame(self, None, info, outer)
        try:
            yield
        finally:
            _threads.own.frame = outer

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        caller = None if torch.compiler.is_compiling() else sys._getframe(1)
        if caller is not None and _threads.own.frame is not None:
            _forget_interrupted(caller)
        around = self._frame()
        outer = None if around is None else around.info
        # First of all: `_after` takes it away again, whatever fails from here on.
        _threads.own.frame = frame = _Frame(self, module, ForwardInfo(), _threads.own.frame, caller)
        inputs = dict(zip(self._of_class(module, self._parameters), args, strict=False)) | kwargs
        if outer is not None and (outer.watched or not isinstance(module, PreTrainedModel)):
            frame.info = self._nested(module, inputs, outer)
            return args, kwargs
        if outer is None:
            self.balance_terms.clear()
        frame.cache, frame.wants_cache = cache_of(inputs), inputs.get("use_cache") is True
        frame.info = self._place(module, self._read(module, inputs, outer), inputs)
        self._warn_of_other_routing(module, inputs)
        for layer in self._checkpointing:
            self._restore_in_checkpoint(layer)
        return args, {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}

    @staticmethod
    def _of_class(module: nn.Module, by_class: Mapping[type[nn.Module], _T]) -> _T:
        """What is known of a module's class, which others (FSDP) may have made a class of their own of since."""
        return next(by_class[kind] for kind in type(module).__mro__ if kind in by_class)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = _threads.own.frame
        if frame is None or frame.module is not module:
            return  # another hook failed before ours ran
        _threads.own.frame = frame.outer
        around = self._frame()
        if around is None or not around.info.watched:
            cache = cache_of({name: getattr(output, name, None) for name in CACHES})
            if cache is None and isinstance(output, tuple):
                cache = next((item for item in output if hasattr(item, "get_seq_length")), None)
            cache = frame.cache if cache is None else cache
            generation = self._generation()
            if hasattr(cache, "__dict__"):
                setattr(cache, _ANSWER, frame.info.answer)
            elif generation is not None and module is generation.model and frame.wants_cache:
                generation.hands_on_nothing = True

    def _read(self, module: nn.Module, inputs: Mapping[str, Any], outer: ForwardInfo | None) -> ForwardInfo:
        """What the arguments of the outermost transformers model say, or those of a module around it."""
        info = read_inputs(inputs, self.picture_tokens)
        if outer is not None:
            # Of a module that somebody made around the model only what is ours is taken; the rest may be anything.
            info.task = outer.task if info.task is None else info.task
            info.seeds = outer.seeds if info.seeds is None else info.seeds
            alike = outer.prompt is not None and outer.prompt.shape == (info.rows, info.length)
            info.prompt = outer.prompt if info.prompt is None and alike else info.prompt
        if _threads.own.adapters is not None and _threads.own.adapters[0] is self:
            info.adapters = _threads.own.adapters[1]
        # Where the text is not understood, the transformers model within is asked.
        info.watched = isinstance(module, PreTrainedModel) and (bool(info.rows) or text_of(inputs) is None)
        info.halves = info.watched and _has_halves(module)
        info.strict = bool(info.rows) and self._of_class(module, self._leaves)
        if not info.rows and isinstance(module, PreTrainedModel):
            # A model of pictures or sounds: all that is known is how many there are, if they come one by one.
            main = inputs.get(module.main_input_name)
            if isinstance(main, Tensor) and main.dim() > 2:
                info.rows = len(main)
            mask = inputs.get("attention_mask")
            if not info.halves and isinstance(mask, Tensor) and not bool(mask.all()):
                info.not_a_prompt = (
                    f"{type(module).__name__}: attention_mask is about samples, of which the layers read frames, so "
                    "padding cannot be told from them; read one at a time, or without attention_mask"
                )
        return info

    def _nested(self, module: nn.Module, inputs: Mapping[str, Any], outer: ForwardInfo) -> ForwardInfo:
        """A module within the pass: the same text, a tower that reads something else, or one half of two."""
        if not isinstance(module, PreTrainedModel):
            return outer
        strict, text = self._of_class(module, self._leaves), text_of(inputs)
        if text is None and not (outer.length or outer.halves):
            return outer  # a part of a model that reads pictures or sounds alone
        if text is None:
            # The sounds or pictures that an encoder-decoder model answers are its batch; a tower's are not.
            return ForwardInfo(
                rows=outer.rows if outer.halves else 0,
                task=outer.task,
                seeds=outer.seeds,
                adapters=outer.adapters,
                copies=outer.copies,
                answer=outer.answer,
                step=outer.step,
                continues=outer.continues,
                calls=outer.calls,
                watched=True,
                halves=outer.halves,
                own_rows=outer.halves,
            )
        other_ids = not text.is_floating_point() and text is not outer.text
        if not (outer.halves or other_ids) and text.shape[:2] == (outer.rows, outer.length):
            # The same text. Where the outer model was given no mask it may have made this one.
            mask = inputs.get("attention_mask")
            made = outer.tokens is None and isinstance(mask, Tensor) and mask.dim() == 2
            tokens = token_mask(mask, 0, outer.length) if made else outer.tokens
            # What masks of it were kept are about the tokens that were known.
            kept = outer.text_mask if tokens is outer.tokens else None
            return replace(outer, strict=strict, tokens=tokens, text_mask=kept)
        # One half of two, or a text that a module around the model has made.
        own = read_inputs(inputs, self.picture_tokens)
        return replace(
            outer,
            text=own.text,
            rows=own.rows,
            length=own.length,
            tokens=own.tokens,
            prompt=outer.prompt if outer.halves else own.prompt,
            pictures=own.pictures,
            text_mask=None,
            segments=None if outer.halves else own.segments,
            memory=own.memory,
            strict=strict,
            has_prompts=None,
            own={},
        )

    def _place(self, module: nn.Module, info: ForwardInfo, inputs: Mapping[str, Any]) -> ForwardInfo:
        """Tell a pass that goes on with a prompt from one that reads a new one."""
        cache, generation = cache_of(inputs), self._generation()
        filled: Answer | None = getattr(cache, _ANSWER, None)
        past = cached_length(cache)
        if past is None:
            # A cache that does not count is known to be filled by what a pass left on it; a mere list, by being there.
            has_past = filled is not None or not hasattr(cache, "__dict__")
        else:
            # Some count nothing though they hold something: then the mask tells of more tokens than the pass reads.
            mask = inputs.get("attention_mask")
            longer = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > info.length > 0
            has_past = past > 0 or (filled is not None and longer)
        answer = filled if has_past else None
        if generation is not None:
            if module is not generation.model and _has_halves(generation.model):
                generation.answers.clear()  # the encoder reads something new
            info, answer = generation.place(info, inputs, answer, has_past)
        if answer is None:
            info.orphan = has_past and generation is None
            return info
        answer.steps += 1
        return replace(info, continues=True, answer=answer, step=answer.steps)

    def _warn_of_other_routing(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Reinforcement learning samples and trains the same answers, and `pool=all` reads them only when it trains."""
        trains_without_labels = (
            module.training
            and torch.is_grad_enabled()
            and "labels" not in inputs
            and "prompt_mask" not in inputs
        )
        if not self._has_generated or self._has_warned or not trains_without_labels:
            return
        self._has_warned = True
        pools = {config.pool for config in self._configs() if config.router.source == "tokens"}
        if "all" in pools:
            warnings.warn(
                "this model has generated text and is now trained on it without labels: with pool=all the factors of "
                "a trained sequence depend on its answer, those that sampled it did not, so their probabilities "
                "differ; use MixLoraConfig(pool='prompt')",
                stacklevel=2,
            )

    def _configs(self) -> list[Any]:
        configs = getattr(self.root, "peft_config", None) or {}
        return [config for config in configs.values() if hasattr(config, "pool")]

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """A model's own `generate`; its passes after the first go on with the prompt, with a cache or without.

        `task_embeddings` and `routing_seeds` (one row for each input) are taken here for all passes, also for those of
        a `generate` that the model calls in turn.
        """
        generation = Generation.of_call(model, args, kwargs, self._generation())
        self._has_generated = True
        outer = _threads.own.generation
        _threads.own.generation = (self, generation, outer)
        try:
            return cast("Any", type(model)).generate(model, *args, **kwargs)
        finally:
            _threads.own.generation = outer

    def _generation(self) -> Generation | None:
        """The innermost call of this model's `generate` in this thread."""
        running = _threads.own.generation
        while running is not None and running[0] is not self:
            running = running[2]
        return None if running is None else running[1]

    @property
    def generating(self) -> bool:
        """Inside `generate`: this pass's choice is wanted again soon."""
        return self._generation() is not None

    @contextmanager
    def with_adapters(self, names: list[str]) -> Iterator[None]:
        """Inside, each row of a batch is answered with the adapter of its name; "__base__" means none."""
        outer, _threads.own.adapters = _threads.own.adapters, (self, names)
        try:
            yield
        finally:
            _threads.own.adapters = outer

    # -- gradient checkpointing ---------------------------------------------------------------------------------------

    def _restore_in_checkpoint(self, layer: nn.Module) -> None:
        function = vars(layer).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _RestoringCheckpoint):
            layer._gradient_checkpointing_func = _RestoringCheckpoint(self, function)  # type: ignore[assignment]

    # -- pooling ------------------------------------------------------------------------------------------------------

    def pooled(self, source: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`masked_mean` of a layer's input, computed once for layers that read the same tensor: (N, d).

        Args:
            source: the input as it came, by which other layers' is known to be the same.
            hidden: the same by instance, (B, ..., d) or (B, d).
            mask: (B, S) bool, the tokens of the pass that count.
        """
        frame = self._frame()
        if frame is None or torch.compiler.is_compiling() or source.is_inference():
            # Of a tensor of inference mode nobody counts whether it was written over since.
            return _mean(self.info, hidden, mask)
        version = source._version
        last, with_graph = frame.pooled, torch.is_grad_enabled()
        if (
            last is not None
            and last.source() is source
            and (last.version, last.with_graph) == (version, with_graph)
            and last.mask is mask
        ):
            return last.mean
        mean = _mean(frame.info, hidden, mask)
        frame.pooled = _Pooled(weakref.ref(source), version, mask, with_graph, mean)
        return mean

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
class _Generate:
    """Stands in for the `generate` of a model; a copy of the model gets one of its own."""

    context: RoutingContext
    model: PreTrainedModel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.context.generate(self.model, *args, **kwargs)


@dataclass
class _RestoringCheckpoint:
    """A checkpoint function under which a layer sees the same pass when it is computed again for its gradient."""

    context: RoutingContext
    checkpoint: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, info, collecting = self.context, self.context.info, self.context.collect_balance
        terms: list[Tensor] | None = context.balance_terms

        def run_as_then(*inner: Any, **inner_kwargs: Any) -> Any:
            nonlocal terms
            outside = context.collect_balance, context.balance_terms
            # A second pass must save the same tensors as the first, but its terms are not wanted again.
            context.collect_balance, context.balance_terms = collecting, [] if terms is None else terms
            terms = None
            try:
                with context.within(info):
                    return run(*inner, **inner_kwargs)
            finally:
                context.collect_balance, context.balance_terms = outside

        return self.checkpoint(run_as_then, *args, **kwargs)


def _mean(info: ForwardInfo, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """`masked_mean` that takes any number of token dimensions; a row of (B, d) is its own mean."""
    if hidden.dim() == 2:
        return hidden.float()
    tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    if info.memory is not None and info.is_memory(hidden):
        mask = info.memory[1]
    # A layer of another part of the model (a projector's, say) reads other tokens: the mask is not about those.
    if mask is not None and mask.shape != tokens.shape[:2]:
        mask = None
    on_cpu = tokens.device.type == "cpu" and (mask is None or mask.device.type == "cpu")
    own = info.own_tokens_of(mask, tokens.shape[:2]) if on_cpu and not torch.compiler.is_compiling() else None
    return masked_mean(tokens, mask, own, info.segments)


def _holds_models(module: nn.Module) -> bool:
    """Whether another transformers model is inside."""
    return any(isinstance(inner, PreTrainedModel) for inner in module.modules() if inner is not module)


def _forget_interrupted(caller: FrameType) -> None:
    """Drop what interrupted passes (Ctrl-C) left, of which torch tells no hook: those that Python runs no more."""
    running: set[FrameType] = set()
    at: FrameType | None = caller
    while at is not None:
        running.add(at)
        at = at.f_back
    frame = _threads.own.frame
    while frame is not None and frame.caller is not None and frame.caller not in running:
        frame = frame.outer
    _threads.own.frame = frame


def _has_halves(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(CONTINUOUS_BATCHING)
