"""A child process that runs another program: started with posix_spawn(3), waited for by a pidfd.

Not subprocess: that module and what comes with it would take half a MiB for as long as the daemon lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence

# Python ignores these; the program may not expect that.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


# What a Python and its libraries are found by, and nothing else of the daemon's own environment.
_INHERITED = ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")


def python(module: str) -> tuple[str, ...]:
    """Return the command that runs a module of ours."""
    return (sys.executable, "-I", "-m", module)


def inherited(*more: str) -> dict[str, str]:
    """Return the environment for a program of ours: what every one needs, and the variables that are named."""
    return {name: os.environ[name] for name in (*_INHERITED, *more) if name in os.environ}


class Child:
    """A program that runs, or ran until somebody waited for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None  # negative: the signal that ended it
        self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return what becomes readable when it has ended; ours, until somebody has waited for it."""
        return self._pidfd

    def kill(self) -> None:
        """SIGKILL it; nothing where it has been waited for."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, most_s: float | None = None) -> int | None:
        """Wait for its end and return its code; None where it still runs after ``most_s``."""
        if self.returncode is None and self._has_ended(most_s):
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.returncode

    def _has_ended(self, most_s: float | None) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(None if most_s is None else most_s * 1000))


def start_child(
    arguments: Sequence[str], descriptors: Iterable[int], environment: Mapping[str, str]
) -> Child:
    """Run a program in a session of its own, with nothing on stdin and of our descriptors only stdout, stderr and these.

    OSError where it cannot be run, or processes or descriptors have run out.
    """
    kept = frozenset(descriptors)
    with contextlib.ExitStack() as stack:
        # Makes sure of a descriptor for the pidfd, while there is no child yet that we could not end.
        spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, spare)
        for descriptor in kept:
            os.set_inheritable(descriptor, True)
            stack.callback(os.set_inheritable, descriptor, False)
        pid = os.posix_spawn(
            arguments[0],
            list(arguments),
            environment,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), *_closing_all_but(kept)],
            setsid=True,
            setsigmask=(),  # we may hold up some for a while
            setsigdef=_IGNORED_BY_PYTHON,
        )
    return Child(pid)


def _closing_all_but(kept: frozenset[int]) -> list[tuple[int, int]]:
    """Return the actions that close what whoever started us left open: what we open ourselves ends with exec anyway."""
    closing = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing's own
            if descriptor > 2 and descriptor not in kept and os.get_inheritable(descriptor):
                closing.append((os.POSIX_SPAWN_CLOSE, descriptor))
    return closing
