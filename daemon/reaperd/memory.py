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
from reaperd.model import ProcessId

VARIABLES = (wire.LINEAGE_VARIABLE, wire.SPARED_VARIABLE, *wire.TEMP_VARIABLES)
# Which mapped files are asked for, by how their paths begin.
MEMFD_PREFIX = "/memfd:"
OUR_PAGES = (MEMFD_PREFIX + wire.PAGE_PREFIX,)
OUR_MEMFDS = (*OUR_PAGES, MEMFD_PREFIX + wire.SPARED_PREFIX)
ALL_FILES = ("/",)

_STALL_S = 0.05
_IDLE_S = 2.0  # a look is seldom the last; between two scans the helper's memory is worth more
_MOST_STALLS, _MOST_S = 4, 0.5  # in one batch: then what is left is left
_DEAR_S = 0.01  # a process whose owner has given it so much to read is not read at every look
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0  # until a process that stalled a helper is read again


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


class _Stall(NamedTuple):
    """A process that could not be read in time."""

    again_s: float
    pause_s: float


class MemoryReader:
    """Reads one /proc."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc
        self._stalled: dict[ProcessId, _Stall] = {}
        self._answerer = helper.Answerer(self._read_one)
        # After a read, for the next: whoever sets this looks at ``idle_deadline_s``.
        self.keeps_helper = False

    def read(self, wishes: Iterable[Wish], alarm: Alarm | None = None) -> dict[int, Memory]:
        """Return what could be read, by pid; whoever is missing is gone, or could not be read before ``alarm`` rang."""
        now_s = time.monotonic()
        until_s = now_s + _MOST_S
        willing = [wish for wish in wishes if self._may_be_read(wish.stat.id, now_s)]
        # The likeliest to stall last.
        left = sorted(willing, key=lambda wish: wish.stat.state == "D" or wish.stat.id in self._stalled)
        found: dict[int, Memory] = {}
        for _ in range(_MOST_STALLS):
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
                        self._note_stall(wish.stat.id)
                    found[wish.stat.id.pid] = Memory(
                        variables, tuple(argv), tuple(Mapping(*one) for one in mapped)
                    )
            if alarm is not None and alarm.rings():
                break
            if len(answers) < len(left) and time.monotonic() < until_s:
                self._note_stall(left[len(answers)].stat.id)
            left = left[len(answers) + 1 :]
        if not self.keeps_helper:
            self.close()
        return found

    def _may_be_read(self, id_: ProcessId, now_s: float) -> bool:
        stall = self._stalled.get(id_)
        return stall is None or stall.again_s <= now_s

    def _note_stall(self, id_: ProcessId) -> None:
        now_s = time.monotonic()
        before = self._stalled.pop(id_, _Stall(0.0, _FIRST_PAUSE_S / 2))
        pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S)
        self._stalled[id_] = _Stall(now_s + pause_s, pause_s)
        for other, stall in list(self._stalled.items()):  # nobody has asked for it since
            if stall.again_s < now_s - _LONGEST_PAUSE_S:
                del self._stalled[other]

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
                name: value for name in VARIABLES if (value := environment_value(environ or b"", name))
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
