"""The paper's tables as data: their rows in its order, each with the experiment that makes it, and their columns.

A row is an experiment of `conf/experiment/<scale>`. What is run and what is printed come from this one table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mixlora_cli.benchmarks.registry import COLUMNS, MEAN_TITLE
from mixlora_cli.config.table import TableName

Scale = Literal["mini", "paper"]
AVERAGE_TITLE = "AVG"
ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One model of a table."""

    experiment: str
    """Name in `conf/experiment/<scale>`."""
    labels: tuple[str, ...]
    """Its cells under the layout's `headings`."""
    title: str
    """The labels in one, for notes: "LoRA r=4"."""
    per_task: bool = False
    """Specialists: one training for each of the six tasks."""


@dataclass(frozen=True)
class Pair:
    """Two rows whose difference is tested."""

    left: str
    """Experiment; the difference is `left` minus `right`."""
    right: str
    why: str


@dataclass(frozen=True)
class Layout:
    """One table."""

    name: TableName
    title: str
    headings: tuple[str, ...]
    """Of the columns that say what a row is."""
    columns: tuple[str, ...] | None
    """Of the numbers; None: the six seen tasks and their average."""
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def on_seen_tasks(self) -> bool:
        """Whether held-out instances of training tasks are scored, not the unseen benchmarks."""
        return self.columns is None

    def row(self, experiment: str) -> Row:
        """The row of this experiment."""
        return next(row for row in self.rows if row.experiment == experiment)


_SIZES = tuple((factors, rank) for rank in (2, 4, 8) for factors in (16, 32))
"""(E, r) in Table 1's order."""
_ALL = (*COLUMNS, MEAN_TITLE)
_MODEL = ("Model", "Factors", "Rank")


def _lora(rank: int) -> Row:
    return Row(f"lora_r{rank}", ("LoRA", ABSENT, str(rank)), f"LoRA r={rank}")


def _specialist(rank: int) -> Row:
    labels = ("LoRA_Specialist", ABSENT, str(rank))
    return Row(f"specialist_lora_r{rank}", labels, f"LoRA specialists r={rank}", per_task=True)


def _routing(experiment: str, routing: str) -> Row:
    return Row(experiment, ("MixLoRA", routing, "32", "4"), f"{routing} routing")


def _with_cfs(factors: int, rank: int, suffix: str, cfs: str) -> Row:
    labels = ("MixLoRA", str(factors), str(rank), cfs)
    return Row(f"mixlora_e{factors}_r{rank}{suffix}", labels, f"E={factors} r={rank} {cfs} CFS")


def _mixlora(factors: int, rank: int) -> Row:
    labels = ("MixLoRA", str(factors), str(rank))
    return Row(f"mixlora_e{factors}_r{rank}", labels, f"MixLoRA E={factors} r={rank}")


_CHOICES = {
    "straight_through": ("router_grad=straight_through", "trained routers"),
    "pool_prompt": ("pool=prompt", "selection without the answer"),
    "cfs_released": ("cfs=released", "CFS as in the published code"),
    "mixlora_e16_r4_nocfs": ("cfs=none", "selection of B without A"),
    "task_routing": ("routing=task", "selection by the task's definition"),
}
"""Experiments that change one choice of MixLoRA E=16, r=4: the setting, and what it means."""
_PLAIN = Row("mixlora_e16_r4", ("MixLoRA",), "MixLoRA")
"""What they change, where the size need not be said."""


def _with(row: Row, what: str, experiment: str = "") -> Row:
    """The row with one more label, of another experiment where one is given."""
    title = row.title if what == ABSENT else f"{row.title} {what}"
    return Row(experiment or row.experiment, (*row.labels, what), title)


TABLE_1 = Layout(
    "table1",
    "Table 1: zero-shot evaluation on the unseen benchmarks",
    _MODEL,
    _ALL,
    (
        Row("llava_align", ("LLaVA_Align", ABSENT, ABSENT), "LLaVA_Align"),
        Row("llava_ft", ("LLaVA_FT", ABSENT, ABSENT), "LLaVA_FT"),
        *(_lora(rank) for rank in (2, 4, 8, 16, 32)),
        *(_mixlora(*size) for size in _SIZES),
    ),
    (
        *(
            Pair(f"mixlora_e{factors}_r{rank}", f"lora_r{rank}", "the same rank")
            for factors, rank in ((16, 4), (16, 2), (16, 8), (32, 2), (32, 4), (32, 8))
        ),
        Pair("mixlora_e16_r4", "lora_r16", "the same number of trained parameters"),
        Pair("mixlora_e16_r2", "lora_r32", "a far higher rank (the paper's example)"),
    ),
)

TABLE_2 = Layout(
    "table2",
    "Table 2: how factors are selected",
    ("Model", "Routing", "Factors", "Rank"),
    ("MME", MEAN_TITLE),
    (
        _routing("routing_random", "Random"),
        # Not `routing_instance`: that is the same training, and one cell serves both tables.
        _routing("mixlora_e32_r4", "Instance"),
        _routing("routing_task", "Task"),
    ),
    (
        Pair("mixlora_e32_r4", "routing_random", "is the routing worth anything"),
        Pair("mixlora_e32_r4", "routing_task", "instance or task"),
        Pair("routing_task", "routing_random", "is the routing worth anything"),
    ),
)

TABLE_3 = Layout(
    "table3",
    "Table 3: held-out instances of six seen tasks",
    _MODEL,
    None,
    (
        _specialist(4),
        _specialist(16),
        _lora(4),
        _lora(16),
        _mixlora(16, 4),
    ),
    (
        Pair("lora_r4", "specialist_lora_r4", "what joint training costs LoRA"),
        Pair("lora_r16", "specialist_lora_r16", "what joint training costs LoRA"),
        Pair("mixlora_e16_r4", "specialist_lora_r4", "what joint training costs MixLoRA"),
        Pair("mixlora_e16_r4", "lora_r4", "the same rank"),
        Pair("mixlora_e16_r4", "lora_r16", "the same number of trained parameters"),
    ),
)

FIGURE_4 = Layout(
    "figure4",
    "Figure 4: with and without conditional factor selection",
    (*_MODEL, "CFS"),
    (MEAN_TITLE,),
    tuple(
        _with_cfs(factors, rank, suffix, cfs)
        for factors, rank in _SIZES
        for suffix, cfs in (("", "with"), ("_nocfs", "without"))
    ),
    tuple(
        Pair(f"mixlora_e{factors}_r{rank}", f"mixlora_e{factors}_r{rank}_nocfs", "with and without CFS")
        for factors, rank in _SIZES
    ),
)

BEYOND = Layout(
    "beyond",
    "Beyond the paper: MixLoRA E=16, r=4, one choice changed at a time, and LoRA of equal size",
    ("Model", "Changed"),
    _ALL,
    (
        _with(_PLAIN, ABSENT),
        *(_with(_PLAIN, setting, experiment) for experiment, (setting, _) in _CHOICES.items()),
        _with(Row("lora_r16", ("LoRA r=16",), "LoRA r=16"), "as many trained parameters"),
        _with(Row("lora_equal", ("LoRA r=63",), "LoRA r=63"), "as many parameters, routers counted"),
    ),
    (
        *(Pair(experiment, "mixlora_e16_r4", why) for experiment, (_, why) in _CHOICES.items()),
        Pair("task_routing", "lora_r16", "the same number of trained parameters"),
        Pair("mixlora_e16_r4", "lora_r16", "the same number of trained parameters"),
        Pair("straight_through", "lora_equal", "about the same number of trained parameters"),
    ),
)

SEEN = Layout(
    "seen",
    "Beyond the paper: what each choice learns, held-out instances of six seen tasks",
    ("Model", "Factors", "Rank", "Changed"),
    None,
    (
        *(_with(row, ABSENT) for row in (_lora(4), _lora(16))),
        _with(_lora(63), ABSENT, "lora_equal"),
        _with(_mixlora(16, 4), ABSENT),
        *(_with(_mixlora(16, 4), setting, experiment) for experiment, (setting, _) in _CHOICES.items()),
        _with(_mixlora(32, 4), "routing=random", "routing_random"),
        _with(_mixlora(32, 4), ABSENT),
        _with(_mixlora(32, 4), "routing=task", "routing_task"),
    ),
    (
        *(Pair(experiment, "mixlora_e16_r4", why) for experiment, (_, why) in _CHOICES.items()),
        Pair("task_routing", "lora_r4", "the same rank"),
        Pair("task_routing", "lora_r16", "the same number of trained parameters"),
        Pair("routing_task", "mixlora_e32_r4", "instance or task"),
        Pair("mixlora_e32_r4", "routing_random", "is the routing worth anything"),
    ),
)

CONTROL = Layout(
    "control",
    "Beyond the paper: the six seen tasks alone, trained together on the specialists' own instances, as often",
    _MODEL,
    None,
    (
        _specialist(4),
        _specialist(16),
        *(
            replace(row, experiment=f"control_{row.experiment}")
            for row in (_lora(4), _lora(16), _mixlora(16, 4))
        ),
        Row("control_task_routing", ("MixLoRA, routing=task", "16", "4"), "MixLoRA E=16 r=4 routing=task"),
    ),
    (
        Pair("control_lora_r4", "specialist_lora_r4", "what sharing an adapter costs LoRA"),
        Pair("control_lora_r16", "specialist_lora_r16", "what sharing an adapter costs LoRA"),
        Pair("control_mixlora_e16_r4", "specialist_lora_r4", "what sharing an adapter costs MixLoRA"),
        Pair("control_task_routing", "specialist_lora_r4", "what sharing costs with selection by task"),
        Pair("control_mixlora_e16_r4", "control_lora_r4", "the same rank"),
        Pair("control_task_routing", "control_lora_r4", "the same rank"),
        Pair("control_task_routing", "control_lora_r16", "the same number of trained parameters"),
        Pair("control_mixlora_e16_r4", "control_lora_r16", "the same number of trained parameters"),
    ),
)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (TABLE_1, TABLE_2, TABLE_3, FIGURE_4, BEYOND, SEEN, CONTROL)
}
