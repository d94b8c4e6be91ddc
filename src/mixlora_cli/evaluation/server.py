"""A server that answers: whatever speaks OpenAI's chat interface (`eval.server`), asked many questions at once."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from mixlora_cli.config import EvalConfig
from mixlora_cli.data.chat import ROLES, content_parts
from mixlora_cli.data.images import Picture, is_upright, open_picture, opened, read_picture
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import Turn
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.instances import Answered, Chosen, Unanswered
from mixlora_cli.launch import ProcessGroup
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.session import Run
from mixlora_cli.openai_client import Body, Server, Words
from mixlora_cli.store import digest_of

_WORDS = Words(
    server="the server",
    url="eval.server",
    others="eval.server_model",
    asked="instances",
    skip="count their answers as empty with eval.requests.on_refusal=empty",
)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""What every server reads; a picture in another format is sent as PNG."""
_SEED = 0
"""Of the draws under routing=random, in `mixlora serve`."""
_OURS = "mixlora"
"""Key of what `mixlora serve` says of its models beyond OpenAI's fields."""


class ServerModel:
    """Asks for greedy answers; the pictures go with the questions, the task's definition where a run routes by task."""

    no_losses = "a server does not tell how likely a given answer is; evaluate without eval.server for it"

    def __init__(self, config: EvalConfig, run: Run | None, routing: TaskRouting | None) -> None:
        """Raises UserError where the address is none, or the model is not named and the server has not just one."""
        if run is not None and run.selects_by == "chance" and config.seed != _SEED:
            raise UserError(
                f"seed={config.seed}: a server draws the factors of {run.label} with seed {_SEED}; give that, "
                "or evaluate without eval.server"
            )
        settings = config.eval
        requests = settings.requests
        refused = None if requests.on_refusal == "stop" else ""
        self._run, self._definitions = run, {} if routing is None else routing.definitions
        self._server = Server(str(settings.server), requests, _WORDS, refused)
        self.model = settings.server_model or (self._only_model() if run is None else _folder_name(run))
        self.label = self.model if run is None else run.label
        body: Body = {"temperature": 0, "max_tokens": settings.max_new_tokens, **requests.extra}
        self._decoding = {name: value for name, value in body.items() if value is not None}

    def _only_model(self) -> str:
        names = [each["id"] for each in self._server.models()]
        if len(names) == 1:
            return str(names[0])
        has = f"has {', '.join(map(cut, names))}" if names else "does not list its models"
        check = "" if names else ", and see that the address ends in /v1"
        raise UserError(
            f"eval.server={self._server.place} {has}; give eval.server_model=<one of them>{check}"
        )

    def usable(self, part: Chosen) -> list[Record]:
        """All of them: what the server refuses shows when it is asked."""
        return list(part.records)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Of server, model, decoding and definitions; of a run also its adapter's."""
        found = {"server": self._server.place, "model": self.model, "decoding": str(self._decoding)}
        if self._run is not None:
            found["adapter"] = self._run.digest
        if self._definitions:
            found["task definitions"] = digest_of(sorted(self._definitions.items()))
        return found

    def answers(self, missing: Unanswered, team: ProcessGroup) -> Iterator[list[Answered]]:
        """One answer at a time, as they come.

        Raises:
            UserError: like `Server.texts`; the server serves another run under this name, or it does not read the
                definitions that the run routes by.
        """
        if self._run is not None:
            self._require_run(self._run)
        share = team.share([(part, record) for part, records in missing for record in records])
        asked = {number: record for number, (_, record) in enumerate(share)}
        for number, text in self._server.texts("chat/completions", asked, self._body):
            yield [Answered(*share[number], text.strip())]

    def _require_run(self, run: Run) -> None:
        """Raise UserError where the server is known to have another adapter under this name."""
        ours = {
            each["id"]: each[_OURS] for each in self._server.models() if isinstance(each.get(_OURS), dict)
        }
        about = ours.get(self.model)
        if about is None and (ours or run.selects_by == "task"):
            has = f"has {', '.join(map(cut, ours))}" if ours else "is none of `mixlora serve`"
            raise UserError(
                f"run={run.root}: the server at {self._server.place} {has}; start `mixlora serve run={run.root}`, or "
                "give eval.server_model=<its name there>"
            )
        if about is not None and about.get("digest") != run.digest:
            raise UserError(
                f"run={run.root} ({run.label}): {cut(self.model)} at {self._server.place} is another adapter "
                f"({cut(about.get('label'))}); give eval.server_model=<its name there>"
            )

    def _body(self, record: Record) -> Body:
        pictures = iter(record.images)
        *asked, _ = record.conversation
        body: Body = {"model": self.model, "messages": [_message(turn, pictures) for turn in asked]}
        if definition := self._definitions.get(record.task):
            body["definition"] = definition
        return {**body, **self._decoding}


def _folder_name(run: Run) -> str:
    assert run.root is not None
    return run.root.resolve().name


def _message(turn: Turn, pictures: Iterator[Picture]) -> dict[str, Any]:
    """A turn with its pictures, which are taken from the record's, where they stand in the text."""
    parts = content_parts(turn.text)
    if all(part["type"] == "text" for part in parts):
        return {"role": ROLES[turn.role], "content": "".join(part["text"] for part in parts)}
    content = [
        part
        if part["type"] == "text"
        else {"type": "image_url", "image_url": {"url": data_url(next(pictures))}}
        for part in parts
    ]
    return {"role": ROLES[turn.role], "content": content}


def data_url(picture: Picture) -> str:
    """A picture's own bytes where every reader sees the same in them, else what this package sees as PNG.

    Raises BadRecord where it is no picture.
    """
    with open_picture(picture) as image:
        kind = image.format
        plain = kind in _FORMATS and image.mode in ("RGB", "L") and is_upright(image)
    data = read_picture(picture)
    if not plain:
        kind, file = "PNG", io.BytesIO()
        opened(picture).save(file, kind)
        data = file.getvalue()
    return f"data:{Image.MIME[str(kind)]};base64,{base64.b64encode(data).decode()}"
