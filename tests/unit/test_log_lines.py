"""How the log is written where journald reads it, and that nothing else is taken for journald."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from reaperd import log_lines
from reaperd.log_lines import JournalLines, JsonLines, goes_to_journal


def record(level: int, message: str, *, exc: bool = False) -> logging.LogRecord:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        told = sys.exc_info() if exc else None
    return logging.LogRecord("reaperd.x", level, "x.py", 1, message, (), told)


@pytest.fixture
def stream() -> Iterator[TextIO]:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as file:
        yield file


def stream_name(stream: TextIO) -> str:
    found = os.fstat(stream.fileno())
    return f"{found.st_dev}:{found.st_ino}"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 3)],
)
def test_the_journal_gets_each_line_with_its_priority_and_no_time_of_ours(level: int, priority: int) -> None:
    assert JournalLines().format(record(level, "ended pid=4")) == f"<{priority}>ended pid=4"


def test_no_line_of_a_traceback_is_without_its_priority() -> None:
    lines = JournalLines().format(record(logging.ERROR, "failed", exc=True)).split("\n")
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>second"
    assert all(line.startswith("<3>") for line in lines)


def test_json_in_the_journal_has_a_priority_too() -> None:
    line = JournalLines(JsonLines()).format(record(logging.WARNING, "less"))
    assert line.startswith("<4>{")
    assert json.loads(line[3:])["message"] == "less"


def test_journald_is_known_by_its_very_pipe_and_not_by_an_inherited_variable(stream: TextIO) -> None:
    assert goes_to_journal(stream, {"JOURNAL_STREAM": stream_name(stream)})
    with open(os.devnull, "w") as elsewhere:
        assert not goes_to_journal(elsewhere, {"JOURNAL_STREAM": stream_name(stream)})
    assert not goes_to_journal(stream, {"JOURNAL_STREAM": "nonsense"})
    assert not goes_to_journal(stream, {})
    assert not goes_to_journal(io.StringIO(), {"JOURNAL_STREAM": stream_name(stream)})
    assert not goes_to_journal(None, {"JOURNAL_STREAM": stream_name(stream)})


def test_a_fault_of_the_settings_is_an_error_in_the_journal_and_plain_elsewhere(
    stream: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for environment, mark in ((stream_name(stream), "<3>"), ("", "")):
        said = io.StringIO()
        monkeypatch.setenv("JOURNAL_STREAM", environment)
        monkeypatch.setattr(said, "fileno", stream.fileno, raising=False)
        monkeypatch.setattr(sys, "stderr", said)
        log_lines.say_fault("[kill] grace: must not be negative")
        assert said.getvalue() == f"{mark}reaperd: [kill] grace: must not be negative\n"
