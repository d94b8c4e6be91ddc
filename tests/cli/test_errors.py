"""A user's mistake is one line on standard error and exit code 2; nothing runs."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixlora_cli.errors import UserError
from mixlora_cli.paths import conf_dir

TOP = (
    "allowed here: model, adapter, routing, data, train, rank, factors, output_dir, seed, resume, overwrite, wandb, "
    "deepspeed, launch"
)
HEAVY = {
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
}
LINES = {
    "bench adapter=lora": "adapter=lora: MixLoRA is what is measured beside LoRA",
    "bench routing.router_init=tasks": (
        "routing.router_init=tasks: starts from what routing.normalize=true reads; add it"
    ),
    "bench routing=task": "routing=task: the instances have no task; only instance or random",
    "train factors=4 rank=8": (
        "rank=8: must be <= factors=4, because rank factors are selected out of the pool"
    ),
    "train adaptor=lora": f"adaptor=lora: unknown key; {TOP}; did you mean adapter?",
    "train +adaptor=lora": f"adaptor=lora: unknown key; {TOP}; did you mean adapter?",
    "train learning_rate=1": f"learning_rate=1: unknown key; {TOP}; did you mean train.learning_rate?",
    "train adapter=lroa": (
        "adapter=lroa: no such option; allowed: full, lora, mixlora, mixlora_plus, none; did you mean lora?"
    ),
    "train adapter.cfs=papr": (
        "adapter.cfs=papr: must be one of paper, released, none; did you mean paper?"
    ),
    "train adapter=full adapter.dropout=0.3": (
        "adapter.dropout=0.3: the chosen option of the group adapter does not use this key"
    ),
    "train adapter=none": (
        "adapter=none: trains nothing; choose lora, mixlora or full "
        "(the untuned base: `mixlora eval adapter=none`)"
    ),
    "train rank=four": "rank=four: must be an integer",
    "train rank": "rank: an override is written key=value (or group=option)",
    "train rank=[1": (
        "rank=[1: cannot be read as key=value; "
        "quote a value that has special characters or spaces, e.g. 'data.train=\"a (b).json\"'"
    ),
    "train rank=2,4": (
        "rank=2,4: several values need -m (--multirun), which runs one job for each; "
        "a list is written key=[a,b], a text with a comma 'key=\"a,b\"'"
    ),
    "train rank=range(1,4)": (
        "rank=range(1,4): several values need -m (--multirun), which runs one job for each; "
        "a list is written key=[a,b], a text with a comma 'key=\"a,b\"'"
    ),
    "train rank.x=1": "rank.x=1: unknown key; rank is a value without keys of its own",
    "train ~foo": "~foo: there is no such key to delete",
    "train ~rank": (
        "output_dir: Interpolation key 'rank' not found"
    ),
    "train +rank=3": (
        "Could not append to config. An item is already at 'rank'.; Either remove + prefix: 'rank=3'; "
        "Or add a second + to add or override 'rank': '++rank=3'"
    ),
    "train adapter/foo=bar": "adapter/foo=bar: no such group; --help lists the groups and their options",
    "train hydra/launcher=nope": (
        "hydra/launcher=nope: no such option; "
        "allowed: basic, slurm (others come with plugins, e.g. hydra-joblib-launcher)"
    ),
    "train output_dir=${nope}": "output_dir: Interpolation key 'nope' not found",
    "train --cfg job --resolve output_dir=${nope}": "Interpolation key 'nope' not found",
    "train --resolve": "The --resolve flag can only be used in conjunction with --cfg or --help",
    "train --bogus": "unrecognized arguments: --bogus; --help lists the flags",
    "train -cn": "argument --config-name/-cn: expected one argument; --help lists the flags",
    "train -cn nope": (
        f"--config-name=nope: no such configuration in {conf_dir()}; add your own folder: -cd FOLDER"
    ),
    "train -cd nope": "--config-dir={here}/nope: must be an existing folder",
    "train -cp nope": "--config-path: must be an existing folder with configuration files",
    "train model=hf": (
        "model.name_or_path=null: model=hf needs a Hugging Face id or a local folder with a checkpoint"
    ),
    "train data=json": (
        "data.train=null: data=json needs data.train=<annotation.json> (and data.images=<folder>)"
    ),
    "train data=json data.train=nope.json": (
        "data.train=nope.json: must be an existing file; looked in {here}"
    ),
    "eval": (
        "run=null: give run=<folder of a finished `mixlora train`>, or adapter=none to score the untuned base"
    ),
    "eval run=nope": "run=nope: must be an existing folder; looked in {here}",
    "align rank=0": "rank=0: must be > 0",
    "interference": (
        "run=null: give run=<folder of a finished `mixlora train adapter=lora` or adapter=mixlora>; "
        "the untuned base has no adapter whose gradients could be compared"
    ),
    "train model=mini model.chat_template=v1": (
        "model.chat_template=v1: model=mini has the chat_template smollm; leave it away, or take another model"
    ),
    "tsne": "run=null: give run=<folder of a finished `mixlora train adapter=mixlora`>",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_one_line_and_exit_code_2(line: str, mixlora: Any, commands: Any, tmp_path: Path) -> None:
    result = mixlora(*line.split())
    assert result.err == f"error: {LINES[line].replace('{here}', str(tmp_path))}\n"
    assert (result.code, result.out, commands.called) == (2, "", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"defaults: [train, _self_]\nrank: [1\n", r"{folder}/my\.yaml, line 3: not valid YAML, .*"),
        (b"rank: 2 # caf\xe9\n", "a configuration file is not UTF-8 text at byte 13; save it as UTF-8"),
        (b"rank: " + b"[" * 5000, "a configuration file is nested too deeply, thousands of brackets in one another"),
        (b"defaults: [trian, _self_]\n", r"my\.yaml names trian in its defaults list, which does not exist"),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_read(mixlora: Any, tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    result = mixlora("train", "-cd", str(tmp_path), "-cn", "my")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(f"error: {told.replace('{folder}', str(tmp_path))}\n", result.err)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("3 records\ncannot be read"), 2, "error: 3 records cannot be read\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: output_dir=runs/one: cannot be written (No space left on device); "
            "free some space there, or give another output_dir=\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/one/a"),
            2,
            "error: output_dir=runs/one: cannot be written (Permission denied); give another output_dir=\n",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval adapter=none", "align"])
def test_what_a_command_finds(
    mixlora: Any, commands: Any, command: str, raised: BaseException, code: int, line: str
) -> None:
    def fail(config: Any) -> None:
        raise raised

    commands.does = fail
    result = mixlora(*command.split(), "output_dir=runs/one")
    assert (result.code, result.out, result.err) == (code, "", line)


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug")])
def test_our_own_errors_keep_their_traceback(error: Exception, mixlora: Any, commands: Any) -> None:
    def fail(config: Any) -> None:
        raise error

    commands.does = fail
    before = os.environ.get("HYDRA_FULL_ERROR")
    with pytest.raises(type(error), match="bug"):
        mixlora("train")
    assert os.environ.get("HYDRA_FULL_ERROR") == before


def test_unknown_command(mixlora: Any) -> None:
    result = mixlora("trian")
    assert result.code == 2
    assert "No such command 'trian'" in result.err


@pytest.mark.parametrize(
    ("line", "code"), [("--help", 0), ("train --cfg job", 0), ("train factors=4 rank=8", 2)]
)
def test_help_configurations_and_mistakes_come_at_once(line: str, code: int) -> None:
    """Nothing that takes seconds to import is imported."""
    program = (
        "import sys\n"
        "from mixlora_cli.cli import main\n"
        f"sys.argv = ['mixlora', *{line.split()}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    code = stop.code or 0\n"
        f"print(f'{{code}}', sorted({HEAVY} & set(sys.modules)))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    shown = done.stdout.splitlines() if code == 0 else done.stderr.splitlines()
    assert done.stdout.splitlines()[-1] == f"{code} []"
    assert len(shown) > 10 if code == 0 else shown[0].startswith("error: rank=8: ")


def test_a_sweep_that_cannot_note_what_it_is_is_one_line(mixlora: Any, commands: Any) -> None:
    Path("file").write_text("")
    result = mixlora("train", "-m", "rank=2,4", "hydra.sweep.dir=file/sweep")
    assert result.code == 2
    assert result.err == (
        "error: hydra.sweep.dir: file/sweep cannot be written (Not a directory); give another hydra.sweep.dir=\n"
    )
    assert commands.called == []
