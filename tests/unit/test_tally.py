"""What a history comes to: every event counts once in each grouping, whatever an earlier or a damaged one lacks."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from reaperd.ctl import render_report, tally
from reaperd.ctl.tally import GROUPINGS, MEMORY, Tally, fold
from reaperd.ctl.text import Look
from reaperd.kinds import EVENT_KINDS

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def process(result: str = "killed", signal: str | None = "SIGTERM", **more: Any) -> dict[str, Any]:
    facts = {"pid": 7, "role": "worker", "framework": "loky", "evidence": []}
    return {**facts, "result": result, "signal": signal, "signals": [signal] if signal else [], **more}


def event(kind: str = "reaped", *processes: dict[str, Any], **more: Any) -> dict[str, Any]:
    of_session = kind in ("reaped", "ended")
    return {
        "seq": 1,
        "at": "2030-01-01T00:00:00.000Z",
        "kind": kind,
        "session": "s" if of_session else None,
        "uid": 1000,
        "cause": {"kind": "signal", "code": 9} if of_session else None,
        "processes": list(processes),
        "latency_s": None,
        "freed": dict.fromkeys(MEMORY, 0),
        **({} if of_session else {"rule": "cpu_threshold"}),
        **more,
    }


def freed(rss: int = 0, shm: int = 0, gpu: int = 0) -> dict[str, int]:
    return {"rss_bytes": rss, "shm_bytes": shm, "gpu_bytes": gpu}


def names(found: tally.History, grouping: str) -> list[Any]:
    return [name for name, _ in found.rows(grouping)]


def test_sessions_processes_memory_and_times_are_counted() -> None:
    found = fold(
        [
            event("registered"),
            event("ended"),
            event(
                "reaped",
                process(),
                process(signal="SIGKILL"),
                process("exited", None),
                freed=freed(10, 20),
                latency_s=0.5,
            ),
            event("reaped", process(), process("stuck", "SIGKILL"), freed=freed(1), latency_s=0.1),
            event("killed", process(), freed=freed(5, 0, 7), latency_s=3.0),
        ]
    ).total
    assert (found.sessions_ended, found.sessions_reaped, found.orphan_groups) == (1, 2, 1)
    assert (found.killed, dict(found.signals)) == (4, {"SIGTERM": 3, "SIGKILL": 1})
    assert (found.remaining, found.freed) == (1, freed(16, 20, 7))
    assert (found.median_s(), found.worst_s()) == (0.5, 3.0)


def test_the_median_of_an_even_number_lies_between_the_two_in_the_middle() -> None:
    found = fold(event("reaped", latency_s=took_s) for took_s in (4.0, 1.0, 100.0, 2.0)).total
    assert (found.median_s(), found.worst_s()) == (3.0, 100.0)
    assert (Tally().median_s(), Tally().worst_s()) == (None, None)


def test_how_long_those_took_that_ended_by_themselves_is_no_time_of_reaping() -> None:
    assert fold([event("ended", process("exited", None), latency_s=9.0)]).total.latencies_s == []


def test_a_dry_run_has_ended_and_freed_nothing() -> None:
    found = fold([event("reaped", process("kept", None), dry_run=True, latency_s=1.0, freed=freed(9))]).total
    assert (found.sessions_spared, found.sessions_reaped, found.killed, found.latencies_s) == (1, 0, 0, [])
    assert found.freed == freed()
    assert not found.is_empty


def test_who_is_stuck_is_counted_where_the_end_is_told_and_nowhere_else() -> None:
    stuck = process("stuck", "SIGKILL")
    of_session = event("stuck", stuck, session="s", cause=None)
    assert not tally.counts(of_session)
    assert fold([of_session, event("reaped", stuck)]).total.remaining == 1
    assert fold([event("stuck", stuck, process(), freed=freed(3))]).total.freed == freed(3)


def test_an_event_belongs_to_the_frameworks_of_those_who_were_ended() -> None:
    loky, torch = process(), process(framework="torch DataLoader")
    tracker = process(framework="multiprocessing", role="tracker")
    by_itself = process("exited", None, framework="forked")
    found = fold(
        [
            event("reaped", loky, tracker, by_itself),
            event("reaped", torch, loky),
            event("reaped", tracker),
            event("ended", by_itself),
            event("ended"),
        ]
    )
    assert set(names(found, "framework")) == {
        "loky",
        "loky, torch DataLoader",
        "multiprocessing",
        "forked",
        "none",
    }


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"cause": {"kind": "exit", "code": 3}}, "exit:3"),
        ({"cause": {"kind": "signal", "code": 9, "core_dumped": True}}, "signal:9"),
        ({"cause": {"kind": "oom", "code": 9}}, "oom"),
        ({"cause": {"kind": "unknown", "code": None}}, "unknown"),
        ({"cause": None}, "unknown"),
        ({"kind": "killed", "cause": None, "rule": "cpu_threshold"}, "rule:cpu_threshold"),
        ({"kind": "killed", "cause": None, "rule": "asked", "asked_by_uid": 0}, "cleanup"),
    ],
)
def test_an_event_belongs_to_one_cause(fields: dict[str, Any], cause: str) -> None:
    assert names(fold([{**event(), **fields}]), "cause") == [cause]


def test_the_rows_of_every_grouping_add_up_to_the_total_one_event_at_a_time() -> None:
    chance = random.Random(1)
    events = [
        event(
            chance.choice(("reaped", "ended", "killed", "registered", "orphan")),
            *(
                process(
                    chance.choice(("killed", "exited", "stuck", "denied")),
                    chance.choice(("SIGTERM", "SIGKILL")),
                    framework=chance.choice(("loky", "multiprocessing", "forked")),
                )
                for _ in range(chance.randrange(5))
            ),
            uid=chance.choice((0, 1000, 1001)),
            freed=freed(chance.randrange(99), chance.randrange(99), chance.randrange(99)),
            latency_s=chance.choice((None, chance.random())),
        )
        for _ in range(300)
    ]
    found = fold(events)
    over = [one for one in events if one["kind"] in ("reaped", "ended", "killed")]
    killed = [p for one in over for p in one["processes"] if p["result"] == "killed"]
    assert found.total.killed == len(killed)
    assert found.total.signals["SIGTERM"] == sum(p["signal"] == "SIGTERM" for p in killed)
    assert found.total.freed["shm_bytes"] == sum(one["freed"]["shm_bytes"] for one in over)
    for grouping in GROUPINGS:
        tallies = [one for _, one in found.rows(grouping)]
        assert len(tallies) > 1
        for field in ("sessions_ended", "sessions_reaped", "orphan_groups", "killed", "remaining"):
            assert sum(getattr(one, field) for one in tallies) == getattr(found.total, field), field
        for key in MEMORY:
            assert sum(one.freed[key] for one in tallies) == found.total.freed[key]
        assert sorted(took for one in tallies for took in one.latencies_s) == sorted(found.total.latencies_s)


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"kind": 7},
        {"kind": "reaped"},
        {"kind": "reaped", "processes": {}, "freed": [], "cause": "x", "uid": "root", "latency_s": "soon"},
        {"kind": "reaped", "processes": [None, 7, {"result": "killed"}], "freed": {"rss_bytes": 1e999}},
        {"kind": "killed", "cause": 7, "rule": None},
        [],
    ],
)
def test_what_is_damaged_counts_for_what_it_says_and_never_fails(damaged: Any) -> None:
    found = fold([damaged])
    assert render_report.report(found, Look(width=80))


# -- as a table -----------------------------------------------------------------------------------


def large(number: int) -> dict[str, Any]:
    return event(
        "reaped",
        *(process(framework="torch DataLoader " * number) for _ in range(400)),
        *(process(signal="SIGKILL") for _ in range(400)),
        uid=number,
        cause={"kind": "signal", "code": number},
        freed=freed(1023 * GIB, 999 * GIB, 80 * GIB),
        latency_s=59.9,
    )


def test_a_table_fits_a_terminal_whatever_is_in_it() -> None:
    events = [large(number) for number in range(1, 7) for _ in range(17)]
    events += [event("killed", process("exited", None)) for _ in range(12_345)]
    lines = render_report.report(fold(events), Look(width=80), user_of=lambda uid: "a user with a long name")
    assert max(map(len, lines)) <= 80, "\n".join(lines)
    assert all("40800" in line for line in lines if line.startswith("total")), "numbers are never cut"


def test_a_table_ends_with_its_total_and_says_what_is_what() -> None:
    found = fold(
        [event("reaped", process(), process(), freed=freed(GIB, 30 * 2**20), latency_s=0.016), event("ended")]
    )
    lines = render_report.report(found, Look(width=80), user_of=lambda _: "ml")
    assert lines[:4] == [
        "2 sessions over: 1 reaped, 1 with nothing left to end",
        "killed 2 processes: 2 by SIGTERM",
        "freed 1.0 GiB of memory, 30.0 MiB of shared memory, 0 B of GPU memory",
        "gone in 16 ms (median), 16 ms at worst",
    ]
    cells = [re.split(r" {2,}", line) for line in lines[4:] if line]
    assert cells[0] == [
        "FRAMEWORK",
        "ENDED",
        "REAPED",
        "ORPHANS",
        "TERM",
        "KILL",
        "MEM",
        "SHM",
        "GPU",
        "MEDIAN",
        "WORST",
    ]
    assert cells[1] == ["loky", "-", "1", "-", "2", "-", "1.0G", "30M", "-", "16ms", "16ms"]
    assert [row[0] for row in cells] == [
        *("FRAMEWORK", "loky", "none", "total"),
        *("USER", "ml", "total"),
        *("CAUSE", "killed by SIGKILL", "total"),
    ]


def test_an_empty_history_is_said_plainly() -> None:
    said = render_report.report(fold([event("registered")]), Look(), within=" in that time")
    assert said == ["nothing to report: no session ended and no orphan was killed in that time"]


def test_a_name_that_somebody_has_chosen_moves_no_cursor() -> None:
    found = fold([event("reaped", process(framework="x\x1b[2J"))])
    assert "\x1b" not in "".join(render_report.report(found, Look()))


# -- the kinds ------------------------------------------------------------------------------------


def test_every_kind_of_event_that_is_recorded_anywhere_can_be_asked_for() -> None:
    recorded: set[str] = set()
    for path in (ROOT / "daemon" / "reaperd").glob("*.py"):
        recorded |= set(re.findall(r'(?:report\.|\b)(?:session_)?event\(\s*"(\w+)"', path.read_text("utf-8")))
    assert {"started", "stopped", "reload", "registered", "orphan"} <= recorded
    assert recorded <= set(EVENT_KINDS)
    assert set(tally.KINDS) <= set(EVENT_KINDS)


def test_the_page_about_json_names_every_kind() -> None:
    page = (ROOT / "docs" / "json.md").read_text("utf-8")
    (row,) = re.findall(r"^\| `kind` \| (`started`.*) \|$", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) | {"breach"} == set(EVENT_KINDS)
