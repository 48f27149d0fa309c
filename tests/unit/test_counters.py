"""What is counted of each event: each process once, under labels that nobody can make more of."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from reaperd import metrics
from reaperd.config import EventKind
from reaperd.counters import LATENCY_BUCKETS_S, Counters, Histogram
from reaperd.metrics import Metrics
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.sessions import Sessions
from reaperd.store import Store


def process(
    result: str = "killed", framework: str = "loky", signal: str | None = "SIGTERM"
) -> dict[str, Any]:
    return {"pid": 7, "framework": framework, "signal": signal, "result": result}


def event(kind: str, *processes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    freed = {f"{memory}_bytes": fields.pop(memory, 0) for memory in ("rss", "shm", "gpu")}
    defaults = {"session": None, "cause": None, "latency_s": None}
    return {"kind": kind, "processes": list(processes), "freed": freed, **defaults, **fields}


def reaped(*processes: dict[str, Any], cause: str = "signal", **fields: Any) -> dict[str, Any]:
    return event("reaped", *processes, session="s", cause={"kind": cause, "code": 9}, **fields)


def killed(*events: dict[str, Any], extra: tuple[str, ...] = ()) -> dict[tuple[str, str, str], int]:
    counters = Counters()
    counters.heed(extra)
    for one in events:
        counters.note(one)
    return {
        (cause, framework, signal): count for cause, framework, signal, count in counters.record()["killed"]
    }


def ended(*events: dict[str, Any]) -> dict[tuple[str, str], int]:
    counters = Counters()
    for one in events:
        counters.note(one)
    return {(cause, outcome): count for cause, outcome, count in counters.record()["ended"] if count}


def test_each_process_that_was_killed_is_counted_by_cause_framework_and_last_signal() -> None:
    assert killed(
        reaped(process(), process(), process(signal="SIGKILL")),
        reaped(process(framework="forked"), cause="oom"),
    ) == {
        ("signal", "loky", "SIGTERM"): 2,
        ("signal", "loky", "SIGKILL"): 1,
        ("oom", "forked", "SIGTERM"): 1,
    }


@pytest.mark.parametrize("result", ["exited", "kept", "stuck", "denied", "stopped"])
def test_nobody_else_is(result: str) -> None:
    assert killed(reaped(process(result)), event("quarantined", process(result))) == {}


def test_an_orphan_of_no_session_is_counted_by_whether_somebody_asked_for_its_end() -> None:
    assert killed(
        event("killed", process(), asked_by_uid=None),
        event("stuck", process(), process("stuck"), asked_by_uid=0),
    ) == {("orphan", "loky", "SIGTERM"): 1, ("cleanup", "loky", "SIGTERM"): 1}


def test_what_a_label_can_be_is_nobodys_choice() -> None:
    hostile = reaped(*(process(framework=f"f{n}", signal=f"S{n}") for n in range(500)), cause="x\n")
    assert killed(hostile) == {("unknown", "other", "other"): 500}


def test_the_frameworks_of_the_settings_are_known_too_but_no_more_than_some() -> None:
    assert killed(reaped(process(framework="mine")), extra=("mine",)) == {("signal", "mine", "SIGTERM"): 1}
    many = tuple(f"f{n:04}" for n in range(1000))
    found = killed(reaped(*(process(framework=name) for name in many)), extra=many)
    assert len(found) == 101
    assert found["signal", "other", "SIGTERM"] == 900


def test_sessions_are_counted_by_their_end_and_a_dry_run_apart() -> None:
    assert ended(
        reaped(process()),
        reaped(process("kept"), dry_run=True),
        event("ended", session="s", cause={"kind": "exit", "code": 0}),
        event("registered", session="s"),
    ) == {("signal", "reaped"): 1, ("signal", "dry-run"): 1, ("exit", "nothing-left"): 1}


def test_what_was_freed_is_summed_by_kind() -> None:
    counters = Counters()
    counters.note(reaped(process(), rss=5, shm=7))
    counters.note(event("killed", process(), rss=1, gpu=2**40))
    assert counters.record()["freed_bytes"] == {"rss": 6, "shm": 7, "gpu": 2**40}


def test_only_the_latency_of_who_was_ended_counts() -> None:
    counters = Counters()
    counters.note(reaped(process(), latency_s=0.004))
    counters.note(reaped(process("kept"), latency_s=0.004, dry_run=True))
    counters.note(reaped(process("stuck")))
    counters.note(event("ended", session="s", latency_s=3.0))
    assert sum(counters.latencies.counts) == 1
    assert counters.latencies.sum_s == 0.004


def test_a_bucket_has_its_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 1e9):
        histogram.add(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.record()["sum"] == pytest.approx(1e9 + 6.6)


def test_all_kinds_of_event_are_told_of_before_there_are_any() -> None:
    record = Counters().record()
    assert record["events"] == dict.fromkeys(get_args(EventKind), 0)
    assert len(record["ended"]) == 12
    assert record["killed"] == []
    assert record["latencies"]["counts"] == [0] * (len(LATENCY_BUCKETS_S) + 1)


def test_a_reload_with_faults_is_told_until_there_is_a_good_one() -> None:
    counters = Counters()
    for faults, good in (([], True), (["x"], False), ([], True)):
        counters.note(event("reload", faults=faults))
        assert counters.record()["reload_was_good"] is good


def test_the_core_counts_no_more_often_than_figures_may_be_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_FRESH_S", 60.0)
    counted = 0

    def read_state() -> dict[str, Any]:
        nonlocal counted
        counted += 1
        return {"gate_restarts": 0}

    with contextlib.closing(Store(str(tmp_path), "boot")) as store:
        one = Metrics(Poller(), Sessions(store, Policy()), read_state)
        for number in (1, 2):
            one._take({"ask": number})
            one.step(time.monotonic())
        assert counted == 1
        due_s = one.next_deadline()
        assert due_s is not None
        one.step(due_s)
        assert counted == 2
