"""The model `mixlora` of lmms-eval: a trained run, or an untuned base, answers its tasks in padded batches.

lmms-eval --model mixlora --model_args run=FOLDER --batch_size 8 --tasks mme
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

from mixlora_cli.config import ServeConfig
from mixlora_cli.data.chat import SPEAKERS
from mixlora_cli.data.definitions import parse_definitions
from mixlora_cli.data.images import Picture, as_shown, open_fully
from mixlora_cli.data.problems import BadRecord
from mixlora_cli.data.template import IMAGE_MARKER, Turn
from mixlora_cli.data.text_files import read_json
from mixlora_cli.errors import UserError, cut
from mixlora_cli.hydra_app import composed
from mixlora_cli.models.generate import Decoding
from mixlora_cli.progress import say, with_bar
from mixlora_cli.serving.models import Question, ServedModel, open_models

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "no_repeat_ngram_size": (0, None),
    "top_k": (0, -1, None),
    "use_cache": (True, None),
}
"""Keys of `generation_kwargs` that are not read, each with the values at which they would change nothing."""
_OTHER_MODELS = ("image_aspect_ratio",)
"""Keys of `generation_kwargs` that say how other models prepare pictures; a model here has its own processor."""


class MixLora(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers chat messages, each with its own factors where the run is a MixLoRA adapter."""

    is_simple = False

    def __init__(
        self,
        run: str | None = None,
        base: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 1024,
        definitions: str | None = None,
        **others: Any,
    ) -> None:
        """What `--model_args` may name.

        Args:
            run: folder of a finished `mixlora train`, or of an adapter that belongs on `base`.
            base: the model group's option (mini, hf, ...); without a run the untuned base answers.
            batch_size: questions answered at once.
            device: the one that there is, or None.
            max_new_tokens: longest answer to a task that names none.
            definitions: file of a definition of each lmms-eval task, for a run with routing=task.
            others: further keys of `mixlora serve`, such as `model.name_or_path` and `precision`.

        Raises:
            UserError: something of this is wrong, or the run cannot be opened.
        """
        super().__init__()
        others.pop("max_batch_size", None)  # lmms-eval's own; of use only with an automatic size
        if run is None and base is None:
            raise UserError("--model_args: give run=<folder of a finished `mixlora train`>, or base=<model>")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: must be a number > 0; there is no automatic one")
        self.batch_size, self._longest = int(batch_size), int(max_new_tokens)
        if torch.cuda.is_available():  # of several processes each its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        overrides = [f"{key}={value}" for key, value in others.items()]
        overrides += [] if base is None else [f"model={base}"]
        overrides += [] if run is None else [f"run={run}"]
        config = composed("serve", ServeConfig, overrides)
        (self._served,) = open_models(config.run or [], config.model, not config.run, config.precision)
        self.device = self._served.session.device
        if device is not None and torch.device(device).type != self.device.type:
            raise UserError(
                f"--device {device}: the model is on {self.device.type}; leave it out, or hide the GPUs with "
                "CUDA_VISIBLE_DEVICES="
            )
        source = "definitions"
        self._definitions = (
            {}
            if definitions is None
            else parse_definitions(read_json(Path(definitions), "a JSON file of definitions", source), source)
        )
        if self._definitions and self._served.run.selects_by != "task":
            raise UserError(
                f"definitions: {self._served.run.label} does not select by the task; leave it out"
            )
        self._told: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> MixLora:
        """As lmms-eval makes it of `--model_args`, which go before `--batch_size` and `--device`."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; questions of like length are answered together.

        Raises:
            UserError: a request asks for what is not done here, or its messages or pictures cannot be read.
        """
        decoding = [self._decoding(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number].args[0]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        answers: dict[int, GenerationResult] = {}
        for batch in with_bar(batches, "answering", hidden=self.rank != 0):
            questions = [self._question(requests[number]) for number in batch]
            written = self._served.write(questions, [decoding[number] for number in batch])
            for number, answer in zip(batch, written, strict=True):
                counts = TokenCounts(len(questions[batch.index(number)].item.input_ids), answer.num_tokens)
                answers[number] = GenerationResult(answer.text, counts)
                context, _, settings, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, settings), answer.text)
        return [answers[number] for number in range(len(requests))]

    def _question(self, request: Instance) -> Question:
        _, to_messages, _, place, task, split = request.args
        messages = to_messages(self.task_dict[task][split][place])
        pictures: list[Picture] = []
        try:
            turns = [_turn(message, pictures) for message in messages]
            task_name, definition = self._selection(self._served, task)
            return self._served.prepare(turns, pictures, task_name, definition)
        except (BadRecord, UserError) as error:
            raise UserError(f"{task}, {split} {place}: {error}") from error

    def _selection(self, served: ServedModel, task: str) -> tuple[str | None, str | None]:
        """What an adapter with routing=task is told of an lmms-eval task: a task of its training, or a definition."""
        if served.run.selects_by != "task":
            return None, None
        if (definition := self._definitions.get(task)) is not None:
            return None, definition
        if task in served.definitions:
            return task, None
        if task not in self._told:
            self._told.add(task)
            say(
                f"{task}: no task of the training, and definitions=<file> has none of it; factors follow from what "
                "each question is like"
            )
        return None, None

    def _decoding(self, request: Instance) -> Decoding:
        """How a request's answer is decoded, by its task's `generation_kwargs`."""
        given = dict(request.args[2] or {})
        longest = given.pop("max_new_tokens", given.pop("max_gen_toks", None))
        temperature, top_p = given.pop("temperature", None), given.pop("top_p", None)
        draws, seed = given.pop("do_sample", None), given.pop("seed", None)
        until = given.pop("until", None) or []
        refused = {
            key: value
            for key, value in given.items()
            if key not in _OTHER_MODELS and value not in _NEUTRAL.get(key, ())
        }
        if refused:
            told = ", ".join(f"{key}={cut(value)}" for key, value in refused.items())
            raise UserError(
                f"{request.task_name}: generation_kwargs {told}: not done here; --gen_kwargs or the task's YAML can "
                "change it (read are max_new_tokens, until, do_sample, temperature, top_p and seed)"
            )
        if draws is False or temperature == 0 or (draws is None and temperature is None):
            temperature, top_p = 0.0, 1.0
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"{request.task_name}: generation_kwargs top_p={top_p}: must be in (0, 1]")
        return Decoding(
            max_new_tokens=self._longest if longest is None else int(longest),
            temperature=1.0 if temperature is None else float(temperature),
            top_p=1.0 if top_p is None else float(top_p),
            seed=seed,
            stop=tuple(each for each in ([until] if isinstance(until, str) else until) if each),
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Not done: this adapter answers questions.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "mixlora answers tasks of output_type generate_until; this one is scored by likelihoods (multiple_choice)"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Not done: this adapter answers each question once.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "mixlora answers tasks of output_type generate_until; this one asks in several rounds"
        )


def _turn(message: Mapping[str, Any], pictures: list[Picture]) -> Turn:
    """A message as a turn, with a marker where each of its pictures stands; these are put behind `pictures`."""
    role = SPEAKERS.get(message.get("role", ""))
    if role is None:
        raise UserError(f"a message from {cut(message.get('role'))}; expected {', '.join(SPEAKERS)}")
    content = message["content"]
    text = ""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text" and IMAGE_MARKER not in part["text"]:
            text += part["text"]
        elif part["type"] == "text":
            raise UserError(f"a text with {IMAGE_MARKER} in it, which stands for a picture here")
        elif part["type"] == "image":
            pictures.append(_picture(part["url"]))
            text += IMAGE_MARKER
        else:
            raise UserError(f"a message has {cut(part['type'])}; text and pictures are read")
    return Turn(role, text)


def _picture(given: Any) -> Picture:
    """The file that a path names, or the bytes of one with what an opened picture shows."""
    if isinstance(given, (str, Path)):
        open_fully(Path(given))
        return Path(given)
    if not isinstance(given, Image.Image):
        raise UserError(f"a picture is given as {type(given).__name__}; expected one of Pillow's, or a path")
    file = io.BytesIO()
    as_shown(given, b"").convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()
