"""What an evaluation found, and the file it is kept in.

`results.json` is `{"format", "about": {...}, "scores": [Score], "mean": Score | null, "seen": Score | null,
"judged": [Judged]}` with the fields of the dataclasses below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.errors import UserError
from mixlora_cli.store import write_text

FORMAT = "mixlora-results/1"
FILE_NAME = "results.json"


@dataclass(frozen=True)
class Score:
    """One number with everything needed to trust it."""

    name: str
    column: str
    """Its heading in tables: the paper's name."""
    value: float
    low: float
    """Lower end of the 95 % interval, in the unit of `value`."""
    high: float
    n: int
    """Instances that were answered."""
    unit: str
    """"%" or "points"."""
    rule: str
    """The rule that made the number."""
    parts: Mapping[str, Mapping[str, float]]
    """Numbers of each subtask, category or seen task."""


@dataclass(frozen=True)
class JudgedScore:
    """What one judge says of one benchmark's answers, in per cent."""

    name: str
    column: str
    value: float
    """Per cent of answers that it calls right."""
    low: float
    high: float
    n: int
    unparsed: int
    """Replies of the judge that decide nothing; counted as wrong."""


@dataclass(frozen=True)
class Agreement:
    """How often two judges say the same of an answer."""

    share: float
    """Per cent of the `n` answers that both have judged."""
    n: int


@dataclass(frozen=True)
class Judged:
    """The scores that one judge gives."""

    judge: Mapping[str, Any]
    """title, judge, model, revision, digest of the prompt and decoding."""
    scores: tuple[JudgedScore, ...]
    """One for each benchmark that it has judged whole, in the paper's order."""
    mean: JudgedScore | None
    """Mean of the paper's columns other than MME; None unless all seven are judged."""
    seen: JudgedScore | None
    """Mean over the seen tasks; None unless all are judged."""
    agreement: Mapping[str, Agreement]
    """With every other judge, by its title, and with the rule "exact"."""

    @property
    def title(self) -> str:
        """Short name of the judge."""
        return str(self.judge["title"])


@dataclass(frozen=True)
class Results:
    """The scores of one model."""

    about: Mapping[str, Any]
    """label, run, limit, seed, versions and the predictions' fingerprint."""
    scores: tuple[Score, ...]
    """One for each benchmark, in the paper's order."""
    mean: Score | None
    """MMAvg, the mean of the paper's columns other than MME; None unless all seven were evaluated."""
    seen: Score | None
    """Held-out instances of the seen tasks: mean over tasks, each in `parts`; None unless answered."""
    judged: tuple[Judged, ...] = ()
    """One for each judge that was asked."""

    @property
    def label(self) -> str:
        """Short name of what was evaluated."""
        return str(self.about.get("label", "model"))

    def column(self, title: str) -> Score | None:
        """The score under this heading."""
        return next((score for score in self.scores if score.column == title), None)


def write_results(results: Results, path: Path) -> None:
    """Write `results.json` whole or not at all."""
    content = {"format": FORMAT, **asdict(results)}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Read `results.json`, or the one in a folder. Raises UserError when there is none, or another file."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("format")
        mean, seen = (None if content[key] is None else Score(**content[key]) for key in ("mean", "seen"))
        scores = tuple(Score(**score) for score in content["scores"])
        judged = tuple(map(_judged, content.get("judged", ())))
        return Results(content["about"], scores, mean, seen, judged)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `mixlora eval` first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results file of this version (expected format {FORMAT})") from error


def _judged(content: Mapping[str, Any]) -> Judged:
    mean, seen = (None if content[key] is None else JudgedScore(**content[key]) for key in ("mean", "seen"))
    scores = tuple(JudgedScore(**score) for score in content["scores"])
    agreement = {title: Agreement(**found) for title, found in content["agreement"].items()}
    return Judged(content["judge"], scores, mean, seen, agreement)
