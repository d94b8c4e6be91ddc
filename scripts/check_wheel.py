#!/usr/bin/env python3
"""Install a wheel into an empty environment and use it from an empty folder: help, a training, a question, a server.

Without --no-deps all that it requires is installed from pip's indexes (several GB where they have CUDA builds of torch
alone). `mixlora demo` then has to say what it lacks, what it says is run as it stands, and the demo itself runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import venv
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue")
QUESTION = "What colour is this?"
TRAIN = "train model=tiny data=json data.train=records.json data.images=. factors=4 rank=2 train.steps=3 output_dir=run"


def main() -> None:
    """Install and run; the first command that does not do what it should ends this with its output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--no-deps", action="store_true", help="beside the packages of this Python; without the demo"
    )
    parser.add_argument("--constraint", type=Path, help="file with versions, as pip takes it")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    with tempfile.TemporaryDirectory(prefix="mixlora-wheel-") as scratch:
        environment, folder = Path(scratch, "environment"), Path(scratch, "empty")
        folder.mkdir()
        venv.create(environment, with_pip=not options.no_deps)
        user = User(environment, folder)
        if options.no_deps:
            pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "-qq"]
            user.run(*pip, "--no-index", "--no-deps", str(wheel))
            beside = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}), "beside.pth")
            # Behind its own packages, and without editable installs: what the wheel has is the wheel's.
            beside.write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
        else:
            if options.constraint:
                user.variables["PIP_CONSTRAINT"] = str(options.constraint.resolve())
            user.run("pip", "install", "-qq", f"{wheel}[serve]")
        use(user)
        if not options.no_deps:
            demo(user)
    print("==> The wheel works")


class User:
    """Somebody in a folder, with the environment activated."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.folder, self.environment = folder, environment
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.variables["PYTHONNOUSERSITE"] = "1"

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command that prints into one pipe."""
        print("==>", *command, flush=True)
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, code: int = 0) -> str:
        """What a command prints that ends with this exit code."""
        process = self.start(*command)
        printed = process.communicate()[0]
        return (
            printed
            if process.returncode == code
            else _stop(f"{printed}exit code {process.returncode}, not {code}")
        )


def use(user: User) -> None:
    """Import, help, a training on the model for tests, a question and a server."""
    where = user.run("python", "-c", "import mixlora_cli; print(mixlora_cli.__file__)")
    if not where.startswith(str(user.environment)):
        _stop(f"mixlora_cli is imported from {where}")
    if "Train and use:" not in user.run("mixlora", "--help"):
        _stop("the help lists no commands")
    records = []
    for number, colour in enumerate(COLOURS * 4):
        Image.new("RGB", (16, 16), colour).save(user.folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": colour}]
        records.append(
            {"id": str(number), "task_name": "naming", "image": f"{number}.png", "conversations": turns}
        )
    (user.folder / "records.json").write_text(json.dumps(records))
    user.run("mixlora", *TRAIN.split())
    user.run("mixlora", "ask", "run=run", "image=0.png", "answer.max_new_tokens=4", QUESTION)
    process = user.start("mixlora", "serve", "run=run", "0")
    assert process.stdout is not None
    printed = ""
    while "/v1 for clients" not in printed:
        printed += process.stdout.readline() or _stop(f"{printed}the server ended")
    body = {"model": "run", "max_tokens": 4, "messages": [{"role": "user", "content": QUESTION}]}
    address = printed.split(" in a browser")[0].split()[-1] + "/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        message = json.load(response)["choices"][0]["message"]
    process.terminate()
    printed += process.communicate()[0]
    if message["role"] != "assistant" or process.returncode != 0:
        _stop(f"{printed}{message}, exit code {process.returncode}")


def demo(user: User) -> None:
    """What `mixlora demo` lacks is installed by the command that it names."""
    needs, _, command = user.run("mixlora", "demo", code=2).strip().partition(": pip install ")
    print(needs)
    user.run("bash", "-c", f"pip install {command}")
    print(user.run("mixlora", "demo"))
    if not (user.folder / "runs/demo/report.html").is_file():
        _stop("the demo made no report")


def _stop(why: str) -> str:
    sys.exit(f"error: {why}")


if __name__ == "__main__":
    main()
