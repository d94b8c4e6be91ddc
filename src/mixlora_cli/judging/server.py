"""The judge `openai`: any server with OpenAI's interface, vLLM for one, asked many questions at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mixlora_cli.config import JudgeConfig
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.judging import prompt
from mixlora_cli.judging.judge import Questions
from mixlora_cli.judging.replies import Identity
from mixlora_cli.openai_client import Body, Server, Words

REFUSED = "(refused by the server)"
"""Stored as the reply where `judge.on_refusal=unparsed`."""
_WORDS = Words(
    server="the judge",
    url="judge.base_url",
    others="judge.model and judge.api",
    asked="questions",
    skip="count them as unparsed with judge.on_refusal=unparsed",
)


@dataclass
class ServerJudge:
    """Keeps `judge.concurrency` questions under way."""

    settings: JudgeConfig
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        body: Body = {"temperature": 0, "max_tokens": settings.max_new_tokens, **settings.extra}
        self._decoding = {name: value for name, value in body.items() if value is not None}
        decoding = {"api": settings.api, **self._decoding}
        self.identity = Identity(
            "openai", str(settings.model), settings.revision or "", prompt.DIGEST, decoding
        )

    def replies(self, questions: Questions) -> Iterator[dict[str, str]]:
        """Replies one by one.

        Raises UserError like `Server.texts`.
        """
        settings = self.settings
        refused = None if settings.on_refusal == "stop" else REFUSED
        path = "completions" if settings.api == "completions" else "chat/completions"
        server = Server(settings.base_url, settings, _WORDS, refused)
        for key, text in server.texts(path, questions, self._body):
            yield {key: text}

    def _body(self, asked: Prediction) -> Body:
        body: Body = {"model": self.identity.model, **self._decoding}
        texts = asked.question, asked.target, asked.prediction
        if self.settings.api == "completions":  # the prompt reaches the model as it stands
            return {**body, "prompt": prompt.fill(prompt.TEMPLATE, *texts)}
        user = {"role": "user", "content": prompt.fill(prompt.USER, *texts)}
        return {**body, "messages": [{"role": "system", "content": prompt.SYSTEM}, user]}
