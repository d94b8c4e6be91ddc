"""`torch.compile` takes an adapted model whole: no layer breaks the graph, nothing is compiled again, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import MECHANISMS, adapt, assert_close, beside, build_llama, gradients
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationMixin

ROUTINGS: list[dict[str, Any]] = [
    {},
    {"cfs": "released", "decode": "step"},
    {"cfs": "none", "pool": "prompt"},
    {"router_grad": "straight_through"},
    {"routing": "random"},
    {"routing": "task", "task_embedding_dim": 6},
    *MECHANISMS.values(),
]


def inputs(length: int = 12, rows: int = 2, seed: int = 0, **fields: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_mask": torch.arange(length).expand(rows, -1) < 8,
    }
    if fields.get("routing") == "task":
        given["task_embeddings"] = torch.randn(rows, 6, generator=generator)
    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", ROUTINGS, ids=lambda fields: "-".join(map(str, fields.values())) or "default"
)
def test_one_graph_with_the_same_outputs_and_gradients(make_model: Any, fields: dict[str, Any]) -> None:
    one_graph_with_the_same_outputs_and_gradients(make_model(**fields).train(), "aot_eager", **fields)


def one_graph_with_the_same_outputs_and_gradients(model: Any, backend: str, **fields: Any) -> None:
    given = beside(model, inputs(**fields))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        logits = run(**given).logits
        logits.square().mean().backward()
        found.append((logits.detach(), gradients(model)))
    assert not counters["graph_break"], dict(counters["graph_break"])
    (plain, plain_gradients), (fast, fast_gradients) = found
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert len(plain_gradients) >= 28
    assert_close(fast_gradients, plain_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_next_batches_are_not_compiled_again(make_model: Any) -> None:
    model = make_model().train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs())
    before = counters["stats"]["unique_graphs"]
    for seed in (1, 2, 3):
        again = inputs(seed=seed)
        torch.testing.assert_close(compiled(**again).logits, model(**again).logits)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_the_selection_is_that_of_the_batch_at_hand(make_model: Any) -> None:
    """What a layer saw while it was compiled must not stay in the graph."""
    model = make_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for seed in (1, 2):
        compiled(**inputs(seed=seed))
        fast = {name: chosen.index_a.clone() for name, chosen in model.base_model.selections().items()}
        model(**inputs(seed=seed))
        for name, chosen in model.base_model.selections().items():
            assert torch.equal(fast[name], chosen.index_a)


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["position_ids", "mask"])
def test_packed_rows_are_seen(told_by: str) -> None:
    """The graph breaks where the batch has to be looked at, and what was seen there counts behind it."""
    model = adapt(build_llama()).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for first in (4, 2, 7):
        ids = torch.randint(5, 40, (1, 9), generator=torch.Generator().manual_seed(first))
        positions = torch.cat([torch.arange(first), torch.arange(9 - first)]).unsqueeze(0)
        blocks = torch.block_diag(torch.ones(first, first), torch.ones(9 - first, 9 - first)).tril().bool()
        given = (
            {"position_ids": positions}
            if told_by == "position_ids"
            else {"attention_mask": blocks[None, None]}
        )
        found = compiled(input_ids=ids, use_cache=False, **given).logits
        torch.testing.assert_close(
            found, model(input_ids=ids, use_cache=False, **given).logits, rtol=1e-5, atol=1e-5
        )
        chosen = model.base_model.selections()
        assert all(len(selection.index_a) == 2 for selection in chosen.values())


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"decode": "step"}, {"routing": "task"}, {"routing": "random"}])
def test_generation_that_transformers_compiles(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a static cache it compiles the decoding passes by itself on GPUs; here it is made to."""
    model, plain = adapt(build_llama(), **fields), adapt(build_llama(), **fields)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *_: True)
    model.get_base_model().generation_config.compile_config = CompileConfig(backend="eager", fullgraph=False)
    torch._dynamo.reset()
    counters.clear()
    for seed, rows in ((0, 2), (1, 2), (2, 1)):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 40, (rows, 9 + seed), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "max_new_tokens": 8,
            "do_sample": False,
        }
        if fields.get("routing") == "task":
            given["task_embeddings"] = torch.randn(rows, 32, generator=generator)
        if fields.get("routing") == "random":
            given["routing_seeds"] = torch.arange(rows) + seed * 7
        expected = plain.generate(**given, disable_compile=True)
        assert torch.equal(model.generate(**given, cache_implementation="static"), expected)
    assert counters["stats"]["unique_graphs"] > 0
