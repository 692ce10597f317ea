"""Texts told apart by 64-bit hashes, where the texts of a million rows would be too much to hold."""

import hashlib
from array import array

from selfalign.core.identity import canonical

_FIRST_SLOTS = 1 << 10


def key_of(*texts: str) -> int:
    """A signed 64-bit hash of texts, the same in every process."""
    return int.from_bytes(hashlib.sha256(canonical([*texts])).digest()[:8], "big", signed=True)


class Keys:
    """A set of signed 64-bit hashes in 12 to 24 bytes each, half as much again while it grows; a `set` takes 100."""

    def __init__(self) -> None:
        # An open hash table, at most two thirds full; 0 is a free slot, and as a key kept apart.
        self._slots = array("q", bytes(8 * _FIRST_SLOTS))
        self._count, self._has_zero = 0, False

    def add(self, key: int) -> bool:
        """Whether the key is new."""
        if key == 0:
            new, self._has_zero = not self._has_zero, True
            return new
        slot = self._slot(key)
        if self._slots[slot]:
            return False
        self._slots[slot] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return True

    def _slot(self, key: int) -> int:
        """Where the key is, or belongs."""
        last = len(self._slots) - 1
        slot = key & last
        while self._slots[slot] not in (0, key):
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, self._slots = self._slots, array("q", bytes(16 * len(self._slots)))
        for key in filter(None, keys):
            self._slots[self._slot(key)] = key
