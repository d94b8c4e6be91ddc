"""The table of benchmarks, one entry each: the paper's eight and the built-in small ones of the same columns.

Prompts: MME's questions carry their own instruction. MNIST and CIFAR follow Zhai et al. (2023, EMT). Text-VQA and
POPE end with the line that LLaVA-1.5 evaluates both with. VSR and SNLI-VE have no agreed prompt; theirs are ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mixlora_cli.benchmarks.benchmark import Benchmark, Origin, Question, Row, text_of
from mixlora_cli.benchmarks.metrics import COGNITION, EXACT, LABELS, METRICS, MME, PERCEPTION, POPE, VQA
from mixlora_cli.errors import UserError, cut

SHORT_ANSWER = "Answer the question using a single word or phrase."
YES_NO = ("yes", "no")
VERDICTS = ("entailment", "neutral", "contradiction")
DIGITS = tuple("0123456789")
CIFAR10 = tuple(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
_FINE_LABELS = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(name.replace("_", " ") for name in _FINE_LABELS.split())
"""Fine labels in the order of their numbers."""


def ask_mme(row: Row) -> Question:
    """MME: two questions about each picture, paired by `question_id`."""
    about = str(row["question_id"])
    return Question(
        text_of(row["question"], "question").strip(),
        str(row["answer"]),
        about,
        category=str(row["category"]),
        image_id=about,
    )


_MME = Benchmark(
    "mme",
    "MME",
    MME,
    Origin(
        hub=("lmms-lab/MME", "lmms-lab-encoder/MME"),
        split="test",
        rows=2_374,
        columns=("question_id", "image", "question", "answer", "category"),
        ask=ask_mme,
        categories=(*PERCEPTION, *COGNITION),
    ),
    in_paper=True,
    num_subtasks=14,
)


def ask_textvqa(row: Row) -> Question:
    """Text-VQA: ten people's answers; the one most of them gave stands for all where one is needed."""
    answers = tuple(str(answer) for answer in row["answers"])
    tokens = ", ".join(str(token) for token in row.get("ocr_tokens") or ())
    return Question(
        text_of(row["question"], "question").strip(),
        max(answers, key=answers.count),
        str(row["question_id"]),
        instruction=SHORT_ANSWER,
        hint=f"Reference OCR token: {tokens}" if tokens else "",
        answers=answers,
    )


_TEXT_VQA = Benchmark(
    "textvqa",
    "Text-VQA",
    VQA,
    Origin(
        hub=("lmms-lab/textvqa",),
        split="validation",
        rows=5_000,
        columns=("question_id", "image", "question", "answers"),
        ask=ask_textvqa,
    ),
    in_paper=True,
)


def ask_vsr(row: Row) -> Question:
    """VSR: a statement about where two things are, true (1) or false (0)."""
    caption, label = text_of(row["caption"], "caption").strip(), row["label"]
    if label not in (0, 1, "0", "1"):
        raise ValueError(f"label is {cut(repr(label))}, expected 0 or 1")
    text = f'Is this statement about the image true? "{caption}" Answer yes or no.'
    return Question(text, YES_NO[0] if int(label) else YES_NO[1], labels=YES_NO)


def vsr_photos(row: Row) -> tuple[str, ...]:
    """COCO 2017's folders and file names: that of the row's link first."""
    name = str(row["image"])
    link = PurePosixPath(str(row.get("image_link") or ""))
    return tuple(dict.fromkeys([f"{link.parent.name}/{name}", name, f"train2017/{name}", f"val2017/{name}"]))


_VSR = Benchmark(
    "vsr",
    "VSR",
    LABELS,
    Origin(
        hub=("cambridgeltl/vsr_zeroshot",),
        split="test",
        rows=1_222,
        columns=("image", "caption", "label"),
        ask=ask_vsr,
        picture="",
        photos=vsr_photos,
        records="test.jsonl",
        by_hand="a folder with COCO 2017's pictures in images/ (images/train2017/000000000009.jpg and so on, from "
        "cocodataset.org, or the same files without sub-folders); test.jsonl beside it is fetched from the hub if "
        "absent",
    ),
    in_paper=True,
)


def ask_snli_ve(row: Row) -> Question | None:
    """SNLI-VE: does the picture entail the hypothesis? Rows without an agreed label ("-") are left out."""
    label = row["gold_label"]
    if label == "-":
        return None
    if label not in VERDICTS:
        raise ValueError(f'gold_label is {cut(repr(label))}, expected {", ".join(VERDICTS)} or "-"')
    hypothesis = text_of(row["sentence2"], "sentence2").strip()
    text = (
        f'Hypothesis: "{hypothesis}" Does the image entail the hypothesis, contradict it, or neither? '
        "Answer with one word: entailment, neutral or contradiction."
    )
    return Question(text, label, str(row.get("pairID", "")), labels=VERDICTS)


def snli_ve_photos(row: Row) -> tuple[str, ...]:
    """Flickr30k's file names, flat or in the folder that its archive unpacks to."""
    name = str(row["Flickr30K_ID"]).removesuffix(".jpg") + ".jpg"
    return (name, f"flickr30k-images/{name}", f"flickr30k_images/{name}")


_SNLI_VE = Benchmark(
    "snli_ve",
    "SNLI-VE",
    LABELS,
    Origin(
        hub=(),  # HuggingFaceM4/SNLI-VE is a script, which `datasets` no longer runs
        split="test",
        rows=17_901,
        columns=("Flickr30K_ID", "sentence2", "gold_label"),
        ask=ask_snli_ve,
        picture="",
        photos=snli_ve_photos,
        records="snli_ve_test.jsonl",
        by_hand="a folder with snli_ve_test.jsonl (github.com/necla-ml/SNLI-VE links to it) and Flickr30k's pictures "
        "in images/ (images/1000092795.jpg and so on; shannon.cs.illinois.edu/DenotationGraph gives them on request)",
    ),
    in_paper=True,
)


def classify(thing: str, labels: tuple[str, ...], column: str) -> Callable[[Row], Question]:
    """A classification benchmark: `column` holds the number of one of `labels`."""
    question = (
        f"What is the {thing} in the image? Please only answer a single {thing} in {', '.join(labels)}."
    )

    def ask(row: Row) -> Question:
        return Question(question, labels[int(row[column])], labels=labels)

    return ask


_CIFAR10 = Benchmark(
    "cifar10",
    "CIFAR-10",
    LABELS,
    Origin(
        hub=("uoft-cs/cifar10",),
        split="test",
        rows=10_000,
        columns=("img", "label"),
        ask=classify("object", CIFAR10, "label"),
        picture="img",
        labels=CIFAR10,
        label_column="label",
    ),
    in_paper=True,
)
_CIFAR100 = Benchmark(
    "cifar100",
    "CIFAR-100",
    LABELS,
    Origin(
        hub=("uoft-cs/cifar100",),
        split="test",
        rows=10_000,
        columns=("img", "fine_label"),
        ask=classify("object", CIFAR100, "fine_label"),
        picture="img",
        labels=CIFAR100,
        label_column="fine_label",
        aliases={"cra": "crab"},
    ),
    in_paper=True,
)
_MNIST = Benchmark(
    "mnist",
    "MNIST",
    LABELS,
    Origin(
        hub=("ylecun/mnist",),
        split="test",
        rows=10_000,
        columns=("image", "label"),
        ask=classify("number", DIGITS, "label"),
        labels=DIGITS,
        label_column="label",
    ),
    in_paper=True,
)


def ask_pope(row: Row) -> Question:
    """POPE: is there such an object?"""
    return Question(
        text_of(row["question"], "question").strip(),
        str(row["answer"]).lower(),
        str(row["question_id"]),
        instruction=SHORT_ANSWER,
        category=str(row["category"]),
        labels=YES_NO,
    )


_POPE = Benchmark(
    "pope",
    "POPE",
    POPE,
    Origin(
        hub=("lmms-lab/POPE", "lmms-lab-encoder/POPE"),
        split="test",
        rows=9_000,
        columns=("question_id", "question", "answer", "image", "category"),
        ask=ask_pope,
        categories=("adversarial", "popular", "random"),
    ),
    in_paper=True,
)


_WHOLE = (_MME, _TEXT_VQA, _VSR, _SNLI_VE, _CIFAR10, _CIFAR100, _MNIST, _POPE)
_MINI = (
    Benchmark(f"mini_{each.name}", each.column, each.metric, num_subtasks=8 if each is _MME else 0)
    for each in _WHOLE
)
_MINI_TEXT = (
    Benchmark("text_largest", "Largest", EXACT),
    Benchmark("text_year_first", "Year first", EXACT),
    Benchmark("text_true_false", "True/false", EXACT),
    Benchmark("text_come_back", "Come back", EXACT),
)
BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in (*_WHOLE, *_MINI, *_MINI_TEXT)}
"""One more entry is one more benchmark. The small ones come with `data=mini` and `data=mini_text`."""
_PAPER = [each for each in BENCHMARKS.values() if each.in_paper]
FROM_THE_PAPER = tuple(each.name for each in _PAPER)
PAPER = "paper"
"""In `eval.benchmarks`: all eight of the paper's."""
COLUMNS = tuple(each.column for each in _PAPER)
"""The paper's columns, in its order; MMAvg, the mean of all that are no sum, follows them."""
AVERAGED = tuple(each.column for each in _PAPER if not each.metric.aggregate.is_sum)
MEAN_TITLE = "MMAvg"
SEEN_TITLE = "Seen"
"""Column of the held-out instances of the training tasks: their mean."""
LOSS_TITLE = "Seen loss"
"""Column of their loss per answer token, the mean over the tasks."""

SEEN_TASKS = {
    "scienceqa+question_answering": "ScienceQA",
    "coco+image_classification_animal": "COCO",
    "fairface+image_classification_age": "FairFace",
    "INATURALIST+order_classification": "iNaturalist",
    "STVQA+image_question_answer": "ST-VQA",
    "PACS+elephant_image_category_classification": "PACS",
}
"""Table 3, in its order: titles of tasks of Vision-Flan whose held-out instances (`data.heldout`) it scores."""


def seen_title(name: str) -> str:
    """Heading of a seen task: the paper's name where it has one, else the task's own."""
    return SEEN_TASKS.get(name, name)


def benchmark_named(name: str, declared: Mapping[str, Any] | None = None) -> Benchmark:
    """The benchmark of this name.

    One of the user's own is described by `declared`, which the predictions file has under `about.benchmarks`
    ({name: {"column", "scorer"}}); without that it gets its own column, scored by label match.
    """
    if known := BENCHMARKS.get(name):
        return known
    own = (declared or {}).get(name, {})
    return Benchmark(name, str(own.get("column", name)), METRICS[str(own.get("scorer", "labels"))])


def in_paper_order(names: Iterable[str]) -> list[str]:
    """Benchmark names sorted by the paper's columns, others behind them in the order they come."""
    place = {column: position for position, column in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: place.get(benchmark_named(name).column, len(COLUMNS)))


def with_origin() -> list[str]:
    """Names of the benchmarks that bring their own instances."""
    return [name for name, each in BENCHMARKS.items() if each.origin is not None]


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
        elsewhere = with_origin()
        near = difflib.get_close_matches(unknown[0], [*ordered, *elsewhere, PAPER], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"eval.benchmarks: the data has no {', '.join(map(cut, unknown))}.{hint} It has: "
            f"{', '.join(map(cut, ordered))}; "
            f"from elsewhere: {', '.join(elsewhere)}, and your own with eval.sources"
        )
    return [name for name in ordered if name in wanted]
