"""Processes that torchrun started work through several jobs, and part at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import LAST_WORD

PROGRAM = """
import sys, time
from mixlora_cli.launch import joined

for job in range(3):
    with joined() as team:
        team.wait()
        if team.is_main:
            time.sleep(1)  # as when it writes the report
if "fail" in sys.argv:
    with joined() as team:
        raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "left"), [([], True), (["fail"], False)])
def test_jobs_share_a_group_that_is_left_unless_one_failed(
    tmp_path: Path, arguments: list[str], left: bool
) -> None:
    program = tmp_path / "program.py"
    program.write_text(LAST_WORD + PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*torchrun, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (ended.returncode == 0) == left, ended.stdout
    assert ended.stdout.count(f"in a group at the end: {not left}") >= 1
    assert f"in a group at the end: {left}" not in ended.stdout
