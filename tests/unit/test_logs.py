"""The log: one line a record, whoever is quoted in it, and no wait for whoever reads it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from reaperd import logs
from reaperd.logs import JournalLines, JsonLines, TextLines, goes_to_journal

HOSTILE = "x\n<0>2030-01-01T00:00:00Z ERROR forged\r\x1b[2J\x1b]0;title\x07\u2028\x85\x1c\u202e\udc80\0end"
FORMATTERS = {"text": TextLines, "journal": JournalLines, "json": JsonLines}


def record(message: str, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("reaperd.x", level, "x.py", 1, message, arguments, None)


def read_all(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    data = b""
    try:
        while chunk := os.read(descriptor, 1 << 20):
            data += chunk
    except BlockingIOError:
        pass
    return data


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


# -- what is quoted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATTERS)
def test_nothing_that_is_quoted_begins_a_line_or_reaches_a_terminal(form: str) -> None:
    text = FORMATTERS[form]().format(record("session name=%s", HOSTILE))
    assert text.isprintable()
    assert "forged" in text, "it is written out, and no less told"


@pytest.mark.parametrize("form", FORMATTERS)
def test_so_it_is_where_an_error_quotes_it(form: str) -> None:
    one = record("cannot read")
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        one.exc_info = (ValueError, error, error.__traceback__)
    lines = FORMATTERS[form]().format(one).split("\n")
    assert all(line.isprintable() for line in lines)
    if form == "journal":
        assert all(line.startswith("<6>") for line in lines), "no line has a priority of its own choice"
    if form == "json":
        assert HOSTILE.encode("utf-8", "replace").decode()[:20] in json.loads(lines[0])["exception"]


def test_a_line_has_its_time_and_level_or_its_priority() -> None:
    warning = record("w", level=logging.WARNING)
    warning.created, warning.msecs = 0.0, 0.0
    assert TextLines().format(warning) == "1970-01-01T00:00:00Z WARNING w"
    assert JournalLines().format(warning) == "<4>w"
    assert json.loads(JsonLines().format(warning)) == {
        "at": "1970-01-01T00:00:00.000Z",
        "level": "warning",
        "logger": "reaperd.x",
        "message": "w",
    }


# -- who reads it -----------------------------------------------------------------------------------


def test_a_reader_that_does_not_read_is_not_waited_for_and_is_told_what_it_missed(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    handler = logs.PatientHandler(writer)
    began_s = time.monotonic()
    for number in range(2000):
        handler.emit(record("%d %s", number, "x" * 200))
    assert time.monotonic() - began_s < 1.0
    first = read_all(reader).decode().splitlines()
    assert first[0].startswith("0 xxx")
    handler.emit(record("again"))
    *more, last = read_all(reader).decode().splitlines()
    lost = 2000 - len(first)
    assert lost > 1000
    assert last == "again"
    assert more == [f"{lost} records of this log were lost: nobody took them"]


@pytest.mark.parametrize("form", FORMATTERS)
def test_what_was_missed_is_told_in_the_form_of_all_else(form: str, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = logs.PatientHandler(writer)
    handler.setFormatter(FORMATTERS[form]())
    for _ in range(2000):
        handler.emit(record("x" * 200))
    read_all(reader)
    handler.emit(record("again"))
    told = read_all(reader).decode().splitlines()[0]
    assert {"text": " WARNING ", "journal": "<4>", "json": '"level": "warning"'}[form] in told


def test_a_record_longer_than_a_pipe_takes_at_once_comes_whole_where_somebody_reads(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    logs.PatientHandler(writer).emit(record("x" * 30_000))
    assert read_all(reader) == b"x" * 30_000 + b"\n"


def test_a_log_that_cannot_be_written_to_or_a_record_that_is_none_raises_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (writer, full):
        handler = logs.PatientHandler(descriptor)
        handler.emit(record("x"))
        handler.emit(record("%d", "no number"))
        os.close(descriptor)
    assert capfd.readouterr() == ("", "")


# -- the journal ------------------------------------------------------------------------------------


def of_level(level: int, message: str, *, exc: bool = False) -> logging.LogRecord:
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
    assert JournalLines().format(of_level(level, "ended pid=4")) == f"<{priority}>ended pid=4"


def test_no_line_of_a_traceback_is_without_its_priority() -> None:
    lines = JournalLines().format(of_level(logging.ERROR, "failed", exc=True)).split("\n")
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>second"
    assert all(line.startswith("<3>") for line in lines)


def test_json_in_the_journal_has_a_priority_too() -> None:
    line = JournalLines(JsonLines()).format(of_level(logging.WARNING, "less"))
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
        logs.say_fault("[kill] grace: must not be negative")
        assert said.getvalue() == f"{mark}reaperd: [kill] grace: must not be negative\n"
