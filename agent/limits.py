"""How many workers a script may have: what it asks for, what this process may use, and what its surroundings allow."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from agent import session

MAX_WORKERS_VARIABLE = "REAPER_MAX_WORKERS"  # what `reaperctl run` gives a script that is to do with less
DEFAULT_MAX_WORKERS = 4  # where no daemon says otherwise: as [sessions] max_workers

Estimator = TypeVar("Estimator")


def usable_cpus(root: str = "/") -> int:
    """Return how many CPUs this process may keep busy, at least 1.

    The least of its affinity (sched_getaffinity(2)), of the CPU quotas of its cgroup and of all above it (``cpu.max`` of
    cgroup-v2.rst, ``cpu.cfs_quota_us`` of sched-bwc.rst; 1.5 CPUs count as 2, as loky has it), and of
    ``LOKY_MAX_CPU_COUNT``. ``root`` is where /proc and /sys are.
    """
    count = getattr(os, "process_cpu_count", None)  # Python 3.13: heeds -X cpu_count
    affine = (count() if count else len(os.sched_getaffinity(0))) or 1
    return max(1, min([affine, *_quotas(root), *_positive("LOKY_MAX_CPU_COUNT")]))


def n_jobs(limit: int | None = None) -> int:
    """Return how many workers to start: never more than ``limit``, the usable CPUs and ``REAPER_MAX_WORKERS``.

    ``limit`` None is the daemon's ``[sessions] max_workers`` for this session, 4 where none has told it. ValueError for
    less than 1.
    """
    if limit is None:
        limit = session.limit_of_workers() or DEFAULT_MAX_WORKERS
    if type(limit) is not int:
        raise TypeError(f"the limit of workers must be a whole number, got {limit!r:.60}")
    if limit < 1:
        raise ValueError(f"the limit of workers must be at least 1, got {limit}")
    return min(limit, usable_cpus(), *_positive(MAX_WORKERS_VARIABLE))


def _positive(variable: str) -> list[int]:
    """Return the whole number in an environment variable, at least 1, as a list; empty where there is none."""
    text = os.environ.get(variable, "").strip()
    return [max(1, int(text))] if text.isascii() and text.isdigit() and len(text) < 10 else []


def _quotas(root: str) -> Iterator[int]:
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif "cpu" in controllers.split(","):
            mounts = (f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu")
        else:
            continue
        for mount in mounts:
            yield from _quotas_above(os.path.join(root, mount), path)


def _quotas_above(mount: str, path: str) -> Iterator[int]:
    """Yield the quotas, in whole CPUs, of a cgroup and of all above it."""
    # In a container, /proc may name a path of the host that is not to be seen in there: its own is the mount itself.
    while True:
        place = mount + path.rstrip("/")
        numbers = " ".join(
            _lines(f"{place}/cpu.max")
            or [*_lines(f"{place}/cpu.cfs_quota_us"), *_lines(f"{place}/cpu.cfs_period_us")]
        ).split()
        # "max", or in v1 -1: as many as there are.
        if len(numbers) == 2 and all(number.isdigit() and int(number) for number in numbers):
            yield math.ceil(int(numbers[0]) / int(numbers[1]))
        if path in ("", "/"):
            return
        path = os.path.dirname(path.rstrip("/"))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line for line in file.read().split("\n") if line]
    except OSError:  # no such hierarchy, or no quota there
        return []


# -- what estimators ask for ----------------------------------------------------------------------


@contextlib.contextmanager
def limit_workers(estimator: Estimator, limit: int | None = None) -> Iterator[Estimator]:
    """Give ``estimator``, and each one in it, no more workers than ``n_jobs(limit)``, and back what it asked for afterwards.

    It holds for every ``n_jobs`` in a pipeline, a search (its grid included), an ensemble: the outermost that asks for more
    than one worker gets the limit, and what works inside its workers gets 1. An ``n_jobs`` of None stays None, which
    ``joblib.parallel_config`` fills. What was fitted meanwhile (``best_estimator_``) keeps what it was fitted with.
    """
    most = n_jobs(limit)
    if not is_estimator(estimator):
        raise TypeError(f"an estimator is wanted, which has get_params(), got {type(estimator).__name__}")
    before: list[tuple[Any, int]] = []
    try:
        _limit(estimator, most, before, inside=False, seen=set())
        yield estimator
    finally:
        for one, asked in reversed(before):
            one.set_params(n_jobs=asked)


def _limit(one: Any, most: int, before: list[tuple[Any, int]], *, inside: bool, seen: set[int]) -> None:
    if id(one) in seen:
        return
    seen.add(id(one))
    parameters = one.get_params(deep=False)
    asked = parameters.get("n_jobs")
    if isinstance(asked, int):
        granted = 1 if inside else _granted(asked, most)
        if granted != asked:
            before.append((one, asked))
            one.set_params(n_jobs=granted)
        inside = inside or granted > 1
    for value in parameters.values():
        for nested in _estimators_in(value):
            _limit(nested, most, before, inside=inside, seen=seen)


def _granted(asked: int, most: int) -> int:
    """Return what becomes of a number as joblib reads it: -1 is all CPUs, -2 all but one."""
    wanted = asked if asked > 0 else usable_cpus() + 1 + asked
    return max(1, min(wanted, most))


def _estimators_in(value: Any) -> Iterator[Any]:
    """Yield the estimators in a parameter: itself, those in a list of steps, and the candidates of a grid."""
    if is_estimator(value):
        yield value
    elif isinstance(value, dict):
        yield from _estimators_among(value.values())
    elif isinstance(value, (list, tuple)):
        yield from _estimators_among(value)


def is_estimator(value: Any) -> bool:
    """Say whether a parameter's value is an estimator itself (scikit-learn's glossary), and no class of them."""
    return hasattr(value, "get_params") and not isinstance(value, type)


def _estimators_among(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from _estimators_in(value)
