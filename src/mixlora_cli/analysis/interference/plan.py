"""What is to be measured, as far as it is known before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora_cli.analysis.interference.sample import Sample
from mixlora_cli.analysis.interference.subject import Measured
from mixlora_cli.config import InterferenceConfig
from mixlora_cli.models.task_routing import TaskRouting


@dataclass(frozen=True)
class Plan:
    """One measurement."""

    config: InterferenceConfig
    folder: Path
    """Where the results go."""
    measured: Measured
    samples: Sequence[Sample]
    routing: TaskRouting | None
    """Where the adapter selects by task."""
    request: Mapping[str, Any]
    """All that the gradients depend on but the base's weights; kept to recognise the measurement later."""
