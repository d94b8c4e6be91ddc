"""Results and failures of functions in several processes; one process needs no other."""

import os
from pathlib import Path

import pytest

from mixlora_cli.config import LaunchConfig
from mixlora_cli.errors import UserError, WorkerFailed
from mixlora_cli.launch import run_workers, threads_each

TWO = LaunchConfig(nproc=2)


def test_a_single_process_is_this_one() -> None:
    assert run_workers("launched:plain", 7, LaunchConfig(nproc=1)) == (7, os.getpid())


def test_a_process_that_others_started_joins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    for key, value in {**ranks, "OMP_NUM_THREADS": "5"}.items():
        monkeypatch.setenv(key, value)
    assert run_workers("launched:greet", "hello", TWO) == ("hello", 3, "8", "5")


@pytest.mark.slow
def test_result_is_that_of_rank_0_and_the_environment_is_as_before() -> None:
    before = dict(os.environ)
    assert run_workers("launched:greet", "hello", TWO) == ("hello", 0, "2", str(threads_each(2)))
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_users_mistake_in_a_worker_is_the_launchers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^no such thing; give another$"):
        run_workers("launched:mistake", str(tmp_path), TWO)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_failure_has_its_rank_and_traceback_and_hides_its_consequences(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailed) as failed:
        run_workers("launched:bug", str(tmp_path), TWO)
    message = str(failed.value)
    assert message.startswith("worker of rank 1 failed:\nTraceback")
    assert message.endswith("ValueError: a mistake of ours")
    assert message.count("Traceback") == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"^worker of rank 1 was killed by SIGKILL"):
        run_workers("launched:killed", str(tmp_path), TWO)
