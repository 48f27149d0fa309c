"""The daemon's log on stderr: for people, for programs as JSON, for the journal with priorities.

One line a record, whatever is quoted in it, and nobody who reads it can make the daemon wait. What processes and users
call themselves is in it: a line break of theirs must not begin a line of ours, nor a sequence of theirs reach a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from reaperd.words import plain

log = logging.getLogger(__name__)

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # sd-daemon(3)

# PIPE_BUF: where a pipe or a socket is writable at all, so much of it is taken without a wait.
_AT_ONCE_BYTES = 4096
_PATIENCE_S = 0.01  # with a reader that did not keep up; none with one that still does not


def goes_to_journal(stream: TextIO | None, environment: Mapping[str, str]) -> bool:
    """Say whether journald reads what is written to ``stream``.

    JOURNAL_STREAM (systemd.exec(5)) alone does not tell: whatever a service starts inherits it, a shell with another
    stderr too, so it names device and inode.
    """
    if stream is None:  # Python was started with it closed
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it was closed, or is no file
        return False
    return environment.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


class TextLines(logging.Formatter):
    """Time, level, message, or what else ``form`` says."""

    def __init__(self, form: str = "%(asctime)s %(levelname)-7s %(message)s") -> None:
        super().__init__(form, "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in logging
        record.message = plain(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - its name in logging
        return "\n".join(map(plain, super().formatException(ei).split("\n")))  # type: ignore[arg-type]


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        at = self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z"
        line = {
            "at": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class JournalLines(logging.Formatter):
    """Puts the priority before each line of what ``inner`` makes; by default the message alone, for journald has the time."""

    def __init__(self, inner: logging.Formatter | None = None) -> None:
        super().__init__()
        self._inner = inner or TextLines("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).split("\n"))


class PatientHandler(logging.Handler):
    """Writes to a descriptor as long as somebody takes it, and leaves out what nobody does: a full pipe ends no reap."""

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0  # records, since the last one that was written
        self._poller = select.poll()
        self._poller.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or count it."""
        try:
            if self._lost and self._write(self.format(_lost(self._lost))):
                self._lost = 0
            written = not self._lost and self._write(self.format(record))
        # A full disk, a reader that is gone, a record that is none.
        except (OSError, MemoryError, ValueError, TypeError):
            written = False
        self._lost += not written

    def _write(self, text: str) -> bool:
        """Say whether ``text`` was written; of one that is longer than can be taken at once, a part may be."""
        data = text.encode("utf-8", "backslashreplace") + b"\n"
        while data:
            # poll(2) of a pipe or a socket says that it is writable while there is room for that much.
            if not self._poller.poll(0 if self._lost else _PATIENCE_S * 1000):
                return False
            data = data[os.write(self._descriptor, data[:_AT_ONCE_BYTES]) :]
        return True


def _lost(count: int) -> logging.LogRecord:
    text = "%d records of this log were lost: nobody took them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (count,), None)


def set_up(log_format: str) -> None:
    """Log to stderr from now on, and have whatever ends the daemon unforeseen logged as an error."""
    # Where stderr was closed, its number is another file's before long.
    handler = logging.NullHandler() if sys.stderr is None else PatientHandler()
    formatter: logging.Formatter = JsonLines() if log_format == "json" else TextLines()
    if goes_to_journal(sys.stderr, os.environ):
        formatter = JournalLines(formatter if log_format == "json" else None)
    handler.setFormatter(formatter)
    logging.getLogger().addHandler(handler)
    sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.error("failed: %r", error, exc_info=(kind, error, trace))


def say_fault(text: str) -> None:
    """Say on stderr what kept the daemon from reading its settings, and so from logging as they want it."""
    mark = "<3>" if goes_to_journal(sys.stderr, os.environ) else ""
    print(f"{mark}reaperd: {text}", file=sys.stderr)
