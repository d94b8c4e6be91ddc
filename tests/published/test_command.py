"""`mixlora import` from the command line, and what the other commands make of its folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import published_code as code
from mixlora_cli import cli
from mixlora_cli.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    GenerationConfig,
    ModelConfig,
    RoutingConfig,
)
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.evaluate import evaluate
from mixlora_cli.models.adapters import load_adapter
from mixlora_cli.models.tiny import build_tiny


@pytest.fixture
def mixlora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`mixlora("import", "x")` in `tmp_path` -> exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixlora", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def test_summary_says_what_was_chosen_and_why(mixlora: Any, checkpoint: Path, tmp_path: Path) -> None:
    status, out, err = mixlora("import", "checkpoint")
    assert (status, err) == (0, "")
    folder = tmp_path / "runs/imported/checkpoint"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    said = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    numbers = sum(t.numel() for name, t in code.state_dict().items() if "lora" in name)
    assert said["read"] == (
        f"checkpoint/pytorch_model.bin: 2 decoder layers x 7 linear layers, {numbers:,} numbers"
    )
    assert said["rank"] == "3 (the tensors)"
    assert said["alpha"] == "16 (cmoa_args.bin), updates are scaled by alpha / rank = 5.33333"
    assert said["routing"] == "instance (cond_type=input_lora_a_param (cmoa_args.bin))"
    assert said["cfs"].startswith("released (")
    assert said["pool, decode"].startswith("all, step (")
    assert said["projector"].startswith("two linear layers, as in LLaVA-1.5 (from pytorch_model.bin)")
    assert said["differs"].startswith("padding: ")
    assert said["next"].startswith("mixlora eval run=runs/imported/checkpoint model=")
    again = mixlora("import", "checkpoint")
    assert again == (
        2, "", "error: --output=runs/imported/checkpoint: already exists; name another folder or delete it first\n"
    )  # fmt: skip
    assert mixlora("import", "checkpoint", "-o", "other", "--cfs", "paper")[0] == 0
    assert json.loads((tmp_path / "other/adapter_config.json").read_text())["cfs"] == "paper"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", r"Missing argument 'folder'; mixlora import --help lists all options"),
        ("checkpoint --rnk 3", r"No such option: --rnk.*; mixlora import --help lists all options"),
        ("checkpoint --rank three", r"Invalid value for '--rank': .*; mixlora import --help lists all options"),
        ("checkpoint --rank", r"Option '--rank' requires an argument; mixlora import --help lists all options"),
        ("checkpoint other", r"Got unexpected extra argument.*other.*; mixlora import --help lists all options"),
        ("nowhere", r"nowhere: no such folder; expected .*"),
        ("empty", r"empty: no checkpoint here, expected .*"),
        ("checkpoint -o checkpoint/cmoa_args.bin/x", r"--output=checkpoint/cmoa_args\.bin/x: cannot be written: .*"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: str, expected: str, mixlora: Any, checkpoint: Path) -> None:
    (checkpoint.parent / "empty").mkdir()
    status, out, err = mixlora("import", *arguments.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: {expected}\n", err, re.IGNORECASE)


def test_mistakes_are_answered_without_loading_torch() -> None:
    program = (
        "import sys\n"
        "from mixlora_cli.cli import main\n"
        "sys.argv = ['mixlora', 'import', 'nowhere']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "2 []\n"


def test_evaluation_takes_the_folder(mixlora: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert mixlora("import", "checkpoint")[0] == 0
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "1"}]
    record = {"task_name": "mnist", "benchmark": "mini_mnist", "image": "0.png", "conversations": turns}
    records = [record | {"id": str(number)} for number in range(2)]
    (tmp_path / "unseen.json").write_text(json.dumps(records))
    results = evaluate(
        EvalConfig(
            model=ModelConfig(name="tiny", source="tiny"),
            adapter=AdapterConfig(name="mixlora"),
            routing=RoutingConfig(name="instance"),
            data=DataConfig(
                name="json", source="json", unseen=str(tmp_path / "unseen.json"), images=str(tmp_path)
            ),
            eval=GenerationConfig(batch_size=2, max_new_tokens=3),
            run="runs/imported/checkpoint",
            output_dir=str(tmp_path / "out"),
        )
    )
    assert [(score.column, score.n) for score in results.scores] == [("MNIST", 2)]
    assert results.about["label"] == "checkpoint"


def test_an_adapter_whose_projector_the_base_does_not_have(mixlora: Any, tmp_path: Path) -> None:
    code.write(tmp_path / "v1", code.state_dict(projector="linear"))
    status, out, _ = mixlora("import", "v1")
    assert status == 0
    assert "one linear layer, as in LLaVA-v1" in out
    assert out.endswith("next          mixlora eval run=runs/imported/v1 model=llava_v1_7b\n")
    with pytest.raises(
        UserError, match=r"does not fit the model: it lacks .*multi_modal_projector\.linear_2\.weight$"
    ):
        load_adapter(build_tiny().model, tmp_path / "runs/imported/v1")
