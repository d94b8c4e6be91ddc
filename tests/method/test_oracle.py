"""The layer equals the equations written out in loops: outputs, selections and every gradient."""

from __future__ import annotations

import method_oracle as oracle
import pytest
import torch
from torch import Tensor, nn

from mixlora_cli import MixLoraConfig
from mixlora_cli.method.context import RoutingContext
from mixlora_cli.method.forward_info import ForwardInfo
from mixlora_cli.method.layer import MixLoraLinear

D_IN, D_OUT, NUM_FACTORS, RANK, ALPHA = 5, 6, 5, 3, 7.0
MASKS = {
    "none": None,
    "left": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool(),
    "right": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
}
NAMES = {
    "factors_a": "mixlora_factors_a.default.weight",
    "factors_b": "mixlora_factors_b.default.weight",
    "router_a": "mixlora_router_a.default.weight",
    "router_b": "mixlora_router_b.default.weight",
    "router_ab": "mixlora_router_ab.default.weight",
}


def build(p: oracle.Parameters, **fields: object) -> MixLoraLinear:
    base = nn.Linear(D_IN, D_OUT, bias=False)
    base.weight = nn.Parameter(p.weight.clone(), requires_grad=False)
    config = MixLoraConfig(r=RANK, factors=NUM_FACTORS, alpha=ALPHA, **fields)
    layer = MixLoraLinear(base, "default", config, RoutingContext())
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for field, name in NAMES.items():
            if name in own:
                own[name].copy_(getattr(p, field))
    return layer


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states (3, 4, d_in) and what the outputs are multiplied with for a loss (3, 4, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, D_IN, generator=generator), torch.randn(3, 4, D_OUT, generator=generator)


def check(
    layer: MixLoraLinear,
    info: ForwardInfo,
    hidden: Tensor,
    probe: Tensor,
    expected: oracle.Result,
    gradients: dict[str, Tensor | None],
) -> None:
    """The layer's output, selection and gradients are the oracle's; what has none there has none here."""
    place = layer.base_layer.weight.device
    hidden = hidden.detach().clone().to(place).requires_grad_()
    with layer.context.within(info):
        output = layer(hidden)
    (output * probe.to(place)).sum().backward()
    selection = layer.last_selection["default"]
    assert selection.index_a.tolist() == expected.index_a
    assert selection.index_b.tolist() == expected.index_b
    stacked = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in expected.output])
    torch.testing.assert_close(output.cpu(), stacked, rtol=1e-5, atol=1e-5)
    own = dict(layer.named_parameters())
    for field, gradient in gradients.items():
        parameter = hidden if field == "hidden" else own.get(NAMES[field])
        if parameter is None or gradient is None:
            assert parameter is None or parameter.grad is None
        else:
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-4, atol=1e-4)
    assert own["base_layer.weight"].grad is None


@pytest.mark.parametrize("base", ["fused", "called"])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("cfs", ["paper", "released", "none"])
@pytest.mark.parametrize("router_grad", ["none", "straight_through"])
def test_forward_and_gradients_equal_the_oracle(
    padding: str, cfs: str, router_grad: str, base: str, device: torch.device
) -> None:
    """Both with the base layer's product taken along and with a base layer that has to be called."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden, probe = inputs(12)
    learns = router_grad == "straight_through"
    loop_input = hidden.clone().requires_grad_()
    expected = oracle.layer(p, loop_input, MASKS[padding], RANK, ALPHA, cfs)
    wanted = {field: getattr(p, field) for field in NAMES} | {"hidden": loop_input}
    layer = build(p, cfs=cfs, router_grad=router_grad).to(device)
    calls: list[int] = []
    if base == "called":
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    gradients = oracle.gradients(expected, probe, wanted, learns)
    mask = MASKS[padding]
    info = ForwardInfo(tokens=None if mask is None else mask.to(device))
    check(layer, info, hidden, probe, expected, gradients)
    assert len(calls) == (base == "called")
    own = dict(layer.named_parameters())
    assert (NAMES["router_ab"] in own) == (cfs != "none")
    for field in ("router_a", "router_b", "router_ab"):
        router = own.get(NAMES[field])
        assert router is None or router.requires_grad == learns == (router.grad is not None)


@pytest.mark.parametrize("cfs", ["paper", "released", "none"])
@pytest.mark.parametrize("router_grad", ["none", "straight_through"])
def test_task_routing_equals_the_oracle(cfs: str, router_grad: str) -> None:
    """The routers read the task's embedding, of a width of its own; the input only goes through the factors."""
    width = 7
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11, width=width)
    hidden, probe = inputs(14)
    task = torch.randn(3, width, generator=torch.Generator().manual_seed(17))
    expected = oracle.layer(p, hidden, None, RANK, ALPHA, cfs, task=task)
    wanted = {field: getattr(p, field) for field in NAMES}
    gradients = oracle.gradients(expected, probe, wanted, router_grad == "straight_through")
    layer = build(p, cfs=cfs, router_grad=router_grad, routing="task", task_embedding_dim=width)
    check(layer, ForwardInfo(task=task), hidden, probe, expected, gradients)


@pytest.mark.parametrize("cfs", ["paper", "released", "none"])
def test_pool_prompt_equals_the_oracle_on_the_prompts_tokens(cfs: str) -> None:
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden, probe = inputs(15)
    prompt = torch.tensor(
        [[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    ).bool()  # two turns, one turn, left padding
    expected = oracle.layer(p, hidden, prompt, RANK, ALPHA, cfs)
    gradients = oracle.gradients(expected, probe, {field: getattr(p, field) for field in NAMES}, True)
    layer = build(p, cfs=cfs, router_grad="straight_through", pool="prompt")
    info = ForwardInfo(tokens=torch.ones(3, 4).bool(), prompt=prompt)
    check(layer, info, hidden, probe, expected, gradients)


@pytest.mark.parametrize("base", ["fused", "called"])
@pytest.mark.parametrize("cfs", ["paper", "none"])
@pytest.mark.parametrize("pairing", ["separate", "tied"])
@pytest.mark.parametrize("normalize", [False, True])
def test_mechanisms_equal_the_oracle(normalize, pairing, cfs, base) -> None:
    """Tied pairs and statistics, alone and together; their routers learn."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=21)
    hidden, probe = inputs(22)
    mean, deviation = (
        torch.randn(D_IN, generator=torch.Generator().manual_seed(23)),
        torch.arange(1.0, D_IN + 1),
    )
    choice = oracle.Choice(
        tied=pairing == "tied",
        statistics=(mean, deviation) if normalize else None,
    )
    loop_input = hidden.clone().requires_grad_()
    expected = oracle.layer(p, loop_input, MASKS["left"], RANK, ALPHA, cfs, choice=choice)
    wanted = {field: getattr(p, field) for field in NAMES} | {"hidden": loop_input}
    gradients = oracle.gradients(expected, probe, wanted, True)
    fields = {"cfs": cfs, "pairing": pairing, "normalize": normalize}
    layer = build(p, router_grad="straight_through", **fields)
    if normalize:
        standardiser = layer.mixlora_standardiser["default"]
        standardiser.mean.copy_(mean)
        standardiser.deviation.copy_(deviation)
        standardiser.known = True
    if base == "called":
        layer.base_layer.register_forward_hook(lambda *_: None)
    check(layer, ForwardInfo(tokens=MASKS["left"]), hidden, probe, expected, gradients)
    with torch.no_grad(), layer.context.within(ForwardInfo(tokens=MASKS["left"])):
        stacked = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in expected.output])
        torch.testing.assert_close(layer(hidden), stacked, rtol=1e-5, atol=1e-5)
    names = set(dict(layer.named_parameters()))
    assert (NAMES["router_b"] in names) == (pairing == "separate")
    assert (NAMES["router_ab"] in names) == (pairing == "separate" and cfs != "none")


def test_pool_text_equals_the_oracle_on_the_prompts_words() -> None:
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden, probe = inputs(15)
    prompt = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    pictures = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]).bool()
    expected = oracle.layer(p, hidden, prompt & ~pictures, RANK, ALPHA, "none")
    gradients = oracle.gradients(expected, probe, {field: getattr(p, field) for field in NAMES}, True)
    layer = build(p, cfs="none", router_grad="straight_through", pool="text")
    check(layer, ForwardInfo(prompt=prompt, pictures=pictures), hidden, probe, expected, gradients)
    with (
        pytest.raises(
            ValueError, match="pool=text: which tokens stand for pictures is known of input_ids alone"
        ),
        layer.context.within(ForwardInfo(prompt=prompt)),
    ):
        layer(hidden)
    alone = ForwardInfo(prompt=prompt, pictures=torch.tensor([[0], [1], [0]]).bool().expand(3, 4))
    nothing = pytest.raises(ValueError, match=r"pool=text: instances \[1\] .* nothing but pictures")
    with nothing, layer.context.within(alone):
        layer(hidden)


def test_random_routing_equals_the_oracle_on_what_was_drawn() -> None:
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden, probe = inputs(16)
    layer = build(p, routing="random")
    torch.manual_seed(0)
    layer(hidden)
    drawn = layer.last_selection["default"]
    picked = list(zip(drawn.index_a.tolist(), drawn.index_b.tolist(), strict=True))
    expected = oracle.layer(p, hidden, None, RANK, ALPHA, "none", picked=picked)
    wanted = {"factors_a": p.factors_a, "factors_b": p.factors_b}
    torch.manual_seed(0)  # the same draw
    check(layer, ForwardInfo(), hidden, probe, expected, oracle.gradients(expected, probe, wanted, False))


def test_the_three_conditional_forms_select_differently() -> None:
    """Otherwise the test above could not tell them apart."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden = torch.randn(6, 4, D_IN, generator=torch.Generator().manual_seed(13))
    chosen = []
    for cfs in ("paper", "released", "none"):
        layer = build(p, cfs=cfs)
        layer(hidden)
        chosen.append(layer.last_selection["default"].index_b.tolist())
    assert chosen[0] != chosen[1] and chosen[0] != chosen[2] and chosen[1] != chosen[2]


def test_straight_through_changes_no_output_bit() -> None:
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    hidden = torch.randn(3, 4, D_IN, generator=torch.Generator().manual_seed(12))
    assert torch.equal(build(p, router_grad="none")(hidden), build(p, router_grad="straight_through")(hidden))


def test_pairing_follows_the_order_of_selection() -> None:
    """The k-th best factor of A works with the k-th best of B: crossing the pairs is another matrix."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    layer = build(p)
    hidden = torch.randn(1, 4, D_IN, generator=torch.Generator().manual_seed(12))
    update = layer(hidden) - layer.base_layer(hidden)
    chosen = layer.last_selection["default"]
    a, b = p.factors_a[chosen.index_a[0]], p.factors_b[chosen.index_b[0]]
    in_order = sum(torch.outer(b[k], a[k]) for k in range(RANK))
    crossed = sum(torch.outer(b[k], a[RANK - 1 - k]) for k in range(RANK))
    torch.testing.assert_close(update, ALPHA / RANK * hidden @ in_order.T, rtol=1e-4, atol=1e-4)
    assert (update - ALPHA / RANK * hidden @ crossed.T).abs().max() > 1


def test_finite_differences_of_the_factors() -> None:
    """A selected factor's gradient is the slope of the loss; one that nobody selected has none."""
    p = oracle.parameters(D_IN, D_OUT, NUM_FACTORS, RANK, seed=11)
    layer = build(p).double()
    generator = torch.Generator().manual_seed(12)
    hidden = torch.randn(2, 4, D_IN, generator=generator).double()
    probe = torch.randn(2, 4, D_OUT, generator=generator).double()
    (layer(hidden) * probe).sum().backward()
    chosen = layer.last_selection["default"]
    for pools, used in (
        (layer.mixlora_factors_a, chosen.index_a),
        (layer.mixlora_factors_b, chosen.index_b),
    ):
        weight = pools["default"].weight
        for factor in range(NUM_FACTORS):
            if factor not in used:
                assert weight.grad[factor].abs().max() == 0
                continue
            slope = _slope(layer, hidden, probe, weight, factor)
            torch.testing.assert_close(weight.grad[factor], slope, rtol=1e-6, atol=1e-6)


def _slope(layer: MixLoraLinear, hidden: Tensor, probe: Tensor, weight: Tensor, factor: int) -> Tensor:
    step = 1e-5
    slopes = []
    with torch.no_grad():
        for position in range(weight.shape[1]):
            values = []
            for sign in (1, -1):
                weight[factor, position] += sign * step
                values.append((layer(hidden) * probe).sum())
                weight[factor, position] -= sign * step
            slopes.append((values[0] - values[1]) / (2 * step))
    return torch.stack(slopes)
