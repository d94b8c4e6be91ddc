"""Scores from stored predictions alone: no model, no data, so it reruns in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixlora_cli.benchmarks.metrics import (
    EXACT,
    InstanceScores,
    LossScores,
    Parts,
    mean_loss,
    mean_over,
    safe_names,
    with_ends,
)
from mixlora_cli.benchmarks.registry import (
    AVERAGED,
    LOSS_TITLE,
    MEAN_TITLE,
    SEEN_TITLE,
    benchmark_named,
    in_paper_order,
)
from mixlora_cli.benchmarks.scorers import normalise_answer
from mixlora_cli.evaluation.predictions import Header, Prediction, read_finished
from mixlora_cli.evaluation.results import FILE_NAME, Results, Score, write_results
from mixlora_cli.judging.verdicts import judged_scores

MME_FOLDER = "official"
"""Subfolder of MME's own text files: official/<benchmark>/<subtask>.txt."""
Task = tuple[str, str]
"""Split and benchmark; `LOSS` and the task for the losses of held-out answers."""
LOSS = "loss"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its answers, and what each scores."""

    folder: Path
    header: Header
    predictions: Sequence[Prediction]
    """In the order of the file."""
    tasks: Mapping[Task, InstanceScores]


def read_evaluation(folder: Path) -> Evaluation:
    """Raises UserError when there are no predictions in `folder` or the evaluation has not finished."""
    header, predictions = read_finished(folder)
    return Evaluation(folder, header, predictions, instance_scores(predictions, header.about))


def instance_scores(
    predictions: Iterable[Prediction], about: Mapping[str, Any]
) -> dict[Task, InstanceScores]:
    """Answers of each benchmark and seen task by the rule that scores it, and the losses of tasks that have them.

    `about["benchmarks"]` describes those of the user's own, see `benchmark_named`.
    """
    groups: dict[Task, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault((prediction.split, prediction.benchmark), []).append(prediction)
    own = about.get("benchmarks")
    found = {
        (split, name): (EXACT if split == "heldout" else benchmark_named(name, own).metric).scores(answers)
        for (split, name), answers in groups.items()
    }
    for (_, name), answers in groups.items():
        if all(answer.nll is not None for answer in answers):
            found[LOSS, name] = LossScores().update(answers)
    return found


def score(folder: Path) -> Results:
    """Score the predictions in `folder` and write `results.json` beside them; for MME also the official tool's files.

    Raises UserError when there are none or the evaluation has not finished.
    """
    return score_evaluation(read_evaluation(folder))


def score_evaluation(evaluation: Evaluation) -> Results:
    """`score` of predictions that are read already; replies of judges are read anew."""
    folder, header = evaluation.folder, evaluation.header
    about = {**header.about, "fingerprint": dict(header.fingerprint)}
    results = results_of(evaluation.tasks, about)
    _write_official_files(evaluation)
    results = replace(results, judged=judged_scores(folder, evaluation.predictions, about.get("benchmarks")))
    write_results(results, folder / FILE_NAME)
    return results


def _write_official_files(evaluation: Evaluation) -> None:
    """Other text files there, of an earlier evaluation, are removed: the tool would count them in."""
    texts = {
        name: found
        for (split, name), scores in sorted(evaluation.tasks.items(), key=lambda item: item[0])
        if split == "unseen" and (found := scores.official_files())
    }
    for name, subfolder in safe_names(texts).items():
        folder = evaluation.folder / MME_FOLDER / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.txt"):
            if old.name not in texts[name]:
                old.unlink()
        for file, text in texts[name].items():
            (folder / file).write_text(text, encoding="utf-8", errors="replace")


def score_predictions(predictions: Iterable[Prediction], about: Mapping[str, Any]) -> Results:
    """Score each benchmark, then MMAvg and the seen tasks. The order of `predictions` changes nothing."""
    return results_of(instance_scores(predictions, about), about)


def results_of(tasks: Mapping[Task, InstanceScores], about: Mapping[str, Any]) -> Results:
    """The scores of each benchmark, of the paper's mean and of the seen tasks."""
    unseen = {name: scores for (split, name), scores in tasks.items() if split == "unseen"}
    seen = {name: tasks["heldout", name] for split, name in sorted(tasks) if split == "heldout"}
    scored, by_column = [], {}
    for name in in_paper_order(sorted(unseen)):
        benchmark, scores = benchmark_named(name, about.get("benchmarks")), unseen[name]
        found, metric = scores.compute(), benchmark.metric
        ends = with_ends("value", found.score)
        count, unit = len(scores.by_index), scores.unit
        scored.append(
            Score(name, benchmark.column, n=count, unit=unit, rule=metric.rule, parts=found.parts, **ends)
        )
        by_column[benchmark.column] = scores
    mean = None
    if all(column in by_column for column in AVERAGED):
        rule = f"mean of {', '.join(AVERAGED)}; bootstrap interval over instances within benchmarks"
        mean = _mean_score([by_column[column] for column in AVERAGED], MEAN_TITLE, rule, {})
    losses = {name: loss for name in seen if isinstance(loss := tasks.get((LOSS, name)), LossScores)}
    return Results(
        about,
        tuple(scored),
        mean,
        _seen_score(seen) if seen else None,
        loss=_loss_score(losses) if losses and len(losses) == len(seen) else None,
    )


def _seen_score(tasks: Mapping[str, InstanceScores]) -> Score:
    """`most_frequent` is per cent right of always giving the answer that is most frequent in a task's very group: what
    chance can reach.
    """
    parts: Parts = {}
    for name, scores in tasks.items():
        targets = Counter(normalise_answer(each.target) for each in scores.predictions.values())
        ((_, frequent),) = targets.most_common(1)
        count = targets.total()
        parts[name] = {
            **with_ends("accuracy", scores.compute().score),
            "n": float(count),
            "most_frequent": 100 * frequent / count,
        }
    rule = (
        "mean over the seen tasks of exact match after normalisation; bootstrap interval over instances "
        "within tasks"
    )
    return _mean_score(list(tasks.values()), SEEN_TITLE, rule, parts)


def _loss_score(tasks: Mapping[str, LossScores]) -> Score:
    """Its parts are the tasks: loss per token, interval (absent of a single instance), instances, answer tokens."""
    parts: Parts = {}
    for name, scores in tasks.items():
        found, pairs = scores.compute().score, scores.pairs()
        ends = {"low": found.low, "high": found.high}
        parts[name] = {
            "loss": scores.value(list(scores.by_index)),
            **{end: value for end, value in ends.items() if value is not None},
            "n": float(len(pairs)),
            "tokens": float(pairs[:, 1].sum()),
        }
    mean = mean_loss(list(tasks.values()))
    rule = (
        "loss per answer token in nats, lower is better: within a task each token weighs the same, then the mean over "
        "the seen tasks; bootstrap interval over instances within tasks"
    )
    count = sum(len(each.by_index) for each in tasks.values())
    assert mean.value is not None
    return Score(LOSS_TITLE.lower(), LOSS_TITLE, mean.value, mean.low, mean.high, count, "nats", rule, parts)


def _mean_score(groups: Sequence[InstanceScores], column: str, rule: str, parts: Parts) -> Score:
    count = sum(len(each.by_index) for each in groups)
    ends = with_ends("value", mean_over([each.array() for each in groups]))
    return Score(column.lower(), column, n=count, unit="%", rule=rule, parts=parts, **ends)
