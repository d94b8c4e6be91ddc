"""Configuration of a judge (group `judge`), and of `mixlora judge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={'null' if value is None else value}: {allowed}")


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges the stored answers, and how it is asked (key `judge`)."""

    name: Literal["none", "exact", "hf", "openai"] = "none"
    model: str | None = None
    """Hugging Face id or local folder (`hf`), or the name that the server knows (`openai`)."""
    revision: str | None = None
    """Commit, branch or tag of `model`; with `openai`, noted in the results as given here."""
    max_new_tokens: int = 8
    """Longest reply: it is to begin with Yes or No."""
    batch_size: int = 16
    """`hf`: questions that are read at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`hf`: number format of the judge."""
    base_url: str = "http://localhost:8000/v1"
    """`openai`: the server; the default is vLLM's."""
    api: Literal["completions", "chat"] = "completions"
    """`openai`: `completions` sends the prompt as it stands, `chat` leaves its format to the server."""
    concurrency: int = 16
    """`openai`: requests under way at once."""
    timeout: float = 60.0
    """`openai`: seconds without a sign of the server after which a request counts as failed."""
    retries: int = 5
    """`openai`: further tries of a request that failed in a way that may pass."""
    first_wait: float = 1.0
    """`openai`: seconds before the first further try; they double from there."""
    on_refusal: Literal["stop", "unparsed"] = "stop"
    """`openai`: what becomes of a question that the server calls wrong (HTTP 400, 413, 422)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """`openai`: further fields of the request's body; null takes one out."""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size", "concurrency", "timeout"):
            _require(getattr(self, key) > 0, f"judge.{key}", getattr(self, key), "must be > 0")
        for key in ("retries", "first_wait"):
            _require(getattr(self, key) >= 0, f"judge.{key}", getattr(self, key), "must be >= 0")
        needs_model = self.name in ("hf", "openai")
        _require(bool(self.model) or not needs_model, "judge.model", self.model, "name the judging model")


@dataclass(frozen=True)
class JudgeCommandConfig:
    """Everything that `mixlora judge` reads."""

    judge: JudgeConfig
    run: str | None = None
    """Folder of a finished evaluation, or of the run that it belongs to."""

    def __post_init__(self) -> None:
        _require(self.run is not None, "run", self.run, "give run=<folder of a finished `mixlora eval`>")
        _require(self.judge.name != "none", "judge", self.judge.name, "must be one of exact, hf, openai")

    @property
    def output_dir(self) -> str:
        """What two jobs of a sweep must not share: one judge's replies about one evaluation."""
        return f"{self.run}/judgements/{self.judge.name} {self.judge.model or ''}".rstrip()
