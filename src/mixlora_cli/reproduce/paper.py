"""The paper's models (Shen et al., ACL 2024) and those beyond it, one `Row` each.

What a row trains (`experiment=<scale>/<name>`), the tables it stands in, and the numbers that the paper gives come from
here. A new row is one more `Row` in `ROWS`; a difference of its own, one more line in its table's `pairs`.
Imports nothing heavy: every command registers the experiments before it composes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

ABSENT = "-"
AVERAGE_TITLE = "AVG"
BASE = "llava_align"
"""The row without a training."""


@dataclass(frozen=True)
class In:
    """Where a row stands."""

    table: str
    """A key of `TABLES`."""
    numbers: tuple[float, ...] = ()
    """The paper's, in the order of its columns; each is one training without an interval."""
    labels: tuple[str, ...] = ()
    """Under the table's headings; () = the row's own."""
    title: str = ""
    """In notes; "" = the row's own."""
    last: bool = False
    """Whether it comes behind the table's other rows, which keep the order of `ROWS`."""


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    """Its experiment is `<scale>/<name>`."""
    title: str
    """What notes call it: "LoRA r=4"."""
    labels: tuple[str, ...]
    """Model, number of factors, rank."""
    base: tuple[str, ...]
    """Experiments of the same scale that it starts from: rows, or those of `SHARED`."""
    settings: str
    """What it changes, as on the command line; `{scale}` is the scale."""
    tables: tuple[In, ...]
    mini: str = ""
    """What it changes at scale=mini alone; `paper` likewise."""
    paper: str = ""
    only_mini: bool = False
    """Whether it does not exist at scale=paper."""
    per_task: bool = False
    """Specialists: one training for each of the six tasks."""
    why: str = ""
    """Of rows that change one choice of MixLoRA E=16, r=4: what is compared."""


SEEN_TASKS = {
    "mini": ("odd_one_out", "object_category", "count_digit", "flag_naming", "word_reading", "left_or_right"),
    # As the published code names them, except COCO's, which it does not give: one of the data set's stands there.
    "paper": (
        "scienceqa+question_answering",
        "coco+image_classification_animal",
        "fairface+image_classification_age",
        "INATURALIST+order_classification",
        "STVQA+image_question_answer",
        "PACS+elephant_image_category_classification",
    ),
}
"""Table 3: one of each kind, reasoning, coarse perception, counting, knowledge, reading, position, as in the paper."""
_RUN = "${run_name:${adapter.name},${rank},${factors},${routing.name}}-seed${seed}"
_GROUPS = ("model", "data", "adapter", "routing", "deepspeed")


def _each_task(scale: str) -> str:
    """`mixlora train -m experiment=...` trains all six, `data.tasks=[NAME]` one; without either it is refused."""
    sweep = ",".join(f"[{task}]" for task in SEEN_TASKS[scale])
    folder = f"runs/{scale}/specialist-lora-r${{rank}}-${{joined:${{data.tasks}}}}-seed${{seed}}"
    return f'output_dir={folder} data.tasks=[] hydra.sweeper.params={{"data.tasks":"{sweep}"}}'


SHARED: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "mini": {
        # LoRA and MixLoRA get the same steps and batch; each has the learning rate that was best for it in one search
        # (docs/findings.md), because a factor's update is scaled differently in the two. With save_every=50 at most
        # two or three minutes of work are lost with a kill.
        "shared/recipe": (
            (),
            f"""model=mini data=mini routing=instance output_dir=runs/mini/{_RUN}
            train.steps=300 train.batch_size=8 train.scheduler=cosine train.warmup_ratio=0.03
            train.weight_decay=0.0 train.log_every=10 train.save_every=50 train.keep_checkpoints=1""",
        ),
        # No dropout, because no instance is seen twice. alpha = 2 * rank, and 2 * factors, are the adapters' defaults.
        # The rates are the best at r=16 and 32, and at E=16, r=4 and 8; the other rows have their own. Routers keep
        # their initial values, as published.
        "shared/lora": (("shared/recipe",), "adapter=lora adapter.dropout=0.0 train.learning_rate=1e-3"),
        "shared/mixlora": (
            ("shared/recipe",),
            """adapter=mixlora adapter.dropout=0.0 adapter.cfs=paper adapter.router_grad=none
            train.learning_rate=1e-3""",
        ),
        # One adapter for each task, with eight passes over what the joint run sees of it: 300 steps of 8 instances over
        # 26 tasks. (data.max_per_task=null train.steps=63 instead: one pass over all 500.)
        "shared/specialist": ((), f"{_each_task('mini')} data.max_per_task=92 train.steps=92"),
        # One adapter for the specialists' tasks, on the very instances that those see (each task is sampled with its
        # own generator) and as often: what it lacks next to them is not due to other data or fewer passes.
        "shared/control": (
            (),
            f"""output_dir=runs/mini/control-{_RUN} data.tasks=[{",".join(SEEN_TASKS["mini"])}]
            data.max_per_task=92 train.steps=552""",
        ),
        # Three times the steps of the tables, each of 7,200 instances once.
        "shared/study": ((), "train.steps=900"),
        # `mixlora eval run=FOLDER experiment=mini/shared/evaluation` is how every cell is evaluated.
        "shared/evaluation": ((), "data=mini eval.batch_size=32 eval.max_new_tokens=24"),
    },
    "paper": {
        # App. B, and LLaVA's defaults where the paper refers to them: "the rest of LLaVA's parameters remain frozen"
        # (the published script trains the projector); 8 instances on each of 4 GPUs, 4 forward passes a step; batches
        # drawn at random. Features of all pictures would take 100 GB, the tower's forward pass 2 % of the time.
        "shared/recipe": (
            (),
            f"""model=llava_v1_7b data=vision_flan routing=instance output_dir=runs/paper/{_RUN}
            model.train_also=[] data.max_length=1792 train.epochs=3.0 train.effective_batch=128
            train.batch_size=8 train.learning_rate=4e-5 train.scheduler=cosine train.warmup_ratio=0.03
            train.weight_decay=0.0 train.precision=bf16 train.gradient_checkpointing=true
            train.group_by_length=false train.cache_features=false train.save_every=500 train.workers=4""",
        ),
        "shared/lora": (("shared/recipe",), "adapter=lora adapter.dropout=0.05"),
        "shared/mixlora": (
            ("shared/recipe",),
            "adapter=mixlora adapter.dropout=0.05 adapter.cfs=paper adapter.router_grad=none",
        ),
        "shared/specialist": ((), _each_task("paper")),
        # The eight benchmarks of Table 1; features of their 60,000 pictures would take 30 GB. The seen tasks of
        # Table 3 also need data.heldout=FILE data.images=FOLDER.
        "shared/evaluation": (
            (),
            "data=vision_flan eval.benchmarks=[paper] eval.batch_size=16 eval.cache_features=false",
        ),
    },
}
"""What rows of a scale share: the experiments that each starts from, and what it changes."""


def _rate(rate: str) -> str:
    """The best learning rate of the search at scale=mini, of rows that do not have the shared one."""
    return f"train.learning_rate={rate}" if rate else ""


def _lora(rank: int, *tables: In, rate: str = "", name: str = "", only_mini: bool = False) -> Row:
    labels, base, settings = ("LoRA", ABSENT, str(rank)), ("shared/lora",), f"rank={rank}"
    name = name or f"lora_r{rank}"
    return Row(name, f"LoRA r={rank}", labels, base, settings, tables, _rate(rate), only_mini=only_mini)


def _mixlora(factors: int, rank: int, *tables: In, rate: str = "") -> Row:
    """MixLoRA, which Figure 4 shows with its CFS."""
    labels, name = ("MixLoRA", str(factors), str(rank)), f"mixlora_e{factors}_r{rank}"
    figure = In("figure4", labels=(*labels, "with"), title=f"E={factors} r={rank} with CFS")
    settings, title = f"factors={factors} rank={rank}", f"MixLoRA E={factors} r={rank}"
    return Row(name, title, labels, ("shared/mixlora",), settings, (*tables, figure), _rate(rate))


def _without_cfs(factors: int, rank: int, *tables: In, why: str = "") -> Row:
    """B chosen independently of A."""
    labels, name = ("MixLoRA", str(factors), str(rank)), f"mixlora_e{factors}_r{rank}"
    figure = In("figure4", labels=(*labels, "without"))
    settings = (
        "output_dir=runs/{scale}/mixlora-instance-e${factors}-r${rank}-nocfs-seed${seed} adapter.cfs=none"
    )
    title = f"E={factors} r={rank} without CFS"
    return Row(f"{name}_nocfs", title, labels, (name,), settings, (figure, *tables), why=why)


def _changed(setting: str) -> tuple[In, In]:
    """The tables that compare choices of MixLoRA E=16, r=4, with what a row changes there."""
    return (
        In("beyond", labels=("MixLoRA", setting), title=f"MixLoRA {setting}"),
        In("seen", labels=("MixLoRA", "16", "4", setting), title=f"MixLoRA E=16 r=4 {setting}"),
    )


def _choice(name: str, setting: str, settings: str, why: str) -> Row:
    """MixLoRA E=16, r=4 with one choice changed."""
    labels, tables = ("MixLoRA", "16", "4"), _changed(setting)
    return Row(name, name, labels, ("mixlora_e16_r4",), settings, tables, only_mini=True, why=why)


def _routing(routing: str, *tables: In) -> Row:
    """Table 2: E=32, r=4 with another routing."""
    labels, title = ("MixLoRA", "32", "4"), f"MixLoRA E=32 r=4 routing={routing}"
    tables = (*tables, In("seen", labels=(*labels, f"routing={routing}")))
    return Row(f"routing_{routing}", title, labels, ("mixlora_e32_r4",), f"routing={routing}", tables)


def _specialist(rank: int, *numbers: float) -> Row:
    labels, base = ("LoRA_Specialist", ABSENT, str(rank)), (f"lora_r{rank}", "shared/specialist")
    tables, title = (In("table3", numbers), In("control")), f"LoRA specialists r={rank}"
    return Row(f"specialist_lora_r{rank}", title, labels, base, "", tables, per_task=True)


def _control(name: str, title: str, *labels: str) -> Row:
    base = (name, "shared/control")
    return Row(f"control_{name}", title, labels, base, "", (In("control"),), only_mini=True)


_PLUS = "adapter=mixlora_plus adapter.dropout=0.0"


def _study(name: str, title: str, base: str, settings: str = "") -> Row:
    """One way to select, or LoRA, trained as long as all others of the study."""
    settings = f"output_dir=runs/mini/study-{name}-seed${{seed}} {settings}"
    bases, tables = (base, "shared/study"), (In("study"), In("study_unseen"))
    return Row(f"study_{name}", title, (title,), bases, settings, tables, only_mini=True)


def _folder(name: str) -> str:
    return f"output_dir=runs/mini/mixlora-instance-e16-r4-{name}-seed${{seed}}"


def _equal(title: str, what: str) -> In:
    """LoRA beside the choices."""
    return In("beyond", labels=(title, what), title=f"{title} {what}", last=True)


ROWS: tuple[Row, ...] = (
    Row(
        BASE,
        "LLaVA_Align",
        ("LLaVA_Align", ABSENT, ABSENT),
        ("shared/evaluation",),
        "adapter=none",
        (In("table1", (1110.82, 32.62, 50.16, 34.51, 80.00, 58.04, 52.79, 59.10, 52.46)),),
        "model=mini",
        "model=llava_v1_7b",
    ),
    Row(
        "llava_ft",
        "LLaVA_FT",
        ("LLaVA_FT", ABSENT, ABSENT),
        ("shared/recipe",),
        "adapter=full",
        (In("table1", (1587.26, 37.26, 53.76, 43.35, 92.97, 63.73, 94.27, 80.82, 66.59)),),
        _rate("1e-4"),  # all weights want a smaller rate than an adapter's; searched over 60 steps
        "deepspeed=zero2",  # gradients and optimizer states of 7B weights do not fit on one GPU
    ),
    _specialist(4, 64.33, 77.67, 54.67, 58.67, 44.67, 99.00, 66.50),
    _specialist(16, 67.33, 76.33, 59.00, 60.00, 46.33, 99.00, 68.00),
    _lora(2, In("table1", (1291.20, 39.86, 51.88, 31.80, 85.51, 49.23, 79.22, 76.72, 59.17)), rate="2e-3"),
    _lora(
        4,
        In("table1", (1345.86, 39.44, 53.19, 33.08, 86.62, 47.36, 80.89, 76.89, 59.64)),
        In("table3", (57.67, 76.33, 59.67, 57.00, 42.33, 99.33, 65.39)),
        In("seen", labels=("LoRA", ABSENT, "4", ABSENT)),
        rate="2e-3",
    ),
    _lora(8, In("table1", (1312.87, 39.20, 53.27, 36.36, 88.92, 46.88, 82.95, 75.48, 60.44)), rate="2e-3"),
    _lora(
        16,
        In("table1", (1381.23, 39.22, 53.60, 36.11, 87.31, 45.60, 85.92, 75.16, 60.42)),
        In("table3", (59.67, 73.00, 59.33, 58.33, 43.67, 99.00, 65.50)),
        _equal("LoRA r=16", "as many trained parameters"),
        In("seen", labels=("LoRA", ABSENT, "16", ABSENT)),
    ),
    _lora(32, In("table1", (1393.67, 39.20, 52.95, 44.56, 90.10, 45.90, 83.42, 72.33, 61.21))),
    # With its routers MixLoRA E=16, r=4 has 19,261,440 parameters, this one 19,232,640. The routers are not trained
    # (router_grad=none): in trained parameters, 4,884,480, LoRA r=16 is its equal.
    _lora(
        63,
        _equal("LoRA r=63", "as many parameters, routers counted"),
        In("seen", labels=("LoRA", ABSENT, "63", ABSENT)),
        rate="5e-4",
        name="lora_equal",
        only_mini=True,
    ),
    _mixlora(
        *(16, 2),
        In("table1", (1417.83, 39.82, 52.13, 35.38, 90.14, 58.05, 85.98, 73.86, 62.19)),
        rate="5e-4",
    ),
    _without_cfs(16, 2),
    _mixlora(
        *(32, 2),
        In("table1", (1459.15, 40.46, 52.62, 35.04, 91.02, 57.95, 85.26, 78.31, 62.95)),
        rate="5e-4",
    ),
    _without_cfs(32, 2),
    _mixlora(
        *(16, 4),
        In("table1", (1443.82, 40.66, 52.70, 43.10, 91.59, 57.28, 85.25, 78.13, 64.10)),
        In("table3", (60.67, 78.67, 59.00, 61.00, 44.33, 99.33, 67.17)),
        In("beyond", labels=("MixLoRA", ABSENT), title="MixLoRA"),
        In("seen", labels=("MixLoRA", "16", "4", ABSENT)),
    ),
    _choice(
        "straight_through",
        "router_grad=straight_through",
        f"adapter.router_grad=straight_through {_folder('straight-through')}",
        "trained routers",
    ),
    _choice(
        "pool_prompt",
        "pool=prompt",
        f"routing.pool=prompt {_folder('pool-prompt')}",
        "selection without the answer",
    ),
    _choice(
        "cfs_released",
        "cfs=released",
        f"adapter.cfs=released {_folder('cfs-released')}",
        "CFS as in the published code",
    ),
    _without_cfs(16, 4, *_changed("cfs=none"), why="selection of B without A"),
    _choice("task_routing", "routing=task", "routing=task", "selection by the task's definition"),
    _routing("random", In("table2", (1007.40, 49.12), ("MixLoRA", "Random", "32", "4"), "Random routing")),
    _mixlora(
        *(32, 4),
        In("table1", (1509.61, 40.42, 49.18, 36.69, 91.40, 59.27, 87.68, 78.48, 63.30)),
        # Not `routing_instance`: that is the same training, and one cell serves both tables.
        In("table2", (1509.61, 63.30), ("MixLoRA", "Instance", "32", "4"), "Instance routing"),
        In("seen", labels=("MixLoRA", "32", "4", ABSENT)),
        rate="5e-4",
    ),
    _without_cfs(32, 4),
    replace(_routing("instance"), settings="", tables=()),
    _routing("task", In("table2", (1381.87, 61.75), ("MixLoRA", "Task", "32", "4"), "Task routing")),
    _mixlora(16, 8, In("table1", (1485.26, 39.92, 52.70, 40.74, 92.85, 53.96, 82.95, 75.31, 62.63))),
    _without_cfs(16, 8),
    _mixlora(
        *(32, 8),
        In("table1", (1485.48, 40.02, 51.15, 37.77, 91.12, 60.25, 86.64, 78.87, 63.69)),
        rate="5e-4",
    ),
    _without_cfs(32, 8),
    _control("lora_r4", "LoRA r=4", "LoRA", ABSENT, "4"),
    _control("lora_r16", "LoRA r=16", "LoRA", ABSENT, "16"),
    _control("mixlora_e16_r4", "MixLoRA E=16 r=4", "MixLoRA", "16", "4"),
    _control("task_routing", "MixLoRA E=16 r=4 routing=task", "MixLoRA, routing=task", "16", "4"),
    replace(
        _control("mixlora_e16_r4", "mixlora_plus E=16 r=4", "mixlora_plus", "16", "4"),
        name="control_plus",
        settings=f"{_PLUS} output_dir=runs/mini/control-plus-seed${{seed}}",
    ),
    _study("lora_r4", "LoRA r=4", "lora_r4"),
    _study("lora_r16", "LoRA r=16", "lora_r16"),
    _study("task", "MixLoRA, by task, tied", "task_routing", "adapter.pairing=tied"),
    _study("plus", "mixlora_plus", "mixlora_e16_r4", _PLUS),
)


Pair = tuple[str, str, str]
"""Two rows whose difference, the first minus the second, is tested; and why."""


@dataclass(frozen=True)
class Layout:
    """One table, but for its rows."""

    title: str
    headings: tuple[str, ...]
    """Of the columns that say what a row is."""
    pairs: tuple[Pair, ...]
    columns: tuple[str, ...] = ()
    """Of these benchmarks or means alone; () = all."""
    on_seen_tasks: bool = False
    """Whether held-out instances of the six seen tasks are scored, not the unseen benchmarks."""
    of_every_task: bool = False
    """Whether all seen tasks are answered then, so that the loss is about them all."""


_MODEL = ("Model", "Factors", "Rank")
_CHOICES = tuple((row.name, "mixlora_e16_r4", row.why) for row in ROWS if row.why)
_SAME_RANK, _SAME_SIZE = "the same rank", "the same number of trained parameters"
_WORTH = "is the routing worth anything"

_STUDY_PAIRS: tuple[Pair, ...] = (
    ("study_plus", "study_lora_r16", _SAME_SIZE),
    ("study_plus", "study_lora_r4", _SAME_RANK),
    ("study_plus", "study_task", "instance or task"),
    ("study_task", "study_lora_r16", _SAME_SIZE),
    ("study_task", "study_lora_r4", _SAME_RANK),
)

TABLES: dict[str, Layout] = {
    "table1": Layout(
        "Table 1: zero-shot evaluation on the unseen benchmarks",
        _MODEL,
        (
            *(
                (f"mixlora_e{factors}_r{rank}", f"lora_r{rank}", _SAME_RANK)
                for factors, rank in ((16, 4), (16, 2), (16, 8), (32, 2), (32, 4), (32, 8))
            ),
            ("mixlora_e16_r4", "lora_r16", _SAME_SIZE),
            ("mixlora_e16_r2", "lora_r32", "a far higher rank (the paper's example)"),
        ),
    ),
    "table2": Layout(
        "Table 2: how factors are selected",
        ("Model", "Routing", "Factors", "Rank"),
        (
            ("mixlora_e32_r4", "routing_random", _WORTH),
            ("mixlora_e32_r4", "routing_task", "instance or task"),
            ("routing_task", "routing_random", _WORTH),
        ),
        ("MME", "MMAvg"),
    ),
    "table3": Layout(
        "Table 3: held-out instances of six seen tasks",
        _MODEL,
        (
            ("lora_r4", "specialist_lora_r4", "what joint training costs LoRA"),
            ("lora_r16", "specialist_lora_r16", "what joint training costs LoRA"),
            ("mixlora_e16_r4", "specialist_lora_r4", "what joint training costs MixLoRA"),
            ("mixlora_e16_r4", "lora_r4", _SAME_RANK),
            ("mixlora_e16_r4", "lora_r16", _SAME_SIZE),
        ),
        on_seen_tasks=True,
    ),
    "figure4": Layout(
        "Figure 4: with and without conditional factor selection",
        (*_MODEL, "CFS"),
        tuple(
            (f"mixlora_e{factors}_r{rank}", f"mixlora_e{factors}_r{rank}_nocfs", "with and without CFS")
            for rank in (2, 4, 8)
            for factors in (16, 32)
        ),
        ("MMAvg",),
    ),
    "beyond": Layout(
        "Beyond the paper: MixLoRA E=16, r=4, one choice changed at a time, and LoRA of equal size",
        ("Model", "Changed"),
        (
            *_CHOICES,
            ("task_routing", "lora_r16", _SAME_SIZE),
            ("mixlora_e16_r4", "lora_r16", _SAME_SIZE),
            ("straight_through", "lora_equal", "about the same number of trained parameters"),
        ),
    ),
    "seen": Layout(
        "Beyond the paper: what each choice learns, held-out instances of six seen tasks",
        (*_MODEL, "Changed"),
        (
            *_CHOICES,
            ("task_routing", "lora_r4", _SAME_RANK),
            ("task_routing", "lora_r16", _SAME_SIZE),
            ("routing_task", "mixlora_e32_r4", "instance or task"),
            ("mixlora_e32_r4", "routing_random", _WORTH),
        ),
        on_seen_tasks=True,
    ),
    "control": Layout(
        "Beyond the paper: the six seen tasks alone, trained together on the specialists' own instances, as often",
        _MODEL,
        (
            ("control_lora_r4", "specialist_lora_r4", "what sharing an adapter costs LoRA"),
            ("control_lora_r16", "specialist_lora_r16", "what sharing an adapter costs LoRA"),
            ("control_mixlora_e16_r4", "specialist_lora_r4", "what sharing an adapter costs MixLoRA"),
            ("control_task_routing", "specialist_lora_r4", "what sharing costs with selection by task"),
            ("control_mixlora_e16_r4", "control_lora_r4", _SAME_RANK),
            ("control_task_routing", "control_lora_r4", _SAME_RANK),
            ("control_task_routing", "control_lora_r16", _SAME_SIZE),
            ("control_mixlora_e16_r4", "control_lora_r16", _SAME_SIZE),
            ("control_plus", "specialist_lora_r4", "what sharing costs mixlora_plus"),
            ("control_plus", "control_lora_r4", _SAME_RANK),
            ("control_plus", "control_lora_r16", _SAME_SIZE),
            ("control_plus", "control_task_routing", "instance or task"),
        ),
        on_seen_tasks=True,
    ),
    "study": Layout(
        "Beyond the paper: ways to select after 900 steps, held-out instances of the seen tasks",
        ("Trained",),
        _STUDY_PAIRS,
        on_seen_tasks=True,
        of_every_task=True,
    ),
    "study_unseen": Layout(
        "Beyond the paper: ways to select after 900 steps, the unseen benchmarks", ("Trained",), _STUDY_PAIRS
    ),
}


def rows_of(table: str) -> tuple[Row, ...]:
    """The rows of a table in its order, with the labels and titles that they have there."""
    placed = [(place, row) for row in ROWS for place in row.tables if place.table == table]
    return tuple(
        replace(row, labels=place.labels or row.labels, title=place.title or row.title)
        for place, row in sorted(placed, key=lambda each: each[0].last)
    )


def columns_of(table: str, scale: str) -> tuple[str, ...]:
    """Headings of a table's numbers: benchmarks and MMAvg, or the six seen tasks and AVG."""
    from mixlora_cli.benchmarks.registry import COLUMNS, MEAN_TITLE, seen_title

    if TABLES[table].on_seen_tasks:
        return (*map(seen_title, SEEN_TASKS[scale]), AVERAGE_TITLE)
    return TABLES[table].columns or (*COLUMNS, MEAN_TITLE)


def published(table: str, name: str, column: str) -> float | None:
    """The paper's number; None where it gives none. Figure 4's, which is only drawn, are rows of Table 1."""
    source = "table1" if table == "figure4" else table
    columns = columns_of(source, "paper")
    for row in ROWS:
        for place in row.tables:
            if (row.name, place.table) == (name, source) and place.numbers and column in columns:
                return place.numbers[columns.index(column)]
    return None


def register_experiments() -> None:
    """Store every row, and what rows share, as Hydra's `experiment=<scale>/<name>`, unless it is there."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.object_type import ObjectType

    store = ConfigStore.instance()
    for scale, name, base, settings in _experiments():
        group, _, last = f"experiment/{scale}/{name}".rpartition("/")
        if store.get_type(f"{group}/{last}.yaml") == ObjectType.NOT_FOUND:
            store.store(last, _node(scale, base, settings), group, package="_global_", provider="mixlora")


def _experiments() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    for scale, shared in SHARED.items():
        for name, (base, settings) in shared.items():
            yield scale, name, base, settings
        for row in ROWS:
            if scale == "mini" or not row.only_mini:
                own = row.mini if scale == "mini" else row.paper
                yield scale, row.name, row.base, f"{row.settings} {own}"


def _node(scale: str, base: tuple[str, ...], settings: str) -> Any:
    """A configuration with a defaults list, as it would stand in a YAML file."""
    from omegaconf import OmegaConf

    given = settings.replace("{scale}", scale).split()
    defaults: list[Any] = [f"/experiment/{scale}/{name}" for name in base]
    defaults += [
        {f"override /{each.partition('=')[0]}": each.partition("=")[2]} for each in given if _is_option(each)
    ]
    values = OmegaConf.from_dotlist([each for each in given if not _is_option(each)])
    return OmegaConf.merge({"defaults": [*defaults, "_self_"]}, values)


def _is_option(setting: str) -> bool:
    return setting.partition("=")[0] in _GROUPS
