"""The low-rank product: right numbers, right type, and never a full matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.dropout import dropped_places, dropped_share, zero_
from mixlora_cli.method.layer import MixLoraLinear
from mixlora_cli.method.lowrank import add_low_rank


def operands(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    rows, tokens, d_in, d_out, rank = shape
    sizes = (
        (rows, tokens, d_out),
        (rows, tokens, d_in),
        (rows, rank, d_in),
        (rows, rank, d_out),
        (rows, rank),
    )
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def test_equals_the_full_matrix() -> None:
    output, hidden, rows_a, rows_b, weight = operands(torch.float64, 3, 4, 5, 6, 2)
    for n in range(3):
        matrix = sum(weight[n, k] * torch.outer(rows_b[n, k], rows_a[n, k]) for k in range(2))
        expected = output[n] + 1.5 * hidden[n] @ matrix.T
        torch.testing.assert_close(add_low_rank(output, hidden, rows_a, rows_b, 1.5, weight)[n], expected)


def test_gradients_equal_finite_differences() -> None:
    inputs = [tensor.requires_grad_() for tensor in operands(torch.float64, 2, 3, 4, 5, 2)]

    def product(output: Tensor, hidden: Tensor, rows_a: Tensor, rows_b: Tensor, weight: Tensor) -> Tensor:
        return add_low_rank(output, hidden, rows_a, rows_b, 0.7, weight)

    assert torch.autograd.gradcheck(product, inputs)


def test_other_numbers_of_dimensions() -> None:
    output, hidden, rows_a, rows_b, _ = operands(torch.float32, 2, 6, 4, 5, 2)
    expected = add_low_rank(output, hidden, rows_a, rows_b, 2.0)
    split = add_low_rank(output.view(2, 2, 3, 5), hidden.view(2, 2, 3, 4), rows_a, rows_b, 2.0)
    assert torch.equal(split, expected.view(2, 2, 3, 5))
    single = add_low_rank(output[:, 0], hidden[:, 0], rows_a, rows_b, 2.0)
    torch.testing.assert_close(single, expected[:, 0])


def make_layer(dtype: torch.dtype = torch.float32, size: int = 64, **fields: object) -> MixLoraLinear:
    torch.manual_seed(4)
    base = nn.Linear(size, size, bias=False).to(dtype).requires_grad_(False)
    layer = MixLoraLinear(base, "default", MixLoraConfig(r=2, factors=6, **fields), RoutingContext())
    for name in ("factors_a", "factors_b", "router_a", "router_b"):
        nn.init.normal_(getattr(layer, f"mixlora_{name}").float()["default"].weight)
    layer.mixlora_router_ab.float()
    return layer


def by_hand(layer: MixLoraLinear, hidden: Tensor, thinned: Tensor) -> Tensor:
    """The output where the low-rank product, with the factors that were selected last, reads the thinned input."""
    chosen = layer.last_selection["default"]
    a = layer.mixlora_factors_a["default"](chosen.index_a)
    b = layer.mixlora_factors_b["default"](chosen.index_b)
    return layer.base_layer(hidden) + 6.0 * (thinned @ a.transpose(1, 2)) @ b


class _Types(TorchDispatchMode):
    """Notes the types of everything that has a token dimension, and the largest tensor made besides the base weight."""

    def __init__(self, tokens: int, base_weight: Tensor) -> None:
        super().__init__()
        self.tokens, self.seen, self.largest = tokens, set(), 0
        self.base_weight = base_weight.data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() != self.base_weight:
                self.largest = max(self.largest, tensor.numel())
                if self.tokens in tensor.shape and tensor.is_floating_point():
                    self.seen.add(tensor.dtype)
        return result


def test_fp32_factors_do_not_drag_a_bf16_layer_to_fp32() -> None:
    layer = make_layer(torch.bfloat16)
    hidden = torch.randn(2, 7, 64).bfloat16()
    assert layer.mixlora_factors_a["default"].weight.dtype == torch.float32
    with _Types(7, layer.base_layer.weight) as types:
        output = layer(hidden)
    assert output.dtype == torch.bfloat16
    assert types.seen == {torch.bfloat16}
    output.float().pow(2).sum().backward()
    assert layer.mixlora_factors_a["default"].weight.grad.dtype == torch.float32
    assert layer.mixlora_factors_a["default"].weight.grad.abs().max() > 0


def test_autocast_computes_the_product_in_bf16_and_selects_as_without(device: torch.device) -> None:
    layer = make_layer().to(device)
    hidden = torch.randn(8, 7, 64).to(device)
    exact = layer(hidden)
    chosen = layer.last_selection["default"]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = layer(hidden)
    assert output.dtype == torch.bfloat16
    assert torch.equal(layer.last_selection["default"].index_b, chosen.index_b)
    assert torch.equal(layer.last_selection["default"].index_a, chosen.index_a)
    assert (output.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_no_tensor_of_the_size_of_the_weight_is_made() -> None:
    size = 96
    layer = make_layer(size=size, router_grad="straight_through", cfs="none")
    hidden = torch.randn(2, 3, size, requires_grad=True)
    with _Types(3, layer.base_layer.weight) as types:
        layer(hidden).sum().backward()
    assert types.largest < size * size / 4


def test_gradients_through_dropout_are_those_of_the_thinned_input() -> None:
    """The places are drawn once and used in both directions; the frozen product sees the whole input."""
    layer = make_layer(dropout=0.3).train()
    hidden, toward = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 64)
    torch.manual_seed(3)
    (layer(hidden) * toward).sum().backward()
    own = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    for_hidden = hidden.grad.clone()
    hidden.grad = None
    layer.zero_grad()
    torch.manual_seed(3)
    thinned = hidden * keep_mask(hidden, 0.3) / (1 - dropped_share(hidden.numel(), 0.3))
    (by_hand(layer, hidden, thinned) * toward).sum().backward()
    torch.testing.assert_close(for_hidden, hidden.grad, rtol=1e-4, atol=1e-4)
    for name, p in layer.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(own[name], p.grad, rtol=1e-4, atol=1e-3)
    assert len(own) == 2


def keep_mask(like: Tensor, probability: float) -> Tensor:
    return zero_(torch.ones(like.shape), dropped_places(like, probability))


def test_dropped_places_have_their_share_and_follow_the_seed() -> None:
    like = torch.empty(501, 999)
    for probability in (0.05, 0.5, 0.9):
        torch.manual_seed(1)
        mask = keep_mask(like, probability)
        torch.manual_seed(1)
        assert torch.equal(mask, keep_mask(like, probability))
        # Five standard deviations of the mean of half a million draws.
        assert abs(1 - mask.mean() - probability) < 5 * (0.25 / like.numel()) ** 0.5
        assert abs(dropped_share(like.numel(), probability) - probability) <= 1 / like.numel()
        assert not torch.equal(mask, keep_mask(like, probability))
    places = mask.flatten()[: like.numel() // 4 * 4].view(-1, 4)
    neighbours = torch.corrcoef(places.T)
    assert (neighbours - torch.eye(4)).abs().max() < 0.02
    assert mask.mean(dim=0).std() < 0.02  # no column is spared


def test_each_number_is_dropped_as_often_as_the_scale_says() -> None:
    """The scale of what is kept is the inverse of the share that is kept, however few numbers there are."""
    for count in (1, 2, 3, 24, 1000):
        like = torch.empty(count)
        draws = 40_000 if count < 1000 else 2_000
        kept = torch.stack([keep_mask(like, 0.3) for _ in range(draws)]).mean(dim=0)
        share = 1 - dropped_share(count, 0.3)
        assert (kept - share).abs().max() <= 6 * (share * (1 - share) / draws) ** 0.5
    assert dropped_places(torch.empty(0, 5), 0.3).tolist() == []


def test_dropout_applies_to_the_low_rank_product_alone() -> None:
    layer = make_layer(dropout=0.5)
    hidden = torch.randn(2, 7, 64)
    kept = layer.eval()(hidden)
    assert torch.equal(kept, layer(hidden))
    chosen = layer.last_selection["default"]
    torch.manual_seed(0)
    dropped = layer.train()(hidden)
    assert torch.equal(layer.last_selection["default"].index_a, chosen.index_a)
    torch.manual_seed(0)
    thinned = hidden * keep_mask(hidden, 0.5) / (1 - dropped_share(hidden.numel(), 0.5))
    torch.testing.assert_close(dropped, by_hand(layer, hidden, thinned), rtol=1e-4, atol=1e-3)
    assert (dropped - kept).abs().max() > 1
