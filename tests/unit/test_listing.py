"""What ``ps`` says is made anew only where something has changed, or there has been another look."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent import wire
from reaperd import listing, pages
from reaperd.census import Interrupted
from reaperd.ledger import Entry
from reaperd.listing import Listing, Pace
from reaperd.model import Family, Member, Process, ProcessId, Role, Session, SessionKey, Usage

WORKER = Process(ProcessId(70, 1), 7, 1000, "worker")


def session(name: str, uid: int = 1000, pid: int = 7) -> Session:
    return Session(name, f"name of {name} \u2603", uid, uid, ProcessId(pid, 1), "2030-01-01T00:00:00Z")


@dataclass
class UsageMeter:
    used: int = 0

    def of(self, process: Process) -> Usage:
        self.used += 1
        return Usage(50.0, 4096)


@dataclass
class Observer:
    asked: list[ProcessId] = field(default_factory=list)
    usage: UsageMeter = field(default_factory=UsageMeter)

    def usage_of(self, id_: ProcessId) -> Usage | None:
        return Usage(3.0, 8192)

    def cmdlines(self, ids: Any) -> dict[int, list[str]]:
        self.asked += ids
        return {id_.pid: ["python", f"{id_.pid}.py"] for id_ in ids if id_.pid != 9}


@dataclass
class Core:
    """Tells of the sessions that the test puts into it; its parts are all itself."""

    entries: dict[SessionKey, Entry] = field(default_factory=dict)
    observer: Observer = field(default_factory=Observer)
    looks: int = 0
    look_takes_s: float = 0.0
    interrupted: bool = False
    progress: pages.Progress | None = None

    @property
    def sessions(self) -> Core:
        return self

    @property
    def living(self) -> Core:
        return self

    @property
    def leaders(self) -> Core:
        return self

    def put(self, one: Session) -> None:
        self.entries[one.key] = Entry(one)

    def look(self) -> dict[SessionKey, Family]:
        self.looks += 1
        if self.interrupted:
            raise Interrupted
        end_s = time.monotonic() + self.look_takes_s
        while time.monotonic() < end_s:
            pass
        member = Member(WORKER, Role.WORKER, "other", ("it is a test",), marked=True)
        return {key: Family({WORKER.id: member}, {}) for key in self.entries}

    def page_of(self, key: SessionKey) -> Any:
        return self

    @property
    def spared(self) -> tuple[()]:
        return ()


@pytest.fixture
def core() -> Core:
    one = Core()
    one.put(session("a"))
    one.put(session("b", uid=1001, pid=8))
    return one


def ps(of: Listing, uid: int | None = None) -> list[dict[str, Any]]:
    text = of.sessions(lambda one: uid in (None, one.uid))
    found: list[dict[str, Any]] = wire.decode(b'{"v":1,"sessions":' + text + b"}")["sessions"]
    return found


def test_everybody_is_told_of_all_sessions_and_sees_its_own_command_lines(core: Core) -> None:
    of = Listing(core)  # type: ignore[arg-type]
    for uid, seen in (
        (1000, ["7.py", None]),
        (1001, [None, "8.py"]),
        (None, ["7.py", "8.py"]),
        (5, [None, None]),
    ):
        told = ps(of, uid)
        assert [one["id"] for one in told] == ["a", "b"]
        lines = [one["leader"]["cmdline"] for one in told]
        assert [line and line[1] for line in lines] == seen
        assert [one["workers"][0]["pid"] for one in told] == [70, 70]
    assert core.looks == 1
    assert sorted(core.observer.asked) == [ProcessId(7, 1), ProcessId(8, 1)], "each is read once"
    assert core.observer.usage.used == 4, "each is written once with its command line, and once without"


def test_a_command_line_that_cannot_be_read_is_none_and_not_asked_for_again(core: Core) -> None:
    core.put(session("c", pid=9))
    of = Listing(core)  # type: ignore[arg-type]
    assert [ps(of)[-1]["leader"]["cmdline"] for _ in range(2)] == [None, None]
    assert core.observer.asked.count(ProcessId(9, 1)) == 1


def test_a_session_that_comes_changes_or_goes_shows_at_once(core: Core) -> None:
    of = Listing(core)  # type: ignore[arg-type]
    ps(of)
    core.put(session("c", pid=9))
    assert [(one["id"], len(one["workers"])) for one in ps(of)] == [("a", 1), ("b", 1), ("c", 0)]
    key = session("a").key
    core.entries[key] = Entry(session("a")._replace(ending=True))
    assert [one["state"] for one in ps(of)] == ["ending", "running", "running"]
    del core.entries[key]
    assert [one["id"] for one in ps(of)] == ["b", "c"]
    assert core.looks == 1
    core.put(session("a"))
    assert ps(of)[-1]["state"] == "running"


def test_progress_shows_when_the_pages_are_read_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_FRESH_S", 60.0)
    of = Listing(core)  # type: ignore[arg-type]
    assert ps(of)[0]["progress"] is None
    core.progress = pages.Progress(1, 2, "half")
    assert ps(of)[0]["progress"] is None
    of._page_pace = Pace()
    assert ps(of)[0]["progress"] == {"done": 1, "total": 2, "message": "half"}
    assert core.looks == 1


def test_a_look_that_takes_long_is_not_repeated_before_ten_times_as_long(core: Core) -> None:
    core.look_takes_s = 0.05
    of = Listing(core)  # type: ignore[arg-type]
    began_s = time.monotonic()
    while core.looks < 3:
        ps(of)
    assert time.monotonic() - began_s > 2 * 0.5


def test_a_look_that_was_interrupted_does_not_count(core: Core) -> None:
    of = Listing(core)  # type: ignore[arg-type]
    core.interrupted = True
    assert [one["workers"] for one in ps(of)] == [[], []]
    core.interrupted = False
    assert [len(one["workers"]) for one in ps(of)] == [1, 1]
    assert core.looks == 2


def test_a_part_of_a_reply_is_written_as_the_whole_is() -> None:
    for value in ({"a": ["\u2603", None, 1.5]}, "\udcff", []):
        assert wire.encode({"x": value}) == b'{"v":1,"x":' + listing.encode_part(value) + b"}"
        json.loads(listing.encode_part(value))
