"""`rows("mnist")`: real rows as on the hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from foolbox_rows import foolbox_rows

Rows = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def rows() -> Rows:
    """`rows("mnist")`: rows as on the hub, pictures encoded."""
    return foolbox_rows
