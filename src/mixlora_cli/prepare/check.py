"""`mixlora check`: texts, pictures, definitions, leakage; a table, a report file and an exit code."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.config import CheckConfig, DataConfig, ModelConfig
from mixlora_cli.data.chat import Chat
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.embedded import picture_store
from mixlora_cli.data.encode import encode, verify_labels
from mixlora_cli.data.images import check_images, stamp
from mixlora_cli.data.loading import DataFiles, Split, locate_files, with_ranges
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.records import Record, parse_record, task_of
from mixlora_cli.data.sources import Raw, Rows, read_raws
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.instances import Chosen, notes
from mixlora_cli.output import require_writable
from mixlora_cli.paths import cache_root
from mixlora_cli.prepare.leakage import Found, Leak, Print, TrainingSide, compare, open_benchmarks, prints_of
from mixlora_cli.progress import say, with_bar
from mixlora_cli.store import write_text
from mixlora_cli.tables import Table, show

FILE_NAME = "check.json"
CHUNK = 1000
_KEPT = 10  # times as many examples in the file as on the screen
_VERIFIED_PER_TASK = 2  # label masks of each task in each chunk


class Remark(Enum):
    """What a training puts up with, and its user should know; the value is the text that the user reads."""

    DUPLICATE = "duplicate record (same picture, same turns)"
    OVER_LENGTH = "over-length: the end of its last answer is cut"
    UNDEFINED_TASK = (
        "task without definition (refused by routing=task, which data.metadata makes the default)"
    )


class Mistake(Enum):
    """Problems that only this check names."""

    LABELS = "wrong label mask"


Sort = Kind | Mistake | Remark


@dataclass
class SplitReport:
    """What was found in the records of one split."""

    split: str
    source: str
    num_examples: int
    all_found: dict[Sort, Found] = field(
        default_factory=lambda: {sort: Found() for sort in (*Kind, *Mistake, *Remark)}
    )
    records: int = 0
    """Looked at; records of other tasks than `data.tasks` do not count."""
    good: int = 0
    """Without a problem."""
    text_only: int = 0
    pictures: int = 0
    """Different files."""
    pictures_per_record: dict[int, int] = field(default_factory=dict)
    """Good records with so many pictures, by that number."""
    longest: int = 0
    """Tokens of the longest record, before it is cut; 0 where lengths are not checked."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Good records of each task."""
    shared_ids: int = 0
    """Records whose id an earlier record has; allowed."""
    texts_per_second: float = 0.0

    def add(self, sort: Sort, example: str) -> None:
        """Count one more finding; they come in the order of the records."""
        self.all_found[sort].add(example, self.num_examples)

    @property
    def found(self) -> dict[Sort, Found]:
        """The sorts of which something was found, problems first."""
        return {sort: found for sort, found in self.all_found.items() if found.count}

    @property
    def num_problems(self) -> int:
        """Findings that stop a training or cost it records."""
        return sum(found.count for sort, found in self.found.items() if not isinstance(sort, Remark))

    @property
    def num_remarks(self) -> int:
        return sum(found.count for sort, found in self.found.items() if isinstance(sort, Remark))


@dataclass
class Report:
    """Everything that one check found."""

    splits: list[SplitReport]
    leaks: list[Leak]
    left_out: list[str]
    """What was not looked at, and why."""
    strict: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 1: problems; with `strict` also remarks and leaks. (2 means that the check could not be made.)"""
        remarks = sum(split.num_remarks for split in self.splits) + sum(leak.total for leak in self.leaks)
        return int(any(split.num_problems for split in self.splits) or (self.strict and remarks > 0))


def check(config: CheckConfig) -> Report:
    """Check, print and write the report.

    Raises:
        UserError: a file, folder or model that the configuration names is not there.
        SystemExit: with code 1 where there are problems (with `check.strict` also for remarks).
    """
    folder = Path(config.output_dir).expanduser()
    require_writable(folder)
    report = run_check(config)
    path = folder / FILE_NAME
    write_text(path, json.dumps(_as_json(report), indent=1, ensure_ascii=False) + "\n")
    _print(report, path, config.check.examples)
    if report.exit_code:
        raise SystemExit(report.exit_code)
    return report


def run_check(config: CheckConfig) -> Report:
    """Look at every record of every split that the configuration names."""
    data, options = config.data, config.check
    if data.streaming:
        raise UserError("data.streaming=true: a check holds all records at once; give data.streaming=false")
    benchmarks = open_benchmarks(config)  # first: what is wrong with them is said before the long part
    workers = options.workers or min(8, os.cpu_count() or 1)
    located = {split: locate_files(data, split) for split in _configured_splits(data)}
    side = _chat(config.model) if options.lengths else None
    checked = {split: _check_split(split, files, config, side, workers) for split, files in located.items()}
    reports = [report for report, _ in checked.values()]
    left_out = [] if options.lengths else ["lengths and label masks (check.lengths=false)"]
    left_out += [] if options.images else ["the inside of pictures (check.images=false)"]
    left_out += _check_definitions(data, reports)
    leaks: list[Leak] = []
    if options.leakage and "train" in checked and (len(checked) > 1 or benchmarks):
        good = {split: (records, located[split].pictures) for split, (_, records) in checked.items()}
        leaks = _leaks(good, reports[0], benchmarks, config, workers)
        left_out += notes(benchmarks)
    elif not options.leakage:
        left_out.append("leakage (check.leakage=false)")
    else:
        left_out.append("leakage (it needs data.train, and data.heldout, data.unseen or check.benchmarks)")
    return Report(reports, leaks, left_out, options.strict)


def _configured_splits(data: DataConfig) -> list[Split]:
    if data.is_built_in:
        return ["train", "heldout", "unseen"]
    files: dict[Split, bool] = {
        "train": data.source == "vision_flan" or data.train is not None,
        "heldout": data.heldout is not None,
        "unseen": data.unseen is not None,
    }
    return [split for split, there in files.items() if there]


def _chat(model: ModelConfig) -> Chat:
    from mixlora_cli.models.load import build_chat

    try:
        return build_chat(model)
    except UserError as error:
        raise UserError(f"{error}; check.lengths=false goes without") from error


@dataclass(frozen=True)
class Rules:
    """What every record is held against."""

    images: Path | None
    """Picture folder of the split."""
    max_length: int
    tasks: frozenset[str] | None = None
    """Only these; None = all."""
    text_side: Chat | None = None
    """For lengths and label masks; None leaves them out."""
    task: str | None = None
    """Of every record; see `data.records.task_of`."""
    task_key: str | None = None


@dataclass
class ChunkResult:
    """What came of one stretch of records."""

    seen: int = 0
    found: list[tuple[int, Sort, str]] = field(default_factory=list)
    """Index, sort and detail of each finding."""
    good: list[Record] = field(default_factory=list)
    longest: int = 0
    """Tokens of the longest record."""


def _check_split(
    split: Split, files: DataFiles, config: CheckConfig, side: Chat | None, workers: int
) -> tuple[SplitReport, list[Record]]:
    """The report, and the good records."""
    data, options = config.data, config.check
    tasks = None if data.tasks is None or split == "unseen" else frozenset(data.tasks)
    good: list[Record] = []
    began = time.perf_counter()
    results: list[ChunkResult] = []
    starts: list[int] = []
    read = 0
    for part in files.parts:
        raws, problems = read_raws(part.place)
        starts.append(read)
        found: list[tuple[int, Sort, str]] = [
            (read + each.index, each.kind, each.detail) for each in problems
        ]
        results.append(ChunkResult(len(problems), found))
        rules = Rules(files.images, data.max_length, tasks, side, part.task, data.task_key)
        at_once = raws.at_once if isinstance(raws, Rows) else CHUNK
        checked = check_texts(((read + number, raw) for number, raw in raws), rules, workers, at_once)
        results += with_bar(checked, f"checking the texts of {split}", total=-(-len(raws) // at_once))
        read += len(raws) + len(problems)
    seconds = time.perf_counter() - began
    source = files.source if len(starts) == 1 else with_ranges(files.parts, starts)
    report = SplitReport(split, source, _KEPT * options.examples)
    for result in results:
        report.records += result.seen
        report.longest = max(report.longest, result.longest)
        good += result.good
        for index, sort, detail in result.found:
            report.add(sort, f"record {index}: {detail}")
    report.texts_per_second = report.records / max(seconds, 1e-9)
    if not report.records:
        raise UserError(f"{source}: no record to check; expected at least one of data.tasks={data.tasks}")
    if options.images:
        bad = check_images((path for each in good for path in each.files), files.pictures, cache_root())
        for record in good:
            for path in [path for path in record.files if path in bad][:1]:
                report.add(bad[path].kind, f"record {record.index}: {bad[path].detail}")
        good = [record for record in good if bad.keys().isdisjoint(record.files)]
    first: dict[tuple[tuple[Path, ...], tuple[str, ...]], int] = {}
    for record in good:
        turns = tuple(turn.text.replace(IMAGE_MARKER, "").strip() for turn in record.conversation)
        earlier = first.setdefault((record.files, turns), record.index)
        if earlier != record.index:
            report.add(Remark.DUPLICATE, f"record {record.index}: as record {earlier}")
    report.good = len(good)
    report.shared_ids = len(good) - len({str(each.extra.get("source_id", each.id)) for each in good})
    report.tasks = dict(sorted(Counter(record.task for record in good).items()))
    report.text_only = sum(not record.images for record in good)
    report.pictures = len({path for record in good for path in record.files})
    report.pictures_per_record = dict(sorted(Counter(len(record.images) for record in good).items()))
    return report, good


def check_texts(
    raws: Iterable[Raw], rules: Rules, workers: int, at_once: int = CHUNK
) -> Iterator[ChunkResult]:
    """Results of all records, stretch by stretch in the order of the records, by parallel processes."""
    rows = iter(raws)
    chunks = iter(lambda: list(islice(rows, at_once)), [])
    if workers == 1:
        yield from (check_chunk(chunk, rules) for chunk in chunks)
        return
    if rules.images is not None:
        stamp(rules.images / "x")  # opens an archive here, so that forked workers need not read its directory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    running: deque[Future[ChunkResult]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_Worker.begin, initargs=(rules,)) as pool:
        for chunk in chunks:
            running.append(pool.submit(_Worker.check, chunk))
            if len(running) >= 2 * workers:  # no more is read ahead
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


class _Worker:
    """The rules of a worker process, which are sent to it once and not with every chunk."""

    rules: Rules

    @classmethod
    def begin(cls, rules: Rules) -> None:
        cls.rules = rules

    @classmethod
    def check(cls, chunk: Sequence[Raw]) -> ChunkResult:
        return check_chunk(chunk, cls.rules)


def check_chunk(chunk: Sequence[Raw], rules: Rules) -> ChunkResult:
    """Check some records' fields, turns, picture paths, lengths and the first label masks of each task.

    Records of other tasks than `rules.tasks` are passed over.
    """
    result = ChunkResult()
    verified: Counter[str] = Counter()
    for index, raw in chunk:
        try:
            named = rules.task, rules.task_key
            if rules.tasks is not None and task_of(raw, *named) not in rules.tasks:
                continue
            result.seen += 1
            record = parse_record(index, raw, rules.images, *named, picture_store())
            if rules.text_side is not None:
                encoded = encode(record, rules.text_side, rules.max_length)
                result.longest = max(result.longest, encoded.length + encoded.num_dropped)
                if encoded.num_dropped:
                    told = f"{encoded.length + encoded.num_dropped} tokens, {rules.max_length} allowed"
                    result.found.append((index, Remark.OVER_LENGTH, told))
                if verified[record.task] < _VERIFIED_PER_TASK:
                    verified[record.task] += 1
                    verify_labels(encoded, record, rules.text_side)
        except BadRecord as bad:
            result.found.append((index, bad.kind, bad.detail))
            continue
        except UserError as error:
            result.found.append((index, Mistake.LABELS, str(error)))
        result.good.append(record)
    return result


def _check_definitions(data: DataConfig, reports: Sequence[SplitReport]) -> list[str]:
    """Find tasks without a definition; what is to be said where there is no file of definitions at all."""
    definitions = load_definitions(data)
    if not definitions and data.source == "json":
        return ["task definitions (data.metadata=null; only routing=task needs them)"]
    for report in reports:
        for task, count in report.tasks.items():
            if task not in definitions:
                report.add(Remark.UNDEFINED_TASK, f"{cut(task)} ({count:,} records)")
    return []


def _leaks(
    good: dict[Split, tuple[list[Record], Path]],
    train: SplitReport,
    benchmarks: Sequence[Chosen],
    config: CheckConfig,
    workers: int,
) -> list[Leak]:
    """The held-out records as one set, every benchmark of the unseen split and those from elsewhere, against the
    training records.
    """
    # pictures that are all bad are in the report
    if benchmarks and train.good == train.text_only and not train.num_problems:
        raise UserError(
            f"check.benchmarks: no training pictures to compare with; none of the {train.records:,} records of "
            f"{train.source} has one"
        )

    def prints(records: Sequence[Record], images: Path | None) -> dict[Path, Print]:
        pictures = (path for record in records for path in record.files)
        return {} if images is None else prints_of(pictures, images, cache_root(), workers)

    records, images = good["train"]
    training = TrainingSide(records, prints(records, images))
    sets: list[tuple[str, Sequence[Record], dict[Path, Print], str]] = []
    if "heldout" in good:
        sets.append(("heldout", good["heldout"][0], prints(*good["heldout"]), ""))
    if "unseen" in good:
        known = prints(*good["unseen"])
        by_benchmark: dict[str, list[Record]] = {}
        for record in good["unseen"][0]:
            by_benchmark.setdefault(str(record.extra.get("benchmark") or record.task), []).append(record)
        sets += [(name, members, known, "") for name, members in by_benchmark.items()]
    for part in benchmarks:
        sets.append((part.name, part.records, prints(part.records, part.images), str(part.about["source"])))
    near, kept = config.check.near, _KEPT * config.check.examples
    return [
        compare(name, members, known, training, near, kept, source) for name, members, known, source in sets
    ]


def _as_json(report: Report) -> dict[str, Any]:
    """Plain values, with every example that was kept."""
    splits = {}
    for split in report.splits:
        findings = {
            sort.name.lower(): {"text": sort.value, "remark": isinstance(sort, Remark), **asdict(found)}
            for sort, found in split.found.items()
        }
        keys = ("source", "records", "good", "text_only", "pictures", "shared_ids", "tasks", "longest")
        splits[split.split] = {
            **{key: getattr(split, key) for key in keys},
            "pictures_per_record": {
                str(number): count for number, count in split.pictures_per_record.items()
            },
            "text_records_per_second": round(split.texts_per_second, 1),
            "findings": findings,
        }
    return {
        "exit_code": report.exit_code,
        "splits": splits,
        "leakage": [asdict(leak) for leak in report.leaks],
        "left_out": report.left_out,
    }


def _print(report: Report, path: Path, examples: int) -> None:
    """Tables of findings and leaks, then one line that sums up."""
    console = Console()
    for split in report.splits:
        most = max(split.pictures_per_record, default=0)
        several = f"up to {most} a record, " if most > 1 else ""
        longest = f"the longest of {split.longest:,} tokens; " if split.longest else ""
        say(
            f"{split.split}: {split.records:,} records; {split.good:,} good, of {len(split.tasks)} tasks, with "
            f"{split.pictures:,} pictures, {several}{split.text_only:,} without one; {longest}"
            f"texts checked at {split.texts_per_second:,.0f} records/s",
            console,
        )
        rows = tuple(
            (
                "remark" if isinstance(sort, Remark) else "problem",
                sort.value,
                f"{found.count:7,}",
                "\n".join(found.examples[:examples]),
            )
            for sort, found in split.found.items()
        )
        if rows:
            headings = ("", "found", "count", "first examples")
            show(Table(f"{split.split}: {split.source}", headings, rows, num_labels=4), console)
    if report.leaks:
        title = "evaluation sets: what they share with the training records"
        parts = ("same picture", "near duplicate", "same question + answer", "same picture + question")
        lines = []
        for leak in report.leaks:
            numbers = (leak.records, leak.pictures, *(part.count for part in leak.parts))
            lines.append((cut(leak.benchmark), *(f"{number:,}" for number in numbers)))
        show(Table(title, ("set", "records", "pictures", *parts), tuple(lines)), console)
    for leak in report.leaks:
        for line in _leak_lines(leak, examples):
            say(f"{cut(leak.benchmark)}: {line}", console)
    for line in report.left_out:
        say(f"not checked: {line}", console)
    problems = sum(split.num_problems for split in report.splits)
    remarks = sum(split.num_remarks for split in report.splits)
    say(f"{problems:,} problems, {remarks:,} remarks; full report: {path}", console)


def _leak_lines(leak: Leak, examples: int) -> list[str]:
    """The training tasks that have its pictures, the first examples of each sort, and what was not compared."""
    tasks = [f"{cut(task)} ({count:,} pictures)" for task, count in leak.training_tasks.items()]
    more = [f"and {len(tasks) - examples} more"] if len(tasks) > examples else []
    lines = [f"training tasks with its pictures: {', '.join([*tasks[:examples], *more])}"] if tasks else []
    lines += [example for part in leak.parts for example in part.examples[:examples]]
    if leak.plain_pictures:
        lines.append(f"{leak.plain_pictures:,} pictures too plain to be anything's near duplicate")
    return lines
