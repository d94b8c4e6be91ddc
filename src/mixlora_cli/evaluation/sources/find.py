"""From a benchmark's name to its instances: what `eval.sources` says about it, else the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from mixlora_cli.errors import UserError, cut
from mixlora_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, in_paper_order
from mixlora_cli.evaluation.metrics import METRICS
from mixlora_cli.evaluation.sources.build import Instances, build
from mixlora_cli.evaluation.sources.files import existing
from mixlora_cli.evaluation.sources.origin import Origin, Row
from mixlora_cli.evaluation.sources.own import open_own, read_own
from mixlora_cli.evaluation.sources.photos import open_photos
from mixlora_cli.evaluation.sources.tables import from_hub, from_local

_YAML = (".yaml", ".yml")


def sourced(wanted: list[str] | None, sources: Mapping[str, str]) -> list[str]:
    """Which of the wanted benchmarks bring their own instances, in the paper's order; the others come with the data.

    Without a wish: those that have a source. Raises UserError for a source that no benchmark can have.
    """
    for name, path in sources.items():
        if path.endswith(_YAML):
            if name in BENCHMARKS:
                raise UserError(f"eval.sources.{name}={path}: {name} is built in; give your own another name")
        elif name not in BENCHMARKS or BENCHMARKS[name].origin is None:
            known = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.origin)
            raise UserError(
                f"eval.sources.{name}={path}: expected a YAML file that describes the benchmark {name}, or one of "
                f"the built-in names: {known}"
            )
    names = (
        list(sources) if wanted is None else [name for name in wanted if name in sources or _has_origin(name)]
    )
    return in_paper_order(names)


def _has_origin(name: str) -> bool:
    return name in BENCHMARKS and BENCHMARKS[name].origin is not None


def described(name: str, sources: Mapping[str, str]) -> Benchmark:
    """The benchmark's row of the table, or what its YAML file makes of it."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    own = read_own(existing(sources[name], f"eval.sources.{name}", "a YAML file"))
    return Benchmark(name, own.column or name, METRICS[own.scorer])


def open_benchmark(
    name: str,
    sources: Mapping[str, str],
    on_error: Literal["stop", "skip"] = "stop",
    ocr_tokens: bool = False,
) -> Instances:
    """Records and pictures of a benchmark, made on first use and kept in the cache.

    Raises UserError when they cannot be had: nothing there, the wrong thing, only a part of it, no network.
    """
    path = sources.get(name)
    if path is not None and path.endswith(_YAML):
        return open_own(existing(path, f"eval.sources.{name}", "a YAML file"), name)
    origin = BENCHMARKS[name].origin
    assert origin is not None
    if path is None and origin.by_hand:
        raise UserError(
            f"{name}: its pictures have to be fetched by hand; make {origin.by_hand}; "
            f"then give eval.sources={{{name}: <that folder>}}"
        )
    if path is None:
        return _built(name, None, origin, ocr_tokens)
    place = existing(path, f"eval.sources.{name}", origin.by_hand or _expected(origin))
    if origin.photos is not None:
        return open_photos(place, origin, name, on_error)
    return _built(name, place, origin, ocr_tokens)


def _expected(origin: Origin) -> str:
    return f"a copy of {origin.hub[0]} from the hub, or its {origin.split} split as parquet"


def _built(name: str, place: Path | None, origin: Origin, ocr_tokens: bool) -> Instances:
    table = from_hub(origin, name) if place is None else from_local(place, origin, name)
    rows, identity = table.rows, table.identity
    if origin.categories:
        rows = _of_its_categories(rows, origin, name)
        # What was built before other categories were refused is built again.
        identity = json.dumps([identity, origin.categories])
    return build(name, rows, identity, table.described, origin.ask, origin.picture, ocr_tokens)


def _of_its_categories(rows: Iterable[Row], origin: Origin, name: str) -> Iterator[Row]:
    """The rows. Raises UserError at one of another category: MME and POPE have the same columns."""
    for number, row in enumerate(rows):
        category = str(row["category"])
        if category not in origin.categories:
            others = [other for other in BENCHMARKS if category in _categories(other)]
            looks = f"; this looks like {others[0]}" if others else ""
            raise UserError(
                f"this is not {name}: row {number} has the category {cut(repr(category))}{looks}; expected "
                f"one of {', '.join(origin.categories)}"
            )
        yield row


def _categories(name: str) -> tuple[str, ...]:
    origin = BENCHMARKS[name].origin
    return () if origin is None else origin.categories
