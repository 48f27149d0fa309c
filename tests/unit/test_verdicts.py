"""Who is ended, stopped, told of or spared of those that nobody registered, and by which rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from reaperd import report
from reaperd.model import Process, ProcessId, Role
from reaperd.signatures import SIGNATURES, Signature
from reaperd.verdicts import (
    STAYS_S,
    Circumstances,
    Fate,
    Parent,
    Record,
    Rules,
    Sample,
    Suspect,
    Verdict,
    add_sample,
    ends_in_s,
    held_by_groups,
    judge,
    load_of,
)

LOKY = next(row for row in SIGNATURES if row.framework == "loky" and row.role is Role.WORKER)
TRACKER = next(row for row in SIGNATURES if row.role is Role.TRACKER)
EXECUTOR = next(row for row in SIGNATURES if row.stays and row.certain)
UNCERTAIN = next(row for row in SIGNATURES if not row.certain)
INIT = Parent(1, "systemd", "process 1 of its machine or container")
SHELL = Parent(70, "bash")
RULES = Rules()
MIB = 1024**2
BUSY = (Sample(380.0, 0), Sample(390.0, 900), Sample(400.0, 1800), Sample(410.0, 2700))


def suspect(row: Signature | None = LOKY, **facts: Any) -> Suspect:
    process = Process(ProcessId(500, 9), facts.get("parent", INIT).pid, 1000, "python", rss_bytes=MIB)
    return Suspect(process, row, **{"parent": INIT, **facts})


def verdict(
    one: Suspect,
    *,
    age_s: float = 400.0,
    group_bytes: int = 200 * MIB,
    samples: tuple[Sample, ...] = (),
    waived: bool = False,
    rules: Rules = RULES,
    **remembered: Any,
) -> Verdict:
    record = Record(1000.0, samples, **remembered)
    given = Circumstances(record, 1000.0 + age_s, group_bytes, load_of(samples, 100), waived)
    return judge(one, given, rules)


def told(one: Verdict) -> tuple[Fate, str]:
    return one.fate, one.rule


# -- who is ended -----------------------------------------------------------------------------------


def test_an_orphan_that_holds_memory_is_ended_whatever_its_load() -> None:
    assert told(verdict(suspect())) == (Fate.KILL, "memory_threshold")


def test_an_orphan_that_is_always_busy_is_ended_whatever_it_holds() -> None:
    assert told(verdict(suspect(), group_bytes=0, samples=BUSY)) == (Fate.KILL, "cpu_threshold")


@pytest.mark.parametrize(
    "samples",
    [
        (BUSY[0], Sample(411.0, 2800)),  # two samples tell of no time between them
        BUSY[:3],  # three, over less than the window
        (*BUSY[:3], Sample(410.0, 1850)),  # idle at last, though busy on the whole
    ],
)
def test_who_was_not_seen_to_be_busy_all_the_time_is_not_ended_for_it(samples: tuple[Sample, ...]) -> None:
    assert told(verdict(suspect(), group_bytes=0, samples=samples)) == (Fate.WAIT, "harmless")


def test_gpu_memory_counts_from_the_first_byte_on() -> None:
    assert told(verdict(suspect(gpu_bytes=1), group_bytes=0)) == (Fate.KILL, "gpu")


def test_who_never_ends_by_itself_is_ended_after_an_hour_and_who_does_is_not() -> None:
    assert told(verdict(suspect(EXECUTOR), group_bytes=0, age_s=STAYS_S - 1)) == (Fate.WAIT, "harmless")
    assert told(verdict(suspect(EXECUTOR), group_bytes=0, age_s=STAYS_S)) == (Fate.KILL, "stays")
    assert told(verdict(suspect(LOKY), group_bytes=0, age_s=STAYS_S)) == (Fate.WAIT, "harmless")


@pytest.mark.parametrize("fate", [Fate.KILL, Fate.QUARANTINE, Fate.REPORT])
def test_the_action_is_what_becomes_of_it(fate: Fate) -> None:
    assert verdict(suspect(), rules=RULES._replace(action=fate)).fate is fate


@pytest.mark.parametrize(
    ("changed", "outlook"),
    [
        ({}, "it would be ended at the next scan"),
        ({"rules": RULES._replace(action=Fate.QUARANTINE)}, "it would be stopped at the next scan"),
        ({"waived": True}, "it would be ended by a clean-up"),
        ({"quarantined_at_s": 1390.0}, "it is ended in 9 min 50 s unless released"),
        ({"quarantined_at_s": 1390.0, "age_s": 10**6}, "it would be ended at the next scan"),
    ],
)
def test_what_would_be_done_is_no_evidence_for_it_has_been_done_by_the_time_it_is_on_record(
    changed: dict[str, Any], outlook: str
) -> None:
    one = verdict(suspect(), **changed)
    assert one.outlook == outlook
    assert not any(outlook in sentence for sentence in one.evidence)
    assert one.prospects == (*one.evidence[:-1], f"{one.evidence[-1]}: {outlook}")
    assert report.orphan_process(suspect(), one)["evidence"] == list(one.evidence)
    assert report.explanation(suspect(), one, [])["evidence"] == list(one.prospects)


def test_a_parent_that_was_seen_to_end_makes_an_orphan_whoever_is_the_parent_now() -> None:
    assert verdict(suspect(parent=SHELL, lost_parent=ProcessId(60, 8))).fate is Fate.KILL


def test_what_an_orphan_has_started_is_one_with_it() -> None:
    assert verdict(suspect(parent=Parent(70, "python3"), below=ProcessId(70, 8))).fate is Fate.KILL


# -- who is spared ----------------------------------------------------------------------------------

SPARED = {
    "parent": {"parent": SHELL},
    "protected": {"protection": "belongs to uid 1000"},
    "session": {"session": "1-1-00000001-00000001"},
    "unread": {"unread": True},
}


@pytest.mark.parametrize("waived", [False, True])
@pytest.mark.parametrize("rule", SPARED)
def test_whom_a_rule_spares_is_spared_whatever_it_takes_and_whoever_asks(rule: str, waived: bool) -> None:
    one = suspect(gpu_bytes=MIB, **SPARED[rule])
    assert told(verdict(one, age_s=10 * STAYS_S, samples=BUSY, waived=waived)) == (Fate.SPARE, rule)


def test_what_a_session_was_not_to_end_is_spared() -> None:
    one = suspect(spared_by_session="1-1-00000001-00000001")
    assert told(verdict(one)) == (Fate.SPARE, "session")


def test_a_tracker_is_never_ended() -> None:
    assert told(verdict(suspect(TRACKER), waived=True)) == (Fate.SPARE, "tracker")


@pytest.mark.parametrize("waived", [False, True])
@pytest.mark.parametrize("row", [None, UNCERTAIN])
@pytest.mark.parametrize("action", list(Fate)[:3])
def test_whom_nothing_tells_from_a_program_in_the_background_is_told_of_at_most(
    row: Signature | None, waived: bool, action: Fate
) -> None:
    one = verdict(suspect(row), samples=BUSY, waived=waived, rules=RULES._replace(action=action))
    assert told(one) == (Fate.REPORT, "uncertain")
    assert verdict(suspect(row), group_bytes=0).fate is Fate.SPARE


def test_nobody_is_judged_before_the_age_limit_or_by_one_look_alone() -> None:
    assert told(verdict(suspect(), age_s=299)) == (Fate.WAIT, "age")
    assert verdict(suspect(), age_s=300).fate is Fate.KILL
    at_once = RULES._replace(age_limit_s=0.0)
    assert told(verdict(suspect(), age_s=0, rules=at_once)) == (Fate.WAIT, "age")
    assert verdict(suspect(), age_s=0.1, rules=at_once).fate is Fate.KILL


def test_a_clean_up_waives_age_load_and_action_alone() -> None:
    reports = RULES._replace(action=Fate.REPORT)
    assert told(verdict(suspect(), age_s=0, group_bytes=0, waived=True, rules=reports)) == (
        Fate.KILL,
        "cleanup",
    )


def test_a_quarantine_lasts_for_its_time_whatever_the_load_is_by_then() -> None:
    quarantine = RULES._replace(action=Fate.QUARANTINE)
    for age_s, fate in ((1000.0, Fate.QUARANTINE), (1000.1, Fate.KILL)):
        one = verdict(suspect(), age_s=age_s, group_bytes=0, quarantined_at_s=1400.1, rules=quarantine)
        assert told(one) == (fate, "quarantine")


# -- what is measured -------------------------------------------------------------------------------


def test_the_memory_of_a_group_is_that_of_its_orphaned_workers_alone() -> None:
    mine, others = (1000, 60, 8), (1000, 61, 8)
    found = [
        suspect(group=mine),
        suspect(group=mine),
        suspect(TRACKER, group=mine),
        suspect(group=mine, parent=SHELL),
        suspect(group=others),
    ]
    assert held_by_groups(found) == {mine: 2 * MIB, others: MIB}


def test_samples_span_the_window_and_no_more_than_is_needed() -> None:
    samples: tuple[Sample, ...] = ()
    for second in range(100):
        samples = add_sample(samples, Sample(float(second), second), 30.0)
        gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(samples)]
        assert min(gaps, default=5.0) >= 5.0
        assert len(samples) <= 8
    assert 30.0 <= samples[-1].at_s - samples[0].at_s <= 40.0


def test_every_verdict_carries_what_it_was_made_of() -> None:
    one = verdict(suspect(), samples=BUSY)
    text = "; ".join(one.evidence)
    for fact in (
        "popen_loky_posix",
        "systemd (pid 1)",
        "6 min 40 s ago",
        "90 % CPU over 30 s (4 samples)",
        "200.0 MiB",
    ):
        assert fact in text


def due_s(
    *,
    age_s: float,
    row: Signature = LOKY,
    group_bytes: int = 200 * MIB,
    rules: Rules = RULES,
    **remembered: Any,
) -> float | None:
    given = Circumstances(Record(1000.0, **remembered), 1000.0 + age_s, group_bytes, None)
    return ends_in_s(suspect(row), given, rules)


def test_an_orphan_that_breaks_a_rule_is_to_end_when_it_is_old_enough() -> None:
    assert due_s(age_s=100.0) == 200.0
    assert due_s(age_s=300.0) == 0.0
    assert due_s(age_s=100.0, rules=Rules(action=Fate.QUARANTINE)) == 800.0
    assert due_s(age_s=500.0, rules=Rules(action=Fate.QUARANTINE)) == 600.0
    assert due_s(age_s=900.0, rules=Rules(action=Fate.QUARANTINE), quarantined_at_s=1500.0) == 200.0


def test_an_orphan_that_breaks_no_rule_is_to_end_only_where_it_never_does_so_by_itself() -> None:
    assert due_s(age_s=100.0, group_bytes=MIB) is None
    assert due_s(age_s=100.0, row=EXECUTOR, group_bytes=MIB) == STAYS_S - 100.0
    assert due_s(age_s=100.0, rules=Rules(action=Fate.REPORT)) is None
    assert due_s(age_s=100.0, row=TRACKER) is None
    assert due_s(age_s=500.0, row=UNCERTAIN) is None
