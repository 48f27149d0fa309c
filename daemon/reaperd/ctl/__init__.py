"""The control command: it asks the daemon over its socket and prints what it hears.

It signals nobody but, with ``run``, the command that it started, and without a daemon what that left.

Imports nothing: ``reaperctl --help`` and ``reaperctl ping`` are to answer at once.
"""

from __future__ import annotations

DONE, FAILED, USAGE, NO_DAEMON, NOT_ALLOWED = range(5)
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class CommandError(Exception):
    """What ends a command early: a sentence for people, and the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
