"""`mixlora check`: texts, pictures, definitions, leakage; a table, a report file and an exit code."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mixlora_cli.checking.benchmarks import open_benchmarks
from mixlora_cli.checking.findings import Findings, Remark
from mixlora_cli.checking.leakage import Leak, TrainingSide, compare
from mixlora_cli.checking.prints import Print, prints_of
from mixlora_cli.checking.report import Report, SplitReport, print_report, write_report
from mixlora_cli.checking.texts import CHUNK, ChunkResult, Rules, Summary, check_texts, summarise
from mixlora_cli.config import CheckConfig, DataConfig
from mixlora_cli.data.definitions import load_definitions
from mixlora_cli.data.encode import TextSide
from mixlora_cli.data.images import check_images
from mixlora_cli.data.loading import DataFiles, Split, locate_files, read_raws
from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.instances import Chosen, notes
from mixlora_cli.output import require_writable
from mixlora_cli.paths import cache_root
from mixlora_cli.progress import with_bar

_KEPT = 10  # times as many examples in the file as on the screen
Checked = tuple[SplitReport, list[Summary], DataFiles]


def check(config: CheckConfig) -> Report:
    """Check, print and write the report.

    Raises:
        UserError: a file, folder or model that the configuration names is not there.
        SystemExit: with code 1 where there are problems (with `check.strict` also for remarks).
    """
    folder = Path(config.output_dir).expanduser()
    require_writable(folder)
    report = run_check(config)
    path = write_report(report, folder)
    print_report(report, path, config.check.examples, Console())
    if report.exit_code:
        raise SystemExit(report.exit_code)
    return report


def run_check(config: CheckConfig) -> Report:
    """Look at every record of every split that the configuration names."""
    data, options = config.data, config.check
    benchmarks = open_benchmarks(config)  # first: what is wrong with them is said before the long part
    splits = configured_splits(data)
    workers = options.workers or min(8, os.cpu_count() or 1)
    located = {split: locate_files(data, split) for split in splits}
    side: TextSide | None = None
    if options.lengths:
        from mixlora_cli.checking.tokens import text_side  # model libraries take seconds to load

        side = text_side(config.model)
    checked: dict[Split, Checked] = {}
    for split, files in located.items():
        report, good = _check_split(split, files, config, side, workers)
        checked[split] = (report, good, files)
    left_out = [] if options.lengths else ["lengths and label masks (check.lengths=false)"]
    left_out += [] if options.images else ["the inside of pictures (check.images=false)"]
    left_out += _check_definitions(data, [part[0] for part in checked.values()])
    leaks: list[Leak] = []
    if options.leakage and "train" in checked and (len(checked) > 1 or benchmarks):
        leaks = _leaks(checked, benchmarks, config, workers)
        left_out += notes(benchmarks)
    elif not options.leakage:
        left_out.append("leakage (check.leakage=false)")
    else:
        left_out.append("leakage (it needs data.train, and data.heldout, data.unseen or check.benchmarks)")
    return Report([part[0] for part in checked.values()], leaks, left_out, options.strict)


def configured_splits(data: DataConfig) -> list[Split]:
    """Splits for which there are records."""
    if data.source == "mini":
        return ["train", "heldout", "unseen"]
    files: dict[Split, bool] = {
        "train": data.source == "vision_flan" or data.train is not None,
        "heldout": data.heldout is not None,
        "unseen": data.unseen is not None,
    }
    return [split for split, there in files.items() if there]


def _check_split(
    split: Split, files: DataFiles, config: CheckConfig, side: TextSide | None, workers: int
) -> tuple[SplitReport, list[Summary]]:
    data, options = config.data, config.check
    report = SplitReport(split, str(files.annotations), Findings(_KEPT * options.examples))
    raws, problems = read_raws(files.annotations)
    tasks = None if data.tasks is None or split == "unseen" else frozenset(data.tasks)
    rules = Rules(files.images, data.max_length, tasks, side)
    broken = ChunkResult(len(problems), [(each.index, each.kind, each.detail) for each in problems])
    good: list[Summary] = []
    began = time.perf_counter()
    console = Console(stderr=True)
    bar = with_bar(
        check_texts(raws, rules, workers),
        f"checking the texts of {split}",
        console,
        -(-len(raws) // CHUNK),
    )
    results = [broken]
    for result in bar:
        results.append(result)
    report.text_seconds = time.perf_counter() - began
    for result in results:
        report.records += result.seen
        good += result.good
        for index, sort, detail in result.found:
            report.findings.add(sort, f"record {index}: {detail}")
    if not report.records:
        raise UserError(
            f"{files.annotations}: no record to check; expected at least one of data.tasks={data.tasks}"
        )
    if options.images:
        good = _with_good_pictures(good, files.images, report)
    _count(report, good)
    return report, good


def _with_good_pictures(good: Sequence[Summary], images: Path | None, report: SplitReport) -> list[Summary]:
    """Open every picture; a record whose picture is bad is a problem."""
    if images is None:
        return list(good)
    bad = check_images((record.image for record in good if record.image is not None), images, cache_root())
    for record in good:
        if record.image in bad:
            report.findings.add(bad[record.image].kind, f"record {record.index}: {bad[record.image].detail}")
    return [record for record in good if record.image not in bad]


def _count(report: SplitReport, good: Sequence[Summary]) -> None:
    """Numbers of the good records, and those among them that repeat another."""
    first: dict[bytes, int] = {}
    for record in good:
        earlier = first.setdefault(record.content, record.index)
        if earlier != record.index:
            report.findings.add(Remark.DUPLICATE, f"record {record.index}: as record {earlier}")
    ids = Counter(record.id for record in good)
    report.shared_ids = len(good) - len(ids)
    report.good = len(good)
    report.tasks = dict(sorted(Counter(record.task for record in good).items()))
    report.text_only = sum(record.image is None for record in good)
    report.pictures = len({record.image for record in good if record.image is not None})


def _check_definitions(data: DataConfig, reports: Sequence[SplitReport]) -> list[str]:
    """Tasks that no definition is given for; what is to be said where there is no file of definitions at all."""
    definitions = load_definitions(data)
    if not definitions and data.source == "json":
        return ["task definitions (data.metadata=null; only routing=task needs them)"]
    for report in reports:
        for task, count in report.tasks.items():
            if task not in definitions:
                report.findings.add(Remark.UNDEFINED_TASK, f"{cut(task)} ({count:,} records)")
    return []


def _leaks(
    checked: dict[Split, Checked], benchmarks: Sequence[Chosen], config: CheckConfig, workers: int
) -> list[Leak]:
    """The held-out records as one set, every benchmark of the unseen split and those from elsewhere, against the
    training records.
    """
    options = config.check
    report, records, files = checked["train"]
    _require_pictures(benchmarks, report)
    training = TrainingSide(records, _prints(records, files.images, workers))
    leaks = []
    evaluation: tuple[Split, ...] = ("heldout", "unseen")
    for split in evaluation:
        if split not in checked:
            continue
        _, records, files = checked[split]
        known = _prints(records, files.images, workers)
        sets: dict[str, list[Summary]] = {}
        for record in records:
            sets.setdefault("heldout" if split == "heldout" else record.benchmark, []).append(record)
        for name, members in sets.items():
            leaks.append(compare(name, members, known, training, options.near, _KEPT * options.examples))
    for part in benchmarks:
        records = [summarise(record) for record in part.records]
        known = _prints(records, part.images, workers)
        source = str(part.about["source"])
        leaks.append(
            compare(part.name, records, known, training, options.near, _KEPT * options.examples, source)
        )
    return leaks


def _require_pictures(benchmarks: Sequence[Chosen], train: SplitReport) -> None:
    """Raises UserError where the training has texts alone; pictures that are all bad are in the report."""
    if benchmarks and train.good == train.text_only and not train.findings.num_problems:
        raise UserError(
            f"check.benchmarks: no training pictures to compare with; none of the {train.records:,} records of "
            f"{train.source} has one"
        )


def _prints(records: Sequence[Summary], images: Path | None, workers: int) -> dict[Path, Print]:
    if images is None:
        return {}
    pictures = (record.image for record in records if record.image is not None)
    return prints_of(pictures, images, cache_root(), workers)
