"""One judge's verdicts by the question's key: nine bytes each, however long the replies are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from mixlora_cli.judging.identity import Identity
from mixlora_cli.judging.prompt import Verdict, read_verdict
from mixlora_cli.judging.replies import ReplyReader

Codes = NDArray[np.int8]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""A verdict's code is its place here."""
CODE = {verdict: code for code, verdict in enumerate(VERDICTS)}
YES = CODE["yes"]
MISSING = -1


class Verdicts:
    """What a file of replies says. Keys are kept as 64-bit hashes: a million of them meet with a chance of 1e-7."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file cannot be read."""
        reader = ReplyReader(path)
        keys, codes = array("q"), bytearray()
        for key, reply in reader:
            keys.append(hash(key))
            codes.append(CODE[read_verdict(reply)])
        self.identity: Identity | None = reader.identity
        hashes = np.frombuffer(keys, dtype=np.int64)
        order = np.argsort(
            hashes, kind="stable"
        )  # stable: of a key that is there twice the first reply counts
        self._keys = hashes[order]
        self._codes: Codes = np.frombuffer(codes, dtype=np.int8)[order]

    def of(self, keys: Sequence[str]) -> Codes:
        """Code of each key's verdict (keys,); MISSING where there is no reply."""
        if not len(self._keys):
            return np.full(len(keys), MISSING, dtype=np.int8)
        wanted = np.array([hash(key) for key in keys], dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found: Codes = np.where(self._keys[places] == wanted, self._codes[places], MISSING).astype(np.int8)
        return found
