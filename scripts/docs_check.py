"""Run every command and every Python block of README.md and docs/, each in an empty folder: make docs-check.

What a page calls FOLDER is a run of model=tiny, my.json are a few records, and trainings take two steps: what is tried
is that the commands do what they say, not how well a model learns. One line each says what became of it; the exit code
is 1 if any failed. With arguments, only the pages whose names contain one of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs_commands import (
    FILES,
    ROOT,
    Shown,
    blocks,
    commands,
    in_folder,
    local,
    named,
    own_configuration,
    pages,
    quietly,
    refusal,
    values,
)

from mixlora_cli import cli
from mixlora_cli.commands import COMMANDS
from mixlora_cli.data.sources import place_of
from mixlora_cli.surroundings import settle_in

OTHERS = {
    "source": "changes the shell",
    "export": "changes the shell",
    "cat": "shows a file",
    "mkdir": "makes a folder",
    "pip": "installs",
    "git": "needs the history",
    "curl": "asks a server",
    "sh": "starts a server of vLLM",
    "vllm": "starts a server of vLLM",
    "lmms-eval": "make test-libraries tries it",
    "torchrun": "make test-libraries tries it",
    "python": "make test-libraries tries it",
}
"""Programs that are not run, and why; another one is an error."""
NOT_HERE = {
    r"experiment=paper/|data=vision_flan|scale=paper|model=llava_v1_7b": "the paper's model and data are not here",
    r"(eval|check)\.(benchmarks|sources)=": "what it reads is on the hub",
    r"eval\.server=|judge=openai": "asks a server",
    r"judge=hf": "the judging model is on the hub",
    r"deepspeed=|train\.fsdp=true|launch\.nnodes=": "for several GPUs",
    r"model\.quantization=": "the tiny model is not quantised",
    r"mixlora (prepare|import)\b": "what it reads is downloaded",
    r"mixlora (align|bench|demo)\b": "takes minutes",
    r"mixlora table (?!.*runs=)": "reads what make reproduce-... has made",
    r"make ": "takes minutes",
}
"""What cannot be run here, by a part of the command line, and why: it is only asked whether it would be accepted."""
ANYWHERE = ("plan", "reproduce")
"""Commands that run whatever is not here, because they load no model."""
_ONCE = ("launch.nproc=1", "wandb.mode=disabled")
SMALL = {
    "train": ("train.steps=2", "train.batch_size=2", *_ONCE),
    "eval": ("eval.limit=1", "eval.max_new_tokens=1", "launch.nproc=1"),
    "ask": ("answer.max_new_tokens=2",),
    "interference": ("interference.batches=2", "interference.batch_size=1", "launch.nproc=1"),
    "tsne": ("tsne.instances=4", "tsne.perplexity=1", "tsne.neighbours=1", "tsne.permutations=20"),
    "export": ("export.instances=1", "export.limit=1", "export.max_new_tokens=1"),
    "reproduce": ("dry_run=true",),
    "serve": ("serve.factors=false",),
}
"""What each command gets behind its own arguments to be quick."""
RECORDS = [
    {"id": str(number), "task_name": task, "question": f"Add 1 and {number}.", "answer": str(number + 1)}
    for number, task in enumerate(["adding", "sums"] * 4)
]
_UNPACKS = "scripts/pack_predictions.py unpack results/mini"
_PICTURE = re.compile(r"[\w-]+\.(?:png|jpe?g|webp)\b")


class Failed(Exception):
    """A command or a block that does not do what the page says."""


def main() -> int:
    """Try everything; returns the exit code."""
    settle_in()
    sys.path.insert(0, str(ROOT / "src"))
    wanted = sys.argv[1:]
    chosen = [
        page for page in pages() if not wanted or any(part in str(page.relative_to(ROOT)) for part in wanted)
    ]
    if not chosen:
        sys.exit(f"error: no page has {' or '.join(wanted)} in its name")
    done: dict[tuple[str, ...], str] = {}
    failures = 0
    with tempfile.TemporaryDirectory() as top:
        runs = Runs(Path(top) / "runs")
        for page in chosen:
            trial = Page(page, Path(top), runs)
            for label, attempt in trial.attempts(done):
                try:
                    outcome = attempt()
                except Failed as error:
                    outcome = f"FAILED    {label}\n{error}"
                    failures += 1
                else:
                    outcome = f"{outcome[0]:<9} {label}{f'    ({outcome[1]})' if outcome[1] else ''}"
                print(outcome, flush=True)
    print(f"==> {failures} failed" if failures else "==> Everything that the pages show is accepted here")
    return 1 if failures else 0


Outcome = tuple[str, str]


class Page:
    """One document: its files, its Python blocks, its commands."""

    def __init__(self, page: Path, top: Path, runs: Runs) -> None:
        self.page, self.runs = page, runs
        self.top = top / page.stem
        self.files = self.top / "files"
        self.count = 0

    def attempts(self, done: dict[tuple[str, ...], str]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        """What is to be tried, with how it is called in the list; what another page shows, too, is tried once."""
        shown = blocks(self.page)
        self.files.mkdir(parents=True)
        pictures = {name for block in shown for name in _PICTURE.findall(block.text)}
        self._make_pictures(self.files, pictures)
        lines = list(commands(self.page))
        for folder in {"pictures", *(name for line in lines for name in _folders_of_pictures(line))}:
            self._make_pictures(self.files / folder, pictures)
        for block in shown:
            if block.name:
                (self.files / block.name).write_text(block.text, encoding="utf-8")
        names: dict[str, Any] = {}
        for block in shown:
            if block.kind == "python":
                label = f"{self.page.relative_to(ROOT)}:{block.line}  (Python)"
                yield label, lambda block=block: self._python(block.text, block.line, names)
        for line in lines:
            if line.words not in done:
                done[line.words] = str(line)
                yield str(line), lambda line=line: self._command(line)

    def _make_pictures(self, folder: Path, names: set[str]) -> None:
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new("RGB", (32, 24), "red").save(folder / name)

    def _python(self, text: str, line: int, names: dict[str, Any]) -> Outcome:
        code = compile("\n" * (line - 1) + text, str(self.page), "exec")
        if "base_url=" in text:
            return "composed", "asks a server"
        if not names:
            names.update(self.runs.python_names())
        with in_folder(self.files):
            self.runs.provide(Path("FOLDER"), "task", "export")
            try:
                quietly(lambda: exec(code, names))
            except Exception as error:
                raise Failed(f"    {type(error).__name__}: {error}") from error
            finally:
                shutil.rmtree("FOLDER")
        return "ran", ""

    def _command(self, line: Shown) -> Outcome:
        program, *arguments = line.words
        if line.fails:
            return "not run", "the page shows its error"
        if program in OTHERS:
            return "not run", OTHERS[program]
        if program.startswith("scripts/"):
            if not (ROOT / program).is_file():
                raise Failed(f"    there is no {program}")
            return "not run", "a script of the repository, for a checkout's own results"
        if program not in ("mixlora", "make"):
            raise Failed(f"    {program}: say in OTHERS of scripts/docs_check.py why it is not run")
        self.count += 1
        with in_folder(self.top / f"{self.count}-composed"):
            if self.files.exists():
                shutil.copytree(self.files, ".", dirs_exist_ok=True)
            if refused := refusal(line.words):
                raise Failed(f"    {refused}")
        text = shlex.join(line.words)
        anywhere = len(arguments) > 0 and arguments[0] in ANYWHERE
        for part, reason in {} if anywhere or "--help" in line.words else NOT_HERE.items():
            if re.search(part, text):
                return "composed", reason
        if any(place_of(text).on_hub for key in FILES for text in values(arguments, key)):
            return "composed", "what it reads is on the hub"
        with in_folder(self.top / f"{self.count}"):
            shutil.copytree(self.files, ".", dirs_exist_ok=True)
            if "table" in arguments[:1] and _UNPACKS in self.page.read_text(encoding="utf-8"):
                shutil.copytree(ROOT / "results", "results")
                unpack = [
                    sys.executable,
                    str(ROOT / "scripts" / "pack_predictions.py"),
                    "unpack",
                    "results/mini",
                ]
                subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
            else:
                Path("results").symlink_to(ROOT / "results")
            return self._run(arguments[0] if arguments else "--help", arguments[1:])

    def _run(self, name: str, arguments: list[str]) -> Outcome:
        if name == "compare":
            for folder in arguments:
                self.runs.provide(Path(folder), "task", "eval")
        if name not in COMMANDS or "--help" in arguments:
            return _in_process([name, *arguments])
        arguments = local(cli.with_key(COMMANDS[name].bare, arguments, COMMANDS[name].texts))
        for key, path in list(named(arguments)):
            self._make(name, key, path, arguments)
        if name == "serve":
            return _serve(small(name, arguments))
        return _in_process([name, *small(name, arguments)])

    def _make(self, name: str, key: str, path: Path, arguments: list[str]) -> None:
        """What a key names and the page does not have."""
        if key in ("-cd", "--config-dir"):
            path.mkdir(parents=True, exist_ok=True)
            own_configuration(name, arguments, path)
        elif key == "image":
            self._make_pictures(path.parent, {path.name})
        elif key == "data.metadata":
            path.write_text(json.dumps({record["task_name"]: {"definition": "Add."} for record in RECORDS}))
        elif key in FILES:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(RECORDS))
        elif key in ("data.images", "serve.images", "report.images"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            measured = key == "compare" or "draw_only=true" in arguments
            parts = {
                "judge": ["eval"],
                "report": ["eval"],
                "interference": ["interference"] if measured else [],
            }
            self.runs.provide(path, _kind_of_run(name, key, path, arguments), *parts.get(name, ()))


def _kind_of_run(name: str, key: str, path: Path, arguments: list[str]) -> str:
    """Which of the finished runs a path stands for."""
    # data.heldout= names records of one's own, whose tasks have no definitions.
    with_instances = ("export.centroids=", "data.heldout=")
    instance = name == "tsne" or any(text.startswith(with_instances) for text in arguments)
    lora = re.search(r"(?<!mix)lora", path.as_posix().lower()) and name != "export"
    return "lora" if lora or key == "compare" else "instance" if instance else "task"


def _folders_of_pictures(line: Shown) -> list[str]:
    return [name for name in values(local(list(line.words)), "data.images") if not name.startswith("..")]


def small(name: str, arguments: list[str]) -> list[str]:
    """The arguments of a command with the tiny model in the place of another, and with little to do."""
    groups = COMMANDS[name].groups.split(",")
    kept = [text for text in arguments if not re.match(r"model[.=]", text)] if name in SMALL else arguments
    if name in ("plan", "reproduce", "table"):
        kept = arguments
    elif "model" in groups and not values(arguments, "run"):
        kept = [*kept, "model=tiny"]
    added = [*SMALL.get(name, ())]
    if name == "train" and not any(text.startswith("data=json") for text in kept):
        added.append("data.max_per_task=2")
    given = {text.partition("=")[0] for text in arguments}
    if "-m" in given:
        swept = {text.partition("=")[0] for text in arguments if "," in text}
        added = [text for text in added if text.partition("=")[0] not in swept]
    replaced = {text.partition("=")[0] for text in added} | {"draw.layers", "tsne.layers"}  # it has two
    return [*(text for text in kept if text.partition("=")[0] not in replaced), *added]


def _in_process(arguments: list[str]) -> Outcome:
    import io

    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["mixlora", *arguments], io.StringIO("What is this?\n")
    try:
        code, printed = quietly(cli.main)
    except Exception as error:
        raise Failed(f"    mixlora {shlex.join(arguments)}\n    {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.stdin = before
    if code:
        last = "\n    ".join(printed.strip().splitlines()[-3:])
        raise Failed(f"    mixlora {shlex.join(arguments)}\n    exit code {code}: {last}")
    return "ran", ""


def _serve(arguments: list[str]) -> Outcome:
    """Start a server, ask once whether it is ready, stop it."""
    given = [text for text in arguments if not re.match(r"(port|host)=", text)]
    line = [sys.executable, "-m", "mixlora_cli.cli", "serve", *given, "port=0"]
    place = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": place},
    ) as server:
        assert server.stdout is not None
        printed = []
        try:
            for text in server.stdout:
                printed.append(text)
                if found := re.search(r"http://[\d.]+:\d+", text):
                    with urllib.request.urlopen(f"{found[0]}/health", timeout=30) as reply:
                        if reply.status != 200:
                            raise Failed(f"    /health: {reply.status}")
                    return "ran", "asked /health"
        finally:
            server.send_signal(signal.SIGTERM)
    raise Failed("    " + "    ".join(printed[-3:]))


class Runs:
    """Finished runs of the tiny model, made when they are first asked for, and copied to where a page names one."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def provide(self, folder: Path, kind: str, *parts: str) -> None:
        """Put a run of a kind (task, instance, lora) there, with parts of it: eval, export, interference."""
        if folder.exists():
            return
        source = self._made(kind, "training")
        shutil.copytree(source, folder)
        for part in parts:
            shutil.copytree(self._made(kind, part), folder / part)

    def python_names(self) -> dict[str, Any]:
        """What Python blocks take for granted: a model, and an input for each of three rows."""
        from mixlora_cli.config import ModelConfig
        from mixlora_cli.models.load import build_base

        loaded = build_base(ModelConfig(name="tiny", source="tiny"))
        words = loaded.tokenizer(["How many?"] * 3, return_tensors="pt")
        return {"model": loaded.model, "base": loaded.model, "inputs": {**words, "max_new_tokens": 1}}

    def _made(self, kind: str, part: str) -> Path:
        place = self.top / kind / part
        if place.exists():
            return place
        if part == "training":
            chosen = ["adapter=lora"] if kind == "lora" else [f"routing={kind}"]
            if kind == "instance":  # so that instances of so small a model differ
                chosen += ["routing.normalize=true", "routing.pool=text", "routing.router_init=tasks"]
            self._call("train", *chosen, f"output_dir={place}")
            return place
        run = self._made(kind, "training")
        if part == "export":
            self._call(
                "export", f"run={run}", "export.per_task=true", "export.evaluate=false", f"output_dir={place}"
            )
            for name, more in {"all": [], "groups": ["export.centroids=2"]}.items():
                instance = self._made("instance", "training")
                self._call(
                    "export", f"run={instance}", "export.evaluate=false", *more, f"output_dir={place}/{name}"
                )
                shutil.copytree(place / name, place, dirs_exist_ok=True)
        else:
            self._call(part, f"run={run}", f"output_dir={place}")
        return place

    def _call(self, name: str, *arguments: str) -> None:
        _in_process([name, *small(name, list(arguments))])


if __name__ == "__main__":
    sys.exit(main())
