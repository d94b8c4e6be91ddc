"""Eight instances of each of two seen and two unseen tasks, and finished MixLoRA runs whose routers differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis_fixtures import family, no_model, one_thread, own_cache  # noqa: F401
from mixlora_cli.config import DataConfig, MapConfig, TsneConfig
from mixlora_cli.training.run_folder import RunFolder
from tiny_data import settings_of, tiny_data
from tiny_runs import TINY, finished_run

SEEN, UNSEEN = ("counting", "naming things/now"), ("mini_vsr", "mini_pope")
FEW: dict[str, Any] = {"permutations": 20, "sides": ["a"], "layers": [1]}
"""Little to draw; the selections of all layers are kept all the same."""
ATTACK = "</script><script>alert('&amp;')</script>"

MakeRun = Callable[..., RunFolder]
MakeConfig = Callable[..., TsneConfig]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("data") / "records"
    return tiny_data(root, remark=ATTACK, heldout=SEEN * 8, unseen=UNSEEN * 8)


@pytest.fixture
def make_run(tmp_path: Path, data: DataConfig) -> MakeRun:
    """`make_run("lora")`, `make_run(pool="prompt")`: what `mixlora train` leaves, without the training."""

    def make(name: str = "mixlora", routing: str = "instance", **fields: Any) -> RunFolder:
        folder = tmp_path / f"run-{name}-{routing}-{len(fields)}"
        # Pooled inputs of the tiny model are much alike: only large routers tell instances apart.
        return finished_run(folder, data, name, routing, router_spread=50, **fields)

    return make


@pytest.fixture
def make_config(data: DataConfig) -> MakeConfig:
    """`make_config(run.root, tasks=[...], batch_size=1)`: keywords of `MapConfig` or `TsneConfig`."""

    def make(run: Path, **values: Any) -> TsneConfig:
        settings = settings_of(MapConfig, values, **FEW, batch_size=4, cache_features=False)
        whole = {"model": TINY, "data": data, "output_dir": str(run / "tsne"), **values}
        return TsneConfig(tsne=settings, run=str(run), **whole)

    return make


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a run this small goes into its figures."""
    monkeypatch.setattr("mixlora_cli.analysis.selections.run.draw_all", lambda *_: [])
