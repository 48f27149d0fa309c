"""``training_session()`` as a script meets it: whatever the way out, what was started inside is gone before it is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Daemon, Scratch, alive, end_process, has_ended, open_pidfd, test_environment

import agent
from agent.training import SAME_S

StartDaemon = Callable[..., Daemon]
ZOO = os.path.join(os.path.dirname(os.path.dirname(__file__)), "support", "zoo")
POOLS = ("loky", "executor", "executor-spawn", "pool", "pool-spawn", "processes", "commands")
NOWHERE = "/nonexistent/reaper.sock"
WITHIN_S = 30.0


class Training:
    """A run of zoo/session.py."""

    def __init__(self, run: str, scratch: Scratch, kind: str, way: str, socket: str = NOWHERE) -> None:
        self.status_file = scratch.file("run.json")
        self._errors = open(scratch.file("stderr"), "w+b")  # noqa: SIM115 - closed with the rest
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", os.path.join(ZOO, "session.py"), kind, way, self.status_file],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=test_environment(run, REAPER_SOCKET=socket),
            start_new_session=True,
        )
        self.handle = os.pidfd_open(self.process.pid)
        self.said = self.read()
        self.workers: list[int] = self.said["workers"]
        self.handles = {pid: open_pidfd(pid) for pid in self.workers}

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        told: dict[str, Any] = json.loads(line)
        return told

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    def status(self) -> agent.Status:
        return agent.read_status(self.status_file)

    def signal(self, number: int, *, group: bool = False) -> None:
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(WITHIN_S)

    def assert_left_clean(self) -> None:
        """Nothing was left when the block was, and nothing of the session itself remains."""
        told = self.read()
        assert told["left"] == [], self.errors()
        assert told["same"], told
        code = self.wait()
        assert all(handle is None or has_ended(handle) for handle in self.handles.values()), code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in (*self.workers, self.said["outside"]):
            if alive(pid):
                end_process(pid)
        for handle in (self.handle, *self.handles.values()):
            if handle is not None:
                os.close(handle)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


Start = Callable[..., Training]


@pytest.fixture
def start(run: str, scratch: Scratch) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(kind: str, way: str, **more: str) -> Training:
            training = Training(run, scratch, kind, way, **more)
            stack.callback(training.close)
            return training

        yield begin


@pytest.mark.parametrize("kind", POOLS)
def test_at_its_end_the_workers_of_any_pool_are_gone_and_all_is_as_it_was(kind: str, start: Start) -> None:
    training = start(kind, "end")
    training.assert_left_clean()
    assert training.wait() == 0
    status = training.status()
    assert (status.state, status.error, status.cause) == ("completed", None, {"kind": "exit", "code": 0})
    assert status.progress == {"done": 2, "total": 10, "message": "fits"}


@pytest.mark.parametrize("kind", ["loky", "executor-spawn"])
@pytest.mark.parametrize(
    ("way", "code", "state", "error"),
    [
        ("exception", 1, "failed", "RuntimeError: the data are gone"),
        ("exit", 3, "failed", None),
    ],
)
def test_whatever_it_raises_nothing_is_left_and_the_exit_code_is_its_own(
    way: str, code: int, state: str, error: str | None, kind: str, start: Start
) -> None:
    training = start(kind, way)
    training.assert_left_clean()
    assert training.wait() == code
    status = training.status()
    assert (status.state, status.error, status.cause) == (state, error, {"kind": "exit", "code": code})


@pytest.mark.parametrize(
    ("number", "code", "kind", "group"),
    [
        *((signal.SIGINT, -signal.SIGINT, kind, group) for kind in POOLS for group in (False, True)),
        *((signal.SIGTERM, 128 + signal.SIGTERM, kind, False) for kind in ("loky", "pool", "processes")),
        (signal.SIGHUP, 128 + signal.SIGHUP, "executor", True),
    ],
)
def test_a_signal_unwinds_it_and_nothing_is_left(
    number: int, code: int, kind: str, group: bool, start: Start
) -> None:
    training = start(kind, "wait")
    assert training.status().state == "running"
    training.signal(number, group=group)
    training.assert_left_clean()
    assert training.wait() == code
    status = training.status()
    assert (status.state, status.cause) == ("interrupted", {"kind": "signal", "code": number})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["loky", "processes"])
def test_the_second_signal_ends_everything_at_once(number: int, kind: str, start: Start) -> None:
    training = start(kind, "deaf")
    training.signal(number)
    assert training.read()["unwinding"]
    time.sleep(SAME_S)  # sooner, it would be the first one that came in two ways
    training.signal(number)
    assert training.wait() == -number
    assert all(handle is None or has_ended(handle) for handle in training.handles.values())
    assert training.status().state == "interrupted"


def test_the_same_signal_at_nearly_the_same_time_is_one(start: Start) -> None:
    training = start("commands", "wait")
    training.signal(signal.SIGTERM, group=True)
    training.signal(signal.SIGTERM)
    assert training.wait() == 128 + signal.SIGTERM
    assert training.status().cause == {"kind": "signal", "code": signal.SIGTERM}


def test_a_run_that_was_killed_never_reads_as_running(start: Start) -> None:
    training = start("commands", "wait")
    assert training.status().state == "running"
    training.signal(signal.SIGKILL)
    assert has_ended(training.handle, within_s=WITHIN_S)
    # It has not been waited for: a zombie does not run.
    assert training.status().state == "killed"
    training.wait()
    assert training.status().state == "killed"


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "killed"), (signal.SIGSTOP, "running")]
)
def test_the_daemon_writes_the_end_of_a_run_that_could_not(
    number: int, state: str, start: Start, daemon: Daemon
) -> None:
    training = start("commands", "wait", socket=daemon.socket)
    training.signal(number)
    if state == "killed":
        daemon.wait_end(training.status().session)
    with open(training.status_file, encoding="utf-8") as file:
        told = json.load(file)
    assert told["state"] == state == training.status().state
    if state == "killed":
        assert told["cause"]["code"] == number
        assert told["progress"] == {"done": 2, "total": 10, "message": "fits"}
        assert told["ended_at"] >= told["started_at"]


def test_what_a_run_has_written_of_its_end_is_left_as_it_is(start: Start, daemon: Daemon) -> None:
    training = start("commands", "exit", socket=daemon.socket)
    assert training.wait() == 3
    daemon.wait_end(training.status().session)
    assert training.status().cause == {"kind": "exit", "code": 3}


def test_what_outlives_a_killed_session_is_the_daemons_to_end(start: Start, daemon: Daemon) -> None:
    training = start("executor-spawn", "wait", socket=daemon.socket)
    training.signal(signal.SIGKILL)
    for handle in training.handles.values():
        assert handle is None or has_ended(handle, within_s=WITHIN_S)
