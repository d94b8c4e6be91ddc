"""Puts `MixLoraLinear` in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from mixlora_cli.method.config import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.layer import MixLoraLayer, MixLoraLinear
from mixlora_cli.method.selection import Selection

LANGUAGE_MODEL_LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Every linear layer of LLaVA's language model except `lm_head`; never the vision tower."""
DECODER_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MixLoraModel(BaseTuner):
    """The tuner that `get_peft_model` makes of a `MixLoraConfig`.

    `context` is the model's `RoutingContext`; its forward pass also takes `prompt_mask` (B, S), `task_embeddings`
    (B, d) and `routing_seeds` (B,), `generate` the latter two.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    # PEFT passes a string on as a regular expression, though it declares lists only.
    target_module_mapping: dict[str, Any] = {  # noqa: RUF012
        "llava": LANGUAGE_MODEL_LINEARS,
        "llama": DECODER_LINEARS,
        "mistral": DECODER_LINEARS,
        "qwen2": DECODER_LINEARS,
    }

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to its target layers and watch the model's forward passes."""
        if "context" not in vars(self):
            self.context = RoutingContext()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.context.attach(model, MixLoraLinear)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        assert isinstance(config, MixLoraConfig)
        if config.routing == "task" and config.task_embedding_dim is None:
            text_config = model_config.get("text_config") or model_config
            width = text_config.get("hidden_size") if isinstance(text_config, Mapping) else None
            if width is None:
                raise ValueError(
                    "task_embedding_dim=None: this model's hidden size is not known, give the width"
                )
            config.task_embedding_dim = width
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
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"target_modules={peft_config.target_modules}: {current_key} is a {type(target).__name__}, "
                "only torch.nn.Linear can be adapted"
            )
        layer = MixLoraLinear(target, adapter_name, peft_config, self.context, current_key)
        if adapter_name not in self.active_adapters:
            # An adapter beside the active one does not train.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        """Take the adapters off; returns the base model as it was."""
        self.context.detach()
        base: nn.Module = super().unload()
        return base

    def selections(self, adapter_name: str = "default") -> dict[str, Selection]:
        """By layer name: the factors that the last forward pass's instances got, `index_a` and `index_b` (B, r)."""
        layers = ((name, m) for name, m in self.model.named_modules() if isinstance(m, MixLoraLinear))
        last = ((name, layer.last_selection.get(adapter_name)) for name, layer in layers)
        return {name: selection for name, selection in last if selection is not None}
