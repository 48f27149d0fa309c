"""Values out of bytes: an input decides what a structured case looks like, whoever made the input."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

NUMBERS = (0, 1, -1, 2, 255, 4095, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 10**30)
TEXTS = (
    "",
    "\0",
    "\x1b[31m",
    "\n",
    "a\u202eb",
    "\ud800",
    "\u00b2",
    "\u0663",
    "id",
    "/",
    "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+14:00",
    "1e999",
    "x" * 300,
)


class Dice:
    """Reads an input from its beginning; past its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def below(self, most: int) -> int:
        """Return a number from 0 to ``most`` - 1."""
        return int.from_bytes(self.take(1 if most <= 256 else 4), "little") % most

    def choose(self, among: Sequence[_T]) -> _T:
        """Return one of some."""
        return among[self.below(len(among))]

    def number(self) -> int:
        """Return a whole number, often one at an edge."""
        if self.below(2):
            return self.choose(NUMBERS)
        return int.from_bytes(self.take(8), "little", signed=True)

    def name(self, longest: int, *, without: bytes = b"\0") -> bytes:
        """Return some bytes as a user may have chosen them for a name."""
        return bytes(byte for byte in self.take(self.below(longest + 1)) if byte not in without)

    def text(self) -> str:
        """Return a text; half of a surrogate pair may be in it."""
        if self.below(2):
            return self.choose(TEXTS)
        return self.take(self.below(40)).decode("utf-8", "surrogateescape")

    def value(self, depth: int = 3) -> Any:
        """Return anything that JSON can say, and what only Python's reading of it can."""
        kind = self.below(10 if depth else 8)
        if kind < 4:
            return (None, True, False, float("inf"))[kind]
        if kind == 4:
            return self.number()
        if kind == 5:
            return self.number() / 8
        if kind in (6, 7):
            return self.text()
        if kind == 8:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        return {self.text(): self.value(depth - 1) for _ in range(self.below(4))}

    def altered(self, value: Any) -> Any:
        """Return a JSON value in which some of what is in it, at any depth, has become something else."""
        for _ in range(self.choose((1, 1, 2, 4, 8, 16))):
            value = self._altered_once(value)
        return value

    def _altered_once(self, value: Any) -> Any:
        if self.below(5) == 0 or not isinstance(value, (dict, list)) or not value:
            return self.value()
        if isinstance(value, list):
            at = self.below(len(value))
            return [*value[:at], self._altered_once(value[at]), *value[at + 1 :]]
        key = self.choose(sorted(value))
        if self.below(6) == 0:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: self._altered_once(value[key])}


def noise(count: int, size: int = 160) -> list[bytes]:
    """Return inputs that decide at random, the same each time."""
    chance = random.Random(count)
    return [chance.randbytes(size) for _ in range(count)]


def sendable(value: Any) -> Any:
    """Return a value as near to ``value`` as the wire lets through."""
    if isinstance(value, dict):
        return {sendable(key): sendable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [sendable(one) for one in value]
    if isinstance(value, float):
        return min(max(value, -1e308), 1e308)
    if isinstance(value, int):
        return min(max(value, -(2**63) + 1), 2**63 - 1) if not isinstance(value, bool) else value
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
