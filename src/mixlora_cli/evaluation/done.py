"""Which instances are answered: one bit each, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

Key = tuple[str, str, int]
"""What identifies an instance: split, benchmark, place in its file."""


class Done(Set[Key]):
    """A set of keys that costs an eighth of a byte for each place up to the last one."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._bits: dict[tuple[str, str], bytearray] = {}
        self._count = 0
        for key in keys:
            self.add(key)

    def add(self, key: Key) -> bool:
        """Take up a key; whether it was new."""
        split, benchmark, index = key
        bits = self._bits.get((split, benchmark))
        if bits is None:
            bits = self._bits[split, benchmark] = bytearray()
        place, bit = index >> 3, 1 << (index & 7)
        if place >= len(bits):
            bits.extend(bytes(place + 1 - len(bits)))
        if bits[place] & bit:
            return False
        bits[place] |= bit
        self._count += 1
        return True

    def __contains__(self, key: object) -> bool:
        if not (isinstance(key, tuple) and len(key) == 3):
            return False
        split, benchmark, index = key
        bits = self._bits.get((split, benchmark), b"")
        return index >> 3 < len(bits) and bool(bits[index >> 3] >> (index & 7) & 1)

    def __iter__(self) -> Iterator[Key]:
        for (split, benchmark), bits in self._bits.items():
            for place, byte in enumerate(bits):
                yield from ((split, benchmark, 8 * place + bit) for bit in range(8) if byte >> bit & 1)

    def __len__(self) -> int:
        return self._count
