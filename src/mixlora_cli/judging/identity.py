"""Who judges, and the key of one question to that judge: everything that the reply depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.judging import prompt

EXACT = "exact"


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
        return f"{name}-{_digest(asdict(self))[:8]}.jsonl"

    @cached_property
    def _prefix(self) -> str:
        return _digest(asdict(self))

    def key(self, prediction: Prediction) -> str:
        """Digest of the full request: this judge and what it is asked about the prediction."""
        asked: Any = _rule_input(prediction) if self.judge == EXACT else question_to(prediction)
        return _digest([self._prefix, asked])


def question_to(prediction: Prediction, template: str = prompt.TEMPLATE) -> str:
    """The prompt about one prediction."""
    return prompt.fill(template, prediction.question, prediction.target, prediction.prediction)


def _rule_input(prediction: Prediction) -> list[Any]:
    return [prediction.target, prediction.prediction, list(prediction.labels)]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
