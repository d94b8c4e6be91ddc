"""Waits for somebody to import `peft`, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_peft_is_imported(action: Callable[[], None]) -> None:
    """Call `action` now if `peft` is imported, else right after its first import."""
    if "peft" in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _PeftFinder(action))


class _PeftFinder(MetaPathFinder):
    """Lets the usual finders find `peft` and adds one step to its loader."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.searching:
            return None
        # The search below asks every finder again, this one too.
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            # Only now: whoever merely asks whether peft is installed gets a spec, too.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        # On the instance: the loader keeps its class, which importlib.resources and inspect rely on.
        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
