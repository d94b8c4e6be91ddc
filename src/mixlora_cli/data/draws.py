"""A seed of an instance's own for routing=random, so that neither its neighbours nor its turn change its factors."""

from __future__ import annotations

import hashlib
from array import array

from mixlora_cli.data.packed import Item
from mixlora_cli.data.pictures import read_picture


def draw_seed(seed: int, item: Item) -> int:
    """63 bits of a digest of `seed`, the prompt's tokens and the bytes of its picture file.

    Raises OSError when the picture cannot be read.
    """
    digest = hashlib.sha256(f"{seed} {item.length} ".encode())
    digest.update(array("q", item.input_ids).tobytes())
    if item.image is not None:
        digest.update(read_picture(item.image))
    return int.from_bytes(digest.digest()[:8], "big") >> 1
