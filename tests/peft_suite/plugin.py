"""Runs PEFT's tests on MixLoRA: LoRA's cases become its own, exceptions are counted.

A failure that is the method's own refusal, or that looks for LoRA's own tensors, is an exception by design
(`exceptions.py`). How often each test is excepted, and why, is compared with `expected.json`.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import peft
import pytest
import standin
from exceptions import NOT_OURS, reason_of
from peft import PeftConfig

from mixlora_cli import MixLoraConfig

RESULTS = "PEFT_SUITE_RESULTS"
"""Environment variable: where to write how often each test function ended how."""
MESSAGE = 400
"""Letters of a failure that are kept."""
MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")


def _stub_diffusers() -> None:
    """PEFT's tests import one class of diffusers, to tell its pipelines from models."""
    stub = types.ModuleType("diffusers")
    stub.__spec__ = ModuleSpec("diffusers", None)
    stub.__version__ = "0"  # type: ignore[attr-defined]
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stub


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of PEFT's own")
    _stub_diffusers()
    standin.count_layers()
    peft.LoraConfig = standin.MixLoraAsLora  # type: ignore[misc]
    config.stash[OUTCOMES] = Counter()
    config.stash[FAILURES] = []


OUTCOMES = pytest.StashKey[Counter[tuple[str, str]]]()
FAILURES = pytest.StashKey[list[str]]()


class _Everything(dict[str, int]):
    """PEFT's tests go online once for each model unless it is in their table; here everything is."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


@pytest.fixture(scope="session", autouse=True)
def stay_offline(request: pytest.FixtureRequest) -> None:
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Everything()


# -- which cases --------------------------------------------------------------------------------------


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


def _params(item: pytest.Item) -> list[Any]:
    callspec = getattr(item, "callspec", None)
    return list(_flat(list(callspec.params.values()))) if callspec else []


def _is_ours(value: Any) -> bool:
    return isinstance(value, MixLoraConfig) or (isinstance(value, type) and issubclass(value, MixLoraConfig))


def _is_foreign(value: Any) -> bool:
    """Another method's configuration, or the class of one."""
    if _is_ours(value):
        return False
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def _left_out(item: pytest.Item) -> bool:
    """Parametrised with another method, or with options that LoRA alone has."""
    values = _params(item)
    if any(map(_is_foreign, values)):
        return True
    options = [value for value in values if isinstance(value, dict)]
    return any(map(_is_ours, values)) and any(standin.lora_only(fields) for fields in options)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(left_out)
        items[:] = [item for item in items if item not in kept]


# -- what came of them --------------------------------------------------------------------------------


def _function(item: pytest.Item) -> str:
    """file::Class::function, without the case."""
    return item.nodeid.split("[")[0].rsplit("/", maxsplit=1)[-1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    standin.uses = 0
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        outcome = _outcome(item, call, report)
        item.config.stash[OUTCOMES][(_function(item), outcome)] += 1
        if outcome == "failed" and call.excinfo is not None:
            item.config.stash[FAILURES].append(f"{item.nodeid}: {call.excinfo.exconly()[:MESSAGE]}")
        if report.failed and outcome != "failed":
            report.outcome = "skipped"
            report.wasxfail = outcome
    return report


def _outcome(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> str:
    if report.skipped:
        return "skipped"
    concerned = standin.uses > 0 or any(map(_is_ours, _params(item)))
    if not concerned:
        return NOT_OURS
    if report.passed:
        return "passed"
    assert call.excinfo is not None
    return reason_of(_function(item), call.excinfo) or "failed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get(RESULTS)
    if path:
        rows: dict[str, dict[str, int]] = {}
        for (function, outcome), count in sorted(session.config.stash[OUTCOMES].items()):
            rows.setdefault(function, {})[outcome] = count
        results = {"outcomes": rows, "failures": session.config.stash[FAILURES]}
        Path(path).write_text(json.dumps(results, indent=1))
