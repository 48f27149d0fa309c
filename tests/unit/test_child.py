"""A program that we start gets what it is given and no more, and its end is noticed once."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from specimens import count_descriptors

from reaperd.linux.child import Child, start_child


def run(script: str, *descriptors: int, **environment: str) -> Child:
    return start_child([sys.executable, "-I", "-S", "-c", script], descriptors, environment)


def said_by(script: str, *more: int, **environment: str) -> str:
    """Return what a script writes into the descriptor that it finds as ``out``."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = run(f"import os; out = {writer}; {script}", writer, *more, **environment)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    assert child.wait() == 0
    return said


def test_a_child_leaves_with_its_code_and_is_waited_for_once() -> None:
    before = count_descriptors()
    child = run("raise SystemExit(3)")
    assert [child.wait(), child.wait(0)] == [3, 3]
    child.kill()  # somebody else may have its pid by now
    assert count_descriptors() == before


def test_a_child_that_does_not_end_can_be_ended() -> None:
    child = run("import signal; signal.pause()")
    assert child.wait(0) is None
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_a_child_has_the_descriptors_it_is_given_and_no_others() -> None:
    stray = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(stray, True)  # as whoever started us may have left one
    try:
        script = "os.listdir('/proc/self/fd'); os.write(out, ' '.join(sorted(os.listdir('/proc/self/fd'))).encode())"
        found = {int(name) for name in said_by(script).split()}
    finally:
        os.close(stray)
    assert stray not in found
    assert len(found) == 5  # three, the pipe, and the listing's own


def test_what_is_lent_to_a_child_is_not_inherited_by_the_next_program() -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        run("pass", writer).wait()
        assert not os.get_inheritable(writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_child_has_a_session_of_its_own_nothing_to_read_and_only_the_environment_it_is_given() -> None:
    script = "os.write(out, repr((os.getsid(0) == os.getpid(), os.read(0, 1), os.environ.get('A'), 'HOME' in os.environ)).encode())"
    assert said_by(script, A="b") == "(True, b'', 'b', False)"


def test_a_child_ignores_none_of_the_signals_that_python_ignores() -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    script = f"grep SigIgn /proc/self/status >/proc/self/fd/{writer}"
    child = start_child(["/bin/sh", "-c", script], [writer], os.environ)
    os.close(writer)
    with os.fdopen(reader) as file:
        ignored = int(file.read().split()[1], 16)
    assert child.wait() == 0
    assert not [name for name in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (name - 1) & 1]


def test_a_program_that_is_not_there_is_an_error_at_once() -> None:
    before = count_descriptors()
    with pytest.raises(FileNotFoundError):
        start_child(["/nowhere/python"], [], {})
    assert count_descriptors() == before
