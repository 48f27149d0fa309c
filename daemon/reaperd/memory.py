"""What lies in the memory of other processes: their environment, command line and mappings.

Reading that can block for as long as its owner likes: a thread that waits for a dead file system may hold the lock of the
address space, or execve(2) may wait for one, and no state in /proc tells. So a forked helper reads it, never the core;
one that stalls is ended, and the process that it stalled at is left for later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from agent import wire
from reaperd.linux import helper
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import Mapping, ProcessGone, ProcFS, Stat, environment_value, parse_maps
from reaperd.pauses import Pauses
from reaperd.signatures import SIGNATURES

VARIABLES = (
    *(wire.LINEAGE_VARIABLE, wire.SPARED_VARIABLE, *wire.TEMP_VARIABLES),
    *(row.variable for row in SIGNATURES if row.variable),
)
# Which mapped files are asked for, by how their paths begin.
MEMFD_PREFIX = "/memfd:"
OUR_PAGES = (MEMFD_PREFIX + wire.PAGE_PREFIX,)
OUR_MEMFDS = (*OUR_PAGES, MEMFD_PREFIX + wire.SPARED_PREFIX)
ALL_FILES = ("/",)

_STALL_S = 0.05
_IDLE_S = 2.0  # a look is seldom the last; between two scans the helper's memory is worth more
_MAX_STALLS, _MAX_S = 4, 0.5  # in one batch: then what is left is left
_MAX_VALUE_CHARS = 64 * 1024  # no variable that means anything is as long
_DEAR_S = 0.01  # a process whose owner has given it so much to read is not read at every look


class Memory(NamedTuple):
    """What was asked for; empty where it was not, or may not be read."""

    variables: dict[str, str] = {}
    argv: tuple[str, ...] = ()
    mapped: tuple[Mapping, ...] = ()


class Wish(NamedTuple):
    """Whose memory is to be read, and which parts of it."""

    stat: Stat
    task: int  # a living thread
    environ: bool = False
    argv: bool = False
    maps: tuple[str, ...] = ()

    def question(self) -> list[Any]:
        """Return what the helper is to be asked."""
        return [self.stat.id.pid, self.task, self.environ, self.argv, self.maps]


class MemoryReader:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self._stalled = Pauses()  # ProcessIds of those that could not be read in time
        self._answerer = helper.Answerer(self._read_one)
        # After a read, for the next: whoever sets this looks at ``idle_deadline_s``.
        self.keeps_helper = False

    def read(self, wishes: Iterable[Wish], alarm: Alarm | None = None) -> dict[int, Memory]:
        """Return what could be read, by pid; whoever is missing is gone, or could not be read before ``alarm`` rang."""
        until_s = time.monotonic() + _MAX_S
        willing = [wish for wish in wishes if self._stalled.until_s(wish.stat.id) is None]
        # The likeliest to stall last.
        left = sorted(willing, key=lambda wish: wish.stat.state == "D" or wish.stat.id in self._stalled)
        found: dict[int, Memory] = {}
        for _ in range(_MAX_STALLS):
            if not left or time.monotonic() >= until_s:
                break
            answers = self._answerer.ask(
                [wish.question() for wish in left],
                stall_s=_STALL_S,
                most_s=until_s - time.monotonic(),
                alarm=alarm,
            )
            if answers is None:
                break
            for wish, answer in zip(left, answers, strict=False):
                if answer is not None:
                    variables, argv, mapped, took_s = answer
                    if took_s > _DEAR_S:
                        self._stalled.begin(wish.stat.id)
                    found[wish.stat.id.pid] = Memory(
                        variables, tuple(argv), tuple(Mapping(*one) for one in mapped)
                    )
            if alarm is not None and alarm.rings():
                break
            # Or all of our time went to the first: whoever comes after it must have a turn at the next look.
            if len(answers) < len(left) and (time.monotonic() < until_s or not answers):
                self._stalled.begin(left[len(answers)].stat.id)
            left = left[len(answers) + 1 :]
        if not self.keeps_helper:
            self.close()
        return found

    @property
    def idle_deadline_s(self) -> float | None:
        """When the helper is to be ended, if nobody asks for more until then."""
        since_s = self._answerer.idle_since_s
        return None if since_s is None else since_s + _IDLE_S

    def close(self) -> None:
        """End the helper; the next read starts another."""
        self._answerer.close()

    def _read_one(self, question: list[Any]) -> list[Any] | None:
        pid, task, with_environ, with_argv, prefixes = question
        began_s = time.thread_time()
        with contextlib.suppress(ProcessGone, PermissionError):
            environ = self._proc.environ(pid, task) if with_environ else None
            # In the middle of execve(2) it has no memory of its own yet; None: it may not be read, now or later.
            if environ == b"" and not self._proc.stat(pid).image:
                return None
            variables = {
                name: value
                for name in VARIABLES
                if (value := environment_value(environ or b"", name)) and len(value) <= _MAX_VALUE_CHARS
            }
            argv = self._proc.argv(pid, task) if with_argv else ()
            maps = self._proc.maps(pid, task) if prefixes else b""
            # A file of a user's own can be called like a memfd, and have any inode.
            mapped = {
                (one.device, one.inode, one.path): one
                for one in parse_maps(maps)
                if one.path.startswith(tuple(prefixes))
                and (one.device == self._proc.memfd_device() or not one.path.startswith(MEMFD_PREFIX))
            }
            return [variables, argv, list(mapped.values()), time.thread_time() - began_s]
        return None
