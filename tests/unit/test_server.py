"""Answers to requests: what is done before a peer is told so."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import wire
from agent.page import SessionPage
from reaperd import report
from reaperd.alerts import Alerts
from reaperd.claims import Claims
from reaperd.config import AlertsConfig
from reaperd.core import Core
from reaperd.gate_link import Peer, Return
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcFS
from reaperd.model import ProcessId, Session
from reaperd.observer import Observer
from reaperd.orphans import Orphans
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.server import Facts, Server, _Request
from reaperd.store import Store

ME = os.getpid()


class Link:
    """Notes each reply, and what another process could read of the database when it was sent."""

    lives_lost = 0

    def __init__(self, database: Path) -> None:
        self._database = database
        self.replies: list[dict[str, Any]] = []
        self.on_record: list[dict[str, bool]] = []  # by id, whether it is ending
        self.told: list[int] = []

    def reply(self, to: Return, reply: bytes) -> None:
        self.replies.append(wire.decode(reply))
        with contextlib.closing(sqlite3.connect(self._database)) as database:
            rows = database.execute("SELECT id, record FROM sessions")
            self.on_record.append({id_: json.loads(record)["ending"] for id_, record in rows})
        self.told.append(self.events())

    def events(self) -> int:
        with contextlib.closing(sqlite3.connect(self._database)) as database:
            return int(database.execute("SELECT count(*) FROM events").fetchone()[0])


class World:
    """A server, asked by this process."""

    def __init__(self, directory: Path) -> None:
        proc, alarm = ProcFS(), Alarm()
        self.alarm = alarm
        observer = Observer(proc, alarm)
        store = Store(str(directory), observer.boot_id)
        self.core = Core(observer, Reaper(proc, frozenset()), store, Poller(), Policy(), alarm)
        self.link = Link(directory / "reaper.db")
        orphans = Orphans(
            proc,
            Scan(proc, observer.marks, alarm),
            Reaper(proc, frozenset()),
            Poller(),
            store,
            Claims(self.core.sessions, proc),
            self.core.sessions.record,
        )
        facts = Facts("user", "", "", 4, frozenset(), dry_run=False)
        self.server = Server(self.core, self.link, facts, orphans, Alerts(Poller(), AlertsConfig()))  # type: ignore[arg-type]
        self.ticks = proc.stat(ME).id.start_ticks
        self.session = wire.format_session_id(ME, self.ticks, 1, 2)
        self.page = SessionPage(self.session, "grid", self.ticks, observer.boot_id)
        self.page.write_record(["/nowhere"])

    def ask(self, operation: str, **more: Any) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours:
            peer = Peer(os.getuid(), os.getgid(), ME, theirs)
            self.server.admit(peer, Return(1, b"", peer.uid), {"op": operation, **more})
            self.server.take_turns()
        return self.link.replies[-1]

    def register(self) -> dict[str, Any]:
        page_fd = self.page.fd
        return self.ask("register", session=self.session, start_ticks=self.ticks, page_fd=page_fd)

    def close(self) -> None:
        self.page.close()
        self.core.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.closing(World(tmp_path)) as one:
        yield one
    del one
    gc.collect()  # what it has open must not be closed in the middle of a test that counts descriptors


def test_a_session_is_on_record_before_its_leader_is_told_that_it_is_taken_on(world: World) -> None:
    assert world.register()["ok"] is True
    assert world.link.on_record == [{world.session: False}]


def test_that_a_session_is_taken_on_is_in_the_history_before_its_leader_is_told_so(world: World) -> None:
    world.register()
    assert world.link.told == [1]
    (event,) = world.core.store.events()
    assert (event["kind"], event["session"]) == ("registered", world.session)


def test_events_of_an_owner_and_of_kinds_are_told_alone(world: World) -> None:
    record = world.core.sessions.record
    record(report.event("started"))
    record(report.event("killed", uid=7))
    record(report.event("killed", uid=8))
    record(report.event("orphan", uid=7))

    def told(**asked: Any) -> list[int]:
        return [one["seq"] for one in world.ask("events", **asked)["events"]]

    assert told() == [1, 2, 3, 4]
    assert told(owner=7) == [2, 4]
    assert told(kinds=["killed", "started"]) == [1, 2, 3]
    assert told(owner=7, kinds=["killed"], after=1) == [2]
    assert told(owner=7, kinds=["a kind of a later version"]) == []
    assert told(owner=None, kinds=None) == [1, 2, 3, 4]


@pytest.mark.parametrize("owner", ["root", -1, 2**32, True, 1.0, [0]])
def test_an_owner_must_be_a_uid(world: World, owner: Any) -> None:
    told = world.ask("events", owner=owner)
    assert (told["kind"], told["message"]) == ("bad-request", f"owner: must be a uid, got {owner!r}")


@pytest.mark.parametrize("kinds", ["reaped", [], [1], [""], ["x" * 65], ["x"] * 33, {"reaped": 1}])
def test_kinds_must_be_a_short_list_of_short_texts(world: World, kinds: Any) -> None:
    told = world.ask("events", kinds=kinds)
    assert told["kind"] == "bad-request"
    assert told["message"].startswith("kinds: must be a list of 1 to 32 kinds of event, got ")


def test_a_session_is_told_of_once_however_often_its_leader_registers(world: World) -> None:
    for _ in range(3):
        assert world.register()["ok"] is True
    assert [event["kind"] for event in world.core.store.events()] == ["registered"]


def test_the_end_of_a_session_is_on_record_before_its_leader_is_told_so(world: World) -> None:
    world.register()
    assert world.ask("unregister", session=world.session)["ok"] is True
    assert world.link.on_record[-1] == {world.session: True}


def test_who_cannot_be_taken_on_for_want_of_descriptors_is_told_so(world: World) -> None:
    world.core.sessions.most = 0
    for number in range(8):
        session = Session(f"{number}", "", os.getuid(), 0, ProcessId(4194305 + number, 1), "")
        world.core.sessions.add(session)
    answer = world.register()
    assert (answer["ok"], answer["kind"]) == (False, "quota")
    assert "all users have 8 sessions" in answer["message"]


def test_what_fails_for_want_of_memory_is_to_be_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(world.core.observer, "describe_leader", fail)
    answer = world.register()
    assert (answer["ok"], answer["kind"]) == (False, "busy")
    assert "out of memory" in answer["message"]
    assert not [one for one in caplog.records if one.exc_info], "there is nothing to mend"
    monkeypatch.undo()
    assert world.register()["ok"]


def test_a_page_of_another_session_is_refused_and_not_kept_open(world: World) -> None:
    other = wire.format_session_id(ME, world.ticks, 1, 3)
    opened = []
    for _ in range(2):  # what is opened for good, the first request opens
        reply = world.ask("register", session=other, start_ticks=world.ticks, page_fd=world.page.fd)
        assert reply["kind"] == "bad-page"
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[0] == opened[1]
    assert world.link.on_record == [{}, {}]


def test_a_request_that_a_leader_dies_in_the_middle_of_is_to_be_made_again(world: World) -> None:
    ours, theirs = socket.socketpair()
    ringing, writer = os.pipe()
    world.alarm.watch(ringing)
    os.write(writer, b"x")
    with ours:
        peer = Peer(os.getuid(), os.getgid(), ME, theirs)
        world.server._answer(_Request(peer, Return(1, b"", peer.uid), {"op": "explain", "pid": ME}))
    world.alarm.silence(ringing)
    os.close(ringing)
    os.close(writer)
    assert world.link.replies[-1]["kind"] == "busy"
    assert world.ask("explain", pid=ME)["ok"] is True


def test_whoever_is_protected_can_be_judged_again(world: World) -> None:
    assert world.ask("protect", pid=ME, undo=True)["kind"] == "not-protected"
    assert world.ask("protect", pid=ME)["ok"] is True
    assert {one.pid for one in world.core.policy.spared} == {ME}
    assert world.ask("explain", pid=ME)["explain"]["rule"] == "protected"
    assert world.ask("protect", pid=ME, undo=1)["kind"] == "bad-request"
    assert world.ask("protect", pid=ME, undo=True)["ok"] is True
    assert world.core.policy.spared == world.core.store.spared() == frozenset()
    assert world.ask("explain", pid=ME)["explain"]["rule"] == "parent"


def test_whoever_was_protected_is_forgotten_once_it_has_ended(world: World) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert world.ask("protect", pid=child.pid)["ok"] is True
        assert {one.pid for one in world.core.store.spared()} == {child.pid}
    assert world.ask("protect", pid=ME)["ok"] is True
    assert {one.pid for one in world.core.store.spared()} == {ME}


@pytest.mark.parametrize("operation", ["protect", "release"])
def test_a_process_that_is_named_with_its_start_time_is_not_taken_for_another_with_its_pid(
    world: World, operation: str
) -> None:
    for undo in (False, True):
        refused = world.ask(operation, pid=ME, start_ticks=world.ticks - 1, undo=undo)
        assert refused["kind"] == "unknown-process"
        assert "another one has its pid" in refused["message"]
    assert world.core.policy.spared == frozenset()
    assert world.ask(operation, pid=ME, start_ticks="1")["kind"] == "bad-request"
    named = world.ask("protect", pid=ME, start_ticks=world.ticks)
    assert named["start_ticks"] == world.ticks


def event(kind: str, pid: int, **more: Any) -> dict[str, Any]:
    return report.event(kind, uid=os.getuid(), processes=[{"pid": pid, "start_ticks": 1}], **more)


def test_the_score_counts_what_rules_would_have_ended_and_no_clean_up(world: World) -> None:
    events = [
        event("orphan", 1, would="kill", rule="stays"),
        event("orphan", 2, would="kill", rule="gpu"),
        event("orphan", 3, rule="uncertain"),
        event("orphan", 1, outcome="exited", after_s=3.0),
        event("orphan", 3, outcome="exited", after_s=9.0),
        event("orphan", 2, outcome="claimed", after_s=1.0),
        event("killed", 4, rule="cleanup", asked_by_uid=0),
        event("killed", 5, rule="gpu", asked_by_uid=None),
    ]
    for one in events:
        world.core.sessions.record(one)
    score = world.ask("orphans", score=True)["score"]
    del score["since"]
    assert score == {
        "condemned": 2,
        "exited": 1,
        "exited_after_s": {"median": 3.0, "max": 3.0},
        "claimed": 1,
        "still_there": 0,
        "killed": 1,
    }


# -- a control group of its own ---------------------------------------------------------------------


def test_a_session_that_is_to_be_isolated_is_answered_when_that_is_decided(world: World) -> None:
    asked: list[Any] = []
    world.core.isolate = lambda key, done: asked.append((key, done))  # type: ignore[method-assign]
    world.link.replies.append({})
    page_fd = world.page.fd
    told = world.ask(
        "register", session=world.session, start_ticks=world.ticks, page_fd=page_fd, isolate=True
    )
    assert told == {}, "no answer yet"
    ((key, done),) = asked
    assert key.id == world.session
    assert key in world.core.sessions.entries, "it is watched meanwhile"
    done(None, "it must stay")
    reply = world.link.replies[-1]
    assert reply["ok"]
    assert (reply["session"], reply["isolated"], reply["not_isolated"]) == (
        world.session,
        False,
        "it must stay",
    )
    done("/s.scope", "")
    assert world.link.replies[-1]["isolated"]


def test_root_of_a_container_takes_no_turns_of_the_machine_s(world: World) -> None:
    """However many of its requests wait: each of them is uid 0's, as the kernel says."""
    world.server.admit(Peer(os.getuid(), 0, ME, socket.socket()), Return(1, b"", 0), {"op": "ping"})
    world.server._container_of = lambda peer: "pid:[7]"  # type: ignore[method-assign]
    with contextlib.ExitStack() as ours:
        peers = [ours.enter_context(socket.socket()) for _ in range(3000)]
        for one in peers:
            world.server.admit(Peer(os.getuid(), 0, ME, one), Return(1, b"", 0), {"op": "ping"})
        assert {reply["kind"] for reply in world.link.replies} == {"busy"}
        world.server._container_of = lambda peer: ""  # type: ignore[method-assign]
        before = len(world.link.replies)
        world.server.admit(Peer(os.getuid(), 0, ME, socket.socket()), Return(1, b"", 0), {"op": "ping"})
        assert len(world.link.replies) == before
        world.server.close()


def test_nobody_is_isolated_who_did_not_ask_unless_the_settings_say_so(world: World) -> None:
    asked: list[Any] = []
    world.core.isolate = lambda key, done: (asked.append(key), done("/s.scope", ""))  # type: ignore[method-assign]
    assert "isolated" not in world.register()
    assert not asked
    world.server.facts = world.server.facts._replace(isolate=True)
    assert world.register()["isolated"]
    assert len(asked) == 1


def test_isolate_must_be_true_or_false(world: World) -> None:
    page_fd = world.page.fd
    reply = world.ask("register", session=world.session, start_ticks=world.ticks, page_fd=page_fd, isolate=1)
    assert (reply["kind"], reply["message"]) == ("bad-request", "isolate: must be true or false, got 1")
    assert not world.core.sessions.entries


@pytest.mark.parametrize("spoiled", ["dry_run", "protected"])
def test_why_a_session_is_not_isolated_is_told(world: World, spoiled: str) -> None:
    told: list[tuple[str | None, str]] = []
    world.register()
    (key,) = world.core.sessions.entries
    policy = {"dry_run": Policy(dry_run=True), "protected": Policy(protected_uids=frozenset((os.getuid(),)))}
    world.core.policy = policy[spoiled]
    world.core.isolate(key, lambda scope, why: told.append((scope, why)))
    ((scope, why),) = told
    assert scope is None
    assert {"dry_run": "runs with dry_run", "protected": "[protect] users"}[spoiled] in why
    assert world.core.sessions.entries[key].session.scope is None


@pytest.mark.parametrize("damage", [{}, {"processes": []}, {"processes": [{"pid": 7}]}, {"at": "x"}], ids=str)
def test_the_score_does_without_events_that_are_damaged(world: World, damage: dict[str, Any]) -> None:
    whole = report.event(
        "orphan", at="2030-01-01T00:00:00Z", would="kill", processes=[{"pid": 7, "start_ticks": 8}]
    )
    world.core.store.add_event(whole, 1.0)
    world.core.store.add_event({**whole, "kind": "killed", "outcome": "exited", "after_s": "soon"}, 1.0)
    for kind in ("orphan", "killed"):
        world.core.store.add_event(
            {"kind": kind, "would": "kill", "outcome": "exited", "uid": None, **damage}, 1.0
        )
    world.server.facts = world.server.facts._replace(admins=frozenset({ME, os.getuid()}))
    assert world.ask("orphans", score=True)["score"]["condemned"] == 1
