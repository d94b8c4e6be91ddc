"""Benchmarks that do not come with the data, opened as `mixlora eval` opens them, to compare their pictures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mixlora_cli.config import AdapterConfig, CheckConfig, EvalConfig, GenerationConfig, RoutingConfig
from mixlora_cli.errors import UserError
from mixlora_cli.evaluation.benchmarks import FROM_THE_PAPER, PAPER, expand
from mixlora_cli.evaluation.instances import Chosen, choose_instances
from mixlora_cli.evaluation.sources.find import sourced

_KEYS = {f"eval.{name}": f"check.{name}" for name in ("benchmarks", "sources")}


def open_benchmarks(config: CheckConfig) -> list[Chosen]:
    """What `check.benchmarks` and `check.sources` name, each with its records and the folder of its pictures.

    Raises UserError for a name that is neither built in nor among the sources, for a source that is missing, wrong or
    partial, and where there is nothing to compare with.
    """
    options = config.check
    if not options.benchmarks and not options.sources:
        return []
    _require_training(config)
    sources = options.sources or {}
    wanted = None if options.benchmarks is None else expand(options.benchmarks)
    try:
        own = sourced(wanted, sources)
        _require_known(wanted or [], own)
        # one by one: `mixlora eval` refuses two benchmarks of one column, which does not matter here
        return [chosen for name in own for chosen in choose_instances(_evaluation(config, name))]
    except UserError as error:
        raise UserError(_renamed(str(error))) from error


def _require_training(config: CheckConfig) -> None:
    data = config.data
    key = "check.benchmarks" if config.check.benchmarks else "check.sources"
    if not config.check.leakage:
        raise UserError(
            f"{key} asks for a comparison with the training pictures, check.leakage=false for none"
        )
    if data.source == "json" and (data.train is None or data.images is None):
        missing = "data.train" if data.train is None else "data.images"
        raise UserError(
            f"{key}: no training pictures to compare with, {missing}=null; "
            "expected data.train=<annotation.json> and data.images=<folder>"
        )


def _require_known(wanted: Sequence[str], own: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in own]:
        near = difflib.get_close_matches(unknown[0], [*FROM_THE_PAPER, PAPER], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"check.benchmarks: unknown {', '.join(unknown)}.{hint} Expected {', '.join(FROM_THE_PAPER)}, {PAPER} "
            "(all of them) or a name in check.sources; the benchmarks of the data are compared without being named"
        )


def _evaluation(config: CheckConfig, name: str) -> EvalConfig:
    """The evaluation that would answer this benchmark alone."""
    sources = {key: path for key, path in (config.check.sources or {}).items() if key == name}
    return EvalConfig(
        model=config.model,
        adapter=AdapterConfig(name="none"),
        routing=RoutingConfig(name="instance"),
        data=config.data,
        eval=GenerationConfig(benchmarks=[name], sources=sources),
        output_dir=config.output_dir,
    )


def _renamed(message: str) -> str:
    """The keys as the user of `mixlora check` knows them."""
    for there, here in _KEYS.items():
        message = message.replace(there, here)
    return message
