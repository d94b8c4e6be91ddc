"""`mixlora interference`: gradients of every task in, scores, figures and a comparison out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from mixlora_cli.analysis.interference.comparison import check_comparable, compare_scores, open_other
from mixlora_cli.analysis.interference.draw import choose_layers, draw_all
from mixlora_cli.analysis.interference.files import NUMBER_FORMAT, Stored, read_stored
from mixlora_cli.analysis.interference.measured import cover, read_steps, summarise_steps
from mixlora_cli.analysis.interference.plan import Plan
from mixlora_cli.analysis.interference.report import print_comparison, print_result, write_result
from mixlora_cli.analysis.interference.sample import Sample, draw_samples
from mixlora_cli.analysis.interference.subject import Measured, find_measured
from mixlora_cli.analysis.interference.summary import averages, summarise
from mixlora_cli.config import InterferenceConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.fingerprint import adapter_digest
from mixlora_cli.launch.team import Team, joined
from mixlora_cli.models.prepared import require_prepared
from mixlora_cli.models.task_routing import TaskRouting, routing_of_adapter
from mixlora_cli.output import alone_in

_PATIENCE = timedelta(days=2)
"""Processes wait for one another's tasks, which may take hours."""


def interference(config: InterferenceConfig) -> Path:
    """Measure, or take what was measured before with the same settings; write, draw and print it.

    Returns:
        The output folder.

    Raises:
        UserError: there is no adapter, task or instance to measure, or the output folder holds another measurement.
            Found before a model is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    with alone_in(folder, "measurement"), joined(_PATIENCE) as team:
        console = Console(stderr=True, quiet=not team.leads, soft_wrap=True)
        stored = _stored(folder) if config.draw_only else _measured(config, folder, team, console)
        if team.leads:
            _report(config, folder, stored, console)
    return folder


def _stored(folder: Path) -> Stored:
    stored = read_stored(folder)
    if stored is None:
        raise UserError(
            f"draw_only=true: nothing was measured in {folder}; give its output_dir=, or draw_only=false to measure"
        )
    return stored


def _measured(config: InterferenceConfig, folder: Path, team: Team, console: Console) -> Stored:
    """What the folder holds, if it is what is asked for; else a new measurement, kept there."""
    measured = find_measured(config)
    require_prepared(measured.subject.model)
    with team.leader_first():
        samples = draw_samples(config)
    routing = routing_of_adapter(measured.folder, config.data, [sample.task for sample in samples])
    request = _request(config, measured, samples, routing)
    from mixlora_cli.training.precision import number_format  # heavy, and mistakes need not wait for it

    here = number_format(request["precision"])
    if config.compare is not None:
        check_comparable(config.compare, open_other(config.compare), dict(request["samples"]), here)
    stored = read_stored(folder)
    asked = {**request, NUMBER_FORMAT: here}
    before = (
        None if stored is None else {**stored.about["request"], NUMBER_FORMAT: stored.about[NUMBER_FORMAT]}
    )
    if stored is not None and before == asked:
        if _has_steps(config, folder, stored):
            console.print("measured before with these settings: drawing from the stored scores")
            return stored
    elif stored is not None and not config.overwrite:
        raise UserError(
            f"output_dir={folder} holds a measurement with other {_changed(before or {}, asked)}; give "
            "another output_dir=, or overwrite=true to replace it"
        )
    _say_what_to_know(config, measured, here, console)
    from mixlora_cli.analysis.interference.measure import measure  # what loads the model

    return measure(Plan(config, folder, measured, samples, routing, request), team, console)


def _request(
    config: InterferenceConfig, measured: Measured, samples: Sequence[Sample], routing: TaskRouting | None
) -> dict[str, Any]:
    """All that the gradients depend on, as far as it is known without the model. Plain values, as JSON gives them."""
    settings = config.interference
    run_precision = measured.subject.precision
    return {
        "adapter": adapter_digest(measured.folder),
        "model": asdict(measured.subject.model),
        "precision": run_precision if settings.precision == "run" else settings.precision,
        "split": settings.split,
        "cache_features": settings.cache_features,
        "max_length": config.data.max_length,
        "seed": config.seed,
        "definitions": None if routing is None else dict(sorted(routing.definitions.items())),
        "samples": [[sample.task, sample.digest] for sample in samples],
    }


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = {
        "samples": "tasks, instances or batches",
        "definitions": "task definitions",
        NUMBER_FORMAT: "precision",
    }
    return ", ".join(names.get(key, key) for key in new if old.get(key) != new[key]) or "settings"


def _has_steps(config: InterferenceConfig, folder: Path, stored: Stored) -> bool:
    """Whether the real steps that are asked for were taken, or none are."""
    available = min(len(products.norms) for products in stored.measurement.products)
    return config.measure.lambdas is None or cover(read_steps(folder), config.measure, available)


def _report(config: InterferenceConfig, folder: Path, stored: Stored, console: Console) -> None:
    """Write everything that follows from the stored products; they come first, `interference.json` last."""
    other = None if config.compare is None else open_other(config.compare)
    if other is not None:
        check_comparable(str(config.compare), other, stored.samples, stored.about[NUMBER_FORMAT])
    choose_layers(stored.measurement, config.draw.layers)
    average = averages(stored.measurement)
    content = summarise(stored.measurement, average, config.interference.near_zero)
    steps = read_steps(folder)
    if steps is not None:
        content["measured"] = summarise_steps(steps)
    if other is not None:
        compared = compare_scores(average, averages(other.measurement))
        content["compare"] = {"with": other.label, "folder": config.compare, "scores": compared}
    write_result(folder, stored.about, content)
    draw_all([stored], folder, config.draw)
    print_result(console, stored.label, content, average, config.draw.score)
    if other is not None:
        draw_all([other, stored], folder, config.draw)
        print_comparison(console, stored.label, other.label, compared)
    console.print(f"scores and figures are in {folder}", markup=False, highlight=False)


def _say_what_to_know(config: InterferenceConfig, measured: Measured, dtype: str, console: Console) -> None:
    notes = []
    if measured.trained_on not in (None, config.data.source):
        notes.append(
            f"this run was trained on data={measured.trained_on}, its gradients are taken on {config.data.name}"
        )
    if measured.routing == "random":
        notes.append(
            f"routing=random: each batch draws its factors with seed={config.seed}, alike in both passes"
        )
    if config.interference.cache_features and dtype == "float32":
        notes.append(
            "pictures are features of the frozen tower, kept in fp16, as a training with "
            "train.cache_features=true reads them, too; "
            "interference.cache_features=false takes them from the pixels in fp32"
        )
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
