"""The variants compute what their names say, in the number format that training uses."""

import pytest
import torch

from mixlora_cli.analysis.bench.layers import LINEAR, LORA, PUBLISHED, Bench, LayerCase, build_bench, mixlora

CASE = LayerCase(d_in=24, d_out=40, dtype="fp32", batch=3, tokens=5, rank=2, seed=1)


def built(dtype: str) -> Bench:
    case = LayerCase(CASE.d_in, CASE.d_out, dtype, CASE.batch, CASE.tokens, CASE.rank, CASE.seed)
    return build_bench(case, factors=4, pools=[4, 8], device=torch.device("cpu"))


def test_the_published_form_gives_what_ours_gives() -> None:
    """With the same weights: so it is the same method that is timed."""
    bench = built("fp32")
    ours, theirs = bench.models[mixlora(4)], bench.models[PUBLISHED]
    weights = {
        name.split("mixlora_")[-1].replace(".default", ""): parameter
        for name, parameter in ours.named_parameters()
        if "mixlora_" in name
    }
    copied = [name for name, _ in theirs.named_parameters() if name in weights]
    assert sorted(copied) == sorted(weights)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    torch.testing.assert_close(bench.forward(PUBLISHED), bench.forward(mixlora(4)), rtol=1e-5, atol=1e-5)
    gradients = []
    for name in (PUBLISHED, mixlora(4)):
        bench.clear(name)
        bench.forward_backward(name)
        assert bench.hidden.grad is not None
        gradients.append(bench.hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_types_are_those_of_training(dtype: str, expected: torch.dtype) -> None:
    bench = built(dtype)
    assert list(bench.variants()) == [LINEAR, LORA, mixlora(4), mixlora(8), PUBLISHED]
    for name, model in bench.models.items():
        bench.clear(name)
        assert bench.forward(name).dtype == expected
        bench.forward_backward(name)
        assert bench.hidden.grad is not None and bench.hidden.grad.dtype == expected
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == (0 if name == LINEAR else 2)
        assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in trained)


def test_all_variants_share_the_frozen_weight_and_the_seed_decides_all() -> None:
    bench, again = built("fp32"), built("fp32")
    shared = {
        p.data_ptr()
        for m in bench.models.values()
        for p in m.parameters()
        if p.shape == (CASE.d_out, CASE.d_in)
    }
    assert len(shared) == 1
    for name in bench.models:
        assert torch.equal(bench.forward(name), again.forward(name))


def test_clear_forgets_the_gradients() -> None:
    bench = built("fp32")
    bench.forward_backward(LORA)
    bench.clear(LORA)
    assert bench.hidden.grad is None
    assert all(parameter.grad is None for parameter in bench.models[LORA].parameters())
