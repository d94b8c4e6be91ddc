"""`auto` follows the hardware, and under bf16 no adapter drags a matrix product to fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixlora_cli.config import AdapterConfig, RoutingConfig
from mixlora_cli.models.adapters import attach_adapter
from mixlora_cli.models.forward import choose_dtype, inputs_keep_their_dtype, matrix_products_in
from mixlora_cli.models.tiny import build_tiny


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_auto_asks_the_processor(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_dtype("auto") is expected
    assert choose_dtype("fp32") is torch.float32
    assert choose_dtype("bf16") is torch.bfloat16


class RecordProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Types of the operands of every matrix product, forward and backward, as the kernels see them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[set[torch.dtype], set[int]]] = []
        """Types and sizes of each product's operands."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.seen.append(({t.dtype for t in tensors}, {size for t in tensors for size in t.shape}))
        return function(*args, **(kwargs or {}))


def adapted(name: str) -> nn.Module:
    torch.manual_seed(0)
    return attach_adapter(
        build_tiny(dtype=torch.bfloat16).model,
        AdapterConfig(name=name, dropout=0.1),  # type: ignore[arg-type]
        RoutingConfig(name="instance"),
        rank=2,
        factors=4,
    )


@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_every_large_product_runs_in_bf16(name: str) -> None:
    """Routers read one pooled vector an instance, in fp32 on purpose; products over tokens are all bf16."""
    model = adapted(name).train()
    num_tokens = 30
    ids = torch.randint(10, 200, (2, num_tokens))
    layer = model.base_model.model.model.language_model.layers[1].mlp.down_proj
    inputs: list[torch.dtype] = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    outputs: list[torch.dtype] = []
    layer.register_forward_hook(lambda _, args, out: outputs.append(out.dtype))

    with matrix_products_in(model, torch.bfloat16, "cpu"), RecordProducts() as record:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits.float().logsumexp(-1).mean().backward()

    assert inputs == outputs == [torch.bfloat16]
    products = [dtypes for dtypes, sizes in record.seen if sizes & {num_tokens, 2 * num_tokens}]
    linears = 2 * 7
    # The base's product and the adapter's two, forward and at least once backward.
    assert len(products) >= 3 * linears * 2
    assert all(dtypes == {torch.bfloat16} for dtypes in products)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients if g is not None} == {torch.float32}


def test_peft_casts_again_outside() -> None:
    model = adapted("lora")
    layers = [m for m in model.modules() if getattr(m, "cast_input_dtype_enabled", False)]
    assert len(layers) == 14
    with inputs_keep_their_dtype(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
