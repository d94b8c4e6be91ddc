"""What the judges' replies say about an evaluation, from the stored files alone, as scores and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixlora_cli.benchmarks.metrics import mean_over, per_cent, with_ends
from mixlora_cli.benchmarks.registry import (
    AVERAGED,
    COLUMNS,
    MEAN_TITLE,
    SEEN_TITLE,
    benchmark_named,
    in_paper_order,
)
from mixlora_cli.benchmarks.scorers import label_match
from mixlora_cli.evaluation.predictions import Prediction
from mixlora_cli.evaluation.results import Agreement, Judged, JudgedScore, Results
from mixlora_cli.judging.prompt import Verdict, read_verdict
from mixlora_cli.judging.replies import EXACT, Identity, all_replies, distinct_titles
from mixlora_cli.tables import Table

Said = Sequence[Verdict | None]
"""One judge's verdict on each answer; None where it has not judged it."""
JUDGED_CAPTION = (
    "Per cent of answers that the judge calls right [95 % interval]. A reply that is neither Yes nor No is unparsed, "
    "and counts as wrong."
)


def judged_scores(
    folder: Path, predictions: Sequence[Prediction], own: Mapping[str, Any] | None = None
) -> tuple[Judged, ...]:
    """An entry for each judge that has judged at least one benchmark whole. Reads the replies in `folder`.

    `own` describes the benchmarks of the user's own, see `benchmark_named`.

    Raises UserError when a file of replies cannot be read.
    """
    if not (judges := all_replies(folder)):
        return ()
    said: list[Said] = []
    for stored in judges:
        replies = (stored.replies.get(stored.identity.key(p)) for p in predictions)
        said.append([None if reply is None else read_verdict(reply) for reply in replies])
    by_rule: Said = ["yes" if label_match(p.prediction, p.target, p.labels) else "no" for p in predictions]
    titles = distinct_titles([stored.identity for stored in judges])
    entries = []
    for title, stored, ours in zip(titles, judges, said, strict=True):
        others = {other: theirs for other, theirs in zip(titles, said, strict=True) if other != title}
        if stored.identity.judge != EXACT:
            others[EXACT] = by_rule
        agreement = {other: _agreement(ours, theirs) for other, theirs in others.items()}
        entry = _judged(stored.identity, title, predictions, ours, agreement, own)
        entries += [entry] if entry.scores or entry.seen else []
    return tuple(entries)


def _agreement(ours: Said, theirs: Said) -> Agreement:
    """Over the answers that both have judged; unparsed is wrong."""
    both = [(one, other) for one, other in zip(ours, theirs, strict=True) if one and other]
    same = sum((one == "yes") == (other == "yes") for one, other in both)
    return Agreement(100 * same / len(both) if both else 0.0, len(both))


def _judged(
    identity: Identity,
    title: str,
    predictions: Sequence[Prediction],
    said: Said,
    agreement: Mapping[str, Agreement],
    own: Mapping[str, Any] | None,
) -> Judged:
    groups: dict[tuple[str, str], list[Verdict | None]] = {}
    for prediction, verdict in zip(predictions, said, strict=True):
        groups.setdefault((prediction.split, prediction.benchmark), []).append(verdict)
    whole = {group: groups[group] for group in sorted(groups) if None not in groups[group]}
    unseen = {name: found for (split, name), found in whole.items() if split == "unseen"}
    seen = [found for (split, _), found in whole.items() if split == "heldout"]
    columns = {name: benchmark_named(name, own).column for name in unseen}
    scores = []
    for name in in_paper_order(unseen):
        found = unseen[name]
        ends = with_ends("value", per_cent(found.count("yes"), len(found)))
        scores.append(
            JudgedScore(name, columns[name], n=len(found), unparsed=found.count("unparsed"), **ends)
        )
    by_column = {columns[name]: found for name, found in unseen.items()}
    averaged = [by_column[column] for column in AVERAGED if column in by_column]
    num_seen = sum(split == "heldout" for split, _ in groups)
    return Judged(
        judge={**asdict(identity), "title": title},
        scores=tuple(scores),
        mean=_mean_score(MEAN_TITLE, averaged) if len(averaged) == len(AVERAGED) else None,
        seen=_mean_score(SEEN_TITLE, seen) if seen and len(seen) == num_seen else None,
        agreement=agreement,
    )


def _mean_score(column: str, groups: Sequence[Said]) -> JudgedScore:
    """Mean over groups of the per cent of Yes."""
    right = [np.array([verdict == "yes" for verdict in each], dtype=np.float64) for each in groups]
    unparsed = sum(verdict == "unparsed" for each in groups for verdict in each)
    ends = with_ends("value", mean_over(right))
    return JudgedScore(column.lower(), column, n=sum(map(len, right)), unparsed=unparsed, **ends)


def judged_table(rows: Sequence[tuple[str, Results]]) -> Table | None:
    """A line for each model and judge: the scores, unparsed replies, agreement with others; None without judges."""
    judges = [(label, judged, _by_column(judged)) for label, results in rows for judged in results.judged]
    if not judges:
        return None
    found = dict.fromkeys(column for *_, scores in judges for column in scores)
    columns = [*(each for each in COLUMNS if each in found), *(each for each in found if each not in COLUMNS)]
    lines = []
    for label, judged, scores in judges:
        cells = [_text(scores.get(column)) for column in columns]
        counted = [*judged.scores, *([judged.seen] if judged.seen else [])]
        unparsed = f"{sum(each.unparsed for each in counted)} of {sum(each.n for each in counted)}"
        agrees = ", ".join(f"{title} {each.share:.1f} %" for title, each in judged.agreement.items())
        lines.append((label, judged.title, *cells, unparsed, agrees or "-"))
    headings = ("", "judge", *columns, "unparsed", "agrees with")
    return Table("Judged", headings, tuple(lines), 2, (JUDGED_CAPTION,))


def _by_column(judged: Judged) -> dict[str, JudgedScore]:
    return {each.column: each for each in (*judged.scores, judged.mean, judged.seen) if each is not None}


def _text(score: JudgedScore | None) -> str:
    return "-" if score is None else f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"
