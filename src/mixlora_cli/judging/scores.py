"""What the judges' replies say about an evaluation, from the stored files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.evaluation.benchmarks import AVERAGED, MEAN_TITLE, benchmark_named, in_paper_order
from mixlora_cli.evaluation.done import Key
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Agreement, Judged, JudgedScore
from mixlora_cli.evaluation.scorers import label_match
from mixlora_cli.evaluation.statistics import SEED, Interval, bootstrap_means, percentile, wilson
from mixlora_cli.judging.identity import EXACT
from mixlora_cli.judging.prompt import Verdict, read_verdict
from mixlora_cli.judging.replies import Stored, all_replies

SEEN_NAME, SEEN_TITLE = "seen", "Seen"
Verdicts = Mapping[Key, Verdict]
"""By `Prediction.key`; what was not judged yet is not there."""


def verdicts_of(stored: Stored, predictions: Iterable[Prediction]) -> dict[Key, Verdict]:
    """One judge's verdicts about the predictions that it has replied to."""
    assert stored.identity is not None
    keys = ((p.key, stored.identity.key(p)) for p in predictions)
    return {instance: read_verdict(stored.replies[key]) for instance, key in keys if key in stored.replies}


def judged_scores(
    folder: Path, predictions: Sequence[Prediction], own: Mapping[str, Any] | None = None
) -> tuple[Judged, ...]:
    """An entry for each judge that has judged at least one benchmark whole. Reads the replies in `folder`.

    `own` describes the benchmarks of the user's own, see `benchmark_named`.

    Raises UserError when a file of replies cannot be read.
    """
    found = [(stored, verdicts_of(stored, predictions)) for stored in all_replies(folder)]
    by_rule: Verdicts = {}
    if found:
        right = ((p.key, label_match(p.prediction, p.target, p.labels)) for p in predictions)
        by_rule = {key: "yes" if mark else "no" for key, mark in right}
    titles = {id(stored): stored.identity.title for stored, _ in found if stored.identity}
    entries = []
    for stored, verdicts in found:
        others: dict[str, Verdicts] = {
            titles[id(other)]: theirs for other, theirs in found if other is not stored
        }
        if stored.identity is not None and stored.identity.judge != EXACT:
            others[EXACT] = by_rule
        entry = _judged(stored, verdicts, predictions, others, own)
        entries += [entry] if entry.scores or entry.seen else []
    return tuple(entries)


def _judged(
    stored: Stored,
    verdicts: Verdicts,
    predictions: Sequence[Prediction],
    others: Mapping[str, Verdicts],
    own: Mapping[str, Any] | None,
) -> Judged:
    assert stored.identity is not None
    groups: dict[str, dict[str, list[Verdict]]] = {"unseen": defaultdict(list), "heldout": defaultdict(list)}
    unfinished = {(p.split, p.benchmark) for p in predictions if p.key not in verdicts}
    for p in predictions:
        if (p.split, p.benchmark) not in unfinished:
            groups[p.split][p.benchmark].append(verdicts[p.key])
    unseen, seen = groups["unseen"], groups["heldout"]
    titles = {name: benchmark_named(name, own).column for name in unseen}
    scores = tuple(judged_score(name, titles[name], unseen[name]) for name in in_paper_order(unseen))
    columns = {titles[name]: group for name, group in unseen.items()}
    averaged = [columns[column] for column in AVERAGED if column in columns]
    whole = len(averaged) == len(AVERAGED)
    seen_whole = seen and not any(split == "heldout" for split, _ in unfinished)
    return Judged(
        judge={**asdict(stored.identity), "title": stored.identity.title},
        scores=scores,
        mean=mean_score(MEAN_TITLE.lower(), MEAN_TITLE, averaged) if whole else None,
        seen=mean_score(SEEN_NAME, SEEN_TITLE, list(seen.values())) if seen_whole else None,
        agreement={title: agreement(verdicts, theirs) for title, theirs in others.items()},
    )


def judged_score(name: str, column: str, verdicts: Sequence[Verdict]) -> JudgedScore:
    """Per cent of Yes with Wilson's interval; what is unparsed is wrong, and counted."""
    interval = wilson(verdicts.count("yes"), len(verdicts)).scaled(100)
    value = 100 * verdicts.count("yes") / len(verdicts)
    return JudgedScore(
        name, column, value, interval.low, interval.high, len(verdicts), verdicts.count("unparsed")
    )


def mean_score(name: str, column: str, groups: Sequence[Sequence[Verdict]]) -> JudgedScore:
    """Mean over groups of the per cent of Yes; the interval resamples the instances within each group."""
    marks = [np.array([verdict == "yes" for verdict in group], dtype=np.float64) for group in groups]
    rng = np.random.default_rng(SEED)
    samples = np.mean([100 * bootstrap_means(each[:, None], rng)[:, 0] for each in marks], axis=0)
    interval: Interval = percentile(samples)
    value = 100 * float(np.mean([each.mean() for each in marks]))
    unparsed = sum(list(group).count("unparsed") for group in groups)
    return JudgedScore(name, column, value, interval.low, interval.high, sum(map(len, groups)), unparsed)


def agreement(verdicts: Verdicts, others: Verdicts) -> Agreement:
    """How often two judges call the same instances right, over those that both have judged; unparsed is wrong."""
    both = [key for key in verdicts if key in others]
    same = sum((verdicts[key] == "yes") == (others[key] == "yes") for key in both)
    return Agreement(100 * same / len(both) if both else 0.0, len(both))
