"""A figure beside what it is compared with, and how both are taken in turn. Knows nothing of what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_ENOUGH_S, _LEAST = 40.0, 3


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    ``at_most`` bounds the ratio ours / theirs, or ours itself where there is nothing to compare with; None: the
    row is there to be known, nothing is promised. An ``aim`` is hoped for, not promised.
    """

    name: str
    ours: float
    unit: str
    theirs: float | None = None
    peer: str = ""  # what theirs is
    at_most: float | None = None
    aim: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.theirs is None:
            return None
        return self.ours / self.theirs if self.theirs else float("inf")

    @property
    def reached(self) -> bool | None:
        value = self.ours if self.theirs is None else self.ratio
        return None if self.at_most is None or value is None else value <= self.at_most

    @property
    def bound(self) -> str:
        """What is to be reached, in words."""
        if self.at_most is None:
            return ""
        limit = f"{self.at_most:.3g}" + (f" {self.unit}" if self.theirs is None else " x")
        return f"{'aim' if self.aim else 'at most'} {limit}"

    @property
    def verdict(self) -> str:
        return {None: "", True: "yes", False: "NO"}[self.reached]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ours": self.ours,
            "theirs": self.theirs,
            "peer": self.peer,
            "unit": self.unit,
            "ratio": self.ratio,
            "bound": self.at_most,
            "aim": self.aim,
            "reached": self.reached,
            "note": self.note,
        }


def shown(value: float | None, unit: str) -> str:
    """Return ``value`` with three figures, empty for None."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f} {unit}".rstrip()


def alternate(pairs: int, *takes: Callable[[], T], enough_s: float = _ENOUGH_S) -> list[list[T]]:
    """Call ``takes`` in turn, A B A B ..., and return what each returned; whatever drifts meanwhile meets all alike.

    On a busy host it makes do with fewer rounds, but never with less than three of those asked for.
    """
    values: list[list[T]] = [[] for _ in takes]
    end_s = time.monotonic() + enough_s
    for number in range(pairs):
        if number >= _LEAST and time.monotonic() > end_s:
            break
        for found, take in zip(values, takes, strict=True):
            found.append(take())
    return values


def spread(values: Sequence[float]) -> float:
    """Return the range of the middle half of ``values``, as a share of their median."""
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


@dataclass(frozen=True, slots=True)
class Line:
    """The straight line through points that misses them least: y = intercept + slope * x."""

    slope: float
    intercept: float
    r_squared: float

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        slope, intercept = statistics.linear_regression(xs, ys)
        mean = statistics.fmean(ys)
        missed = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
        varied = sum((y - mean) ** 2 for y in ys)
        return cls(slope, intercept, 1 - missed / varied if varied else 1.0)

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x
