"""Names that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

from mixlora_cli.config import InterferenceConfig
from mixlora_cli.training.run_folder import RunFolder

TASKS = ("counting", "naming things/now", "reading")

MakeRun = Callable[..., RunFolder]
MakeConfig = Callable[..., InterferenceConfig]
