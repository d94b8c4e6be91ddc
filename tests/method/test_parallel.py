"""Two processes (gloo) train as one does on both their rows: data parallel, and with every weight in two parts.

Seen are differences of 2e-7: sums over a batch are taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import Case, Trained, run

from mixlora_cli.config.launch import LaunchConfig
from mixlora_cli.launch.workers import run_workers

pytestmark = pytest.mark.slow

CLOSE = 1e-5
FIELDS: dict[str, dict[str, Any]] = {
    "routers_stay": {},
    "routers_learn": {"router_grad": "straight_through"},
    "prompt_released": {"router_grad": "straight_through", "pool": "prompt", "cfs": "released"},
}
CASES = [Case(how, fields) for how in ("ddp", "fsdp2") for fields in FIELDS.values()]
NAMES = [f"{how}-{name}" for how in ("ddp", "fsdp2") for name in FIELDS]


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, tuple[Trained, Trained]]]:
    """By case: one process, and two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(Path(__file__).parent))
        together = run_workers("parallel_runs:run", CASES, LaunchConfig(nproc=2))
    alone = run([replace(case, how="alone") for case in CASES])
    yield dict(zip(NAMES, zip(alone, together, strict=True), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(pairs: dict[str, tuple[Trained, Trained]], name: str) -> None:
    alone, together = pairs[name]
    assert (alone.processes, together.processes) == (1, 2)
    assert together.losses == pytest.approx(alone.losses, abs=CLOSE)
    assert alone.losses[-1] < alone.losses[0] - 0.01  # the curve moves: equal curves say something
    learns = "routers_stay" not in name
    for kind in ("gradients", "weights"):
        expected, found = getattr(alone, kind), getattr(together, kind)
        assert expected.keys() == {key.replace("module.", "") for key in found}
        assert any("router" in key for key in expected) == (learns or kind == "weights")
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, atol=CLOSE, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert max(gradient.abs().max() for gradient in alone.gradients.values()) > 1000 * CLOSE
