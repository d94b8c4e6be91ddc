"""What torchrun, deepspeed and SLURM put into the environment."""

import os

import pytest

from mixlora_cli.config import LaunchConfig
from mixlora_cli.errors import UserError
from mixlora_cli.launch import cluster_environment, first_host, variables

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


def test_nobody_started_this() -> None:
    assert cluster_environment({"PATH": "/bin"}) is None


def test_torchrun_is_taken_as_it_is() -> None:
    assert cluster_environment({**TORCHRUN, "PATH": "/bin"}) == TORCHRUN


def test_slurm_is_translated() -> None:
    assert cluster_environment(SLURM) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20_000 + 123456 * 31 % 20_000),
    }


def test_a_slurm_step_of_one_task_starts_its_own_processes() -> None:
    assert cluster_environment({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_half_an_environment_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"RANK=0 is set .* MASTER_ADDR, MASTER_PORT is not"):
        cluster_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[007-010,012]", "gpu007"),
        ("gpu[3,5],login1", "gpu3"),
        ("a-1,b-2", "a-1"),
        ("rack2-gpu[1-4]", "rack2-gpu1"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_variables_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLORA_TEST", "before")
    before = dict(os.environ)
    with variables({"MIXLORA_TEST": "inside"}):
        os.environ["MIXLORA_OTHER"] = "left"
        del os.environ["PATH"]
        assert os.environ["MIXLORA_TEST"] == "inside"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"nproc": 0}, "launch.nproc=0: must be > 0"),
        ({"nnodes": 2}, "launch.rdzv_endpoint=null: launch.nnodes=2 needs"),
        ({"rdzv_endpoint": "node01"}, "launch.rdzv_endpoint=node01: must be host:port"),
        ({"rdzv_endpoint": "node01:99999"}, "must be host:port"),
    ],
)
def test_impossible_settings(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LaunchConfig(**settings)  # type: ignore[arg-type]
