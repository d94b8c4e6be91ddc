"""`mixlora eval`: answer the unseen tasks (and held-out instances of the seen ones), score, print, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from mixlora_cli.benchmarks.benchmark import label_set, references
from mixlora_cli.config import EvalConfig
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import records_digest, relative_image
from mixlora_cli.evaluation.instances import (
    Answered,
    Chosen,
    Unanswered,
    benchmark_of,
    category_of,
    check_pairs,
    check_targets,
    choose_instances,
    declared,
    notes,
)
from mixlora_cli.evaluation.local import LocalModel
from mixlora_cli.evaluation.predictions import (
    FILE_NAME,
    Header,
    Key,
    Prediction,
    PredictionLog,
    open_share,
    take_in_rank_files,
)
from mixlora_cli.evaluation.results import Results, print_results, read_results
from mixlora_cli.evaluation.scoring import read_evaluation, score_evaluation
from mixlora_cli.evaluation.server import ServerModel
from mixlora_cli.launch import ProcessGroup, joined
from mixlora_cli.models.session import Run, find_run
from mixlora_cli.output import alone_in
from mixlora_cli.paths import require_cache
from mixlora_cli.progress import counting, say
from mixlora_cli.report.run import finish
from mixlora_cli.training.run_folder import versions


class Answerer(Protocol):
    """What answers: a model here, or a server."""

    label: str
    """Its row's name in tables."""
    model: str
    """Name of the base, or of the server's model."""
    no_losses: str
    """Why it gives no losses of held-out instances; "" where it does."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What its answers depend on beside the questions, each part named."""

    def usable(self, part: Chosen) -> list[Record]:
        """Records that it can be asked. Raises UserError where one cannot and `data.on_error` is "stop"."""

    def answers(self, missing: Unanswered, team: ProcessGroup) -> Iterator[list[Answered]]:
        """This process's share of the records, a few at a time.

        Raises UserError when it cannot go on; what it gave until then stays good.
        """


def evaluate(config: EvalConfig) -> Results:
    """Evaluate as `config` says; everything lands in `config.output_dir`. Continues what an earlier call left
    unfinished.

    In one of several processes that were started together it answers its share; all return the same results.

    Raises UserError for a run folder, benchmark or data that cannot be evaluated, before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "evaluation"):
        with joined() as team:
            console = Console(stderr=True, quiet=not team.is_main)
            _answer(config, folder, team, console)
            team.wait()
            if team.is_main:
                take_in_rank_files(folder / FILE_NAME)
                evaluation = read_evaluation(folder)
                results = score_evaluation(evaluation)
                print_results([(results.label, results)])
                empty = sum(not prediction.prediction for prediction in evaluation.predictions)
                if empty and config.eval.server:
                    say(
                        f"{empty} of {len(evaluation.predictions)} answers of the server are empty: refused, or its "
                        f"model spent eval.max_new_tokens={config.eval.max_new_tokens} before its first word",
                        console,
                    )
                say(f"predictions and results are in {folder}", console)
            team.wait()
            if not team.is_main:
                return read_results(folder)
        return finish(evaluation, results, config.judge, config.seed)


def _answer(config: EvalConfig, folder: Path, team: ProcessGroup, console: Console) -> None:
    """Have every instance of this process's share answered in a predictions file."""
    if config.eval.cache_features and config.eval.server is None:
        require_cache()
    if config.run is not None and config.adapter.name == "none":
        raise UserError(
            f"adapter=none is the untuned base, run={config.run} a trained adapter: give one of the two"
        )
    server, alone = config.eval.server, config.run is None
    run = find_run(config.run, config.model, loads=server is None)
    with team.main_process_first():
        chosen = choose_instances(config)
    for part in chosen:
        check_targets(part, config)
    for note in notes(chosen):
        say(note, console)
    routing = run.task_routing(config.data, (record.task for part in chosen for record in part.records))
    answerer: Answerer
    with team.main_process_first():
        if server is None:
            answerer = LocalModel(config, run, routing)
        else:
            answerer = ServerModel(config, None if alone else run, routing)
    asked = [replace(part, records=answerer.usable(part)) for part in chosen]
    for part in asked:  # again: encoding may have left out one of two
        check_pairs(part, part.records)
    if answerer.no_losses and any(part.split == "heldout" for part in asked):
        say(f"held-out instances get no loss: {answerer.no_losses}", console)
    header = _header(config, run, answerer, asked)
    with open_share(folder / FILE_NAME, header, team, lambda text: say(text, console)) as log:
        if len(log.done) == header.count:
            return
        try:
            _answer_share(asked, answerer, log, team, console)
        except KeyboardInterrupt:
            say(f"stopped at {len(log.done)}/{header.count}: the same command continues", console)
            raise


def _header(config: EvalConfig, run: Run, answerer: Answerer, asked: Sequence[Chosen]) -> Header:
    digests = (f"{part.name}:{records_digest(part.records, part.images)}" for part in asked)
    fingerprint = {"data": " ".join(digests), **answerer.fingerprint}
    return Header(fingerprint, sum(len(part.records) for part in asked), _about(config, run, answerer, asked))


def _about(config: EvalConfig, run: Run, answerer: Answerer, asked: Sequence[Chosen]) -> Mapping[str, Any]:
    answered = Counter(_key(part, record)[:2] for part in asked for record in part.records)
    available: dict[tuple[str, str], int] = {
        (part.split, name): count for part in asked for name, count in part.counts.items()
    }
    return {
        "label": answerer.label,
        "model": answerer.model,
        "run": None if run.root is None else str(run.root),
        "limit": config.eval.limit,
        "seed": config.seed,
        "sample": {task[1]: {"answered": n, "of": available[task]} for task, n in answered.items()},
        "images": {name: str(part.images) for part in asked for name in part.counts if part.images},
        "sources": {part.name: dict(part.about) for part in asked if part.about},
        "benchmarks": declared(asked),
        "versions": versions(),
    }


def _key(part: Chosen, record: Record) -> Key:
    """That of the prediction which answers the record."""
    return part.split, benchmark_of(record), record.index


def _answer_share(
    asked: Sequence[Chosen], answerer: Answerer, log: PredictionLog, team: ProcessGroup, console: Console
) -> None:
    """Answer this process's share of what no file has yet; what came is on the disk before the next is asked for."""
    missing: Unanswered = [
        (part, [record for record in part.records if _key(part, record) not in log.done]) for part in asked
    ]
    done, whose = (len(log.done), "") if team.size == 1 else (0, f"first of {team.size} processes: ")
    total = done + sum(len(team.share(records)) for _, records in missing)
    with counting(
        "answering", total, done, console, lines=10, unit="instances", finished=f"{whose}answered"
    ) as advance:
        for answered in answerer.answers(missing, team):
            log.append(list(map(_prediction, answered)))
            advance(len(answered))


def _prediction(answered: Answered) -> Prediction:
    part, record = answered.part, answered.record
    nll, tokens = answered.loss or (None, None)
    *_, question, target = record.conversation
    return Prediction(
        split=part.split,
        index=record.index,
        benchmark=benchmark_of(record),
        id=record.id,
        question=question.text.replace(IMAGE_MARKER, "").strip(),
        target=target.text.strip(),
        prediction=answered.text,
        category=category_of(record),
        image_id=str(record.extra.get("image_id", "")),
        answers=references(record.extra),
        labels=label_set(record.extra),
        image=relative_image(record, part.images),
        nll=nll,
        tokens=tokens,
    )
