"""An agent and a daemon of two versions: an earlier one, as tests/fixtures keeps it, and that of the tree."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from harness import Daemon, Leader, Scratch, repeat_until, test_environment
from versions import NAMES, AgedDaemon, Version, environment_of

import agent as agent_of_the_tree
from agent import status

StartLeader = Callable[..., Leader]

GONE_WITHIN_S = 15.0
WAYS = ("an old agent", "an old daemon")


class Pair(NamedTuple):
    """Which version the agent is of, and which one the daemon; None: the tree's."""

    agent: Version | None
    daemon: Version | None


@pytest.fixture(scope="module", params=NAMES)
def old(request: pytest.FixtureRequest) -> Iterator[Version]:
    scratch = Scratch()
    yield Version(request.param, scratch)
    scratch.remove()


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest, old: Version) -> Pair:
    return Pair(old, None) if request.param == WAYS[0] else Pair(None, old)


@pytest.fixture
def aged(scratch: Scratch, run: str) -> Iterator[AgedDaemon]:
    daemon = AgedDaemon(scratch, run)
    with contextlib.closing(daemon):
        yield daemon


@pytest.fixture
def train(start_leader: StartLeader) -> Callable[..., Leader]:
    def start(daemon: Daemon, version: Version | None, *arguments: str) -> Leader:
        leader = start_leader("versioned.py", *arguments, socket=daemon.socket, env=environment_of(version))
        imported = leader.family.facts["agent"]
        ours = os.path.dirname(agent_of_the_tree.__file__)
        assert (os.path.dirname(imported) == ours) == (version is None), imported
        return leader

    return start


Train = Callable[..., Leader]


def progress_of(daemon: Daemon, leader: Leader) -> dict[str, Any]:
    session = daemon.session_of(leader.pid)
    assert session is not None
    assert session["name"] == "aged"
    found: dict[str, Any] = session["progress"]
    return found


def end_and_check(daemon: Daemon, leader: Leader) -> dict[str, Any]:
    """SIGKILL the leader: both its workers are ended, and the event tells of it."""
    leader.kill9()
    event = daemon.wait_end(leader.session)
    leader.wait_all_gone(GONE_WITHIN_S)
    assert (event["kind"], event["name"], event["cause"]) == ("reaped", "aged", {"kind": "signal", "code": 9})
    assert {process["pid"] for process in event["processes"]} >= set(leader.family.workers)
    return event


def test_what_was_registered_is_listed_with_its_progress_and_reaped(
    pair: Pair, aged: AgedDaemon, train: Train
) -> None:
    aged.of(pair.daemon).start()
    leader = train(aged, pair.agent)
    assert leader.family.facts["socket"] == aged.socket
    aged.wait_listed(leader.pid, leader.family.workers)
    assert progress_of(aged, leader) == {"done": 3, "total": 8, "message": "fold 3"}
    leader.ask("progress 5 8 fold 5")
    repeat_until(lambda: progress_of(aged, leader)["done"] == 5 or None, 10, "no progress is seen")
    end_and_check(aged, leader)
    assert "Traceback" not in aged.read_log() + leader.read_log()


def test_a_session_that_its_leader_ends_is_over_and_nobody_is_touched(
    pair: Pair, aged: AgedDaemon, train: Train
) -> None:
    aged.of(pair.daemon).start()
    leader = train(aged, pair.agent)
    leader.ask("unregister")
    repeat_until(
        lambda: (found := aged.session_of(leader.pid)) is None or found["state"] != "running" or None,
        10,
        "the session goes on",
    )
    assert set(leader.still_alive(leader.family.workers)) == set(leader.family.workers)
    leader.kill9()
    leader.wait_all_gone(GONE_WITHIN_S)


def test_a_daemon_that_comes_later_takes_the_session_on_by_its_page(
    pair: Pair, aged: AgedDaemon, train: Train
) -> None:
    leader = train(aged, pair.agent)
    assert leader.family.facts["socket"] is None
    leader.ask("progress 6 8 alone")
    aged.of(pair.daemon).start()
    (event,) = aged.events(kind="registered")
    assert (event["session"], event["adopted"]) == (leader.session, True)
    assert progress_of(aged, leader) == {"done": 6, "total": 8, "message": "alone"}
    end_and_check(aged, leader)


def test_a_training_session_says_its_new_things_to_an_old_daemon_in_vain_and_unharmed(
    old: Version, aged: AgedDaemon, train: Train, scratch: Scratch
) -> None:
    aged.of(old).start()
    path = scratch.file("run.json")
    leader = train(aged, None, "training", path)
    aged.wait_listed(leader.pid, leader.family.workers)
    end_and_check(aged, leader)
    assert (
        status.read_status(path).state == "killed"
    )  # which the reader finds out where the daemon wrote nothing


def test_an_old_daemon_that_tells_of_every_event_shows_no_more_than_was_asked_for(
    old: Version, aged: AgedDaemon, train: Train
) -> None:
    aged.of(old).start()
    leader = train(aged, None)
    aged.wait_listed(leader.pid, leader.family.workers)
    event = end_and_check(aged, leader)
    assert len(aged.events()) > 2
    assert aged.ask("events", "--kind", "reaped") == [event]
    assert aged.ask("events", "--user", str(os.getuid()), "--kind", "reaped,started") == [event]
    assert aged.ask("events", "--user", "54321") == []
    told = aged.ask("report")
    ended = [one for one in event["processes"] if one["result"] == "killed"]
    assert (told["total"]["sessions_reaped"], told["total"]["killed"]) == (1, len(ended))
    assert aged.ask("report", "--user", "54321")["total"]["killed"] == 0


def test_reaperctl_run_does_without_a_daemon_that_wants_pages_sealed_for_good(
    old: Version, aged: AgedDaemon, run: str
) -> None:
    """A page that is to be handed over by execve(2) has two seals only: 0.1.0.dev1 refuses it, and nothing is lost by that."""
    aged.of(old).start()
    left = "sleep 150 & kill -9 $$"
    done = subprocess.run(
        [sys.executable, "-m", "reaperd.ctl.main", "run", "--restart", "on-failure:1", "--", "sh", "-c", left],
        env=test_environment(run, REAPER_SOCKET=aged.socket), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert "Traceback" not in done.stderr
    watched = len(aged.events(kind="registered"))
    assert watched == 2 or "no Reaper daemon watches this session" in done.stderr
    assert done.stderr.count("killed by SIGKILL") == 2


# -- the state that one leaves and another finds --------------------------------------------------


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("forward", [True, False], ids=["up", "down"])
def test_a_session_lives_through_a_change_of_the_daemons_version(
    old: Version, aged: AgedDaemon, train: Train, forward: bool, killed: bool
) -> None:
    first, second = (old, None) if forward else (None, old)
    aged.of(first).start()
    lives, dies = train(aged, None), train(aged, old)
    for leader in (lives, dies):
        aged.wait_listed(leader.pid, leader.family.workers)
    before = aged.events()
    if killed:
        aged.kill9()
    else:
        aged.stop()
    dies.kill9()  # while nobody looks
    aged.of(second).start()
    assert {one["id"] for one in aged.sessions()} >= {lives.session}
    assert aged.events()[: len(before)] == before, "the history is there as it was"
    assert [one["session"] for one in aged.events(kind="registered")].count(lives.session) == 1
    event = aged.wait_end(dies.session)
    assert (event["kind"], event["name"]) == ("reaped", "aged")
    dies.wait_all_gone(GONE_WITHIN_S)
    assert progress_of(aged, lives) == {"done": 3, "total": 8, "message": "fold 3"}
    end_and_check(aged, lives)
    assert not [name for name in os.listdir(aged.state) if "broken" in name], aged.read_log()
    assert "Traceback" not in aged.read_log()


@pytest.mark.parametrize("ours", [False, True], ids=["an old daemon", "this daemon"])
def test_a_database_of_a_format_to_come_is_kept_aside_and_told_of(
    old: Version, aged: AgedDaemon, train: Train, ours: bool
) -> None:
    aged.start()
    leader = train(aged, None)
    aged.stop()
    path = os.path.join(aged.state, "reaper.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 3")
        database.commit()
    aged.of(None if ours else old).start()
    assert "its version is 3, this daemon knows 2" in aged.read_log()
    (aside,) = (n for n in os.listdir(aged.state) if "broken" in n and not n.endswith(("-wal", "-shm")))
    with contextlib.closing(sqlite3.connect(os.path.join(aged.state, aside))) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
        (record,) = database.execute("SELECT record FROM sessions").fetchone()
        assert json.loads(record)["id"] == leader.session
    assert aged.session_of(leader.pid) is not None, "its page tells of it"
    end_and_check(aged, leader)
