"""Which instances an evaluation answers: those of the data, those that benchmarks bring, and held-out ones."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixlora_cli.benchmarks.benchmark import Benchmark, label_set, references, require_reachable
from mixlora_cli.benchmarks.metrics import METRICS
from mixlora_cli.benchmarks.registry import BENCHMARKS, benchmark_named, choose, expand
from mixlora_cli.benchmarks.sources import described, open_benchmark, own_place, sourced
from mixlora_cli.config import DataConfig, EvalConfig
from mixlora_cli.data.loading import load_records, locate_files
from mixlora_cli.data.records import Record
from mixlora_cli.errors import UserError, cut

EvalSplit = Literal["unseen", "heldout"]


@dataclass(frozen=True)
class Chosen:
    """Instances of one file, and the folder of their pictures."""

    name: str
    """"unseen" or "heldout" of the data, or the benchmark that brings its own file."""
    split: EvalSplit
    records: Sequence[Record]
    images: Path | None
    counts: Mapping[str, int]
    """Instances of each benchmark or task before `eval.limit`."""
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    """Those that the instances belong to, by name; empty for held-out ones."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """A benchmark's own source: where, how many rows, how many of them are unusable, how many the whole split has."""


@dataclass(frozen=True)
class Answered:
    """An instance and what was made of it."""

    part: Chosen
    record: Record
    text: str
    loss: tuple[float, int] | None = None
    """`nll` and `tokens` of `Prediction`, of held-out instances; None where nobody can tell."""


Unanswered = Sequence[tuple[Chosen, Sequence[Record]]]
"""Records of each part that are to be answered."""


def choose_instances(config: EvalConfig) -> list[Chosen]:
    """What `eval.benchmarks`, `eval.sources`, `eval.seen` and `eval.limit` ask for.

    Raises UserError for unknown names, sources that are missing, wrong or partial, two benchmarks of one column, and
    questions for MME's rule that are not in pairs.
    """
    wanted = None if config.eval.benchmarks is None else expand(config.eval.benchmarks)
    own = sourced(wanted, config.eval.sources or {})
    rest = None if wanted is None else [name for name in wanted if name not in own]
    chosen = []
    if rest or (not own and not (config.eval.seen and (rest == [] or not _has_unseen(config.data)))):
        groups = grouped(load_records(config.data, "unseen"), benchmark_of)
        records = [record for name in choose(rest, list(groups)) for record in groups[name]]
        chosen.append(_of_data("unseen", records, config))
    chosen += [_of_source(name, config) for name in own]
    if config.eval.seen:
        chosen.append(_of_data("heldout", load_records(config.data, "heldout"), config))
    by_column: dict[str, str] = {}
    for benchmark in (each for part in chosen for each in part.benchmarks.values()):
        if other := by_column.get(benchmark.column):
            raise UserError(
                f"eval.benchmarks: {other} and {benchmark.name} are both the column {cut(benchmark.column)}; "
                "evaluate them apart, each with its own output_dir"
            )
        by_column[benchmark.column] = benchmark.name
    for part in chosen:
        check_pairs(part, part.records)
    return chosen


def _has_unseen(data: DataConfig) -> bool:
    return data.source != "json" or data.unseen is not None


def _of_data(split: EvalSplit, records: Sequence[Record], config: EvalConfig) -> Chosen:
    """Raises UserError where `answers` or `labels` of a record are not what scoring reads."""
    files = locate_files(config.data, split)
    counts = Counter(map(benchmark_of, records))
    benchmarks = {name: benchmark_named(name) for name in counts} if split == "unseen" else {}
    for record in records:
        try:
            benchmark = benchmarks.get(benchmark_of(record))
            references(record.extra, benchmark.metric if benchmark else None)
            label_set(record.extra)
        except ValueError as error:
            raise UserError(f"{files.source}, record {record.index}: {error}") from None
    sample = limited(records, config.eval.limit, config.seed)
    return Chosen(split, split, sample, files.pictures, dict(counts), benchmarks)


def _of_source(name: str, config: EvalConfig) -> Chosen:
    sources, on_error = config.eval.sources or {}, config.data.on_error
    found = open_benchmark(name, sources, on_error, config.eval.ocr_tokens)
    place, images = str(found.records), str(found.images)
    files = DataConfig(name=name, source="json", unseen=place, images=images, on_error=on_error)
    records = load_records(files, "unseen")
    benchmark = described(name, sources)
    about = {"source": found.source, "rows": found.rows, "left_out": found.rows - len(records)}
    if benchmark.origin is not None:
        about["split_rows"] = benchmark.origin.rows
    sample = limited(records, config.eval.limit, config.seed)
    return Chosen(name, "unseen", sample, found.images, {name: len(records)}, {name: benchmark}, about)


def check_pairs(part: Chosen, records: Sequence[Record]) -> None:
    """Raise UserError where a rule that pairs questions finds more or fewer about a picture in `part`'s `records`."""
    for name, group in grouped(records, benchmark_of).items():
        metric = part.benchmarks[name].metric if part.benchmarks else None
        if metric is None or not metric.aggregate.questions_per_image:
            continue
        questions = Counter((category_of(record), str(record.extra.get("image_id", ""))) for record in group)
        odd = [each for each in questions.items() if each[1] != metric.aggregate.questions_per_image]
        if odd:
            (subtask, image), count = odd[0]
            first = f"{cut(repr(image))} of subtask {cut(repr(subtask))} with {count}"
            raise UserError(
                f"{name}: {len(odd)} of {len(questions)} pictures have not two questions; "
                f"the first is {first}. {metric.name} pairs questions by image_id (on the hub question_id) within a "
                "subtask: check these fields, and whether the data is complete"
            )


def check_targets(part: Chosen, config: EvalConfig) -> None:
    """Raise UserError where no answer to one of `part`'s records can be right by its benchmark's rule."""
    for record in part.records if part.benchmarks else ():
        metric = part.benchmarks[benchmark_of(record)].metric
        try:
            require_reachable(record.conversation[-1].text, label_set(record.extra), metric)
        except ValueError as error:
            raise UserError(f"{_place_of(part, record, config)}: {error}") from None


def _place_of(part: Chosen, record: Record, config: EvalConfig) -> str:
    """Where the user finds a record: file and line, or file and number."""
    if part.name in BENCHMARKS:
        return f"{part.about['source']}, row {record.id}"
    if part.name in (sources := config.eval.sources or {}):
        return own_place(sources[part.name], record.index)
    return f"{locate_files(config.data, 'unseen').source}, record {record.index}"


def declared(chosen: Sequence[Chosen]) -> dict[str, dict[str, str]]:
    """What scoring has to know of the user's own benchmarks: see `benchmark_named`."""
    scorers = {metric: name for name, metric in METRICS.items()}
    own = (each for part in chosen if part.about for each in part.benchmarks.values())
    return {
        each.name: {"column": each.column, "scorer": scorers[each.metric]}
        for each in own
        if each.name not in BENCHMARKS
    }


def notes(chosen: Sequence[Chosen]) -> list[str]:
    """What somebody who reads the numbers should know: sources with fewer rows than the split, rows left out."""
    return source_notes({part.name: part.about for part in chosen})


def source_notes(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each source with fewer rows than the whole split, and for each with rows left out.

    `sources`: by benchmark, {"source", "rows", "left_out", "split_rows"}, as `results.json` has them under
    `about.sources`; each key may be absent.
    """
    lines = []
    for name, about in sources.items():
        rows, whole = about.get("rows"), about.get("split_rows")
        if rows is not None and whole is not None and rows != whole:
            lines.append(
                f"{name}: {about.get('source', 'the source')} has {rows} rows, the whole split {whole}"
            )
        if left_out := about.get("left_out"):
            lines.append(
                f"{name}: {left_out} of {rows} rows left out (no agreed label, or no usable picture)"
            )
    return lines


def benchmark_of(record: Record) -> str:
    """Name of the benchmark that a record belongs to: its `benchmark`, else its task."""
    return str(record.extra.get("benchmark") or record.task)


def category_of(record: Record) -> str:
    """MME subtask or POPE category, "" where there is none."""
    return str(record.extra.get("category") or "")


def grouped(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Records by key, both in the order they come."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)


def stratified(records: Sequence[Record], limit: int, seed: int) -> list[Record]:
    """At most `limit` of one benchmark's records, in their order in the data; each stratum keeps its share.

    Units are the questions that share an `image_id`, else single records. They are shuffled within strata and taken
    in the order of their relative rank there, (position + 1/2) / size, after one of each stratum. One unit is taken in
    any case, even if it is larger than `limit`. The same arguments give the same sample.
    """
    if len(records) <= limit:
        return list(records)
    generator = random.Random(f"{seed}:{benchmark_of(records[0])}")
    strata: dict[tuple[str, ...], list[list[Record]]] = defaultdict(list)
    for unit in grouped(records, _unit_of).values():
        strata[_stratum(unit)].append(unit)
    ranked: list[tuple[float, float, list[Record]]] = []
    for units in strata.values():
        generator.shuffle(units)
        for position, unit in enumerate(units):
            rank = (position + 0.5) / len(units) if position else 0.0
            ranked.append((rank, generator.random(), unit))
    chosen: list[Record] = []
    for _, _, unit in sorted(ranked, key=lambda entry: entry[:2]):
        if not chosen or len(chosen) + len(unit) <= limit:
            chosen += unit
    return sorted(chosen, key=lambda record: record.index)


def _unit_of(record: Record) -> str:
    image = record.extra.get("image_id")
    return f"record {record.index}" if image is None else f"image {image}"


def _stratum(unit: Sequence[Record]) -> tuple[str, ...]:
    """The unit's categories, and the answer of a single instance where it is one of a closed set of labels."""
    categories = sorted({category_of(record) for record in unit} - {""})
    labelled = len(unit) == 1 and unit[0].extra.get("labels")
    return (*categories, unit[0].conversation[-1].text) if labelled else tuple(categories)


def limited(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """`stratified` within each benchmark; all records without a limit."""
    if limit is None:
        return list(records)
    groups = grouped(records, benchmark_of)
    return [record for group in groups.values() for record in stratified(group, limit, seed)]
