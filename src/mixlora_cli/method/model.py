"""Puts `MixLoraLinear` in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.factors import Standardiser
from mixlora_cli.method.layer import MixLoraLayer, MixLoraLinear
from mixlora_cli.method.selection import Selection
from mixlora_cli.method.targets import decoder_linears, is_read_past, output_layer

PICTURE_TOKENS = ("image_token_id", "image_token_index", "video_token_id")
"""Keys of models' configurations that hold the id of a token which stands for a picture."""
TOKENS_FIRST = ("xlnet", "fsmt")
"""Models whose layers read tokens before rows."""


class MixLoraModel(BaseTuner):
    """The tuner that `get_peft_model` makes of a `MixLoraConfig`.

    `context` is the model's `RoutingContext`; its forward pass also takes `prompt_mask` or `completion_mask` (B, S),
    `task_embeddings` (B, d) and `routing_seeds` (B,), `generate` the latter two. In evaluation mode both take
    `adapter_names`, as LoRA does: the adapter of each row, "__base__" for none.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    # Targets are found in the model itself, whatever its kind: see `decoder_linears`.
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to its target layers and watch the model's forward passes.

        Raises:
            ValueError: a target that cannot be adapted, or none.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, MixLoraConfig)
        if config.target_modules is None and isinstance(model, PreTrainedModel):
            config.target_modules = decoder_linears(model, as_list=config.layers_to_transform is not None)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and config.pool != "all":
            raise ValueError(
                f"pool={config.pool}: all that the decoder of an encoder-decoder model reads in training is its "
                "answer; use pool=all"
            )
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind in TOKENS_FIRST:
            raise ValueError(
                f"{kind}: this model's layers read (tokens, rows, features), and routing takes the first dimension for "
                "instances; use LoRA"
            )
        # A second adapter that was injected by another tuner (transformers' `add_adapter`) shares the passes.
        others = (layer.context for layer in model.modules() if isinstance(layer, MixLoraLayer))
        self.context = next(others, None) or vars(self).get("context") or RoutingContext()
        for key in [key for key in self.context.holders if key[0] == adapter_name]:
            del self.context.holders[key]  # of one that had this name before
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        root = self.context.root
        is_outermost = root is None or any(module is root for module in model.modules())
        self.context.attach(model if is_outermost else root, MixLoraLinear)  # type: ignore[arg-type]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        assert isinstance(config, MixLoraConfig)
        if config.router.source == "task" and config.task_embedding_dim is None:
            text_config = model_config.get("text_config") or model_config
            width = text_config.get("hidden_size") if isinstance(text_config, Mapping) else None
            if width is None:
                raise ValueError(
                    "task_embedding_dim=None: this model's hidden size is not known, give the width"
                )
            config.task_embedding_dim = width
        if config.pool == "text" and config.picture_tokens is None:
            named = (model_config.get(key) for key in PICTURE_TOKENS)
            config.picture_tokens = [token for token in named if isinstance(token, int)]
        return config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MixLoraConfig)
        if isinstance(target, MixLoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        self._refuse(peft_config, target, current_key)
        assert isinstance(target, nn.Linear)
        layer = MixLoraLinear(target, adapter_name, peft_config, self.context, current_key)
        if adapter_name not in self.active_adapters:
            # An adapter beside the active one does not train.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _refuse(self, config: MixLoraConfig, target: nn.Module, key: str) -> None:
        """Raise ValueError for a target that cannot be adapted."""
        asked = f"target_modules={config.target_modules}: {key}"
        if not isinstance(target, nn.Linear):
            raise ValueError(f"{asked} is a {type(target).__name__}, only torch.nn.Linear can be adapted")
        if is_read_past(self.model, key):
            raise ValueError(
                f"{asked} belongs to a state-space layer whose kernel reads the weight and never calls the layer, so "
                "an adapter there would do nothing; leave it out"
            )
        if config.router.source == "tokens" and target is output_layer(self.model):
            raise ValueError(
                f"{asked} is the output layer, which reads only the tokens whose logits are wanted, and an instance's "
                "factors are chosen from all of its tokens; leave it out, train it whole (modules_to_save), or use "
                "routing=task"
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where PEFT asks for it: `adapter_names` of the rows of a mixed batch."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, MixLoraLayer) for name in layer.rules}
        if unknown := {*names} - known - {"__base__"}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        # Modules that are trained whole learn of it as PEFT tells them; rows are repeated for beams.
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        with self.context.with_adapters(list(names)), ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_with_names, names=repeated)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def calibrated(
        self, adapter_name: str = "default", tasks: Sequence[Hashable] | None = None
    ) -> Iterator[None]:
        """Inside, read some training inputs; behind, the adapter has the statistics that `normalize` needs of them.

        Before the first training step, with the inputs as training has them (a prompt that is known where `pool` asks
        for it). With the same inputs and seed it does the same again. Nothing happens without `normalize`.

        Args:
            adapter_name: whose statistics.
            tasks: for router_init=tasks: whose each of the inputs is, in their order; of two tasks at least.

        Raises:
            ValueError: fewer than two inputs were read, or not as many as `tasks` names.
        """
        numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks or ()))}
        config = self.peft_config[adapter_name]
        if isinstance(config, MixLoraConfig) and config.router_init == "tasks" and len(numbers) < 2:
            raise ValueError(
                f"router_init=tasks needs inputs of two tasks at least; tasks names {len(numbers)}"
            )
        whose = torch.tensor([numbers[task] for task in tasks or ()])
        layers = [
            m
            for m in self.modules()
            if isinstance(m, MixLoraLinear) and adapter_name in m.mixlora_standardiser
        ]
        found: dict[tuple[str, str], list[Tensor]] = {}
        self.context.collecting = found
        try:
            with torch.no_grad():
                yield
        finally:
            self.context.collecting = None
        for layer in layers:
            read = torch.cat(found.pop((layer.name, adapter_name), []) or [torch.empty(0, 1)])
            if len(read) < 2:
                raise ValueError(f"{layer.name}: statistics need two inputs at least, {len(read)} were read")
            if tasks is not None and len(tasks) != len(read):
                raise ValueError(f"{layer.name}: tasks names {len(tasks)} inputs, {len(read)} were read")
            layer.calibrate(adapter_name, read, whose)

    def skip_calibration(self) -> None:
        """Let `normalize` leave what routers read as it is; for measurements of time and memory alone."""
        for module in self.modules():
            if isinstance(module, Standardiser):
                module.known = True

    def calibrated_tensors(self, adapter_name: str = "default") -> list[Tensor]:
        """All that `calibrated` has set: statistics, and routers that start from them; in the layers' order."""
        found: list[Tensor] = []
        for layer in self.modules():
            if isinstance(layer, MixLoraLinear) and adapter_name in layer.mixlora_standardiser:
                found += layer.mixlora_standardiser[adapter_name].buffers()
                if layer.rules[adapter_name].router_init != "random":
                    routers = (layer.mixlora_router_a, layer.mixlora_router_b)
                    found += [
                        weight.data
                        for each in routers
                        if adapter_name in each
                        for weight in each[adapter_name].parameters()
                    ]
        return found

    def unload(self) -> nn.Module:
        """Take the adapters off; returns the base model as it was."""
        self.context.detach()
        base: nn.Module = super().unload()
        return base

    def selections(self, adapter_name: str = "default") -> dict[str, Selection]:
        """By layer name: the factors that the last pass's N instances got, `index_a` and `index_b` (N, r)."""
        layers = ((name, m) for name, m in self.model.named_modules() if isinstance(m, MixLoraLinear))
        last = ((name, layer.last_selection.get(adapter_name)) for name, layer in layers)
        return {name: selection for name, selection in last if selection is not None}

    def decoder_layers(self) -> dict[str, MixLoraLinear]:
        """The adapted layers of the decoder, by name; a tower's would see other rows, or nothing at all."""
        base: Any = self.model
        inside = {*base.get_decoder().modules()}
        return {
            name: layer
            for name, layer in base.named_modules()
            if isinstance(layer, MixLoraLinear) and layer in inside
        }


def selected(layers: Iterable[MixLoraLinear], adapter: str = "default") -> tuple[Tensor, Tensor]:
    """Factors that the last forward pass's instances got in L layers: of A and of B, (L, B, r) each.

    What `MixLoraModel.selections` gives, without a walk through all modules of the model.
    """
    last = [layer.last_selection[adapter] for layer in layers]
    selections = [selection for selection in last if selection is not None]
    assert len(selections) == len(last), "a layer had no part in the forward pass"
    return torch.stack([s.index_a for s in selections]), torch.stack([s.index_b for s in selections])


def _with_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
