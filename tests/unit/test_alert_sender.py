"""The process that sends alerts: real helpers run real commands, one target holds up no other, and no reason holds a secret."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import harness
import pytest
from harness import repeat_until

from reaperd import alert_delivery, alert_sender, report
from reaperd.alert_check import MISSING, faults_and_warnings, why_no_apprise
from reaperd.alert_groups import SETTLE_S, Group, Outcome
from reaperd.alert_sender import AT_ONCE, COMMAND_S, SEND_S, TEST_S, TRIAL_S, Sender
from reaperd.alert_words import NO_REASON
from reaperd.alerts import TEST_WITHIN_S
from reaperd.linux import prctl
from reaperd.linux.helper import Helper, end_children, finish_helper, start_helper
from reaperd.linux.procfs import ProcFS

SOON_S = 20.0
BAD = "nosuchservice://hunter2/token"


@pytest.fixture(scope="module", autouse=True)
def apprise_is_loaded() -> None:
    """Once, as it is where alerts are sent, and not in each helper."""
    alert_delivery.load()


@pytest.fixture(autouse=True)
def all_helpers_end() -> Iterator[None]:
    World.made.clear()
    yield
    for one in World.made:
        one.sender.close()
    assert ProcFS().children(os.getpid()) == []


def in_helper(work: Callable[[], Any]) -> Any:
    """Return the result of what must not run in this process: it silences it."""
    return result_of(start_helper(work))


def result_of(helper: Helper) -> Any:
    poller = select.poll()
    poller.register(helper.pidfd, select.POLLIN)
    assert poller.poll(SOON_S * 1000)
    return finish_helper(helper)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)
    return str(path)


class World:
    """A sender, told things by the test."""

    made: ClassVar[list[World]] = []

    def __init__(self, **settings: Any) -> None:
        self.made.append(self)
        self.said: list[dict[str, Any]] = []
        self.sender = Sender(self.said.append)
        self.set(**settings)

    def set(self, **settings: Any) -> None:
        given = {"urls": [], "command": [], "group_within_s": 60.0, "host": "node7", **settings}
        self.take({"settings": given})

    def take(self, message: dict[str, Any]) -> None:
        self.sender.take(message, time.monotonic())

    def note(self, kind: str = "reaped", **fields: Any) -> None:
        self.take({"event": {"at": "2026-01-31T12:00:00.000Z", **report.event(kind, **fields)}})

    def until(self, done: Callable[[], bool], later_s: float = 0.0) -> None:
        def look() -> bool | None:
            poller = select.poll()
            for descriptor in self.sender.descriptors():
                poller.register(descriptor, select.POLLIN)
            poller.poll(20)
            self.sender.step(time.monotonic() + later_s)
            return done() or None

        repeat_until(look, SOON_S, "what is asked of the sender")

    def logged(self) -> list[str]:
        return [one["text"] for one in self.said if "log" in one]


def test_a_command_is_given_each_event_as_json_in_order_and_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = script(
        tmp_path / "hook",
        f'test -e {out}.busy && echo busy >> {out}\ntouch {out}.busy\ncat >> {out}\necho "$1" >> {out}\nrm {out}.busy',
    )
    here = World(command=[command, "a b; $(c)"])
    for name in ("x", "y", "z"):
        here.note(name=name, session="s")
        here.sender.step(time.monotonic())
        assert len(here.sender.descriptors()) == 1
    here.until(here.sender.is_done)
    lines = out.read_text("utf-8").splitlines()
    assert lines[1::2] == ["a b; $(c)"] * 3, "no shell looks at it"
    told = [json.loads(line) for line in lines[::2]]
    assert [(one["name"], one["kind"], one["host"]) for one in told] == [
        (n, "reaped", "node7") for n in "xyz"
    ]
    assert here.said == []


def test_a_command_that_fails_is_told_of_and_the_next_event_is_given_to_it(tmp_path: Path) -> None:
    here = World(command=[script(tmp_path / "hook", "exit 3")])
    here.note()
    here.note()
    here.until(here.sender.is_done)
    assert here.logged() == ["the command for an event failed: it left with 3"] * 2


def run(command: str, most_s: float = 5.0, event: str = "{}") -> Any:
    return in_helper(functools.partial(alert_delivery.run_command, [command], event, most_s))


def test_where_no_process_can_be_started_the_command_is_given_all_events_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(_: object) -> Helper:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    out = tmp_path / "out"
    here = World(command=[script(tmp_path / "hook", f"cat >> {out}")])
    for name in ("x", "y"):
        here.note(name=name)
    monkeypatch.setattr(alert_sender, "start_helper", no_process)
    now_s = time.monotonic()
    here.sender.step(now_s)
    assert here.sender.next_deadline() == now_s + 1
    here.sender.step(now_s + 1)
    assert here.sender.next_deadline() == now_s + 2
    assert here.logged() == [
        "the command for an event waits: no process could be started for it: resource temporarily unavailable; trying again"
    ]
    monkeypatch.undo()
    here.until(here.sender.is_done, 2.0)
    assert [json.loads(line)["name"] for line in out.read_text("utf-8").splitlines()] == ["x", "y"]
    assert len(here.logged()) == 1


def test_what_is_wrong_with_a_command_is_said_in_words(tmp_path: Path) -> None:

    assert run(str(tmp_path / "none")) == ["failed", "it cannot be run: no such file or directory"]
    assert run(script(tmp_path / "killed", "kill -9 $$")) == ["failed", "it was ended by signal 9"]
    assert run(script(tmp_path / "slow", "exec sleep 60"), 0.2) == ["failed", "it took longer than 0.2 s"]
    assert run(script(tmp_path / "deaf", "exit 0")) == ["sent", ""]


# It leaves a child, an orphan, and an orphan in a session of its own, all of which hold what it had as stdin.
STAYS = "sleep 600 <&0 & (sleep 600 <&0 &)\nsetsid sh -c 'sleep 600 & echo up > {out}; wait' <&0 &\nuntil test -s {out}; do :; done"


@pytest.mark.parametrize("end", ["exit 0", "sleep 600"])
def test_what_a_command_leaves_behind_ends_with_it_and_nobody_waits_until_its_input_is_read(
    tmp_path: Path, end: str
) -> None:
    out = tmp_path / "out"
    mark = f"ALERT_HOOK_{os.getpid()}_{time.monotonic_ns()}"
    command = script(tmp_path / "hook", f"export {mark}=1\n{STAYS.format(out=out)}\n{end}")
    if end == "exit 0":
        assert run(command, SOON_S, "x" * 300_000) == ["sent", ""]
        assert out.read_text() == "up\n"
    else:
        assert run(command, 1.0, "x" * 300_000) == ["failed", "it took longer than 1 s"]
    assert alive_with(mark) == []


def alive_with(mark: str) -> list[bytes]:
    """Return the command lines of the processes that have ``mark`` in their environment."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [
        harness.read_proc(pid, "cmdline")
        for pid in pids
        if mark.encode() in harness.read_proc(pid, "environ")
    ]


def test_what_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    """Here the helper itself does not end it in time: it is stopped."""
    mark = f"ALERT_HOOK_{os.getpid()}_{time.monotonic_ns()}"
    command = script(tmp_path / "hook", f"export {mark}=1\n(sleep 600 &)\nkill -STOP $PPID\nsleep 600")

    def work() -> list[str]:
        prctl.adopt_orphans()
        said: list[dict[str, Any]] = []
        sender = Sender(said.append, end_children)
        given = {"urls": [], "command": [command], "group_within_s": 60.0, "host": "node7"}
        sender.take({"settings": given}, time.monotonic())
        sender.take({"event": report.event("reaped")}, time.monotonic())
        sender.step(time.monotonic())
        ((running),) = sender._running.values()
        os.waitid(os.P_PID, running.helper.pid, os.WSTOPPED)
        sender.step(time.monotonic() + COMMAND_S + 5)
        return [one["text"] for one in said]

    assert in_helper(work) == ["the command for an event failed: it did not answer within 32 s"]
    assert alive_with(mark) == []


def test_more_events_than_a_command_can_be_given_are_counted_and_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alert_sender, "_MAX_EVENTS", 2)
    here = World(command=["/nowhere"])
    for _ in range(9):
        here.note()
    here.take({"lost": {"reaped": 3}, "at": "now"})
    here.until(here.sender.is_done)
    assert here.logged()[-1] == "the command was not run for 10 events: there were too many at a time"


def test_events_that_did_not_come_through_to_a_command_are_told_of_though_no_other_comes() -> None:
    here = World(command=["/nowhere"])
    here.take({"lost": {"reaped": 3}, "at": "now"})
    here.sender.step(time.monotonic())
    assert here.logged() == ["the command was not run for 3 events: there were too many at a time"]


def test_events_of_thousands_of_processes_take_only_so_much_memory_while_they_wait() -> None:
    here = World(command=["/nowhere"])
    for _ in range(400):
        here.note(processes=[{"pid": 1, "evidence": ["e" * 100_000]}])
    assert sum(map(len, here.sender._events)) <= 16 * 1024 * 1024
    assert len(here.sender._events) + here.sender._not_run == 400
    here.set()
    assert here.sender._event_chars == 0
    here.set(command=["/nowhere"])
    here.note()
    here.until(here.sender.is_done)
    assert here.sender._event_chars == 0


def test_what_waits_for_a_command_that_was_taken_out_is_told_of_and_not_run() -> None:
    here = World(urls=["a://x"], command=["/nowhere"])
    here.note()
    here.note()
    here.set(urls=["a://x"])
    assert here.logged() == ["not given to a command, as there is none any more: 2 events"]
    here.sender._jobs.clear()
    here.sender.step(time.monotonic())
    assert here.sender.descriptors() == []


def test_who_has_waited_longest_is_sent_to_first() -> None:
    """However many hang: each of those takes a helper for half a minute, and is due again when it gets none."""
    here = World(urls=[f"a://{number}" for number in range(2 * AT_ONCE + 1)])
    for target in here.sender._targets:
        target.outbox.note(group(), 0.0)
    sent_to: list[int] = []
    for second in range(0, 7 * int(SEND_S), int(SEND_S) + 1):
        at_s = 2.0 + second
        for target in [one for one in here.sender._by_turn() if (one.outbox.next_deadline() or 0) <= at_s][
            :AT_ONCE
        ]:
            assert target.outbox.take(at_s)
            target.outbox.done(Outcome.FAILED, at_s + SEND_S)
            sent_to.append(target.number)
    assert sent_to[: 2 * AT_ONCE + 1] == list(range(1, 2 * AT_ONCE + 2))


def group() -> Group:
    return Group("reaped", 1, "first", "last", ("x",))


def test_only_so_many_are_sent_to_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_delivery, "check", lambda *_: time.sleep(600))
    monkeypatch.setattr(alert_delivery, "send", lambda *_: time.sleep(600))
    here = World(urls=[f"json://localhost/{number}" for number in range(2 * AT_ONCE)])
    here.note()
    here.sender.step(time.monotonic() + SETTLE_S)
    assert len(here.sender.descriptors()) == AT_ONCE
    here.sender._jobs.clear()
    here.sender.step(time.monotonic() + SETTLE_S + SEND_S)
    assert len(here.sender.descriptors()) == AT_ONCE


def test_nothing_that_a_library_writes_reaches_the_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def write(said: str) -> str:
        for descriptor in (1, 2):
            os.write(descriptor, f"hunter2 {said}".encode())
        return "it was written"

    monkeypatch.setattr(alert_delivery, "reason_in", write)
    work = functools.partial(alert_delivery.send, "json://127.0.0.1:1/hunter2", "title", "body", "info")
    assert in_helper(work) == ["failed", "it was written"]
    assert capfd.readouterr() == ("", "")


def test_of_an_error_in_who_sends_it_is_told_where_and_not_with_what() -> None:
    said: list[dict[str, Any]] = []
    try:
        raise ValueError("json://hunter2")
    except ValueError as error:
        alert_sender._tell_uncaught(said.append, type(error), error, error.__traceback__)
    (text,) = (one["text"] for one in said)
    assert text.startswith("failed: ValueError at test_alert_sender.py:")
    assert "hunter2" not in text


def test_a_target_that_hangs_has_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_delivery, "send", lambda *_: time.sleep(600))  # a helper that does hang
    here = World(urls=["json://localhost/hunter2"])
    here.sender._jobs.clear()
    here.note()
    here.sender.step(time.monotonic() + SETTLE_S)
    assert here.logged() == []
    (running,) = here.sender._running.values()
    here.sender.step(time.monotonic() + SETTLE_S + SEND_S)
    assert here.logged() == [
        "cannot send to json://*** (entry 1 of urls): it did not answer within 30 s; trying again"
    ]
    assert not os.path.exists(f"/proc/{running.helper.pid}")
    assert here.sender._targets[0].outbox.count() == 1


def test_of_a_service_that_answers_without_end_no_more_is_taken_than_there_is_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alert_delivery, "_MEMORY_BYTES", 32 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"json://127.0.0.1:{server.getsockname()[1]}/"
        helper = start_helper(functools.partial(alert_delivery.send, url, "title", "body", "info"))
        server.settimeout(SOON_S)
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(SOON_S)
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            for _ in range(128):
                connection.sendall(bytes(1 << 20))
        found = result_of(helper)
    assert found == ["failed", NO_REASON]


def test_as_the_daemon_ends_what_hangs_has_a_moment_and_no_more(tmp_path: Path) -> None:
    mark = f"ALERT_HOOK_{os.getpid()}_{time.monotonic_ns()}"
    command = script(tmp_path / "hook", f"export {mark}=1\n(sleep 600 &)\nsleep 600")

    def work() -> list[str]:
        prctl.adopt_orphans()
        said: list[dict[str, Any]] = []
        ours, theirs = socket.socketpair()
        given = {"urls": [], "command": [command], "group_within_s": 60.0, "host": "node7"}
        for message in ({"settings": given}, *({"event": report.event("reaped")} for _ in range(3))):
            ours.sendall(json.dumps(message).encode() + b"\n")
        ours.shutdown(socket.SHUT_WR)
        alert_sender.serve(theirs, Sender(said.append, end_children), last_words_s=0.3)
        return [one["text"] for one in said]

    assert in_helper(work) == ["not given to the command, or not to its end, as the daemon ends: 3 events"]
    assert alive_with(mark) == []


def test_a_url_that_apprise_does_not_know_is_told_of_once_and_without_its_secret() -> None:
    here = World(urls=["json://localhost", BAD])
    here.until(lambda: bool(here.said))
    (said,) = here.logged()
    assert said.startswith(
        "nothing can be sent to nosuchservice://*** (entry 2 of urls): Apprise does not understand this URL"
    )
    here.set(urls=[BAD])
    here.note()
    here.until(lambda: not here.sender.descriptors() and not here.sender._targets[0].outbox.count(), 1e4)
    assert here.logged() == [said]
    assert "hunter2" not in json.dumps(here.said)


def test_a_failure_is_told_of_once_and_so_is_its_end() -> None:
    here = World(urls=["a://hunter2/x", "b://hunter2/y"])
    target = here.sender._targets[1]
    for outcome in (Outcome.FAILED, Outcome.FAILED, Outcome.SENT, Outcome.SENT):
        here.note()
        assert target.outbox.take(time.monotonic(), at_once=True)
        here.sender._sent(target, outcome, "connection refused")
    first, last = here.logged()
    assert first == "cannot send to b://*** (entry 2 of urls): connection refused; trying again"
    assert last.startswith("sending to b://*** (entry 2 of urls) works again, after ")


def test_what_waits_for_a_url_that_stays_goes_on_waiting() -> None:
    here = World(urls=["a://x", "b://y", "b://y"])
    here.note()
    here.set(urls=["c://z", "b://y"], group_within_s=5.0)
    assert [(one.url, one.number, one.outbox.count()) for one in here.sender._targets] == [
        ("c://z", 1, 0),
        ("b://y", 2, 1),
    ]


def test_a_test_tells_of_each_target_what_came_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    here = World(urls=[BAD], command=[script(tmp_path / "hook", f"cat > {out}")])
    here.take({"test": 5})
    here.until(lambda: any("tested" in one for one in here.said))
    (told,) = (one for one in here.said if "tested" in one)
    bad, command = told["results"]
    assert (told["tested"], bad["target"], bad["sent"]) == (5, "nosuchservice://*** (entry 1 of urls)", False)
    assert "Apprise does not understand" in bad["reason"]
    assert command == {"target": str(tmp_path / "hook"), "sent": True, "reason": None}
    assert json.loads(out.read_text("utf-8"))["kind"] == "test"


def test_a_test_is_answered_in_time_with_what_is_known_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_delivery, "send", lambda *_: time.sleep(600))
    here = World(urls=[f"json://localhost/{number}" for number in range(2 * AT_ONCE + 1)])
    here.sender._jobs.clear()
    here.take({"test": 5})
    now_s = time.monotonic()
    for later_s in (0.0, TEST_S, 2 * TEST_S):
        here.sender.step(now_s + later_s + 0.1)
    assert here.said == []
    due_s = here.sender.next_deadline()
    assert due_s is not None
    here.sender.step(due_s)
    (told,) = here.said
    reasons = [one["reason"] for one in told["results"]]
    assert reasons[:-1] == ["it did not answer within 20 s"] * 2 * AT_ONCE
    assert reasons[-1] == "not tried within 43 s: others took that long"
    assert TRIAL_S < TEST_WITHIN_S
    assert (here.sender.descriptors(), here.sender.next_deadline()) == ([], None)


def test_what_happened_is_told_before_a_test_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_delivery, "send", lambda *_: time.sleep(600))
    here = World(urls=[f"json://localhost/{number}" for number in range(AT_ONCE)])
    here.note()
    here.take({"test": 5})
    here.sender.step(time.monotonic() + SETTLE_S)
    assert all(target.outbox.is_sending for target in here.sender._targets)


def test_a_test_without_targets_is_answered_at_once() -> None:
    here = World()
    here.take({"test": 5})
    assert here.said == [{"tested": 5, "results": []}]


def test_as_the_daemon_ends_what_waits_behind_a_message_is_sent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    os.mkfifo(gate)

    def send(url: str, title: str, *_: str) -> tuple[str, str]:
        with open(out, "a", encoding="utf-8") as file:
            file.write(f"{title}\n")
        os.read(os.open(gate, os.O_RDONLY), 1)
        return Outcome.SENT.value, ""

    monkeypatch.setattr(alert_delivery, "send", send)
    here = World(urls=["json://localhost"])
    here.sender._jobs.clear()
    here.note("reaped")
    here.sender.step(time.monotonic() + SETTLE_S)
    here.note("stuck")
    here.sender.end()
    here.sender.step(time.monotonic())
    assert not here.sender.is_done()
    writer = os.open(gate, os.O_RDWR)
    os.write(writer, b"..")
    here.until(here.sender.is_done)
    os.close(writer)
    assert out.read_text("utf-8").splitlines() == ["Reaper on node7: 1 reaped", "Reaper on node7: 1 stuck"]


def test_what_is_left_as_the_daemon_ends_is_told_of() -> None:
    here = World(urls=["a://x"], command=["/nowhere"])
    here.note()
    here.take({"lost": {"reaped": 2}, "at": "now"})
    here.sender.close()
    assert here.logged() == [
        "not sent to a://*** (entry 1 of urls), as the daemon ends: 3 events",
        "not given to the command, or not to its end, as the daemon ends: 3 events",
    ]


# -- what is checked beforehand --------------------------------------------------------------------------


def test_urls_that_apprise_cannot_use_are_faults_without_their_secrets() -> None:
    faults, warnings = faults_and_warnings(["json://localhost/x", BAD, "slack://hunter2"])
    assert warnings == []
    assert [fault.split(": ")[1] for fault in faults] == ["entry 2", "entry 3"]
    assert faults[0].endswith("got nosuchservice://***")
    assert "hunter2" not in "".join(faults)
    assert faults_and_warnings([]) == ([], [])


def test_why_apprise_cannot_be_had_is_said_with_what_helps() -> None:
    assert why_no_apprise(ImportError(name="apprise")) == MISSING
    assert "pip install" in MISSING
    assert (
        why_no_apprise(ImportError(name="requests.adapters"))
        == "Apprise cannot be imported, for requests cannot"
    )
    assert why_no_apprise(ImportError()) == "Apprise cannot be imported, for a part of it cannot"
