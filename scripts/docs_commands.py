"""The commands that README.md and docs/ show, and whether each is one that `mixlora` or `make` would accept."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import typer
from hydra.core.override_parser.overrides_parser import OverridesParser

from mixlora_cli import cli
from mixlora_cli.commands import COMMANDS
from mixlora_cli.data.sources import place_of
from mixlora_cli.hydra_app import run_command

ROOT = Path(__file__).resolve().parents[1]
SHELL = ("sh", "bash", "console")
_FENCED = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"\w+=\S*")
_REDIRECTION = re.compile(r"\d?[<>|].*|&")
FOLDERS = ("run", "runs", "base", "compare", "resume", "data.images", "serve.images", "report.images")
"""Keys whose values are folders that have to be there."""
FILES = ("data.train", "data.heldout", "data.unseen", "data.metadata", "image")
"""Keys whose values are files that have to be there; those of data may be elsewhere."""


@dataclass(frozen=True)
class Block:
    """What a page shows in a fence: the word behind it, the name of a file, the text."""

    kind: str
    name: str | None
    text: str
    line: int


@dataclass(frozen=True)
class Shown:
    """A command line of a page, in words, without variables before it and what follows a redirection."""

    page: str
    line: int
    words: tuple[str, ...]
    fails: bool = False
    """Whether the page shows an error as what it prints."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}  {shlex.join(self.words)}"


def pages() -> list[Path]:
    """The documents whose commands are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Everything that stands in fences."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], found[3], text[: found.start()].count("\n") + 2)
        for found in _FENCED.finditer(text)
    ]


def commands(page: Path) -> Iterator[Shown]:
    """The command lines of a page: each line of a shell's block, those behind `$` of one with what is printed."""
    for block in blocks(page):
        if block.kind not in SHELL:
            continue
        lines = block.text.splitlines()
        for number, line in enumerate(lines):
            while line.endswith("\\"):
                number += 1
                line, lines[number] = line[:-1] + lines[number], ""
            printed = lines[number + 1 : number + 3]
            if block.kind == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            fails = any(text.startswith("error: ") for text in printed)
            for joins, group in itertools.groupby(
                shlex.split(line, comments=True), lambda word: word == "&&"
            ):
                words = itertools.dropwhile(_ASSIGNMENT.fullmatch, () if joins else group)
                if words := tuple(itertools.takewhile(lambda word: not _REDIRECTION.fullmatch(word), words)):
                    yield Shown(page.relative_to(ROOT).as_posix(), block.line + number, words, fails)


def values(arguments: list[str], key: str) -> list[str]:
    """The texts that a command line gives a key, alone, in lists, in mappings and as values of a sweep."""

    def flat(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (text for entry in value.values() for text in flat(entry))
        elif isinstance(value, list):
            yield from (text for entry in value for text in flat(entry))
        elif value is not None and not isinstance(value, bool | float | int):
            yield str(value)

    overrides = [text for text in arguments if re.match(rf"\+?{re.escape(key)}=", text)]
    found: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        entry = override.value()
        found += flat(getattr(entry, "list", None) or entry)
    return found


def local(arguments: list[str]) -> list[str]:
    """The arguments with paths from the root of the file system as paths below the working folder."""
    return [re.sub(r"=/(?=\w)", "=", text) for text in arguments]


def named(arguments: list[str]) -> Iterator[tuple[str, Path]]:
    """Keys and paths of everything that a command line takes for granted and that is not there."""
    for key in (*FOLDERS, *FILES):
        for text in values(arguments, key):
            place = place_of(text)
            if not place.path.exists() and not (place.on_hub and key.startswith("data.")):
                yield key, place.path
    for key in ("train", "evaluation", "drawing"):  # of `mixlora reproduce`: what it hands on
        yield from (found for text in values(arguments, key) for found in named([text]))
    for flag, name in itertools.pairwise(arguments):
        if flag in ("-cd", "--config-dir"):
            yield flag, Path(name)


@cache
def refusal(words: tuple[str, ...]) -> str:
    """Why `mixlora` or `make` would not accept a command line; "" if it would. The working folder has to be empty."""
    program, *arguments = words
    if program == "make":
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stderr.strip()
    name, *arguments = arguments or ["--help"]
    if name not in COMMANDS:
        return _refused_by_typer([name, *arguments])
    arguments = local(cli.with_key(COMMANDS[name].bare, arguments, COMMANDS[name].texts))
    for key, path in named(arguments):
        if key.startswith("data.") and not path.suffix and key in FILES:
            path /= "train.parquet"
        (path.parent if key in FILES else path).mkdir(parents=True, exist_ok=True)
        if key in FILES:
            path.touch()
        if key.startswith("-c"):
            own_configuration(name, arguments, path)
    accepted = replace(COMMANDS[name], entry="docs_commands:_accept")
    code, printed = quietly(lambda: run_command(accepted, arguments))
    return "" if code == 0 else printed.strip() or f"exit code {code}"


def own_configuration(name: str, arguments: list[str], folder: Path) -> None:
    """Write the configuration of one's own that a command line begins with."""
    flags = dict(itertools.pairwise(arguments))
    own = flags.get("-cn") or flags.get("--config-name")
    (folder / f"{own}.yaml").write_text(f"defaults: [{name}, _self_]\n")


def quietly(run: Any) -> tuple[int, str]:
    """A command's exit code, and what it wrote to standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run()
        except typer.Exit as stop:
            code = stop.exit_code
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return code or 0, err.getvalue()


def _accept(settings: Any) -> None:
    """In the place of what a command does."""


@cache
def _typer_command() -> Any:
    return typer.main.get_command(cli.app)


def _refused_by_typer(arguments: list[str]) -> str:
    """Whether a command without Hydra takes these arguments, which is all that is looked at."""
    name, *rest = arguments
    if name.startswith("-"):
        known = {option for parameter in _typer_command().params for option in parameter.opts}
        return "" if name in {*known, "--help", "-h"} else f"no such option: {name}"
    if name not in _typer_command().commands:
        return f"no such command: {name}"
    command = _typer_command().commands[name]
    code, printed = quietly(lambda: command.make_context(name, list(rest)) and 0)
    return printed.strip() if code else ""


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Inside, this is the working folder; it is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
