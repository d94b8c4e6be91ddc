"""The base and trained runs beside one another, ready for questions: one base in memory, however many adapters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_cli.config import ModelConfig
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.encode import Item, encode_prompt
from mixlora_cli.data.images import Picture
from mixlora_cli.data.records import DEFAULT_TASK, Record
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.errors import UserError, cut, hint_at
from mixlora_cli.models.definitions import TaskRouting, choose_encoder, embed_text
from mixlora_cli.models.generate import Answer, Decoding, Generator, Watch
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.models.session import BASE_LABEL, Run, Session, find_run
from mixlora_cli.serving.choosing import TaskChooser

_READING = threading.Lock()
"""Tokenizers bear one caller at a time. Questions are prepared in any thread, and the models answer in another."""
FREE = "\0"
"""Begins what stands for a task in an item whose definition is a text of its own: no task's name begins so."""
DOUBT = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""How far a batch is taken to move a logit by rounding: more than was seen on the small model."""
_KEPT = 1000
"""Free definitions whose embeddings are remembered."""


class Embeddings(dict[str, Tensor]):
    """Embedding (d,) by task; that of a free definition, under `FREE` and its text, is made when first asked for."""

    def __init__(self, known: Mapping[str, Tensor], routing: TaskRouting, base: LoadedModel) -> None:
        """`base` must never get an adapter."""
        super().__init__(known)
        self._tasks = len(known)
        self._encoder = choose_encoder(routing.encoder, base)

    @cached_property
    def _opened(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        return self._encoder.open()

    def __missing__(self, definition: str) -> Tensor:
        assert definition.startswith(FREE)
        if len(self) >= self._tasks + _KEPT:
            del self[next(key for place, key in enumerate(self) if place == self._tasks)]
        self[definition] = embed_text(definition.removeprefix(FREE), *self._opened)
        return self[definition]


@dataclass
class Question:
    """A prompt ready to be answered, and what the adapter selects its factors by."""

    item: Item
    selected_by: Literal["tokens", "task", "definition", "question", "chance"] | None
    """None without a MixLoRA adapter."""
    task: str | None = None
    """The one that was named; of a question alone the one that it belongs to, once its answer has begun."""


class ServedModel:
    """A base, alone or with a run's adapter, that answers questions by its name."""

    def __init__(
        self,
        name: str,
        run: Run,
        session: Session,
        routing: TaskRouting | None,
        base: LoadedModel,
        chat: Chat,
    ) -> None:
        """`base` is the one without an adapter, which reads definitions; `chat` is for `prepare` alone."""
        self.name, self.run, self.session = name, run, session
        self._chat = chat
        self.definitions: Mapping[str, str] = {} if routing is None else routing.definitions
        """By task, where the adapter selects by it."""
        self._embeddings = None if routing is None else Embeddings(session.embeddings or {}, routing, base)
        self._chooser = None if routing is None else _chooser(run, routing, base)
        self._generator = Generator(
            session.model,
            session.base,
            session.features,
            1,
            embeddings=self._embeddings,
            routing_seed=0 if run.selects_by == "chance" else None,
        )

    @cached_property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None where the model does not say."""
        return getattr(self.session.base.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def kind(self) -> str:
        """`base`, `lora`, `mixlora` or `full`."""
        if self.run.adapter is None:
            return "base"
        return str(self.run.settings.get("peft_type", "full")).lower()

    def prepare(
        self,
        conversation: Sequence[Turn],
        images: Sequence[Picture] = (),
        task: str | None = None,
        definition: str | None = None,
    ) -> Question:
        """The prompt of a conversation that ends with a question.

        Args:
            conversation: a system turn or none, then human, gpt, ..., human; `IMAGE_MARKER` where a picture stands.
            images: one for each marker, in order.
            task: one of `definitions`, for an adapter with routing=task.
            definition: a task's definition in the place of a known task's. With neither, the last question is looked
                at: its task is that of the training whose questions it is like, or its text is read as a definition.

        Raises:
            BadRecord: the text holds a control token, or the processor refuses a picture.
            UserError: the roles do not alternate; the task is unknown, or the adapter does not select by tasks; the
                model reads no pictures.
        """
        key, selected_by = self._selection(conversation, task, definition)
        turns = (*conversation, Turn("gpt", ""))
        roles = [turn.role for turn in turns if turn.role != "system"]
        if roles != ["human", "gpt"] * (len(roles) // 2) or any(turn.role == "system" for turn in turns[1:]):
            raise UserError(
                "a conversation is at most one system turn, then questions and answers in turn, and ends with a "
                f"question; got {', '.join(turn.role for turn in conversation)}"
            )
        with _READING:
            item = encode_prompt(Record(0, "question", key, tuple(images), turns), self._chat)
        return Question(item, selected_by, task)

    def _selection(
        self, conversation: Sequence[Turn], task: str | None, definition: str | None
    ) -> tuple[str, Literal["tokens", "task", "definition", "question", "chance"] | None]:
        """What stands for the task, and what was looked at."""
        source = self.run.selects_by
        if source != "task":
            if task is not None or definition is not None:
                raise UserError(
                    f"{'task' if task is not None else 'definition'}: {self.name} does not select by the task "
                    f"({self.run.label}); leave it out"
                )
            return DEFAULT_TASK, source
        if task is not None:
            if task not in self.definitions:
                raise UserError(f"task={cut(task)}: no such task; {hint_at(task, self.definitions, 'tasks')}")
            return task, "task"
        text = definition if definition is not None else conversation[-1].text.replace(IMAGE_MARKER, "")
        if not text.strip():
            raise UserError(
                "this adapter selects by the task: give the task, a definition of it, or a question with words"
            )
        # A definition as it stands, like those of the training.
        return (FREE + text.strip(), "question") if definition is None else (FREE + text, "definition")

    def write(
        self,
        questions: Sequence[Question],
        decoding: Sequence[Decoding],
        watch: Watch | None = None,
        exact: bool = False,
    ) -> list[Answer]:
        """Answers to one batch: see `Generator.write`; `exact` ones are what each is alone, to the last bit."""
        for question in questions:
            if question.selected_by == "question":
                self._settle(question)
        with self.session.products():
            doubt = DOUBT[self.session.dtype] if exact else 0.0
            return self._generator.write([question.item for question in questions], decoding, watch, doubt)

    def _settle(self, question: Question) -> None:
        """Find the task of a question that stands for it: here, where nothing else uses model and tokenizer."""
        if self._chooser is not None and self._embeddings is not None and question.task is None:
            question.task = self._chooser.choose(self._embeddings[question.item.task])
        if question.task is not None:
            question.item = replace(question.item, task=question.task)


def _chooser(run: Run, routing: TaskRouting, base: LoadedModel) -> TaskChooser | None:
    """Of the training's tasks; None where its questions are not known."""
    questions = {task: texts for task, texts in run.questions.items() if task in routing.definitions}
    if not questions:
        return None
    texts = {text: text for asked in questions.values() for text in asked}
    return TaskChooser(questions, replace(routing, definitions=texts).embeddings(base))


def open_models(
    runs: Sequence[str],
    model: ModelConfig,
    base: bool = True,
    precision: Literal["run", "auto", "fp32", "bf16"] = "run",
) -> list[ServedModel]:
    """The untuned base, if wanted, and each run on it, in order.

    Args:
        runs: folders of finished runs, or of adapters that belong on `model`.
        model: the base where no run names one.
        base: also the base alone, first.
        precision: of the matrix products; "run" = as the runs were trained.

    Raises:
        UserError: a run cannot be found, or the runs do not share one base and one number format.
    """
    found = [find_run(run, model) for run in runs] or [find_run(None, model)]
    first = found[0]
    for run in found[1:]:
        if run.model != first.model:
            raise UserError(
                f"run={run.root}: another base ({run.model.name}) than {first.root}'s ({first.model.name}), and one "
                "base is in memory at a time; give runs of one base, or begin a second command"
            )
        if precision == "run" and run.dtype != first.dtype:
            raise UserError(
                f"run={run.root}: trained in another number format than {first.root}; give precision=fp32 or bf16"
            )
    routings = [run.trained_routing for run in found]
    names = _names(found)
    dtype = (first if precision == "run" else replace(first, precision=precision)).dtype
    plain = build_base(first.model, dtype)
    alone = Run(BASE_LABEL, first.model, precision=first.precision, data=first.data)
    chat = copy.deepcopy(plain.chat)
    session = Session(plain, dtype, cache_features=False)
    served = [ServedModel(BASE_LABEL, alone, session, None, plain, chat)]
    for name, run, routing in zip(names, found, routings, strict=True):
        if run.adapter is not None:
            own = twin(plain, shared=bool(run.settings))
            served.append(
                ServedModel(name, run, Session(own, dtype, False, run.adapter, routing), routing, plain, chat)
            )
    return served if base else served[1:] or served


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs' folders, with their parents' where two are alike.

    Raises:
        UserError: a run is given twice.
    """
    folders = [(run.root or Path("/base")).resolve().parts[1:] for run in runs]
    if len({*folders}) < len(folders):
        raise UserError(
            f"run=[{','.join(str(run.root) for run in runs)}]: the same run twice; give each once"
        )
    depth, taken = 1, (BASE_LABEL,)
    while len({taken, *(folder[-depth:] for folder in folders)}) < len({taken, *folders}):
        depth += 1
    return ["/".join(folder[-depth:]) for folder in folders]


def twin(base: LoadedModel, shared: bool = True) -> LoadedModel:
    """The same model with modules of its own, so that an adapter on it leaves `base` as it is.

    Args:
        base: without an adapter.
        shared: over the same weights; False: also weights of its own, which may be changed.
    """
    weights: list[Tensor] = [*base.model.parameters(), *base.model.buffers()]
    module: Any
    for module in base.model.modules():
        if hasattr(module, "init_8bit_state"):
            # A layer of eight bits takes codes and scales out of its weight with its first pass; a second layer that
            # has the same weight would find none, and compute something else.
            if module.weight.CB is not None:
                module.init_8bit_state()
            weights += [module.state.CB, module.state.SCB]
    known = {id(tensor): tensor for tensor in weights} if shared else {}
    return replace(base, model=copy.deepcopy(base.model, known))
