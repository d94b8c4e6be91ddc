"""What messages show of names that users gave."""

from __future__ import annotations

import pytest

from mixlora_cli.errors import cut


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b", "a b"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 77 + "..."),
        (7, "7"),
        ("caf\u00e9 \ud83d", "caf\u00e9 \\ud83d"),
    ],
)
def test_names_are_cut_to_80_characters_of_unicode(name: object, shown: str) -> None:
    assert cut(name) == shown
