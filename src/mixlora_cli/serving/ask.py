"""`mixlora ask`: one question, a conversation in the terminal, or the lines of a pipe; answers alone go to stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mixlora_cli.config import AskConfig
from mixlora_cli.data.images import open_fully
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.progress import say

if TYPE_CHECKING:
    from mixlora_cli.serving.models import ServedModel

_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
"""Brands of ISO 23008-12 in a file's first bytes."""


def ask(config: AskConfig) -> None:
    """Answer the question, or those that come from the terminal or a pipe.

    Raises:
        UserError: a picture cannot be used, a run cannot be found or does not fit, or the task is not known.
        KeyboardInterrupt: the one answer was stopped.
    """
    console = Console(stderr=True)
    pictures = [usable_picture(path) for path in config.image]
    with working("loading", console):
        # Seconds of imports, and the weights behind them: what can be refused without them, is.
        from mixlora_cli.serving.conversation import Conversation
        from mixlora_cli.serving.terminal import Screen, Talk, one_question, questions_of_a_pipe

        models = _opened(config)
    screen = Screen(Conversation(models, config, pictures), Console(), console)
    with_factors = config.show == "factors"
    try:
        if config.question is not None:
            one_question(screen, config.question, with_factors)
        elif sys.stdin.isatty():
            Talk(screen, with_factors).run()
        else:
            questions_of_a_pipe(screen, sys.stdin, with_factors)
    except BrokenPipeError:  # nobody reads any more, as behind `| head`: no word at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _opened(config: AskConfig) -> list[ServedModel]:
    """The models that are asked.

    Raises:
        UserError: as `ask`; where the weights need not be known for that, before they are read.
    """
    from mixlora_cli.models.load import build_chat
    from mixlora_cli.models.session import find_run
    from mixlora_cli.serving.models import open_models

    runs = [find_run(path, config.model) for path in config.run or [None]]
    by_task = [run for run in runs if run.selects_by == "task"]
    for key, value in (("task", config.task), ("definition", config.definition)):
        if value is not None and not by_task:
            labels = ", ".join(run.label for run in runs)
            raise UserError(f"{key}={cut(value)}: no model here selects by the task ({labels}); leave it out")
    known = {task for run in by_task for task in run.definitions}
    if config.task is not None and config.task not in known:
        raise UserError(f"task={cut(config.task)}: no such task; {hint_at(config.task, known, 'tasks')}")
    model = runs[0].model
    # The built-in one of text aside, those that are built here read pictures.
    may_be_blind = config.image and model.source in ("hub", "prepared", "smollm")
    if may_be_blind and build_chat(model).processor is None:
        raise UserError(f"image={cut(config.image[0])}: {model.name} reads text alone; leave it out")
    return open_models(config.run, config.model, config.adapter is not None, config.precision)


def usable_picture(name: str) -> Path:
    """Path of a picture that can be decoded to its last pixel.

    Raises:
        UserError: there is none, it is damaged or too large, or is of a kind that is not read.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"image={cut(name, 200)}: {what}; expected a picture, such as a JPEG or PNG file")
    try:
        open_fully(path)
    except BadRecord as bad:
        raise UserError(f"image={cut(name, 200)}: {_what_to_do(path, bad)}") from None
    return path


def _what_to_do(path: Path, bad: BadRecord) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "a HEIC picture, which is not read here; save or export it as JPEG"
    return f"{bad.kind.value} ({bad.detail}); expected a picture, such as a JPEG or PNG file"


@contextmanager
def working(what: str, console: Console) -> Iterator[None]:
    """Inside, a terminal shows that something goes on; a file gets a line, and another at the end."""
    start = time.monotonic()
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        say(f"{what} ...", console)
        yield
    say(f"{what}: done in {time.monotonic() - start:.0f} s", console)
