"""Who judges, and the file of a judge's replies: a cache keyed by the full request, safe to kill at any byte.

`judgements/<judge>.jsonl` beside the predictions: a header that names the judge, then a line for each reply. What the
reply means is read from its text anew each time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.judging import prompt
from mixlora_cli.store import Log, open_log, read_log, resume_log

EXACT = "exact"
_FORMAT = "mixlora-judgements/1"
_FOLDER = "judgements"
_WHAT_TO_DO = "move the file away and judge again"
_SHOWN = 12
"""Characters of a commit or digest in a title."""


@dataclass(frozen=True)
class Identity:
    """A judge with all settings that change what it replies; where it runs is not among them."""

    judge: str
    """"exact", "hf" or "openai"."""
    model: str = ""
    revision: str = ""
    """Commit on the hub, digest of a local folder, or what the user says that a server runs."""
    prompt: str = ""
    """Digest of the prompt's words; "" for a judge that reads none."""
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Heading of its column: "exact", "vicuna-13b-v1.5 (hf)"."""
        return f"{self.model.rstrip('/').rpartition('/')[2]} ({self.judge})" if self.model else self.judge

    @property
    def file_name(self) -> str:
        """Name of the file with its replies: another one whenever any setting is another."""
        name = re.sub(r"[^\w.-]+", "-", self.title).strip("-")
        return f"{name}-{self._digest[:8]}.jsonl"

    @cached_property
    def _digest(self) -> str:
        return _digest_of(asdict(self))

    def key(self, prediction: Prediction) -> str:
        """Digest of the full request: this judge and what it is asked about the prediction."""
        asked: Any = question_to(prediction)
        if self.judge == EXACT:
            asked = [prediction.target, prediction.prediction, list(prediction.labels)]
        return _digest_of([self._digest, asked])


def question_to(prediction: Prediction, template: str = prompt.TEMPLATE) -> str:
    """The prompt about one prediction."""
    return prompt.fill(template, prediction.question, prediction.target, prediction.prediction)


def _digest_of(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


class ReplyLog:
    """A judge's file, open for writing; what `append` was given is on the disk when it returns."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.replies = _by_key(log.records)
        """Text of each reply by `Identity.key`."""

    def append(self, replies: Mapping[str, str]) -> None:
        """Write them in one go."""
        self._log.append({"key": key, "reply": reply} for key, reply in replies.items())


@contextmanager
def open_replies(folder: Path, identity: Identity) -> Iterator[ReplyLog]:
    """Continue the judge's file in an evaluation folder, or start it. Raises UserError when it cannot be read."""
    path = folder / _FOLDER / identity.file_name
    if path.exists() and read_log(path, _FORMAT, _WHAT_TO_DO, header_only=True).header is not None:
        log = resume_log(path, _FORMAT, _WHAT_TO_DO)
    else:
        log = open_log(path, {"format": _FORMAT, "judge": asdict(identity)}, _WHAT_TO_DO)
    with log:
        yield ReplyLog(log)


@dataclass(frozen=True)
class Stored:
    """What one judge has replied."""

    identity: Identity
    replies: Mapping[str, str]
    """Text of each reply by `Identity.key`."""


def all_replies(folder: Path) -> list[Stored]:
    """What every judge has replied in an evaluation folder, by file name. Raises UserError when one cannot be read."""
    stored = []
    for path in sorted((folder / _FOLDER).glob("*.jsonl")):
        found = read_log(path, _FORMAT, _WHAT_TO_DO)
        if found.header is not None:
            try:
                stored.append(Stored(Identity(**found.header["judge"]), _by_key(found.records)))
            except (TypeError, KeyError) as error:
                raise UserError(f"{path} holds a line that is no reply ({error}): {_WHAT_TO_DO}") from error
    return stored


def _by_key(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of a key that was written twice the first reply counts."""
    replies: dict[str, str] = {}
    for record in records:
        replies.setdefault(str(record["key"]), str(record["reply"]))
    return replies


def distinct_titles(identities: Sequence[Identity]) -> list[str]:
    """A title for each: `Identity.title`, and where several share one, the shortest setting that tells them apart.

    "judge (openai, api=chat)" and "judge (openai, api=completions)", for instance.
    """
    titles = [identity.title for identity in identities]
    for title in {title for title in titles if titles.count(title) > 1}:
        places = [place for place, each in enumerate(titles) if each == title]
        texts = _telling_apart([_settings(identities[place]) for place in places])
        for place, text in zip(places, texts, strict=True):
            titles[place] = f"{title[:-1]}, {text})" if title.endswith(")") else f"{title} ({text})"
    return titles


def _settings(identity: Identity) -> dict[str, str]:
    """Everything that may differ between two judges of one title, as short texts by name."""
    named = {"revision": identity.revision, "prompt": identity.prompt}
    digests = {name: f"{name}={value[:_SHOWN] or 'unknown'}" for name, value in named.items()}
    decoding = {name: f"{name}={value}" for name, value in identity.decoding.items()}
    return {"model": identity.model, **digests, **decoding}


def _telling_apart(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """For each the values of as few settings as it takes, the shortest of those; a number where none does."""
    every = dict.fromkeys(name for each in settings for name in each)
    names = [name for name in every if len({each.get(name) for each in settings}) > 1]
    for count in range(1, len(names) + 1):
        found = [
            [", ".join(each.get(name, f"no {name}") for name in chosen) for each in settings]
            for chosen in combinations(names, count)
        ]
        if apart := [texts for texts in found if len(set(texts)) == len(texts)]:
            return min(apart, key=lambda texts: len("".join(texts)))
    return [str(number) for number in range(1, len(settings) + 1)]
