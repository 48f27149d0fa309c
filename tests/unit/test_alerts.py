"""The core's end of the alerts: what the process that sends them is given, and that nobody waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import repeat_until

from agent.wire import WireError
from reaperd import report
from reaperd.alerts import TEST_WITHIN_S, Alerts
from reaperd.config import AlertsConfig
from reaperd.poller import Poller
from reaperd.waiters import News

SOON_S = 20.0
URLS = ("ntfy://hunter2/topic",)
# Keeps what it is given, and answers to a test at once, where it is to.
SENDER = """
import json, os, signal, socket, sys
channel = socket.socket(fileno=int(sys.argv[3]))
if "stopped" in sys.argv[2]:
    os.kill(os.getpid(), signal.SIGSTOP)
with open(sys.argv[1], "ab", 0) as kept:
    for line in channel.makefile("rb"):
        kept.write(line)
        if "answers" in sys.argv[2] and "test" in (told := json.loads(line)):
            channel.sendall(json.dumps({"tested": told["test"], "results": [{"sent": True}]}).encode() + b"\\n")
        if "dies" in sys.argv[2] and "test" in json.loads(line):
            sys.exit(1)
"""


class World:
    """Alerts, with as much of the daemon's loop as they need."""

    def __init__(self, kept: Path, config: AlertsConfig, ways: str) -> None:
        self.poller = Poller()
        self._kept = kept
        self.alerts = Alerts(self.poller, config, (sys.executable, "-I", "-S", "-c", SENDER, str(kept), ways))
        self._seq = 0

    def turn(self) -> None:
        self.poller.wait(0.05)
        self.alerts.exchange(time.monotonic())
        self.alerts.step(time.monotonic())

    def until(self, done: Callable[[], bool]) -> None:
        def look() -> bool | None:
            self.turn()
            return done() or None

        repeat_until(look, SOON_S, "what is asked of the alerts")

    def note(self, kind: str = "reaped", **fields: Any) -> None:
        self._seq += 1
        self.alerts.note(News(self._seq, 0.0, {"at": "now", **report.event(kind, **fields)}))

    @property
    def pid(self) -> int | None:
        return self.alerts.companion.pid

    def kept(self) -> list[dict[str, Any]]:
        text = self._kept.read_text("utf-8") if self._kept.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def events(self, count: int) -> list[dict[str, Any]]:
        self.until(lambda: sum("event" in one for one in self.kept()) >= count)
        return [one["event"] for one in self.kept() if "event" in one]


@contextlib.contextmanager
def world(tmp_path: Path, config: AlertsConfig, ways: str = "") -> Iterator[World]:
    found = World(tmp_path / "kept", config, ways)
    try:
        yield found
    finally:
        if found.pid is not None:
            os.kill(found.pid, signal.SIGCONT)
        found.alerts.close(time.monotonic())
        found.poller._epoll.close()


def test_without_targets_nothing_is_started_and_nothing_is_due(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig()) as here:
        here.note()
        assert (here.pid, here.alerts.next_deadline()) == (None, None)
        with pytest.raises(WireError, match="nobody is to be alerted"):
            here.alerts.test(lambda _: None)


def test_only_kinds_that_are_asked_for_are_told_and_without_what_nobody_is_shown(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS, on=("stuck",))) as here:
        here.note("reaped")
        process = {
            "pid": 7,
            "framework": "loky",
            "signal": "SIGKILL",
            "result": "stuck",
            "evidence": ["long"],
        }
        here.note("stuck", processes=[process])
        (told,) = here.events(1)
        assert (told["seq"], told["kind"]) == (2, "stuck")
        assert told["processes"] == [{key: process[key] for key in ("pid", "framework", "signal", "result")}]


def test_a_command_is_told_the_evidence_and_of_very_many_processes_how_many_are_left_out(
    tmp_path: Path,
) -> None:
    with world(tmp_path, AlertsConfig(command=("/x",), on=("reaped",))) as here:
        here.note(processes=[{"pid": pid, "evidence": ["long"]} for pid in range(300)])
        (told,) = here.events(1)
        assert (len(told["processes"]), told["processes_left_out"]) == (256, 44)
        assert told["processes"][0] == {"pid": 0, "evidence": ["long"]}


def test_the_settings_go_first_and_new_ones_are_told_to_the_same_process(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS)) as here:
        before = here.pid
        here.alerts.heed(AlertsConfig(urls=("a://b",), group_within_s=5.0))
        here.alerts.heed(AlertsConfig(urls=("a://b",), group_within_s=5.0))  # no change
        here.note()
        here.events(1)
        first, second, _ = here.kept()
        assert first["settings"]["urls"] == list(URLS)
        assert (second["settings"]["urls"], second["settings"]["group_within_s"]) == (["a://b"], 5.0)
        assert here.pid == before


def test_it_is_started_anew_where_apprise_is_needed_from_now_on_and_ended_where_nobody_is_to_be_told(
    tmp_path: Path,
) -> None:
    with world(tmp_path, AlertsConfig(command=("/x",))) as here:
        before = here.pid
        here.alerts.heed(AlertsConfig(urls=URLS, command=("/x",)))
        assert here.pid not in (None, before)
        here.alerts.heed(AlertsConfig())
        assert here.pid is None
        here.until(lambda: here.alerts.next_deadline() is None)


def test_what_a_process_that_does_not_read_cannot_be_given_is_counted_and_told_once_it_reads(
    tmp_path: Path,
) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS), "stopped") as here:
        took_s = -time.thread_time()
        for _ in range(5000):
            here.note(name="n" * 150)
        took_s += time.thread_time()
        assert here.alerts._lost["reaped"] > 1000
        assert took_s < 5.0
        assert here.alerts.next_deadline() is not None
        assert here.pid is not None
        os.kill(here.pid, signal.SIGCONT)

        def told() -> int:
            return sum(1 if "event" in one else one.get("lost", {}).get("reaped", 0) for one in here.kept())

        here.until(lambda: told() == 5000)
        assert here.alerts.next_deadline() is None


def test_nothing_is_due_for_what_could_not_be_given_once_nobody_is_to_be_told(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS), "stopped") as here:
        for _ in range(5000):
            here.note(name="n" * 150)
        assert here.alerts._tell_lost_at_s is not None
        assert here.pid is not None
        os.kill(here.pid, signal.SIGCONT)
        here.alerts.heed(AlertsConfig())
        here.until(lambda: here.alerts.next_deadline() is None)


def test_a_test_is_answered_with_what_came_of_it(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS), "answers") as here:
        answers: list[Any] = []
        here.alerts.test(answers.append)
        here.until(lambda: bool(answers))
        assert answers == [[{"sent": True}]]


def test_a_test_is_answered_also_where_its_process_dies_or_says_nothing(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS), "dies") as here:
        answers: list[Any] = []
        here.alerts.test(answers.append)
        here.until(lambda: bool(answers))
    with world(tmp_path, AlertsConfig(urls=URLS)) as here:
        here.alerts.test(answers.append)
        here.turn()
        assert len(answers) == 1
        here.alerts.step(time.monotonic() + TEST_WITHIN_S + 1)
        assert answers == [None, None]


def test_only_so_many_tests_wait_at_a_time(tmp_path: Path) -> None:
    with world(tmp_path, AlertsConfig(urls=URLS)) as here:
        for _ in range(4):
            here.alerts.test(lambda _: None)
        with pytest.raises(WireError) as refused:
            here.alerts.test(lambda _: None)
        assert refused.value.kind == "busy"
