"""`mixlora eval`: answer the unseen tasks (and held-out instances of the seen ones), score, print, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.benchmarks.benchmark import label_set, references
from mixlora_cli.config import EvalConfig, GenerationConfig
from mixlora_cli.data.encode import Item, encode_prompts
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import prompt_digest, records_digest, relative_image
from mixlora_cli.evaluation.instances import (
    Chosen,
    benchmark_of,
    category_of,
    check_pairs,
    check_targets,
    choose_instances,
    declared,
    notes,
)
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
from mixlora_cli.launch import ProcessGroup, joined
from mixlora_cli.models.definitions import TaskRouting
from mixlora_cli.models.features import has_fixed_features, pictures_from
from mixlora_cli.models.generate import Generator, batches, longest_first
from mixlora_cli.models.load import LoadedModel, build_base
from mixlora_cli.models.session import Run, Session, find_run
from mixlora_cli.output import alone_in
from mixlora_cli.paths import require_cache
from mixlora_cli.progress import counting, say
from mixlora_cli.report.run import finish
from mixlora_cli.training.run_folder import versions


@dataclass(frozen=True)
class Work:
    """One file's instances: the records, by `Record.index`, and their encoded prompts."""

    chosen: Chosen
    records: Mapping[int, Record]
    items: Sequence[Item]

    @property
    def encoded(self) -> list[Record]:
        """Records whose prompts could be encoded."""
        return [self.records[item.index] for item in self.items]

    def key(self, item: Item) -> Key:
        """That of the prediction which answers the item."""
        return self.chosen.split, benchmark_of(self.records[item.index]), item.index


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
                say(f"predictions and results are in {folder}", console)
            team.wait()
            if not team.is_main:
                return read_results(folder)
        return finish(evaluation, results, config.judge, config.seed)


def _answer(config: EvalConfig, folder: Path, team: ProcessGroup, console: Console) -> None:
    """Have every instance of this process's share answered in a predictions file."""
    if config.eval.cache_features:
        require_cache()
    if config.run is not None and config.adapter.name == "none":
        raise UserError(
            f"adapter=none is the untuned base, run={config.run} a trained adapter: give one of the two"
        )
    run = find_run(config.run, config.model)
    with team.main_process_first():
        chosen = choose_instances(config)
    for part in chosen:
        check_targets(part, config)
    for note in notes(chosen):
        say(note, console)
    routing = run.task_routing(config.data, (record.task for part in chosen for record in part.records))
    with team.main_process_first():
        base = build_base(run.model, run.dtype)
    work = [_encoded(part, base, config) for part in chosen]
    for each in work:  # again: encoding may have left out one of two
        check_pairs(each.chosen, each.encoded)
    header = _header(config, run, base, work, routing)
    with open_share(folder / FILE_NAME, header, team, lambda text: say(text, console)) as log:
        if len(log.done) == header.count:
            return
        session = Session(base, run.dtype, config.eval.cache_features, run.adapter, routing)
        generator = Generator(
            session.model,
            base,
            session.features,
            config.eval.max_new_tokens,
            embeddings=session.embeddings,
            routing_seed=config.seed if run.selects_by == "chance" else None,
        )
        with session.products():
            try:
                _answer_share(work, generator, log, config.eval, team, console)
            except KeyboardInterrupt:
                say(f"stopped at {len(log.done)}/{header.count}: the same command continues", console)
                raise


def _encoded(part: Chosen, base: LoadedModel, config: EvalConfig) -> Work:
    encoded = encode_prompts(part.records, base.chat, config.data.on_error, source=f"the {part.name} data")
    return Work(part, {record.index: record for record in part.records}, encoded.items)


def _header(
    config: EvalConfig, run: Run, base: LoadedModel, work: Sequence[Work], routing: TaskRouting | None
) -> Header:
    digests = (f"{each.chosen.name}:{records_digest(each.encoded, each.chosen.images)}" for each in work)
    fingerprint = {
        "model": base.fingerprint,
        "number format": str(run.dtype).removeprefix("torch."),
        "adapter": run.digest,
        "data": " ".join(digests),
        "prompt": prompt_digest(base),
        "pictures": pictures_from(config.eval.cache_features and has_fixed_features(base)),
        "decoding": f"greedy, at most {config.eval.max_new_tokens} tokens",
    }
    if routing is not None:
        fingerprint["task definitions"] = routing.fingerprint(base)
    if run.selects_by == "chance":
        fingerprint["draws"] = f"by instance, seed {config.seed}"
    return Header(fingerprint, sum(len(each.items) for each in work), _about(config, run, base, work))


def _about(config: EvalConfig, run: Run, base: LoadedModel, work: Sequence[Work]) -> Mapping[str, Any]:
    chosen = [each.chosen for each in work]
    answered = Counter(each.key(item)[:2] for each in work for item in each.items)
    available: dict[tuple[str, str], int] = {
        (part.split, name): count for part in chosen for name, count in part.counts.items()
    }
    return {
        "label": run.label,
        "model": base.name,
        "run": None if run.root is None else str(run.root),
        "limit": config.eval.limit,
        "seed": config.seed,
        "sample": {task[1]: {"answered": n, "of": available[task]} for task, n in answered.items()},
        "images": {name: str(part.images) for part in chosen for name in part.counts if part.images},
        "sources": {part.name: dict(part.about) for part in chosen if part.about},
        "benchmarks": declared(chosen),
        "versions": versions(),
    }


def _answer_share(
    work: Sequence[Work],
    generator: Generator,
    log: PredictionLog,
    settings: GenerationConfig,
    team: ProcessGroup,
    console: Console,
) -> None:
    """Answer this process's share of what no file has yet, batch by batch, each on the disk before the next begins."""
    missing = [(part, [item for item in part.items if part.key(item) not in log.done]) for part in work]
    shares = [(part, team.share(longest_first(items))) for part, items in missing]
    done, whose = (len(log.done), "") if team.size == 1 else (0, f"first of {team.size} processes: ")
    total = done + sum(len(items) for _, items in shares)
    with counting(
        "answering", total, done, console, lines=10, unit="instances", finished=f"{whose}answered"
    ) as advance:
        for part, items in shares:
            for batch in batches(items, settings.batch_size):
                answers = generator(batch)
                log.append(
                    [_prediction(part, item, answer) for item, answer in zip(batch, answers, strict=True)]
                )
                advance(len(batch))


def _prediction(work: Work, item: Item, answer: str) -> Prediction:
    record = work.records[item.index]
    *_, question, target = record.conversation
    return Prediction(
        split=work.chosen.split,
        index=record.index,
        benchmark=benchmark_of(record),
        id=record.id,
        question=question.text.replace(IMAGE_MARKER, "").strip(),
        target=target.text.strip(),
        prediction=answer,
        category=category_of(record),
        image_id=str(record.extra.get("image_id", "")),
        answers=references(record.extra),
        labels=label_set(record.extra),
        image=relative_image(record, work.chosen.images),
    )
