"""The benchmarks: one row each. Adding one touches this table and nothing else.

A benchmark without an origin comes with the data (`data=mini`, or records of your own that carry its name).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.metrics import LABELS, METRICS, MME, POPE, VQA, Metric
from mixlora_cli.evaluation.sources import rows
from mixlora_cli.evaluation.sources.origin import Origin
from mixlora_cli.evaluation.tallies import COGNITION, PERCEPTION

COLUMNS = ("MME", "Text-VQA", "VSR", "SNLI-VE", "CIFAR-10", "CIFAR-100", "MNIST", "POPE")
"""The paper's columns, in its order; MMAvg, the mean of all but MME, follows them."""
AVERAGED = tuple(column for column in COLUMNS if column != "MME")
MEAN_TITLE = "MMAvg"
PAPER = "paper"
"""In `eval.benchmarks`: all eight of the paper's."""


@dataclass(frozen=True)
class Benchmark:
    """An unseen task that is scored as a whole."""

    name: str
    """What records carry as `benchmark`, and what `eval.benchmarks` takes."""
    column: str
    """The paper's name; also the column of the result table."""
    metric: Metric
    origin: Origin | None = None
    num_subtasks: int = 0
    """How many subtasks the score is a sum over when all are answered; 0: it is no sum, or that is not known."""


_MME = Origin(
    hub=("lmms-lab/MME", "lmms-lab-encoder/MME"),
    split="test",
    rows=2_374,
    columns=("question_id", "image", "question", "answer", "category"),
    ask=rows.ask_mme,
    categories=(*PERCEPTION, *COGNITION),
)
_TEXT_VQA = Origin(
    hub=("lmms-lab/textvqa",),
    split="validation",
    rows=5_000,
    columns=("question_id", "image", "question", "answers"),
    ask=rows.ask_textvqa,
)
_VSR = Origin(
    hub=("cambridgeltl/vsr_zeroshot",),
    split="test",
    rows=1_222,
    columns=("image", "caption", "label"),
    ask=rows.ask_vsr,
    picture="",
    photos=rows.vsr_photos,
    records="test.jsonl",
    by_hand="a folder with COCO 2017's pictures in images/ (images/train2017/000000000009.jpg and so on, from "
    "cocodataset.org, or the same files without sub-folders); test.jsonl beside it is fetched from the hub if absent",
)
_SNLI_VE = Origin(
    hub=(),  # HuggingFaceM4/SNLI-VE is a script, which `datasets` no longer runs
    split="test",
    rows=17_901,
    columns=("Flickr30K_ID", "sentence2", "gold_label"),
    ask=rows.ask_snli_ve,
    picture="",
    photos=rows.snli_ve_photos,
    records="snli_ve_test.jsonl",
    by_hand="a folder with snli_ve_test.jsonl (github.com/necla-ml/SNLI-VE links to it) and Flickr30k's pictures in "
    "images/ (images/1000092795.jpg and so on; shannon.cs.illinois.edu/DenotationGraph gives them on request)",
)
_CIFAR10 = Origin(
    hub=("uoft-cs/cifar10",),
    split="test",
    rows=10_000,
    columns=("img", "label"),
    ask=rows.classify("object", rows.CIFAR10, "label"),
    picture="img",
    labels=rows.CIFAR10,
    label_column="label",
)
_CIFAR100 = Origin(
    hub=("uoft-cs/cifar100",),
    split="test",
    rows=10_000,
    columns=("img", "fine_label"),
    ask=rows.classify("object", rows.CIFAR100, "fine_label"),
    picture="img",
    labels=rows.CIFAR100,
    label_column="fine_label",
    aliases={"cra": "crab"},
)
_MNIST = Origin(
    hub=("ylecun/mnist",),
    split="test",
    rows=10_000,
    columns=("image", "label"),
    ask=rows.classify("number", rows.DIGITS, "label"),
    labels=rows.DIGITS,
    label_column="label",
)
_POPE = Origin(
    hub=("lmms-lab/POPE", "lmms-lab-encoder/POPE"),
    split="test",
    rows=9_000,
    columns=("question_id", "question", "answer", "image", "category"),
    ask=rows.ask_pope,
    categories=("adversarial", "popular", "random"),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mme", "MME", MME, _MME, num_subtasks=14),
        Benchmark("textvqa", "Text-VQA", VQA, _TEXT_VQA),
        Benchmark("vsr", "VSR", LABELS, _VSR),
        Benchmark("snli_ve", "SNLI-VE", LABELS, _SNLI_VE),
        Benchmark("cifar10", "CIFAR-10", LABELS, _CIFAR10),
        Benchmark("cifar100", "CIFAR-100", LABELS, _CIFAR100),
        Benchmark("mnist", "MNIST", LABELS, _MNIST),
        Benchmark("pope", "POPE", POPE, _POPE),
        Benchmark("mini_mme", "MME", MME, num_subtasks=8),
        Benchmark("mini_textvqa", "Text-VQA", VQA),
        Benchmark("mini_vsr", "VSR", LABELS),
        Benchmark("mini_snli_ve", "SNLI-VE", LABELS),
        Benchmark("mini_cifar10", "CIFAR-10", LABELS),
        Benchmark("mini_cifar100", "CIFAR-100", LABELS),
        Benchmark("mini_mnist", "MNIST", LABELS),
        Benchmark("mini_pope", "POPE", POPE),
    )
}

FROM_THE_PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.origin is not None)


@dataclass(frozen=True)
class SeenTask:
    """A task of training whose held-out instances the paper scores one by one."""

    name: str
    """Vision-Flan's, which records carry as their task."""
    title: str
    """The paper's; also its heading in tables."""


SEEN_TASKS: dict[str, SeenTask] = {
    task.name: task
    for task in (
        SeenTask("scienceqa+question_answering", "ScienceQA"),
        SeenTask("coco+image_classification_animal", "COCO"),
        SeenTask("fairface+image_classification_age", "FairFace"),
        SeenTask("INATURALIST+order_classification", "iNaturalist"),
        SeenTask("STVQA+image_question_answer", "ST-VQA"),
        SeenTask("PACS+elephant_image_category_classification", "PACS"),
    )
}
"""Table 3, in its order. Their instances are held-out ones (`data.heldout`)."""


def seen_title(name: str) -> str:
    """Heading of a seen task: the paper's name where it has one, else the task's own."""
    return SEEN_TASKS[name].title if name in SEEN_TASKS else name


def benchmark_named(name: str, declared: Mapping[str, Any] | None = None) -> Benchmark:
    """The row of this name.

    A benchmark of the user's own is described by `declared`, which the predictions file has under
    `about.benchmarks` ({name: {"column", "scorer"}}); without that it gets its own column, scored by label match.
    """
    if known := BENCHMARKS.get(name):
        return known
    own = (declared or {}).get(name, {})
    return Benchmark(name, str(own.get("column", name)), METRICS[str(own.get("scorer", "labels"))])


def in_paper_order(names: Iterable[str]) -> list[str]:
    """Benchmark names sorted by the paper's columns, others behind them in the order they come."""
    place = {column: position for position, column in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: place.get(benchmark_named(name).column, len(COLUMNS)))


def expand(wanted: Sequence[str]) -> list[str]:
    """`eval.benchmarks` with "paper" replaced by the eight that it stands for, each name once."""
    return list(
        dict.fromkeys(each for name in wanted for each in (FROM_THE_PAPER if name == PAPER else (name,)))
    )


def choose(wanted: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """The benchmarks to evaluate, in the paper's order; `wanted=None` means all that are available.

    Raises UserError that names the unknown ones, what was probably meant, and what there is.
    """
    ordered = in_paper_order(available)
    if wanted is None:
        return ordered
    if unknown := [name for name in wanted if name not in ordered]:
        near = difflib.get_close_matches(unknown[0], [*ordered, *FROM_THE_PAPER, PAPER], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"eval.benchmarks: the data has no {', '.join(map(cut, unknown))}.{hint} It has: "
            f"{', '.join(map(cut, ordered))}; "
            f"from elsewhere: {', '.join(FROM_THE_PAPER)}, and your own with eval.sources"
        )
    return [name for name in ordered if name in wanted]
