"""Base, MixLoRA and static adapters on the same held-out examples: are answers right, how unlikely were true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from mixlora_cli.benchmarks.scorers import exact_match
from mixlora_cli.config import FitConfig
from mixlora_cli.data.encode import IGNORE, Item, encode, encode_prompts
from mixlora_cli.data.records import Record
from mixlora_cli.data.template import IMAGE_MARKER
from mixlora_cli.errors import cut
from mixlora_cli.models.generate import Generator, batches
from mixlora_cli.models.load import LoadedModel
from mixlora_cli.models.session import Session
from mixlora_cli.stats import SEED, Estimate, Floats, bootstrap_means, percentile, wilson
from mixlora_cli.tables import Cell, Table

BASE, MIXLORA, STATIC = "base", "mixlora", "static"
"""What is compared: no adapter, the MixLoRA adapter, the static LoRA made of it."""
NEAREST, ROUTED = "nearest centroid", "routed centroid"
"""Of several static LoRAs the one nearest to what MixLoRA selects, and the one that the request's text names."""
MEAN = ""
"""Stands for the mean over tasks where there is a number for each."""


@dataclass(frozen=True)
class HeldOutExample:
    """One held-out instance."""

    prompt: Item
    answered: Item
    """The prompt and its true answer; the answer alone has labels."""
    target: str
    text: str
    """What a router of texts reads."""


@dataclass(frozen=True)
class Answers:
    """What one model did with one task's examples, in their order."""

    right: Floats
    """(n,): 1 where the answer matches exactly, else 0."""
    losses: Floats
    """(n, 2): summed cross entropy of the true answer's tokens in nats, and how many these are."""


ByTask = Mapping[str, Answers]
Examples = Mapping[str, Sequence[HeldOutExample]]
"""By task."""


@dataclass(frozen=True)
class Measure:
    """A number of each adapter kind by task, and paired differences from MixLoRA; MEAN is among the tasks."""

    name: str
    unit: str
    rule: str
    kinds: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    """Of each static kind - mixlora, by task."""
    counts: Mapping[str, int]
    """Instances."""


def asked_text(record: Record) -> str:
    """What a gateway has of a request before a model runs: its system turn and questions, without pictures."""
    turns = [turn.text for turn in record.conversation[:-1] if turn.role != "gpt"]
    return "\n".join(turns).replace(IMAGE_MARKER, " ")


def make_examples(
    task: str, records: Sequence[Record], base: LoadedModel, on_error: Literal["stop", "skip"]
) -> list[HeldOutExample]:
    """Examples of one task, neither prompt nor answer truncated.

    Raises:
        UserError: a record cannot be encoded and `on_error` is "stop".
    """
    known = {record.index: record for record in records}
    examples = []
    for prompt in encode_prompts(records, base.chat, on_error, f"the held-out data of {task}").items:
        record = known[prompt.index]
        # Earlier answers of a conversation are part of the prompt, here as in generation.
        whole = list(encode(record, base.chat).input_ids)
        labels = [IGNORE] * prompt.length + whole[prompt.length :]
        answered = replace(prompt, input_ids=whole, labels=labels)
        target = record.conversation[-1].text.strip()
        examples.append(HeldOutExample(prompt, answered, target, asked_text(record)))
    return examples


def answer(session: Session, examples: Examples, settings: FitConfig) -> ByTask:
    """Let the session's model answer the examples of each task, and measure its loss on the true answers."""
    generator = Generator(
        session.model,
        session.base,
        session.features,
        settings.max_new_tokens,
        embeddings=session.embeddings,
    )
    found = {}
    with session.products():
        for task, asked in examples.items():
            answers: dict[int, str] = {}
            losses: dict[int, Floats] = {}
            for batch in batches([example.prompt for example in asked], settings.batch_size):
                answers |= zip((item.index for item in batch), generator(batch), strict=True)
            for batch in batches([example.answered for example in asked], settings.batch_size):
                losses |= zip((item.index for item in batch), _answer_losses(session, batch), strict=True)
            right = [exact_match(answers[each.prompt.index], each.target) for each in asked]
            summed = np.stack([losses[each.prompt.index] for each in asked])
            found[task] = Answers(np.array(right, dtype=np.float64), summed)
    return found


def answer_with(folder: Path, examples: Examples, session: Session, settings: FitConfig) -> ByTask:
    """What the static adapter of a folder answers."""
    session.put_on(folder)
    answers = answer(session, examples, settings)
    session.take_off()
    return answers


def put_together(
    examples: Examples, adapter_of: Mapping[int, str], answers: Mapping[str, tuple[Examples, ByTask]]
) -> ByTask:
    """The answers to all examples, each by its own adapter.

    Args:
        examples: all of them.
        adapter_of: name by index of the example's prompt.
        answers: by adapter: the examples that it answered, and its answers.
    """
    known = {
        (name, example.prompt.index): (by_task[task].right[place], by_task[task].losses[place])
        for name, (asked, by_task) in answers.items()
        for task, each in asked.items()
        for place, example in enumerate(each)
    }
    found = {}
    for task, asked in examples.items():
        right, losses = zip(*(known[adapter_of[e.prompt.index], e.prompt.index] for e in asked), strict=True)
        found[task] = Answers(np.array(right), np.stack(losses))
    return found


@torch.inference_mode()
def _answer_losses(session: Session, items: Sequence[Item]) -> Floats:
    """(B, 2): each row's summed cross entropy over its labels, and how many labels it has."""
    logits, predicts, targets = session.label_logits(items)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    summed = torch.zeros(len(items), device=losses.device).index_add(0, predicts.nonzero()[:, 0], losses)
    result: Floats = torch.stack([summed, predicts.sum(dim=1).float()], dim=1).double().cpu().numpy()
    return result


def compare(answers: Mapping[str, ByTask]) -> list[Measure]:
    """Exact match and answer loss of every kind, all on the same instances: answers by kind and task."""
    own, statics = answers[MIXLORA], [kind for kind in answers if kind not in (BASE, MIXLORA)]
    counts = {task: len(each.right) for task, each in own.items()}
    counts[MEAN] = sum(counts.values())
    gained, added = {}, {}
    for kind in statics:
        by_task = answers[kind]
        right = {task: by_task[task].right - each.right for task, each in own.items()}
        gained[kind] = {task: np.stack([r, np.ones(len(r))], axis=1) for task, r in right.items()}
        losses = {task: (by_task[task].losses, each.losses) for task, each in own.items()}
        added[kind] = {
            task: np.stack([static[:, 0] - mixlora[:, 0], static[:, 1]], axis=1)
            for task, (static, mixlora) in losses.items()
        }
    return [
        Measure(
            "exact match",
            "%",
            "accuracy: exact match after normalisation; Wilson interval; mean over tasks: bootstrap interval",
            {kind: _per_cent({task: a.right for task, a in each.items()}) for kind, each in answers.items()},
            {
                kind: {task: estimate.scaled(100) for task, estimate in _each_and_mean(rows).items()}
                for kind, rows in gained.items()
            },
            counts,
        ),
        Measure(
            "answer loss",
            "nats a token",
            "cross entropy of the true answer's tokens, summed over instances, by their number; bootstrap interval "
            "over instances within tasks",
            {
                kind: _each_and_mean({task: a.losses for task, a in each.items()}, proportion=False)
                for kind, each in answers.items()
            },
            {kind: _each_and_mean(rows, proportion=False) for kind, rows in added.items()},
            counts,
        ),
    ]


def _per_cent(right: Mapping[str, Floats]) -> dict[str, Estimate]:
    """Per cent right by task, and their mean, whose interval resamples the instances within each task."""
    each = {
        task: replace(wilson(int(r.sum()), len(r)).scaled(100), value=100 * int(r.sum()) / len(r))
        for task, r in right.items()
    }
    rng = np.random.default_rng(SEED)
    samples = [100 * bootstrap_means(right[task][:, None], rng)[:, 0] for task in sorted(right)]
    value = 100 * float(np.mean([right[task].mean() for task in sorted(right)]))
    return {**each, MEAN: percentile(value, np.mean(samples, axis=0))}


def _each_and_mean(rows: Mapping[str, Floats], proportion: bool = True) -> dict[str, Estimate]:
    each = {task: mean_over_tasks([values], proportion) for task, values in rows.items()}
    return {**each, MEAN: mean_over_tasks(list(rows.values()), proportion)}


def mean_over_tasks(tasks: Sequence[Floats], proportion: bool = True) -> Estimate:
    """Mean over tasks of a ratio of sums: each task is rows (n, 2) of numerator and denominator.

    The interval resamples the instances within each task. Rows of a `proportion` that are all one whole number have no
    spread to resample, which is no certainty: they are taken as a proportion that is 0 or 1 (Wilson).
    """
    value = float(np.mean([rows[:, 0].sum() / rows[:, 1].sum() for rows in tasks]))
    numerators = np.concatenate([rows[:, 0] for rows in tasks])
    if proportion and np.ptp(numerators) == 0 and numerators[0] in (-1.0, 0.0, 1.0):
        unseen, alike = wilson(0, len(numerators)).high or 0.0, float(numerators[0])
        return Estimate(value, max(alike - unseen, -1.0), min(alike + unseen, 1.0))
    rng = np.random.default_rng(SEED)
    samples = [bootstrap_means(rows, rng) for rows in tasks]
    return percentile(value, np.mean([sums[:, 0] / sums[:, 1] for sums in samples], axis=0))


def as_json(measure: Measure) -> dict[str, Any]:
    """What `export.json` holds of it."""

    def nested(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        tasks = {task: {**asdict(e), "n": measure.counts[task]} for task, e in estimates.items()}
        return {"mean": tasks.pop(MEAN), "tasks": tasks}

    return {
        "name": measure.name,
        "unit": measure.unit,
        "rule": measure.rule,
        "adapter kind": {kind: nested(estimates) for kind, estimates in measure.kinds.items()},
        **{f"{kind} - {MIXLORA}, paired": nested(each) for kind, each in measure.differences.items()},
    }


def task_table(measure: Measure) -> Table:
    """A row for each task and their mean: every adapter kind, and the paired difference."""
    digits = 1 if measure.unit == "%" else 3
    title = f"Held-out instances: {measure.name} ({measure.unit}) [95 % interval]"
    rows: list[tuple[Cell | str, ...]] = []
    for task in measure.counts:
        estimates = [each[task] for each in (*measure.kinds.values(), *measure.differences.values())]
        cells = [Cell(f"{e.value:.{digits}f}", e.interval_text(digits)) for e in estimates]
        rows.append((cut(task) if task != MEAN else "mean", *cells))
    differences = (f"{kind} - {MIXLORA}" for kind in measure.differences)
    return Table(title, ("task", *measure.kinds, *differences), tuple(rows), last_apart=True)


def kinds_table(measure: Measure) -> Table:
    """A row for each adapter kind: the mean over tasks, and the paired difference."""
    digits = 1 if measure.unit == "%" else 3
    tasks, count = len(measure.counts) - 1, measure.counts[MEAN]
    title = f"{count} held-out instances: {measure.name} ({measure.unit}), mean over {tasks} tasks [95 % interval]"
    rows: list[tuple[Cell | str, ...]] = []
    for kind, estimates in measure.kinds.items():
        found = [estimates[MEAN], *(each[MEAN] for k, each in measure.differences.items() if k == kind)]
        cells: list[Cell | str] = [Cell(f"{e.value:.{digits}f}", e.interval_text(digits)) for e in found]
        rows.append((kind, *cells, *([""] if len(cells) == 1 else [])))
    return Table(title, ("adapter", measure.name, f"- {MIXLORA}"), tuple(rows))
