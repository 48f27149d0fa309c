"""Inputs out of seeds, without a fuzzer: for ``make test``, and for a Python that has no wheel of atheris."""

from __future__ import annotations

import random
from typing import NamedTuple

KINDS = ("put", "insert", "drop", "copy", "flip", "word")


class Change(NamedTuple):
    """One change to an input; ``place`` and ``size`` are numbers of any size, ``data`` bytes to put somewhere."""

    kind: str
    place: int
    size: int
    data: bytes


def changed(seed: bytes, changes: list[Change], words: tuple[bytes, ...], longest: int) -> bytes:
    """Return ``seed`` after some changes."""
    data = seed
    for change in changes:
        data = _change(data, change, words)[:longest]
    return data


def _change(data: bytes, change: Change, words: tuple[bytes, ...]) -> bytes:
    at = change.place % (len(data) + 1)
    size = change.size % 32 + 1
    match change.kind:
        case "put":
            return data[:at] + change.data + data[at + len(change.data) :]
        case "insert":
            return data[:at] + change.data + data[at:]
        case "drop":
            return data[:at] + data[at + size :]
        case "copy":
            return data[:at] + data[at : at + size] * (change.size % 4 + 1) + data[at:]
        case "flip" if at < len(data):
            return data[:at] + bytes((data[at] ^ 1 << change.size % 8,)) + data[at + 1 :]
        case "word" if words:
            return data[:at] + words[change.size % len(words)] + data[at:]
    return data


def random_changes(chance: random.Random) -> list[Change]:
    """Return a few changes."""
    return [
        Change(
            chance.choice(KINDS),
            chance.randrange(chance.choice((12, 2**16))),  # it begins with what decides about all the rest
            chance.randrange(2**16),
            chance.randbytes(chance.choice((1, 1, 2, 4, 9))),
        )
        for _ in range(chance.choice((1, 1, 2, 3, 5, 8)))
    ]
