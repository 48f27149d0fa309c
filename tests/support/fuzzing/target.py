"""What a target of fuzzing is: bytes from an enemy in, and an exception where a promise is broken.

A check never says merely "no crash": it holds what a parser returns against a second way to the same, or sends it round.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

Check = Callable[[bytes], None]

# A parser takes microseconds for the few thousand bytes that it gets here; with every line of it traced, some more.
MAX_CPU_S = 1.0
MAX_GROWTH_BYTES = 64 * 1024 * 1024


class Target(NamedTuple):
    """A parser, or several that read the same."""

    name: str
    opened: Callable[[], AbstractContextManager[Check]]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()  # that its format is made of
    longest: int = 4096  # bytes of an input
    cost: int = 1  # how much longer than a parser's one run of it takes: it gets so many fewer


def stateless(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """Return what opens a check that needs nothing around it."""
    return lambda: contextlib.nullcontext(check)


class TooMuch(AssertionError):
    """An input took more time or memory than any of its size may."""


@contextlib.contextmanager
def bounded(target: Target) -> Iterator[Check]:
    """Open a target's check, with the bounds on time and memory that hold for every input."""
    with target.opened() as check:

        def check_within_bounds(data: bytes) -> None:
            # Of processes, not of threads: what is asked may answer in another.
            before_s, before_bytes = time.process_time(), _peak_bytes()
            check(data)
            took_s, grew_bytes = time.process_time() - before_s, _peak_bytes() - before_bytes
            if took_s > MAX_CPU_S:
                raise TooMuch(f"{target.name}: {took_s:.2f} s of CPU for {len(data)} bytes")
            if grew_bytes > MAX_GROWTH_BYTES:
                raise TooMuch(f"{target.name}: {grew_bytes} bytes of memory for {len(data)} bytes")

        yield check_within_bounds


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Refused(NamedTuple):
    """A parser raised what it says that it raises."""

    error: Exception


def outcome(parse: Callable[..., Any], *arguments: Any, raises: tuple[type[Exception], ...]) -> Any:
    """Return what ``parse`` returns, Refused where it raises what it may; its sentence must be fit for a terminal."""
    try:
        return parse(*arguments)
    except raises as error:
        assert_printable(str(error))
        return Refused(error)


def assert_printable(text: str) -> None:
    """Fail where ``text`` could move a cursor, colour, hide or reorder what a terminal shows."""
    assert text.isprintable(), f"not printable: {text!r}"
