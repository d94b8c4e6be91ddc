"""Questions and answers in a terminal or a pipe: answers go to stdout, and everything else to stderr."""

from __future__ import annotations

import glob
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mixlora_cli.data.images import size_as_shown
from mixlora_cli.errors import UserError, cut, did_you_mean, hint_at
from mixlora_cli.progress import say
from mixlora_cli.serving.ask import usable_picture
from mixlora_cli.serving.conversation import Conversation, Reply, Stop
from mixlora_cli.serving.drawing import likeness, picture_of
from mixlora_cli.serving.models import ServedModel

_NARROWEST = 38
"""Characters of a column; where the terminal has less for each model, answers stand one below the other."""
_WHAT_TO_DO = "Ctrl-C stops an answer, Ctrl-D leaves"


class Screen:
    """Where a conversation is shown."""

    def __init__(self, conversation: Conversation, out: Console, err: Console) -> None:
        self.conversation, self.out, self.err = conversation, out, err
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        say(text, self.err)

    def answer(self, text: str, remember: bool = True) -> bool:
        """Ask all models and show their answers as they are written; whether none was stopped.

        Raises:
            UserError: a model cannot be asked this.
        """
        models, stop = self.conversation.models, Stop()
        in_columns = 1 < len(models) <= self.out.width // _NARROWEST and self.out.is_terminal
        with self._columns() if in_columns else self._in_turn() as told:
            replies = self.conversation.ask(text, told, stop, remember)
        for reply in replies:
            self.say_how_it_came(reply)
        return not stop.pressed

    @contextmanager
    def _in_turn(self) -> Iterator[Callable[[ServedModel, str], None]]:
        """One model after the other; several have their names above."""
        several = len(self.conversation.models) > 1
        waiting = self.err.status("reading ...")
        begun: list[str] = []

        def told(model: ServedModel, piece: str) -> None:
            waiting.stop()
            if model.name not in begun:
                if several:
                    self._write("\n\n" * bool(begun) + f"{model.name}:\n")
                begun.append(model.name)
            self._write(piece)

        if self.err.is_terminal:
            waiting.start()
        try:
            yield told
        finally:
            waiting.stop()
            if begun:
                self._write("\n")

    def _write(self, text: str) -> None:
        self.out.file.write(_harmless(text) if self.out.is_terminal else text)
        self.out.file.flush()

    @contextmanager
    def _columns(self) -> Iterator[Callable[[ServedModel, str], None]]:
        """All side by side."""
        texts = {model.name: "" for model in self.conversation.models}

        def table() -> Table:
            shown = Table.grid(padding=(0, 3), expand=True)
            for name in texts:
                shown.add_column(Text(name, "bold"), ratio=1)
            shown.show_header = True
            shown.add_row(*(Text(_harmless(text)) for text in texts.values()))
            return shown

        with Live(table(), console=self.out, auto_refresh=False, vertical_overflow="visible") as live:

            def told(model: ServedModel, piece: str) -> None:
                texts[model.name] += piece
                live.update(table(), refresh=True)

            yield told

    def say_how_it_came(self, reply: Reply, where: str = "") -> None:
        """Whether an answer was cut off or stopped, and which task it was selected by; `where` stands in front."""
        name = where + (f"{reply.model.name}: " if len(self.conversation.models) > 1 else "")
        if reply.answer.finish == "cancelled":
            self.note(f"{name}stopped")
        elif reply.answer.finish == "length":
            count = reply.answer.num_tokens
            asked_for = count >= self.conversation.decoding.max_new_tokens
            why = "answer.max_new_tokens" if asked_for else "more than that the model does not know; /reset"
            self.note(f"{name}cut off after {count} tokens ({why})")
        elif not reply.answer.text:
            self.note(f"{name}an empty answer")
        if reply.question.selected_by == "question":
            read = "none of the training's; the question was read as a definition of its own"
            self.note(f"{name}task by the question: {reply.question.task or read}")
            if reply.model.name not in self._noted:
                self._noted.add(reply.model.name)
                self.note(f"{name}factors follow from the task: task=NAME or definition=TEXT say which it is")

    def factors(self) -> None:
        """Which factors the last question selected, and which tasks of the training select alike."""
        replies = [reply for reply in self.conversation.last if reply.answer.factors is not None]
        if not replies:
            asked = "no model here has factors" if self.conversation.last else "nothing has been asked yet"
            self.note(f"factors: {asked}")
        for reply in replies:
            factors = reply.answer.factors
            assert factors is not None
            self.note(f"\n{reply.model.name} ({reply.model.run.label})")
            num_factors = int(reply.model.run.settings["factors"])
            self.note(picture_of(factors, num_factors, self.err.width))
            if reply.question.selected_by == "chance":
                self.note("drawn by chance: they say nothing of the question")
            elif (known := self.conversation.task_factors(reply.model)) is not None:
                self.note(likeness(factors, known))


def _harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def one_question(screen: Screen, text: str, with_factors: bool) -> None:
    """Answer one question.

    Raises:
        UserError: a model cannot be asked this.
        KeyboardInterrupt: it was stopped.
    """
    finished = screen.answer(text, remember=False)
    if with_factors:
        screen.factors()
    if not finished:
        raise KeyboardInterrupt


def questions_of_a_pipe(screen: Screen, lines: Iterable[str], with_factors: bool) -> None:
    """Answer each line as a question of its own, about the same pictures: a line each, or one for each model.

    Raises:
        UserError: lines that could not be asked; theirs are empty.
        KeyboardInterrupt: it was stopped.
    """
    conversation = screen.conversation
    asked = refused = 0
    for number, line in enumerate(lines, start=1):
        if not (text := line.strip()):
            continue
        asked += 1
        stop = Stop()
        try:
            conversation.ask(text, lambda *_: None, stop, remember=False)
        except UserError as error:
            refused += 1
            screen.note(f"line {number}: {error}")
        if stop.pressed:  # a reader of the pipe could not tell half an answer from a whole one
            screen.note(f"line {number}: stopped")
            raise KeyboardInterrupt
        answers = {reply.model.name: " ".join(reply.answer.text.split()) for reply in conversation.last}
        for model in conversation.models:
            name = f"{model.name}\t" if len(conversation.models) > 1 else ""
            print(f"{name}{answers.get(model.name, '')}", file=screen.out.file, flush=True)
        for reply in conversation.last:
            screen.say_how_it_came(reply, f"line {number}: ")
        if with_factors:
            screen.factors()
    if refused:
        raise UserError(f"{refused} of {asked} questions could not be asked; their lines are empty")


class Talk:
    """A conversation in the terminal: what is typed is a question, or a command that begins with "/"."""

    def __init__(self, screen: Screen, with_factors: bool) -> None:
        self._screen, self._conversation = screen, screen.conversation
        self._with_factors = with_factors
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/image": ("PATH", "add a picture, which goes with the next question", self._image),
            "/task": (
                "NAME",
                "select the factors of a task of the training; without a name no longer",
                self._task,
            ),
            "/definition": (
                "TEXT",
                "select by the definition of a task; without a text no longer",
                self._define,
            ),
            "/factors": ("", "what the last question selected, and which tasks select alike", self._factors),
            "/reset": ("", "begin a new conversation, without pictures", self._reset),
            "/help": ("", "this list", self._help),
            "/quit": ("", "leave, as Ctrl-D does", self._quit),
        }
        self._left = False

    def run(self) -> None:
        """Go on until it is left."""
        names = ", ".join(f"{model.name} ({model.run.label})" for model in self._conversation.models)
        self._screen.note(f"{names}: ask something, or /help; {_WHAT_TO_DO}")
        self._complete_words()
        pressed = False
        while not self._left:
            try:
                line = self._read().strip()
            except EOFError:
                self._screen.note("")
                return
            except KeyboardInterrupt:
                self._screen.note("")
                if pressed:
                    return
                pressed = True
                self._screen.note("Ctrl-C once more, or Ctrl-D, leaves")
                continue
            pressed = False
            try:
                self._obey(line)
            except UserError as error:
                self._screen.note(f"error: {error}")

    def _read(self) -> str:
        waiting = len(self._conversation.pictures)
        prompt = (f"[{waiting} picture{'s' * (waiting > 1)}] " if waiting else "") + "> "
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout holds answers alone
        return input()

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word][2](rest.strip())
        elif word.startswith("/") and "/" not in word[1:]:
            hint = did_you_mean(word, self._commands)
            raise UserError(f"{cut(word)}: no such command{hint}; /help lists them")
        elif line:
            self._screen.answer(line)
            if self._with_factors:
                self._screen.factors()

    def _image(self, rest: str) -> None:
        paths = [rest] if rest and Path(rest).expanduser().exists() else _dropped(rest)
        for name in paths:
            path = usable_picture(name)
            self._conversation.pictures.append(path)
            width, height = size_as_shown(path)
            self._screen.note(f"{path.name}, {width} x {height}: goes with the next question")
        if not paths:
            waiting = ", ".join(path.name for path in self._conversation.pictures) or "none"
            self._screen.note(f"pictures for the next question: {waiting}; /image PATH adds one")

    def _task(self, name: str) -> None:
        self._require_tasks("/task")
        if name and name not in (known := self._conversation.tasks):
            raise UserError(f"/task {cut(name)}: no such task; {hint_at(name, known, 'tasks')}")
        self._conversation.task, self._conversation.definition = name or None, None
        self._screen.note(f"task: {name or 'none; the question is read as its definition'}")

    def _define(self, text: str) -> None:
        self._require_tasks("/definition")
        self._conversation.task, self._conversation.definition = None, text or None
        self._screen.note(f"definition: {text or 'none; the question is read as one'}")

    def _require_tasks(self, command: str) -> None:
        if not any(model.run.selects_by == "task" for model in self._conversation.models):
            raise UserError(f"{command}: no model here selects by the task")

    def _factors(self, _: str) -> None:
        self._screen.factors()

    def _reset(self, _: str) -> None:
        self._conversation.forget()
        self._screen.note("a new conversation")

    def _help(self, _: str) -> None:
        for name, (value, what, *_rest) in self._commands.items():
            self._screen.note(f"  {f'{name} {value}':<18}{what}")
        self._screen.note(f"  {_WHAT_TO_DO}; <image> in a question says where a picture stands")
        if tasks := self._conversation.tasks:
            self._screen.note(f"  tasks: {', '.join(tasks)}")

    def _quit(self, _: str) -> None:
        self._left = True

    def _complete_words(self) -> None:
        """The tab key completes commands, files and tasks, where Python was built with readline."""
        with suppress(ImportError):
            import readline

            def complete(line: str, state: int) -> str | None:
                return dict(enumerate(self._continuations(line))).get(state)

            readline.set_completer(complete)
            readline.set_completer_delims("\n")
            readline.parse_and_bind("tab: complete")

    def _continuations(self, line: str) -> list[str]:
        command, space, begun = line.partition(" ")
        if not space:
            known = self._commands.items()
            return [name + " " * bool(value) for name, (value, *_) in known if name.startswith(command)]
        if command == "/image":
            found = sorted(glob.glob(glob.escape(os.path.expanduser(begun)) + "*"))
            return [f"/image {path}{os.sep * os.path.isdir(path)}" for path in found]
        if command == "/task":
            return [f"/task {task}" for task in self._conversation.tasks if task.startswith(begun)]
        return []


def _dropped(text: str) -> list[str]:
    """Paths as terminals write them when files are dropped into them: quoted, or with escaped blanks."""
    try:
        return shlex.split(text)
    except ValueError:
        return [text]
