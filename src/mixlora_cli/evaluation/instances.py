"""Which instances an evaluation answers: those of the data, those that benchmarks bring, and held-out ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.config import DataConfig, EvalConfig
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, benchmark_named, choose, expand
from mixlora_cli.evaluation.metrics import METRICS, MME
from mixlora_cli.evaluation.references import label_set, references, require_reachable
from mixlora_cli.evaluation.sampling import benchmark_of, category_of, grouped, limited
from mixlora_cli.evaluation.source_notes import source_notes
from mixlora_cli.evaluation.sources.find import described, open_benchmark, sourced
from mixlora_cli.evaluation.sources.own import place_in

EvalSplit = Literal["unseen", "heldout"]


@dataclass(frozen=True)
class Chosen:
    """Instances of one file, and the folder of their pictures."""

    name: str
    """"unseen" or "heldout" of the data, or the benchmark that brings its own file."""
    split: EvalSplit
    records: Sequence[Record]
    images: Path | None
    about: Mapping[str, Any] = field(default_factory=dict)
    """A benchmark's own source: where, how many rows, how many of them are unusable, how many the whole split has."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Instances of each benchmark or task before `eval.limit`."""


def choose_instances(config: EvalConfig) -> list[Chosen]:
    """What `eval.benchmarks`, `eval.sources`, `eval.seen` and `eval.limit` ask for.

    Raises UserError for unknown names, sources that are missing, wrong or partial, two benchmarks of one column, and
    questions for MME's rule that are not in pairs.
    """
    wanted = None if config.eval.benchmarks is None else expand(config.eval.benchmarks)
    sources = config.eval.sources or {}
    own = sourced(wanted, sources)
    chosen = _of_data(config, wanted, own)
    chosen += [_of_source(name, config, sources) for name in own]
    if config.eval.seen:
        chosen.append(_limited("heldout", "heldout", load_records(config.data, "heldout"), config))
    _check_columns([name for part in chosen if part.split == "unseen" for name in part.counts], sources)
    for part in chosen:
        check_pairs(part, part.records, sources)
    return chosen


def _of_data(config: EvalConfig, wanted: list[str] | None, own: Sequence[str]) -> list[Chosen]:
    data = config.data
    rest = None if wanted is None else [name for name in wanted if name not in own]
    if own and not rest:
        return []
    if config.eval.seen and (rest == [] or (data.source == "json" and data.unseen is None)):
        return []
    groups = grouped(load_records(data, "unseen"), benchmark_of)
    records = [record for name in choose(rest, list(groups)) for record in groups[name]]
    return [_limited("unseen", "unseen", records, config)]


def _limited(name: str, split: EvalSplit, records: Sequence[Record], config: EvalConfig) -> Chosen:
    files = locate_files(config.data, split)
    for record in records:
        _check_answers(record, split, str(files.annotations))
    counts = {key: len(group) for key, group in grouped(records, benchmark_of).items()}
    return Chosen(name, split, limited(records, config.eval.limit, config.seed), files.images, counts=counts)


def _check_answers(record: Record, split: EvalSplit, source: str) -> None:
    """Raise UserError where `answers` or `labels` are not what scoring reads."""
    try:
        references(record.extra, benchmark_named(benchmark_of(record)).metric if split == "unseen" else None)
        label_set(record.extra)
    except ValueError as error:
        raise UserError(f"{source}, record {record.index}: {error}") from None


def _of_source(name: str, config: EvalConfig, sources: Mapping[str, str]) -> Chosen:
    found = open_benchmark(name, sources, config.data.on_error, config.eval.ocr_tokens)
    files = DataConfig(
        name=name,
        source="json",
        unseen=str(found.records),
        images=str(found.images),
        on_error=config.data.on_error,
    )
    records = load_records(files, "unseen")
    origin = BENCHMARKS[name].origin if name in BENCHMARKS else None
    about = {"source": found.source, "rows": found.rows, "left_out": found.rows - len(records)}
    if origin is not None:
        about["split_rows"] = origin.rows
    sample = limited(records, config.eval.limit, config.seed)
    return Chosen(name, "unseen", sample, found.images, about, {name: len(records)})


def _check_columns(names: Sequence[str], sources: Mapping[str, str]) -> None:
    by_column: dict[str, str] = {}
    for name in names:
        column = _row(name, sources).column
        if column in by_column:
            raise UserError(
                f"eval.benchmarks: {by_column[column]} and {name} are both the column {cut(column)}; "
                "evaluate them apart, each with its own output_dir"
            )
        by_column[column] = name


def check_pairs(part: Chosen, records: Sequence[Record], sources: Mapping[str, str]) -> None:
    """Raise UserError where MME's rule is to score a picture with more or fewer than two of `part`'s `records`."""
    if part.split != "unseen":
        return
    for name, group in grouped(records, benchmark_of).items():
        if _row(name, sources).metric is not MME:
            continue
        questions = Counter((category_of(record), str(record.extra.get("image_id", ""))) for record in group)
        odd = [(key, count) for key, count in questions.items() if count != 2]
        if odd:
            (subtask, image), count = odd[0]
            first = f"{cut(repr(image))} of subtask {cut(repr(subtask))} with {count}"
            raise UserError(
                f"{name}: {len(odd)} of {len(questions)} pictures have not two questions; "
                f"the first is {first}. MME pairs questions by image_id (on the hub question_id) within a "
                "subtask: check these fields, and whether the data is complete"
            )


def check_targets(part: Chosen, config: EvalConfig) -> None:
    """Raise UserError where no answer to one of `part`'s records can be right by its benchmark's rule."""
    if part.split != "unseen":
        return
    for name, records in grouped(part.records, benchmark_of).items():
        metric = _row(name, config.eval.sources or {}).metric
        for record in records:
            try:
                require_reachable(record.conversation[-1].text, label_set(record.extra), metric)
            except ValueError as error:
                raise UserError(f"{_place_of(part, record, config)}: {error}") from None


def _place_of(part: Chosen, record: Record, config: EvalConfig) -> str:
    """Where the user finds a record: file and line, or file and number."""
    if part.name in BENCHMARKS:
        return f"{part.about['source']}, row {record.id}"
    if part.name in (sources := config.eval.sources or {}):
        return place_in(Path(sources[part.name]).expanduser(), record.index)
    return f"{locate_files(config.data, 'unseen').annotations}, record {record.index}"


def _row(name: str, sources: Mapping[str, str]) -> Benchmark:
    return described(name, sources) if name in sources else benchmark_named(name)


def declared(chosen: Sequence[Chosen], sources: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What scoring has to know of benchmarks that the table does not have: see `benchmark_named`."""
    names = [part.name for part in chosen if part.name in sources and part.name not in BENCHMARKS]
    return {name: _as_declared(described(name, sources)) for name in names}


def _as_declared(benchmark: Benchmark) -> dict[str, str]:
    scorer = next(name for name, metric in METRICS.items() if metric is benchmark.metric)
    return {"column": benchmark.column, "scorer": scorer}


def notes(chosen: Sequence[Chosen]) -> list[str]:
    """What somebody who reads the numbers should know: sources with fewer rows than the split, rows left out."""
    return source_notes({part.name: part.about for part in chosen})
