"""What people and programs are told of a session and of its end: every field that others rely on."""

from __future__ import annotations

from typing import Any

import pytest

from agent import wire
from reaperd import pages, report
from reaperd.escalation import Event
from reaperd.ledger import (
    QUIET_LOOKS,
    Concluded,
    Entry,
    Exited,
    Happening,
    LeaderDied,
    Looked,
    Reclaimed,
    Signalled,
    SignalsSent,
    Unregistered,
    apply,
)
from reaperd.model import (
    UNKNOWN_CAUSE,
    Cause,
    CauseKind,
    Family,
    Freed,
    Member,
    Process,
    ProcessId,
    Role,
    Session,
    Usage,
)

LEADER = ProcessId(100, 1000)
SESSION = Session("s", "grid", 1000, 100, LEADER, "2030-01-01T00:00:00.000Z")


def member(pid: int, *, tracker: bool = False, rss_bytes: int = 0) -> Member:
    one = Process(ProcessId(pid, 2000), 1, 1000, rss_bytes=rss_bytes)
    return Member(one, Role.TRACKER if tracker else Role.WORKER, "loky", ("holds the page",), True)


def looked(at_s: float, *members: Member, left_alone: dict[int, str] | None = None) -> Looked:
    found = {one.process.id: one for one in members}
    left = {ProcessId(pid, 2000): reason for pid, reason in (left_alone or {}).items()}
    return Looked(Family(found, left), at_s, 0.0)


def exited(at_s: float, *pids: int) -> Exited:
    return Exited({ProcessId(pid, 2000): at_s for pid in pids})


def sent(pid: int, number: int, *, denied: bool = False) -> SignalsSent:
    return SignalsSent((Signalled(ProcessId(pid, 2000), Event.DUE, number, 0.0, denied=denied),))


def dead(*happenings: Happening, cause: Cause = Cause(CauseKind.SIGNAL, 9)) -> Entry:  # noqa: B008 (a value)
    entry = apply(Entry(SESSION), LeaderDied(cause, 10.0, 10.0))
    for happening in happenings:
        entry = apply(entry, happening)
    return entry


def end(*happenings: Happening, dry_run: bool = False) -> dict[str, Any]:
    event = report.end_event(dead(*happenings), dry_run=dry_run)
    assert wire.decode(wire.encode(event)) == {"v": 1, **event}
    return event


def results(event: dict[str, Any]) -> dict[int, str]:
    return {one["pid"]: one["result"] for one in event["processes"]}


# -- causes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "cause", "words"),
    [
        (0, Cause(CauseKind.EXIT, 0), "exit:0"),
        (3 << 8, Cause(CauseKind.EXIT, 3), "exit:3"),
        (255 << 8, Cause(CauseKind.EXIT, 255), "exit:255"),
        (9, Cause(CauseKind.SIGNAL, 9), "signal:9"),
        (11 | 0x80, Cause(CauseKind.SIGNAL, 11, core_dumped=True), "signal:11+core"),
    ],
)
def test_a_wait_status_is_a_cause_in_words(status: int, cause: Cause, words: str) -> None:
    assert Cause.of_status(status) == cause
    assert report.cause_words(cause) == words


def test_a_cause_that_nobody_knows_is_called_so() -> None:
    assert report.cause_words(None) == report.cause_words(UNKNOWN_CAUSE) == "unknown"
    assert report.cause_words(Cause(CauseKind.OOM, 9)) == "oom:9"
    assert report.cause_record(None) is None
    assert report.cause_record(UNKNOWN_CAUSE) == {"kind": "unknown", "code": None}


def test_a_core_dump_is_told_only_where_there_is_one() -> None:
    assert report.cause_record(Cause(CauseKind.SIGNAL, 9)) == {"kind": "signal", "code": 9}
    told = report.cause_record(Cause(CauseKind.SIGNAL, 11, core_dumped=True))
    assert told == {"kind": "signal", "code": 11, "core_dumped": True}


# -- the end of a session ---------------------------------------------------------------------------


def test_the_event_of_an_end_has_every_field_that_others_rely_on() -> None:
    event = end(
        looked(10.0, member(201, rss_bytes=4096), left_alone={300: "was started under spared()"}),
        sent(201, 15),
        sent(201, 9),
        exited(10.0125, 201),
        Reclaimed(Freed(shm_bytes=512)),
    )
    assert event == {
        "kind": "reaped",
        "session": "s",
        "name": "grid",
        "uid": 1000,
        "leader": {"pid": 100, "start_ticks": 1000},
        "cause": {"kind": "signal", "code": 9},
        "processes": [
            {
                "pid": 201,
                "role": "worker",
                "framework": "loky",
                "signal": "SIGKILL",
                "signals": ["SIGTERM", "SIGKILL"],
                "result": "killed",
                "evidence": ["holds the page"],
            }
        ],
        "stopped_by_uid": None,
        "left_alone": [{"pid": 300, "reason": "was started under spared()"}],
        "latency_s": 0.0125,
        "freed": {"rss_bytes": 4096, "shm_bytes": 512, "gpu_bytes": 0},
    }


def test_who_was_left_alone_at_first_and_ended_later_is_told_of_once() -> None:
    event = end(
        looked(10.0, left_alone={201: "its parent is neither", 300: "was started under spared()"}),
        looked(10.1, member(201)),
        sent(201, 15),
        exited(10.2, 201),
        looked(10.3, left_alone={201: "its parent is neither"}),  # of what was read before it ended
    )
    assert [one["pid"] for one in event["processes"]] == [201]
    assert event["left_alone"] == [{"pid": 300, "reason": "was started under spared()"}]


def test_an_end_that_needed_no_signal_is_not_called_reaped() -> None:
    assert end()["kind"] == "ended"
    event = end(looked(10.0, member(201)), exited(10.1, 201))
    assert event["kind"] == "ended"
    assert results(event) == {201: "exited"}


def test_every_process_is_told_with_what_became_of_it() -> None:
    event = end(
        looked(10.0, *(member(pid) for pid in (201, 202, 203, 204, 205))),
        *(sent(201, 15), exited(10.1, 201)),
        exited(10.1, 202),
        *(sent(203, 15), sent(203, 9), sent(203, 9)),
        *(sent(204, 15, denied=True), sent(204, 9, denied=True)),
    )
    assert results(event) == {201: "killed", 202: "exited", 203: "stuck", 204: "denied", 205: "kept"}


def test_a_process_that_went_although_it_could_not_be_signalled_was_not_killed() -> None:
    assert results(end(looked(10.0, member(201)), sent(201, 15, denied=True), exited(10.1, 201))) == {
        201: "exited"
    }


def test_the_latency_is_that_of_the_last_worker_and_no_trackers() -> None:
    event = end(
        looked(10.0, member(201), member(202), member(203, tracker=True)),
        exited(10.5, 201),
        exited(12.0, 202),
        exited(19.0, 203),
    )
    assert event["latency_s"] == 2.0
    assert end()["latency_s"] is None
    assert end(looked(10.0, member(203, tracker=True)), exited(11.0, 203))["latency_s"] is None


def test_only_memory_of_those_who_were_ended_counts_as_freed() -> None:
    event = end(
        looked(10.0, *(member(pid, rss_bytes=pid) for pid in (201, 202, 203))),
        *(sent(201, 15), exited(10.1, 201)),
        exited(10.1, 202),  # went by itself
        sent(203, 15),  # lives on
    )
    assert event["freed"]["rss_bytes"] == 201


def test_a_dry_run_says_what_it_would_have_done_and_claims_nothing() -> None:
    event = end(looked(10.0, member(201, rss_bytes=4096)), dry_run=True)
    assert event["kind"] == "reaped"
    assert event["dry_run"] is True
    assert results(event) == {201: "kept"}
    assert event["freed"]["rss_bytes"] == 0
    assert end(dry_run=True)["kind"] == "ended"
    assert end(looked(10.0, member(201)), exited(10.1, 201), dry_run=True)["kind"] == "ended"


def test_an_event_of_the_daemon_itself_has_every_field_that_others_rely_on() -> None:
    assert report.event("started", version="1") == {
        "kind": "started",
        "session": None,
        "uid": None,
        "cause": None,
        "processes": [],
        "latency_s": None,
        "freed": {"rss_bytes": 0, "shm_bytes": 0, "gpu_bytes": 0},
        "version": "1",
    }


def test_an_event_of_a_living_session_has_no_cause_and_what_was_added() -> None:
    event = report.session_event("registered", SESSION, adopted=True)
    assert event["cause"] is None
    assert event["adopted"] is True


# -- what ps says -----------------------------------------------------------------------------------


def record(entry: Entry, *members: Member, **facts: Any) -> dict[str, Any]:
    found = {one.process.id: one for one in members}
    told = report.session_record(
        entry, found, facts.pop("usage", {}), **{"leader_cmdline": None, "progress": None, **facts}
    )
    assert wire.decode(wire.encode(told)) == {"v": 1, **told}
    return told


def test_a_session_is_told_with_every_field_that_others_rely_on() -> None:
    entry = apply(Entry(SESSION), looked(1.0, member(201), left_alone={300: "was started under spared()"}))
    told = record(
        entry,
        member(201, rss_bytes=4096),
        usage={ProcessId(201, 2000): Usage(99.96, 8192), SESSION.leader: Usage(3.04, 4096)},
        leader_cmdline=["python", "train.py"],
        progress=pages.Progress(3.0, 64.0, "fold 3"),
    )
    assert told == {
        "id": "s",
        "name": "grid",
        "uid": 1000,
        "state": "running",
        "phase": "watched",
        "started_at": "2030-01-01T00:00:00.000Z",
        "attempt": None,
        "isolated": False,
        "leader": {
            "pid": 100,
            "start_ticks": 1000,
            "cmdline": ["python", "train.py"],
            "cpu_percent": 3.0,
            "rss_bytes": 4096,
        },
        "cause": None,
        "progress": {"done": 3, "total": 64, "message": "fold 3"},
        "workers": [
            {
                "pid": 201,
                "start_ticks": 2000,
                "role": "worker",
                "framework": "loky",
                "cpu_percent": 100.0,
                "rss_bytes": 8192,
                "evidence": ["holds the page"],
            }
        ],
        "left_alone": [{"pid": 300, "reason": "was started under spared()"}],
    }


def test_progress_is_told_in_whole_numbers_where_it_is_whole() -> None:
    told = [
        record(Entry(SESSION), progress=pages.Progress(done, total, ""))["progress"]
        for done, total in ((0.5, None), (1.0, 2.5), (-0.0, 0.0))
    ]
    assert told == [
        {"done": 0.5, "total": None, "message": ""},
        {"done": 1, "total": 2.5, "message": ""},
        {"done": 0, "total": 0, "message": ""},
    ]
    assert isinstance(told[1]["done"], int)


@pytest.mark.parametrize("number", [2.0**53, -(2.0**53), 2.0**63, 1e22, 1e300, -1e300])
def test_progress_beyond_what_a_float_counts_in_ones_is_told_as_the_float_it_is(number: float) -> None:
    told = record(Entry(SESSION), progress=pages.Progress(number, number, ""))["progress"]
    assert told == {"done": number, "total": number, "message": ""}
    assert isinstance(told["done"], float)
    assert isinstance(told["total"], float)


def test_progress_up_to_what_a_float_counts_in_ones_is_told_as_a_whole_number() -> None:
    told = record(Entry(SESSION), progress=pages.Progress(2.0**53 - 1, -(2.0**53) + 1, ""))["progress"]
    assert told == {"done": 2**53 - 1, "total": 1 - 2**53, "message": ""}
    assert isinstance(told["done"], int)


def test_a_session_runs_then_ends_then_has_ended() -> None:
    quiet = [looked(20.0 + number) for number in range(QUIET_LOOKS)]
    assert record(Entry(SESSION))["state"] == "running"
    assert record(apply(Entry(SESSION), Unregistered()))["state"] == "ending"
    assert record(dead(looked(10.0, member(201))))["state"] == "ending"
    finished = dead(*quiet, Reclaimed(Freed()))
    assert (record(finished)["state"], record(finished)["phase"]) == ("ending", "finished")
    assert record(apply(finished, Concluded()))["state"] == "ended"
