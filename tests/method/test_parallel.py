"""Two processes (gloo) train as one does on both their rows: data parallel, and with every weight shared out.

Seen are differences of 2e-7: sums over a batch are taken in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import MECHANISMS
from parallel_runs import Case, Trained, run

from mixlora_cli.config import LaunchConfig
from mixlora_cli.launch import run_workers

pytestmark = pytest.mark.slow

CLOSE = 1e-5
FIELDS: dict[str, dict[str, Any]] = {
    "routers_stay": {},
    "routers_learn": {"router_grad": "straight_through"},
    "prompt_released": {"router_grad": "straight_through", "pool": "prompt", "cfs": "released"},
    "plus": MECHANISMS["plus"],
    "block": MECHANISMS["block"],
}
HOWS = ("ddp", "fsdp2")
Pairs = dict[str, tuple[Trained, Trained]]


@pytest.fixture(scope="module")
def alone() -> list[Trained]:
    """One process, for each of `FIELDS`; with one thread, as each of the two, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run([Case("alone", fields) for fields in FIELDS.values()])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=HOWS)
def pairs(request: pytest.FixtureRequest, alone: list[Trained]) -> Pairs:
    """By fields: one process, and two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(Path(__file__).parent))
        cases = [Case(request.param, fields) for fields in FIELDS.values()]
        together = run_workers("parallel_runs:run", cases, LaunchConfig(nproc=2))
    return dict(zip(FIELDS, zip(alone, together, strict=True), strict=True))


@pytest.mark.parametrize("name", FIELDS)
def test_two_processes_train_as_one(pairs: Pairs, name: str) -> None:
    alone, together = pairs[name]
    assert (alone.processes, together.processes) == (1, 2)
    assert together.losses == pytest.approx(alone.losses, abs=CLOSE)
    assert alone.losses[-1] < alone.losses[0] - 0.01  # the curve moves: equal curves say something
    for kind in ("gradients", "weights"):
        expected, found = getattr(alone, kind), getattr(together, kind)
        assert expected.keys() == found.keys()
        assert any("router" in key for key in expected) == (name != "routers_stay" or kind == "weights")
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, atol=CLOSE, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert max(gradient.abs().max() for gradient in alone.gradients.values()) > 1000 * CLOSE
