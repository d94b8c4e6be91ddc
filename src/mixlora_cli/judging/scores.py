"""What the judges' replies say about an evaluation, from the stored files alone.

Predictions are gone through a few at a time; what is kept of them are counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.evaluation.benchmarks import AVERAGED, MEAN_TITLE, benchmark_named, in_paper_order
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Agreement, Judged, JudgedScore
from mixlora_cli.evaluation.scorers import label_match
from mixlora_cli.evaluation.statistics import SEED, percentile, wilson
from mixlora_cli.evaluation.tallies import resampled
from mixlora_cli.judging.identity import EXACT, Identity
from mixlora_cli.judging.replies import reply_files
from mixlora_cli.judging.titles import distinct_titles
from mixlora_cli.judging.verdicts import CODE, MISSING, VERDICTS, YES, Codes, Verdicts

SEEN_NAME, SEEN_TITLE = "seen", "Seen"
CHUNK = 512
Counts = Counter[str]
"""How many instances got each verdict."""


class _Counted:
    """Counts of one judge."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.groups: dict[tuple[str, str], Counts] = {}
        """By split and benchmark."""
        self.unfinished: set[tuple[str, str]] = set()
        """Groups in which an instance was not judged yet."""

    def add(self, predictions: Sequence[Prediction], codes: Codes) -> None:
        for p, code in zip(predictions, codes.tolist(), strict=True):
            group = p.split, p.benchmark
            if code == MISSING:
                self.unfinished.add(group)
            else:
                self.groups.setdefault(group, Counter())[VERDICTS[code]] += 1

    def finished(self, split: str) -> dict[str, Counts]:
        """Counts of the benchmarks (or seen tasks) that were judged whole, by name."""
        groups = {group: found for group, found in self.groups.items() if group not in self.unfinished}
        return {name: found for (part, name), found in sorted(groups.items()) if part == split}


class _Pairs:
    """How often each judge says the same as each other one, and as the rule; unparsed is wrong."""

    def __init__(self, count: int) -> None:
        self._both = np.zeros((count, count), dtype=np.int64)
        self._same = np.zeros((count, count), dtype=np.int64)

    def add(self, codes: Sequence[Codes]) -> None:
        """Codes (instances,) of every judge."""
        there = np.array([each != MISSING for each in codes])
        right = np.array([each == YES for each in codes])
        for place, (known, says) in enumerate(zip(there, right, strict=True)):
            both = there & known
            self._both[place] += both.sum(axis=1)
            self._same[place] += (both & (right == says)).sum(axis=1)

    def agreement(self, first: int, second: int) -> Agreement:
        """Over the instances that both have judged."""
        both, same = int(self._both[first, second]), int(self._same[first, second])
        return Agreement(100 * same / both if both else 0.0, both)


def judged_scores(
    folder: Path, predictions: Iterable[Prediction], own: Mapping[str, Any] | None = None
) -> tuple[Judged, ...]:
    """An entry for each judge that has judged at least one benchmark whole. Reads the replies in `folder`.

    `own` describes the benchmarks of the user's own, see `benchmark_named`.

    Raises UserError when a file of replies cannot be read.
    """
    read = [Verdicts(path) for path in reply_files(folder)]
    judges = [(verdicts, identity) for verdicts in read if (identity := verdicts.identity) is not None]
    if not judges:
        return ()
    counted = [_Counted(identity) for _, identity in judges]
    pairs = _Pairs(len(judges) + 1)
    for some in _chunks(predictions):
        codes = [verdicts.of([identity.key(p) for p in some]) for verdicts, identity in judges]
        for each, found in zip(counted, codes, strict=True):
            each.add(some, found)
        pairs.add([*codes, _by_rule(some)])
    titles = distinct_titles([identity for _, identity in judges])
    entries = []
    for place, each in enumerate(counted):
        others = {title: other for other, title in enumerate(titles) if other != place}
        if each.identity.judge != EXACT:
            others[EXACT] = len(judges)
        agreement = {title: pairs.agreement(place, other) for title, other in others.items()}
        entry = _judged(each, titles[place], agreement, own)
        entries += [entry] if entry.scores or entry.seen else []
    return tuple(entries)


def _chunks(predictions: Iterable[Prediction]) -> Iterator[list[Prediction]]:
    rest = iter(predictions)
    while some := list(islice(rest, CHUNK)):
        yield some


def _by_rule(predictions: Sequence[Prediction]) -> Codes:
    right = [label_match(p.prediction, p.target, p.labels) for p in predictions]
    return np.array([CODE["yes" if mark else "no"] for mark in right], dtype=np.int8)


def _judged(
    counted: _Counted, title: str, agreement: Mapping[str, Agreement], own: Mapping[str, Any] | None
) -> Judged:
    unseen, seen = counted.finished("unseen"), counted.finished("heldout")
    titles = {name: benchmark_named(name, own).column for name in unseen}
    scores = tuple(judged_score(name, titles[name], unseen[name]) for name in in_paper_order(unseen))
    columns = {titles[name]: counts for name, counts in unseen.items()}
    averaged = [columns[column] for column in AVERAGED if column in columns]
    whole = len(averaged) == len(AVERAGED)
    seen_whole = seen and not any(split == "heldout" for split, _ in counted.unfinished)
    return Judged(
        judge={**asdict(counted.identity), "title": title},
        scores=scores,
        mean=mean_score(MEAN_TITLE.lower(), MEAN_TITLE, averaged) if whole else None,
        seen=mean_score(SEEN_NAME, SEEN_TITLE, list(seen.values())) if seen_whole else None,
        agreement=agreement,
    )


def judged_score(name: str, column: str, counts: Counts) -> JudgedScore:
    """Per cent of Yes with Wilson's interval; what is unparsed is wrong, and counted."""
    interval = wilson(counts["yes"], counts.total()).scaled(100)
    value = 100 * counts["yes"] / counts.total()
    return JudgedScore(name, column, value, interval.low, interval.high, counts.total(), counts["unparsed"])


def mean_score(name: str, column: str, groups: Sequence[Counts]) -> JudgedScore:
    """Mean over groups of the per cent of Yes; the interval resamples the instances within each group."""
    rng = np.random.default_rng(SEED)
    interval = percentile(np.mean([100 * resampled(_marks(each), rng) for each in groups], axis=0))
    value = 100 * float(np.mean([each["yes"] / each.total() for each in groups]))
    count, unparsed = sum(each.total() for each in groups), sum(each["unparsed"] for each in groups)
    return JudgedScore(name, column, value, interval.low, interval.high, count, unparsed)


def _marks(counts: Counts) -> dict[float, int]:
    marks = {1.0: counts["yes"], 0.0: counts.total() - counts["yes"]}
    return {mark: count for mark, count in marks.items() if count}
