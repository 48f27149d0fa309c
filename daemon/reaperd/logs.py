"""The daemon's log: one line a record, whatever is quoted in it, on stderr; nobody who reads it can make the daemon wait.

What processes and users call themselves is in it: a line break of theirs must not begin a line of ours, nor a sequence of
theirs reach a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import select
import time

from reaperd.words import plain

_AT_ONCE_BYTES = (
    4096  # PIPE_BUF: where a pipe or a socket is writable at all, so much of it is taken without a wait
)
_PATIENCE_S = 0.01  # with a reader that did not keep up; none with one that still does not


class _Lines(logging.Formatter):
    """Text for people and files, with the time."""

    def __init__(self, form: str = "%(asctime)s %(levelname)-7s %(message)s") -> None:
        super().__init__(form, "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in logging
        record.message = plain(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - its name in logging
        return "\n".join(map(plain, super().formatException(ei).split("\n")))  # type: ignore[arg-type]


class _JournalLines(_Lines):
    """For journald, which has the time: the message behind its priority (sd-daemon(3))."""

    _PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _JsonLines(logging.Formatter):
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
            if self._lost and self._write(f"{self._lost} records of this log were lost: nobody took them\n"):
                self._lost = 0
            written = not self._lost and self._write(self.format(record) + "\n")
        except (
            OSError,
            MemoryError,
            ValueError,
            TypeError,
        ):  # a full disk, a reader that is gone, a record that is none
            written = False
        self._lost += not written

    def _write(self, text: str) -> bool:
        """Say whether ``text`` was written; of one that is longer than can be taken at once, a part may be."""
        data = text.encode("utf-8", "backslashreplace")
        while data:
            # poll(2) of a pipe or a socket says that it is writable while there is room for that much.
            if not self._poller.poll(0 if self._lost else _PATIENCE_S * 1000):
                return False
            data = data[os.write(self._descriptor, data[:_AT_ONCE_BYTES]) :]
        return True


def set_up_logging(log_format: str) -> None:
    """Log to stderr, as ``json`` or as ``text``: for journald, where that is at its other end."""
    handler = PatientHandler()
    if log_format == "json":
        handler.setFormatter(_JsonLines())
    elif os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_JournalLines())
    else:
        handler.setFormatter(_Lines())
    logging.getLogger().addHandler(handler)
