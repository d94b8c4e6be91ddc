"""Two real processes (gloo) train as one process with twice the batch does: without and with ZeRO, and with FSDP2.

In fp32 the loss is the same to 5e-6 and the weights to 1e-5, seen are 1e-6 and 7e-7: sums over a batch are taken in
another order. A run that is resumed by as many processes is the same bit for bit.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from families import make_family
from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    DeepspeedConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    TrainConfig,
)
from mixlora_cli.launch import run_workers
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.tiny import build_tiny
from mixlora_cli.paths import conf_dir
from mixlora_cli.training.run_folder import RunFolder, read_metrics
from mixlora_cli.training.train import train

from .conftest import write_data

pytestmark = pytest.mark.slow

LOSS, WEIGHT = 5e-6, 1e-5
BATCH = 3
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A stage of ZeRO, or FSDP2, and what it trains.

    `whole` = also the projector, and routers that learn; `plus` = routers with statistics, that start as centroids.
    """

    stage: str
    adapter: str
    whole: bool = False
    plus: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}-{self._what}"

    @property
    def alone(self) -> str:
        """Name of the run in one process that it must equal."""
        return f"alone-{self._what}"

    @property
    def _what(self) -> str:
        return f"{self.adapter}{'-whole' * self.whole}{'-plus' * self.plus}"


CASES = [
    Case("none", "mixlora"),
    Case("none", "lora"),
    Case("zero1", "mixlora"),
    Case("zero2", "mixlora", whole=True),
    Case("zero2", "lora"),
    Case("zero3", "mixlora", whole=True),
    Case("zero3", "lora"),
    Case("zero3_offload", "mixlora"),
    Case("fsdp", "mixlora", whole=True),
    Case("fsdp", "mixlora"),
    Case("fsdp", "lora"),
    *(Case(stage, "mixlora", plus=True) for stage in ("none", "zero2", "zero3", "fsdp")),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass(frozen=True)
class Runs:
    """Where the runs are, and what their processes saw."""

    root: Path
    seen: dict[str, dict[str, Any]]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in read_metrics(self.root / name / "metrics.jsonl")]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.root / name / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLORA_CACHE", str(root / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(Path(__file__).parent))
        data = write_data(root)

        def config(name: str, case: Case, batch_size: int) -> TrainConfig:
            fsdp = case.stage == "fsdp"
            stage = "none" if fsdp else case.stage
            settings = yaml.safe_load((conf_dir() / "deepspeed" / f"{stage}.yaml").read_text())
            return TrainConfig(
                model=ModelConfig(
                    name="tiny", source="tiny", train_also=["multi_modal_projector"] if case.whole else []
                ),
                adapter=AdapterConfig(
                    name=case.adapter,  # type: ignore[arg-type]
                    dropout=0.0,  # each process draws its own
                    router_grad="straight_through" if case.whole or case.plus else "none",
                    pairing="tied" if case.plus else "separate",
                ),
                routing=RoutingConfig(
                    name="instance",
                    health_every=1,
                    **(dict(pool="text", normalize=True, router_init="clusters") if case.plus else {}),  # type: ignore[arg-type]
                ),
                data=data,
                train=OptimConfig(
                    steps=STEPS,
                    batch_size=batch_size,
                    learning_rate=1e-2,
                    precision="fp32",
                    log_every=1,
                    save_every=2,
                    cache_features=False,
                    fsdp=fsdp,
                ),
                rank=2,
                factors=4,
                output_dir=str(root / name),
                deepspeed=DeepspeedConfig(**settings),
            )

        for case in {case.alone: case for case in CASES}.values():
            train(config(case.alone, replace(case, stage="none"), 2 * BATCH))
        together = [config(case.name, case, BATCH) for case in CASES]
        yield Runs(root, run_workers("distributed_runs:run_all", together, LaunchConfig(nproc=2)))


@each_case
def test_losses_are_those_of_one_process_with_twice_the_batch(runs: Runs, case: Case) -> None:
    assert runs.seen[case.name]["processes"] == 2
    losses = runs.losses(case.name)
    assert losses == pytest.approx(runs.losses(case.alone), abs=LOSS)
    assert len(losses) == STEPS
    assert abs(losses[-1] - losses[0]) > 1000 * LOSS  # the curve moves: equal curves say something


@each_case
def test_saved_weights_are_whole_and_those_of_one_process(runs: Runs, case: Case) -> None:
    weights, alone = runs.weights(case.name), runs.weights(case.alone)
    assert weights.keys() == alone.keys()
    assert any("projector" in name for name in weights) == case.whole
    for name, expected in alone.items():
        assert weights[name].shape == expected.shape, name
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(
            weights[name], expected, atol=WEIGHT, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    # B starts at zero, so it shows that trained weights were saved and not the first ones.
    trained = [tensor for name, tensor in weights.items() if "lora_B" in name or "factors_b" in name]
    assert trained and all(tensor.abs().max() > 100 * WEIGHT for tensor in trained)


@each_case
def test_saved_adapter_is_found_again(runs: Runs, case: Case) -> None:
    model = load_adapter(build_tiny().model, runs.root / case.name / "adapter")
    loaded, saved = get_peft_model_state_dict(model), runs.weights(case.name)
    assert loaded.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []


@each_case
def test_resumed_run_goes_on_with_the_curve(runs: Runs, case: Case) -> None:
    resumed = f"{case.name}-resumed"
    assert runs.losses(resumed) == runs.losses(case.name)[2:]
    again = runs.weights(resumed)
    assert [
        name for name, tensor in runs.weights(case.name).items() if not torch.equal(again[name], tensor)
    ] == []


@each_case
def test_base_weights_are_read_directly_unless_they_are_spread(runs: Runs, case: Case) -> None:
    fused = runs.seen[case.name]["fused"]
    assert (fused > 0) == (case.adapter == "mixlora" and not case.stage.startswith("zero3"))


def test_one_process_writes_the_run_folder(runs: Runs) -> None:
    for case in CASES:
        steps = [row["step"] for row in read_metrics(runs.root / case.name / "metrics.jsonl")]
        assert steps == [1, 2, 3, 4]
        if case.adapter == "mixlora":
            looks = read_metrics(runs.root / case.name / "routing.jsonl")
            assert [look["instances"] for look in looks] == [2 * BATCH] * STEPS


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_families_spread_over_processes(data: DataConfig, tmp_path: Path, family: str) -> None:
    """Batches with no, one and two pictures; a tower whose weights are fetched ahead when the adapter is saved."""
    folder = make_family(family, tmp_path / family)

    def trained(processes: int) -> tuple[list[float], dict[str, Tensor]]:
        root = tmp_path / f"run{processes}"
        settings = [
            "model=hf",
            f"model.name_or_path={folder}",
            "data=json",
            f"data.train={data.train}",
            f"data.images={data.images}",
            "routing=instance",
            "adapter.dropout=0",
            "deepspeed=zero3",
            "train.cache_features=false",
            "train.precision=fp32",
            "train.steps=2",
            f"train.batch_size={4 // processes}",
            "train.effective_batch=4",
            "train.log_every=1",
            f"launch.nproc={processes}",
            f"train.workers={processes - 1}",  # which get the processor, a class made while the program runs
            f"output_dir={root}",
        ]
        command = [sys.executable, "-m", "mixlora_cli.cli", "train", *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        losses = [row["loss"] for row in read_metrics(RunFolder(root).metrics)]
        return losses, load_file(root / "adapter" / "adapter_model.safetensors")

    (losses, weights), (spread_losses, spread) = trained(1), trained(2)
    assert spread_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(spread[name], weight, rtol=1e-3, atol=1e-5, msg=name)
