"""Fingerprints of pictures: equal bytes, and a perceptual hash that survives scaling and compression.

The perceptual hash is a difference hash (Krawetz, "Kind of Like That", 2013): the picture in 17 x 16 grey cells, one
bit for each pair of neighbours that says which is brighter; 256 bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console

from mixlora_cli.checking.memory import Memory
from mixlora_cli.data.images import MAX_PIXELS, PIXELS, as_shown, read_picture, stamp
from mixlora_cli.progress import with_bar

SIDE = 16
MIN_BITS = 16
"""A hash with fewer bits of either value is that of a plain picture, which looks like any other plain one."""
_BLOCK = 128  # pictures compared at once with all others
_LAYOUT = f"1 {PIXELS}"  # raise when the hashes below change

Hash = npt.NDArray[np.uint64]
"""(4,) words, 256 bits."""


@dataclass(frozen=True)
class Print:
    """One picture file."""

    bytes_digest: str
    """Hex digest of the file's bytes."""
    perceptual: str
    """Hex of the 256 bits."""

    @property
    def is_plain(self) -> bool:
        """Whether the perceptual hash says too little to be compared."""
        bits = int(self.perceptual, 16).bit_count()
        return not MIN_BITS <= bits <= SIDE * SIDE - MIN_BITS


def print_of(path: Path) -> Print | None:
    """Fingerprint of a picture; None where it cannot be opened."""
    try:
        content = read_picture(path)
        with Image.open(BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("L", (8 * SIDE, 8 * SIDE))  # JPEG: decode no more than is needed
            bits = difference_bits(as_shown(image, path))
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, ...; the picture check says what
        return None
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Print(digest, np.packbits(bits).tobytes().hex())


def difference_bits(image: Image.Image) -> npt.NDArray[np.bool_]:
    """(16, 16) bits: whether each grey cell is brighter than its left neighbour."""
    cells = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return cells[:, 1:] > cells[:, :-1]


def prints_of(paths: Iterable[Path], folder: Path, cache: Path, workers: int) -> dict[Path, Print]:
    """Fingerprints of all pictures that can be opened; those of an earlier call are remembered in `cache`."""
    memory = Memory(cache / "picture-prints", f"{folder} {_LAYOUT}")
    unique = list(dict.fromkeys(paths))
    names = {path: os.path.relpath(path, folder) for path in unique}
    stamps = {path: stamp(path) for path in unique}
    prints: dict[Path, Print] = {}
    for path in unique:
        known = memory.get(names[path], stamps[path])
        if known is not None:
            prints[path] = Print(*known)
    lacking = [path for path in unique if path not in prints]
    console = Console(stderr=True)
    with ThreadPoolExecutor(workers) as pool:  # decoding and hashing let other threads run
        results = zip(lacking, pool.map(print_of, lacking), strict=True)
        for path, found in with_bar(results, "comparing pictures", console, len(lacking)):
            mark = stamps[path]
            if found is not None and mark is not None:
                prints[path] = found
                memory.put(names[path], mark, (found.bytes_digest, found.perceptual))
    memory.save()
    return prints


def nearest(wanted: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """For each hash of `wanted` the position of the nearest one of `others` and the number of bits that differ.

    Every pair is compared; empty without `others`.
    """
    if not others:
        return []
    words = _words(others)
    results: list[tuple[int, int]] = []
    for start in range(0, len(wanted), _BLOCK):
        block = _words(wanted[start : start + _BLOCK])
        distances = np.zeros((len(block), len(words)), dtype=np.uint16)
        for word in range(words.shape[1]):
            distances += np.bitwise_count(block[:, word, None] ^ words[None, :, word])
        best = distances.argmin(axis=1)
        results += [
            (int(position), int(row[position])) for row, position in zip(distances, best, strict=True)
        ]
    return results


def _words(hashes: Sequence[str]) -> Hash:
    """(n, 4) words of n hex hashes."""
    joined = bytes.fromhex("".join(hashes))
    return np.frombuffer(joined, dtype=np.uint64).reshape(len(hashes), -1)
