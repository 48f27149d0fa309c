"""How the log is written: for people in a terminal, for programs as JSON, and for the journal with priorities.

Knows nothing of what is logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

log = logging.getLogger(__name__)

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # sd-daemon(3)


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
    """Time, level, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime


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
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).split("\n"))


def set_up(log_format: str) -> None:
    """Log to stderr from now on, and have whatever ends the daemon unforeseen logged as an error."""
    handler = logging.StreamHandler()
    formatter: logging.Formatter = JsonLines() if log_format == "json" else TextLines()
    if goes_to_journal(handler.stream, os.environ):
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
