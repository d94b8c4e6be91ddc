"""A conversation with one or several models: the questions are shared, each model goes on from its own answers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from mixlora_cli.config import AskConfig
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.errors import UserError
from mixlora_cli.models.generate import Answer, Decoding, Factors
from mixlora_cli.serving.factors import TaskFactors, task_factors
from mixlora_cli.serving.models import Question, ServedModel


@dataclass(frozen=True)
class Exchange:
    """A question and what each model answered."""

    question: str
    """With a marker for each picture."""
    pictures: tuple[Path, ...]
    answers: Mapping[str, str] = field(default_factory=dict)
    """By the model's name."""


@dataclass(frozen=True)
class Reply:
    """One model's answer, and what its adapter selected by."""

    model: ServedModel
    question: Question
    answer: Answer


class Stop:
    """Ctrl-C while answers are written: the first ends the answer that runs, the second is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, it is this object that hears of it."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class Conversation:
    """What was said, and the settings of what is asked next."""

    def __init__(
        self, models: Sequence[ServedModel], config: AskConfig, pictures: Sequence[Path] = ()
    ) -> None:
        """`pictures` go with the first question."""
        self.models = models
        self.pictures = list(pictures)
        """They go with the next question."""
        self.task, self.definition = config.task, config.definition
        self.last: list[Reply] = []
        """To the last question."""
        self._system = [] if config.system is None else [Turn("system", config.system)]
        self.decoding = Decoding(**asdict(config.answer))
        self._said: list[Exchange] = []
        self._known: dict[str, TaskFactors | None] = {}

    @property
    def tasks(self) -> list[str]:
        """Those that can be named: of all models that select by the task."""
        return list(dict.fromkeys(task for model in self.models for task in model.definitions))

    def forget(self) -> None:
        """Begin a new conversation, without pictures."""
        self._said.clear()
        self.pictures.clear()
        self.last.clear()

    def ask(
        self, text: str, told: Callable[[ServedModel, str], None], stop: Stop, remember: bool = True
    ) -> list[Reply]:
        """Put a question to each model in turn.

        Args:
            text: of the question; pictures stand where it has `IMAGE_MARKER`, else before it.
            told: the model and what is new of its answer, as it is written.
            stop: asked after each token; the models that come after the one that was stopped do not answer.
            remember: what comes next goes on from here.

        Raises:
            UserError: a model cannot be asked this; then none is.
        """
        self.last = []
        exchange = Exchange(_with_places(text, len(self.pictures)), tuple(self.pictures))
        questions = [self._prepared(model, exchange) for model in self.models]
        rooms = [self._room(*pair) for pair in zip(self.models, questions, strict=True)]
        with stop.listening():
            for model, question, room in zip(self.models, questions, rooms, strict=True):
                if stop.pressed:
                    break

                def watch(_: int, piece: str, __: Factors | None, model: ServedModel = model) -> bool:
                    told(model, piece)
                    return not stop.pressed

                decoding = replace(self.decoding, max_new_tokens=min(room, self.decoding.max_new_tokens))
                (answer,) = model.write([question], [decoding], watch)
                self.last.append(Reply(model, question, answer))
        if remember:
            answers = {reply.model.name: reply.answer.text for reply in self.last}
            self._said.append(Exchange(exchange.question, exchange.pictures, answers))
            self.pictures = []
        return self.last

    def _prepared(self, model: ServedModel, exchange: Exchange) -> Question:
        turns, pictures = [*self._system], list[Path]()
        for said in self._said:
            if answer := said.answers.get(model.name):  # a stopped model may have none
                turns += [Turn("human", said.question), Turn("gpt", answer)]
                pictures += said.pictures
        by_task = model.run.selects_by == "task"
        try:
            return model.prepare(
                [*turns, Turn("human", exchange.question)],
                [*pictures, *exchange.pictures],
                self.task if by_task else None,
                self.definition if by_task else None,
            )
        except BadRecord as bad:
            raise UserError(f"{bad.kind.value}: {bad.detail}") from None

    def _room(self, model: ServedModel, question: Question) -> int:
        """Tokens that an answer may have.

        Raises:
            UserError: none.
        """
        length = question.item.length
        if model.context is not None and length >= model.context:
            raise UserError(
                f"{model.name} knows {model.context} tokens, and what it is asked has {length}; ask less at once, or "
                "begin a new conversation (/reset)"
            )
        return self.decoding.max_new_tokens if model.context is None else model.context - length

    def task_factors(self, model: ServedModel) -> TaskFactors | None:
        """Which tasks of its training use which factors; found out when it is first asked for."""
        if model.name not in self._known:
            self._known[model.name] = task_factors(model.run, model.session)
        return self._known[model.name]


def _with_places(text: str, num_pictures: int) -> str:
    """The question with a place for each picture.

    Raises:
        UserError: it has places, but not one for each.
    """
    places = text.count(IMAGE_MARKER)
    if places not in (0, num_pictures):
        raise UserError(
            f"the question has {places} places for pictures ({IMAGE_MARKER}) and goes with {num_pictures}; give one "
            "for each, or none"
        )
    return text if places else f"{IMAGE_MARKER}\n" * num_pictures + text
