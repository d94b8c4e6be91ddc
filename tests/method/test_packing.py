"""Several instances in one row: each has its own factors, and everything is as if it were alone in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import MECHANISMS, adapt, assert_same_choice, build_llama
from torch import Tensor

LENGTHS = (5, 9, 1, 7)
FIELDS: list[dict[str, Any]] = [
    {},
    {"router_grad": "straight_through"},
    {"cfs": "none", "pool": "prompt"},
    {"cfs": "released", "pool": "prompt", "router_grad": "straight_through"},
    {"routing": "task"},
    {"routing": "random"},
    *MECHANISMS.values(),
]


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 64, (1, length), generator=generator) for length in LENGTHS]


def labels_of(ids: Tensor) -> Tensor:
    """The first two thirds are the prompt, the first token at least: nothing predicts it."""
    return torch.where(torch.arange(ids.shape[1]) < max(1, ids.shape[1] * 2 // 3), -100, ids)


def own(fields: dict[str, Any], rows: list[int]) -> dict[str, Tensor]:
    """What these samples bring along beside their tokens."""
    generator = torch.Generator().manual_seed(7)
    task, seeds = torch.randn(4, 32, generator=generator), torch.arange(4) * 2**50 + 12345
    if fields.get("routing") == "task":
        return {"task_embeddings": task[rows]}
    return {"routing_seeds": seeds[rows]} if fields.get("routing") == "random" else {}


def packed(how: str, rows: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Samples 0 to 3 in one row, or in the given rows, which are padded on the right."""
    ids = samples()
    rows = rows or [[0, 1, 2, 3]]
    width = max(sum(LENGTHS[i] for i in row) for row in rows)
    columns: dict[str, list[Tensor]] = {"input_ids": [], "position_ids": [], "labels": [], "mask": []}
    for row in rows:
        parts = {
            "input_ids": [ids[i][0] for i in row],
            "position_ids": [torch.arange(LENGTHS[i]) for i in row],
            "labels": [labels_of(ids[i])[0] for i in row],
            "mask": [torch.ones(LENGTHS[i], dtype=torch.long) for i in row],
        }
        for name, values in parts.items():
            joined = torch.cat(values)
            columns[name].append(torch.nn.functional.pad(joined, (0, width - len(joined))))
    batch = {name: torch.stack(values) for name, values in columns.items()}
    mask = batch.pop("mask").bool()
    batch["labels"][~mask] = -100
    number = (batch["position_ids"] == 0).cumsum(-1)
    together = (number.unsqueeze(2) == number.unsqueeze(1)) & mask.unsqueeze(1) & mask.unsqueeze(2)
    causal = (together & torch.ones(width, width).tril().bool()).unsqueeze(1)
    if how == "position_ids":
        batch["attention_mask"] = causal if not mask.all() else None
    elif how == "cu_seq_lens":
        batch["cu_seq_lens_q"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
    elif how == "mask":
        batch["attention_mask"] = causal
    return {name: value for name, value in batch.items() if value is not None}


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a loss over the labelled tokens' sum."""
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    scores = output.logits[:, :-1].float().log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    loss = -scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[targets != -100].sum()
    return output.logits.detach(), {"loss": loss.detach()} | {
        name: gradient
        for (name, p), gradient in zip(
            ((n, p) for n, p in model.named_parameters() if p.requires_grad),
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True),
            strict=True,
        )
        if gradient is not None
    }


@pytest.mark.parametrize(
    "fields", FIELDS, ids=lambda fields: "-".join(map(str, fields.values())) or "default"
)
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "mask", "two_rows"])
def test_packed_equals_alone(fields: dict[str, Any], how: str) -> None:
    model = adapt(build_llama(), **fields).train()
    close = 1e-4 if "gate" in fields else 1e-5  # a weight hands on the rounding of what was pooled
    rows = [[0, 1], [2, 3]] if how == "two_rows" else [[0, 1, 2, 3]]
    batch = packed("position_ids" if how == "two_rows" else how, rows)
    logits, found = run(model, batch | own(fields, [0, 1, 2, 3]))
    chosen = model.base_model.selections()
    expected: dict[str, Tensor] = {}
    place = {
        i: (row, sum(LENGTHS[j] for j in members[:at]))
        for row, members in enumerate(rows)
        for at, i in enumerate(members)
    }
    for i, ids in enumerate(samples()):
        row, start = place[i]
        alone_logits, alone = run(model, {"input_ids": ids, "labels": labels_of(ids)} | own(fields, [i]))
        torch.testing.assert_close(
            logits[row, start : start + LENGTHS[i]], alone_logits[0], rtol=close, atol=close
        )
        assert_same_choice(chosen, i, model.base_model.selections())
        for name, value in alone.items():
            expected[name] = expected.get(name, 0) + value
    # Whatever the seeds are, instances differ; else the above would hold without segments.
    assert sum(len({tuple(row) for row in s.index_a.tolist()}) > 2 for s in chosen.values()) >= 10
    assert found.keys() == expected.keys() and len(found) > 28
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=close, atol=close * max(1.0, value.abs().max().item()), msg=name
        )
