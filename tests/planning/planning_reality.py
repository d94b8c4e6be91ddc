"""What a small LLaVA really saves and computes: the reality that planning's formulas are held against."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mixlora_cli.analysis.planning.network import Network, read_network
from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.training.loss import head_sees_only, token_loss
from mixlora_cli.training.precision import inputs_keep_their_dtype

# torch counts baddbmm, but not the variant that adds in place.
IN_PLACE = {
    torch.ops.aten.baddbmm_: lambda _, a, b, *rest, out_shape=None, **more: 2 * a[0] * a[1] * a[2] * b[2]
}
BATCH, LENGTH, LABELS = 3, 48, 5
RANK, FACTORS = 4, 16
VOCABULARY = 160


def small_llava(attention: str) -> LlavaForConditionalGeneration:
    """Three LLaMA layers with grouped keys and values; no two sizes are alike."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_index=5,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


class Case:
    """A small model with an adapter, the `Network` that planning makes of it, and one text batch."""

    def __init__(
        self,
        adapter: AdapterConfig,
        attention: str = "eager",
        routing: str = "instance",
        bf16: bool = False,
        checkpointing: bool = False,
    ) -> None:
        base = small_llava(attention)
        if bf16 and adapter.name != "full":
            base = base.to(torch.bfloat16)
        route = RoutingConfig(name=routing)  # type: ignore[arg-type]
        self.network: Network = read_network(base, adapter, route, RANK, FACTORS, False, attention)
        self.bf16 = bf16
        self.model: nn.Module = attach_adapter(base, adapter, route, RANK, FACTORS).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.inputs = {
            "input_ids": torch.randint(6, VOCABULARY, (BATCH, LENGTH)),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        }
        self.inputs["attention_mask"][0, :7] = 0
        self.labelled = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        self.labelled[:, -LABELS:] = True

    def loss(self) -> Tensor:
        """As in training: logits of the labelled tokens alone."""
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        autocast = torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()
        with autocast, inputs_keep_their_dtype(self.model), head_sees_only(base.lm_head, self.labelled):
            logits = self.model(**self.inputs, use_cache=False).logits
        return token_loss(logits, torch.zeros(len(logits), dtype=torch.long), 1.0)

    def saved_bytes(self) -> int:
        """Distinct storages that autograd keeps, without those of parameters."""
        owned = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss()
        return sum(sizes.values())

    def counted_operations(self) -> tuple[int, int]:
        """torch's own count of (forward, backward with recomputation)."""
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
            loss = self.loss()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward:
            loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()
