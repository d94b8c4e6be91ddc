"""Help and composed configurations come at once: nothing that takes seconds to import is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "wandb",
)


@pytest.mark.parametrize("command", [["--help"], ["train", "--cfg", "job"]], ids=" ".join)
def test_no_heavy_library_is_imported(command: list[str]) -> None:
    program = (
        "import sys\n"
        "from mixlora_cli.cli import main\n"
        f"sys.argv = ['mixlora', *{command}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('loaded:', sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    shown, _, loaded = done.stdout.rpartition("loaded: ")
    assert loaded == "[]\n"
    assert len(shown.splitlines()) > 10
