"""Who belongs to a session and who does not: every rule of lineage.py, from both sides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd import lineage, signatures
from reaperd.model import UNKNOWN_CAUSE, Family, Process, ProcessId, Role, Session, Snapshot
from reaperd.policy import Policy

ID = "100-3e8-0000000a-0000000b"
OUTER = "90-2e8-0000000a-0000000c"
UID = 1000
LEADER = ProcessId(100, 1000)
SHELL = ProcessId(50, 10)  # an ancestor of the leader
JOB = "/user.slice/job.scope"


def process(pid: int, ppid: int = 1, *, start: int = 2000, **facts: Any) -> Process:
    return Process(ProcessId(pid, start), ppid, **{"uid": UID, "cgroup": JOB, **facts})


def leader(**facts: Any) -> Process:
    return process(LEADER.pid, SHELL.pid, start=LEADER.start_ticks, **facts)


def session(**facts: Any) -> Session:
    return Session(ID, "", UID, UID, LEADER, "", **{"cgroup": JOB, "adopters": frozenset((SHELL,)), **facts})


def family(
    *processes: Process,
    of: Session | None = None,
    policy: Policy | None = None,
    living: frozenset[ProcessId] = frozenset((SHELL,)),
) -> Family:
    snapshot = Snapshot({process.id.pid: process for process in processes}, living)
    return lineage.family(of or session(), snapshot, (policy or Policy()).protection)


def pids(found: Family) -> set[int]:
    return {id_.pid for id_ in found.members}


def left_alone(found: Family) -> dict[int, str]:
    return {id_.pid: reason for id_, reason in found.left_alone.items()}


def evidence(found: Family, pid: int) -> str:
    (only,) = (m.evidence for id_, m in found.members.items() if id_.pid == pid)
    (words,) = only
    return words


PAGE = {"forked": True, "pages": frozenset((ID,))}
STAMP = {"lineage": (ID,)}
SPARED = {"spared": frozenset((ID,))}
AT_ROOT: dict[str, Any] = {"cgroup": "/"}
SCOPE = f"/user.slice/reaper-{UID}-{ID}-00000000.scope"
OTHERS_SCOPE = f"/user.slice/reaper-{UID}-{OUTER}-00000000.scope"


# -- 1. uid, age, life ------------------------------------------------------------------------------


def test_a_stamped_process_of_another_uid_is_no_member() -> None:
    assert not pids(family(process(201, uid=UID + 1, **STAMP), process(202, uid=0, **PAGE)))


def test_a_stamped_process_of_mixed_or_unreadable_uids_is_no_member() -> None:
    assert not pids(family(process(201, uid=None, **STAMP), process(202, uid=None, **PAGE)))


def test_a_child_of_a_member_that_changed_its_uid_is_no_member() -> None:
    assert pids(family(process(201, **PAGE), process(202, 201, uid=0))) == {201}


def test_a_process_that_is_older_than_the_leader_is_no_member_whatever_it_carries() -> None:
    older = LEADER.start_ticks - 1
    assert not pids(family(process(201, start=older, **PAGE), process(202, start=older, **STAMP)))


def test_a_process_that_started_in_the_same_tick_as_the_leader_can_be_a_member() -> None:
    assert pids(family(process(201, start=LEADER.start_ticks, **STAMP))) == {201}


def test_the_leader_is_no_member_of_its_own_session() -> None:
    assert not pids(family(leader(**PAGE, **STAMP)))


def test_a_process_that_got_the_pid_of_the_leader_is_judged_like_any_other() -> None:
    assert pids(family(process(LEADER.pid, **STAMP))) == {LEADER.pid}
    assert not pids(family(process(LEADER.pid), process(201, LEADER.pid)))


def test_a_zombie_is_no_member() -> None:
    assert not pids(family(process(201, dead=True, **PAGE), process(202, dead=True, **STAMP)))


def test_a_process_without_any_mark_is_a_stranger_and_not_even_named() -> None:
    found = family(leader(), process(201), process(202, 201))
    assert not found.members
    assert not found.left_alone


# -- 2. spared, protected ---------------------------------------------------------------------------


def test_a_process_spared_by_its_environment_is_left_alone_with_the_reason() -> None:
    found = family(process(201, **STAMP, **SPARED))
    assert not pids(found)
    assert "spared()" in left_alone(found)[201]


def test_a_forked_process_that_bears_the_spared_mark_is_left_alone_even_where_it_holds_the_page() -> None:
    assert not pids(family(process(201, **PAGE, **SPARED)))


def test_a_spared_child_of_a_member_is_left_alone() -> None:
    found = family(leader(), process(201, LEADER.pid, **SPARED))
    assert not pids(found)
    assert list(left_alone(found)) == [201]


def test_nothing_below_a_spared_process_is_a_member_by_descent() -> None:
    found = family(
        leader(), process(201, LEADER.pid, **SPARED), process(202, 201), process(203, 202), process(204, 202)
    )
    assert not pids(found)
    assert "below pid 201" in left_alone(found)[202]


def test_what_stands_below_a_spared_process_is_left_alone_whatever_it_carries() -> None:
    kept = session(kept=frozenset((ProcessId(204, 2000),)))
    found = family(
        leader(),
        process(201, LEADER.pid, **SPARED),
        process(202, 201, **PAGE),
        process(203, 202, **STAMP),
        process(204, 203),
        of=kept,
    )
    assert not pids(found)
    assert set(left_alone(found)) == {201, 202, 203, 204}


def test_a_process_that_the_leader_named_as_spared_is_left_alone_with_all_below_it() -> None:
    named = session(spared=frozenset((ProcessId(201, 2000),)))
    found = family(
        leader(), process(201, LEADER.pid), process(202, 201, **STAMP), process(203, 1, **STAMP), of=named
    )
    assert pids(found) == {203}
    assert "spared()" in left_alone(found)[201]


def test_another_process_with_the_pid_of_a_spared_one_is_not_spared() -> None:
    named = session(spared=frozenset((ProcessId(201, 1999),)))
    assert pids(family(leader(), process(201, LEADER.pid), of=named)) == {201}


def test_spared_processes_in_a_circle_end_the_search() -> None:
    assert not pids(family(process(201, 202, **SPARED), process(202, 201), process(203, 203, **SPARED)))


def test_a_process_that_was_known_before_is_spared_all_the_same() -> None:
    assert not pids(family(process(201, **SPARED), of=session(kept=frozenset((ProcessId(201, 2000),)))))


def test_what_another_session_spares_is_not_spared_in_this_one() -> None:
    assert pids(family(process(201, spared=frozenset((OUTER,)), **STAMP))) == {201}


@pytest.mark.parametrize(
    ("policy", "facts", "words"),
    [
        (Policy(protected_names=frozenset(("keeper",))), {"comm": "keeper"}, "'keeper'"),
        (Policy(protected_names=frozenset(("keeper",))), {"argv": ("/usr/bin/keeper", "-v")}, "'keeper'"),
        (Policy(protected_uids=frozenset((UID,))), {}, f"uid {UID}"),
        (Policy(only_uid=UID + 1), {}, f"a daemon of uid {UID + 1}"),
        (Policy(protected_units=frozenset(("job.scope",))), {}, "job.scope"),
        (Policy(protected_units=frozenset(("user.slice",))), {}, "user.slice"),
        (Policy(untouchable=frozenset((ProcessId(201, 2000),))), {}, "daemon"),
    ],
)
def test_a_protected_process_is_left_alone_with_the_reason_and_so_is_all_below_it(
    policy: Policy, facts: dict[str, Any], words: str
) -> None:
    for marks in (PAGE, STAMP, {}):
        below = process(202, 201, comm="other", argv=("/bin/other",), **marks)
        found = family(leader(), process(201, LEADER.pid, **{**marks, **facts}), below, policy=policy)
        assert not pids(found)
        assert words in left_alone(found)[201]


def test_protection_asks_for_the_whole_name_and_the_whole_unit() -> None:
    policy = Policy(
        protected_names=frozenset(("keep", "")), protected_units=frozenset(("job", "user.slice/job.scope"))
    )
    for facts in ({"comm": "keeper"}, {"argv": ("/keep/er",)}, {"argv": ("",)}, {"argv": ()}):
        assert pids(family(process(201, **STAMP, **facts), policy=policy)) == {201}


# -- 3. the page ------------------------------------------------------------------------------------


def test_whoever_holds_the_page_is_a_member_wherever_it_was_put_and_whoever_adopted_it() -> None:
    found = family(process(201, 7777, cgroup="/elsewhere", **PAGE))
    assert pids(found) == {201}
    assert "page" in evidence(found, 201)
    assert all(member.marked for member in found.members.values())


def test_the_page_counts_where_the_cgroup_of_the_leader_was_never_learned() -> None:
    assert pids(family(process(201, **PAGE), of=session(cgroup=None))) == {201}


def test_the_page_of_another_session_makes_no_member() -> None:
    assert not pids(family(process(201, forked=True, pages=frozenset((OUTER,)))))


# -- 4. the environment stamp -----------------------------------------------------------------------


def test_a_stamped_process_in_the_cgroup_of_the_leader_is_a_member_whoever_its_parent_is() -> None:
    found = family(process(201, 7777, **STAMP))
    assert pids(found) == {201}
    assert "REAPER_LINEAGE" in evidence(found, 201)


def test_a_stamped_process_below_the_cgroup_of_the_leader_is_a_member() -> None:
    assert pids(family(process(201, cgroup=f"{JOB}/inner/deeper", **STAMP))) == {201}


@pytest.mark.parametrize(
    "cgroup", ["/", "/user.slice", f"{JOB}2", "/system.slice/slurmd.service", f"/x{JOB}"]
)
def test_a_stamped_process_elsewhere_was_put_there_on_purpose_and_is_named(cgroup: str) -> None:
    found = family(process(201, cgroup=cgroup, **STAMP))
    assert not pids(found)
    assert cgroup in left_alone(found)[201]


def test_no_environment_stamp_counts_where_the_cgroup_of_the_leader_was_never_learned() -> None:
    for cgroup in ("/", JOB):
        assert not pids(family(process(201, cgroup=cgroup, **STAMP), of=session(cgroup=None)))


def test_the_stamp_of_a_nested_session_makes_a_member_of_both() -> None:
    assert pids(family(process(201, lineage=(OUTER, ID)))) == {201}
    assert pids(family(process(201, lineage=(ID, OUTER)))) == {201}
    assert not pids(family(process(201, lineage=(OUTER,))))


def test_the_leader_of_a_nested_session_is_a_member_of_the_outer_one() -> None:
    inner = process(201, LEADER.pid, lineage=(ID, OUTER), pages=frozenset((OUTER,)))
    assert pids(family(leader(), inner, process(202, 201, lineage=(ID, OUTER)))) == {201, 202}


def at_root(*processes: Process, **facts: Any) -> Family:
    return family(*processes, of=session(cgroup="/", **facts))


def test_in_the_root_cgroup_a_stamped_process_that_init_adopted_is_a_member() -> None:
    found = at_root(process(201, 1, **STAMP, **AT_ROOT))
    assert pids(found) == {201}
    assert "adopted by pid 1" in evidence(found, 201)


@pytest.mark.parametrize("proof", ["page", "kept", "seen"])
def test_in_the_root_cgroup_an_ancestor_that_adopted_one_of_the_session_adopted_the_stamped_too(
    proof: str,
) -> None:
    adopted = process(202, SHELL.pid, **(PAGE if proof == "page" else {}), **AT_ROOT)
    known = {proof: frozenset((adopted.id,))} if proof != "page" else {}
    found = at_root(process(201, SHELL.pid, **STAMP, **AT_ROOT), adopted, **known)
    assert 201 in pids(found)
    assert f"adopted by pid {SHELL.pid}" in evidence(found, 201)


def test_an_ancestor_that_was_seen_to_adopt_one_who_is_gone_by_now_adopts_still() -> None:
    stamped = process(201, SHELL.pid, **STAMP, **AT_ROOT)
    adopted = process(202, SHELL.pid, **PAGE, **AT_ROOT)
    seen = at_root(adopted).subreapers
    assert seen == {SHELL}
    assert pids(at_root(stamped, subreapers=seen)) == {201}
    assert not pids(family(stamped, of=session(cgroup="/", subreapers=seen), living=frozenset()))
    assert at_root(stamped).subreapers == frozenset()


def test_in_the_root_cgroup_a_job_that_an_ancestor_itself_started_with_a_copied_stamp_is_left_alone() -> None:
    found = at_root(
        process(201, SHELL.pid, **STAMP, **AT_ROOT),
        process(202, SHELL.pid, **AT_ROOT),
        process(203, SHELL.pid, forked=True, pages=frozenset((OUTER,)), **AT_ROOT),
    )
    assert not pids(found)
    assert set(left_alone(found)) == {201}


def test_a_process_of_the_session_that_init_adopted_proves_nothing_of_an_ancestor() -> None:
    found = at_root(process(201, SHELL.pid, **STAMP, **AT_ROOT), process(202, 1, **PAGE, **AT_ROOT))
    assert pids(found) == {202}


def test_in_the_root_cgroup_a_stamped_process_of_an_unrelated_daemon_is_left_alone() -> None:
    # What atd or slurmd starts has a living parent that never was an ancestor of the leader.
    atd = process(300, 1, start=5, uid=0, **AT_ROOT)
    found = at_root(atd, process(201, 300, **STAMP, **AT_ROOT), process(202, 201, **STAMP, **AT_ROOT))
    assert not pids(found)
    assert "parent 300" in left_alone(found)[201]
    assert set(left_alone(found)) == {201, 202}


def test_an_ancestor_whose_pid_is_another_process_now_adopts_nobody() -> None:
    stamped, adopted = process(201, SHELL.pid, **STAMP, **AT_ROOT), process(202, SHELL.pid, **PAGE, **AT_ROOT)
    assert pids(family(stamped, adopted, of=session(cgroup="/"))) == {201, 202}
    assert pids(family(stamped, adopted, of=session(cgroup="/"), living=frozenset())) == {202}


def test_an_ancestor_of_another_leader_adopts_nothing_of_this_one() -> None:
    other = ProcessId(60, 11)
    found = family(
        process(201, other.pid, **STAMP, **AT_ROOT),
        process(202, other.pid, **PAGE, **AT_ROOT),
        of=session(cgroup="/"),
        living=frozenset((SHELL, other)),
    )
    assert pids(found) == {202}


def test_init_adopts_even_where_the_leader_had_no_ancestor_that_is_known() -> None:
    stamped = process(201, 1, **STAMP, **AT_ROOT)
    assert pids(at_root(stamped, adopters=frozenset())) == {201}


def test_in_the_root_cgroup_a_stamped_child_of_a_member_is_a_member_with_its_own_mark() -> None:
    found = at_root(leader(**AT_ROOT), process(201, LEADER.pid, **STAMP, **AT_ROOT))
    assert pids(found) == {201}
    (member,) = found.members.values()
    assert member.marked
    assert "REAPER_LINEAGE" in member.evidence[0]


def test_in_the_root_cgroup_a_chain_of_stamped_processes_hangs_by_its_top() -> None:
    chain = [process(pid, pid - 1, **STAMP, **AT_ROOT) for pid in (202, 203, 204)]
    assert pids(at_root(process(201, 1, **STAMP, **AT_ROOT), *chain)) == {201, 202, 203, 204}
    assert not pids(at_root(process(201, 300, **STAMP, **AT_ROOT), *chain))


def test_the_order_of_the_snapshot_does_not_matter_to_a_chain() -> None:
    chain = [process(pid, pid - 1 if pid > 201 else 1, **STAMP, **AT_ROOT) for pid in (204, 203, 202, 201)]
    assert pids(at_root(*chain)) == {201, 202, 203, 204}


def test_a_session_of_the_root_cgroup_takes_nobody_from_any_other() -> None:
    found = at_root(process(201, 1, cgroup="/user.slice", **STAMP))
    assert not pids(found)
    assert "/user.slice" in left_alone(found)[201]


# -- 5. descent -------------------------------------------------------------------------------------


def test_children_of_the_leader_and_of_members_are_members_down_to_the_last() -> None:
    found = family(leader(), process(201, LEADER.pid), process(202, 201), process(203, 202))
    assert pids(found) == {201, 202, 203}
    assert not any(member.marked for member in found.members.values())
    assert evidence(found, 203) == "is a child of pid 202, a member"


def test_a_child_with_a_scrubbed_environment_follows_its_stamped_parent() -> None:
    assert pids(family(process(201, **STAMP), process(202, 201))) == {201, 202}


def test_a_child_of_a_member_of_another_uid_is_not_followed_through_it() -> None:
    # sudo: what it starts is root's, and what that starts as the user again has root for a parent.
    assert not pids(family(leader(), process(201, LEADER.pid, uid=0), process(202, 201)))


def test_the_children_of_a_dead_leader_are_no_members_by_descent() -> None:
    assert not pids(family(process(201, LEADER.pid)))
    assert not pids(family(leader(dead=True), process(LEADER.pid + 1, 1)))


def test_a_child_that_was_put_into_another_cgroup_is_left_alone_with_all_below_it() -> None:
    found = family(
        leader(),
        process(201, LEADER.pid, cgroup="/user.slice/run-7.scope"),
        process(202, 201, cgroup="/user.slice/run-7.scope"),
        process(203, 201),
    )
    assert not pids(found)
    assert "/user.slice/run-7.scope" in left_alone(found)[201]


def test_a_child_below_the_cgroup_of_the_leader_is_a_member() -> None:
    assert pids(family(leader(), process(201, LEADER.pid, cgroup=f"{JOB}/worker"))) == {201}


def test_a_child_that_is_older_than_its_parent_has_a_parent_that_got_the_pid_later() -> None:
    found = family(process(201, start=3000, **STAMP), process(202, 201, start=2999))
    assert pids(found) == {201}
    assert pids(family(process(201, start=3000, **STAMP), process(202, 201, start=3000))) == {201, 202}


def test_nobody_descends_from_a_pid_that_is_somebody_elses_now() -> None:
    kept = session(kept=frozenset((ProcessId(201, 2000),)))
    assert pids(family(process(201, start=2000), process(202, 201), of=kept)) == {201, 202}
    assert not pids(family(process(201, start=2500), process(202, 201, start=2600), of=kept))


def test_a_member_that_only_descent_told_of_stays_one_after_its_parent_is_gone() -> None:
    found = family(process(201, 1), of=session(kept=frozenset((ProcessId(201, 2000),))))
    assert pids(found) == {201}
    assert "while the leader lived" in evidence(found, 201)
    assert not any(member.marked for member in found.members.values())


def test_a_known_member_that_was_put_into_another_cgroup_meanwhile_is_left_alone() -> None:
    kept = session(kept=frozenset((ProcessId(201, 2000),)))
    found = family(process(201, 1, cgroup="/elsewhere"), process(202, 201), of=kept)
    assert not pids(found)
    assert "/elsewhere" in left_alone(found)[201]
    assert pids(family(process(201, 1, cgroup=f"{JOB}/below"), of=kept)) == {201}


def test_init_is_never_touched_whatever_it_carries() -> None:
    assert not pids(family(process(1, 0, **PAGE, **STAMP)))


def test_the_children_of_a_known_member_are_members() -> None:
    kept = session(kept=frozenset((ProcessId(201, 2000),)))
    assert pids(family(process(201, 1), process(202, 201), of=kept)) == {201, 202}


def test_what_a_leader_starts_after_it_unregistered_is_not_its_sessions() -> None:
    ending = session(ending=True)
    assert not pids(family(leader(), process(201, LEADER.pid), process(202, 201), of=ending))


def test_what_a_leader_left_to_a_session_that_it_ended_remains_the_sessions() -> None:
    ending = session(ending=True, kept=frozenset((ProcessId(203, 2000),)))
    found = family(
        leader(),
        process(201, LEADER.pid, **STAMP),
        process(202, LEADER.pid, **PAGE),
        process(203, LEADER.pid),
        process(204, 201),
        of=ending,
    )
    assert pids(found) == {201, 202, 203, 204}


def test_in_the_root_cgroup_a_stamped_child_of_a_leader_that_unregistered_remains_a_member() -> None:
    found = at_root(
        leader(**AT_ROOT),
        process(201, LEADER.pid, **STAMP, **AT_ROOT),
        process(202, LEADER.pid, **AT_ROOT),
        ending=True,
    )
    assert pids(found) == {201}


# -- shapes that must not matter --------------------------------------------------------------------


def test_parents_in_a_circle_end_the_search() -> None:
    found = family(process(201, 202), process(202, 201), process(203, 203))
    assert not pids(found)
    assert pids(family(process(201, 202, **PAGE), process(202, 201), process(203, 203))) == {201, 202}


def test_a_chain_of_thousands_is_followed_to_its_end() -> None:
    chain = [process(pid, pid - 1) for pid in range(201, 3_201)]
    assert len(pids(family(process(200, 1, **PAGE), *chain))) == 3_001


# -- any snapshot at all ----------------------------------------------------------------------------

# Few values each, and at most one thing odd about a process: so the rules meet.
_PIDS = st.integers(2, 5)
_STARTS = st.sampled_from([1001, 1000, 999])
_ODDITIES: list[dict[str, Any]] = [
    *({}, {}, {}, {"comm": "keeper"}, {"comm": "keeper"}, {"uid": UID + 1}, {"uid": None}, {"dead": True}),
    *(SPARED, {"cgroup": "/"}, {"cgroup": f"{JOB}/below"}, {"cgroup": "/elsewhere"}, {"cgroup": SCOPE}),
]
_MARKS: list[dict[str, Any]] = [STAMP, {}, PAGE, {"lineage": (OUTER, ID)}, {"lineage": (OUTER,)}]


@st.composite
def snapshots(draw: st.DrawFn) -> tuple[str | None, list[Process]]:
    cgroup = draw(st.sampled_from(["/", JOB, None]))
    found = []
    for pid in draw(st.sets(_PIDS)):
        facts = {"cgroup": cgroup or JOB, **draw(st.sampled_from(_MARKS)), **draw(st.sampled_from(_ODDITIES))}
        found.append(process(pid, draw(st.integers(1, 5)), start=draw(_STARTS), **facts))
    return cgroup, found


_SESSIONS = st.builds(
    Session,
    id=st.just(ID),
    name=st.just(""),
    uid=st.just(UID),
    gid=st.just(UID),
    leader=st.builds(ProcessId, _PIDS, st.just(1000)),
    started_at_utc=st.just(""),
    adopters=st.frozensets(st.builds(ProcessId, _PIDS, st.just(1)), max_size=2),
    kept=st.frozensets(st.builds(ProcessId, _PIDS, _STARTS), max_size=1),
    spared=st.frozensets(st.builds(ProcessId, _PIDS, _STARTS), max_size=1),
    seen=st.frozensets(st.builds(ProcessId, _PIDS, _STARTS), max_size=1),
    ending=st.booleans(),
    scope=st.sampled_from([None, SCOPE]),
)
_POLICIES = st.builds(
    Policy,
    untouchable=st.frozensets(st.builds(ProcessId, _PIDS, _STARTS), max_size=2),
    protected_names=st.sampled_from([frozenset(), frozenset(("keeper",))]),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(snapshots(), _SESSIONS, _POLICIES, st.frozensets(st.builds(ProcessId, _PIDS, st.just(1)), max_size=2))
def test_whatever_the_snapshot_no_member_is_one_without_a_reason_or_against_a_rule(
    snapshot: tuple[str | None, list[Process]], of: Session, policy: Policy, living: frozenset[ProcessId]
) -> None:
    cgroup, processes = snapshot
    of = of._replace(cgroup=cgroup)
    found = family(*processes, of=of, policy=policy, living=living)
    parents = {of.leader.pid, *(id_.pid for id_ in found.members)}
    adopting = {1, *(id_.pid for id_ in of.adopters & living)}
    words = ("spared()", "[protect]", "the daemon itself")
    untouched = {id_.pid for id_, why in found.left_alone.items() if any(word in why for word in words)}
    for id_, member in found.members.items():
        one = member.process
        assert one.id == id_
        assert one.uid == UID
        assert id_.start_ticks >= of.leader.start_ticks
        assert id_ != of.leader
        assert not one.dead
        assert ID not in one.spared
        assert id_ not in of.spared
        assert one.ppid not in untouched
        assert policy.protection(one) is None
        resident = one.cgroup == of.scope and not of.ending
        within = cgroup == JOB and one.cgroup.startswith(f"{JOB}/")
        placed = one.cgroup in (cgroup, SCOPE) or within
        stamped = ID in one.lineage and placed and (cgroup == JOB or one.ppid in adopting)
        descends = one.ppid in parents and placed
        assert ID in one.pages or id_ in of.kept or stamped or descends or resident
        assert member.marked <= (ID in one.pages or ID in one.lineage or resident)
    assert not found.members.keys() & found.left_alone.keys()
    again = family(*reversed(processes), of=of, policy=policy, living=living)
    assert (again.members.keys(), again.left_alone.keys()) == (found.members.keys(), found.left_alone.keys())


# -- what kind of process it is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "framework", "role"),
    [
        (
            ("python", "-m", "joblib.externals.loky.backend.popen_loky_posix", "--process-name"),
            "loky",
            "worker",
        ),
        (("python", "-m", "loky.backend.popen_loky_posix"), "loky", "worker"),
        (
            (
                "python",
                "-c",
                "from joblib.externals.loky.backend.resource_tracker import main; main(5, False)",
            ),
            "loky",
            "tracker",
        ),
        (("python", "-c", "from loky.backend.resource_tracker import main; main(5, 0)"), "loky", "tracker"),
        (
            ("python", "-O", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)"),
            "multiprocessing spawn",
            "worker",
        ),
        (
            ("python", "-Wignore", "-c", "from multiprocessing.forkserver import main; main(4, 5, [])"),
            "multiprocessing forkserver",
            "worker",
        ),
        (
            ("python", "-B", "-E", "-c", "from multiprocessing.resource_tracker import main;main(3)"),
            "multiprocessing",
            "tracker",
        ),
        (("python", "train.py"), "other", "worker"),
        (("python",), "other", "worker"),
        ((), "other", "worker"),
    ],
)
def test_a_framework_is_known_by_the_tokens_of_the_command_line(
    argv: tuple[str, ...], framework: str, role: str
) -> None:
    assert signatures.recognise(process(201, argv=argv)) == (framework, Role(role))


@pytest.mark.parametrize(
    "argv",
    [
        ("python", "tool.py", "-m", "joblib.externals.loky.backend.popen_loky_posix"),
        ("python", "-m", "tool", "-c", "from multiprocessing.resource_tracker import main;main(3)"),
        ("grep", "from multiprocessing.resource_tracker import main"),
        ("vi", "joblib.externals.loky.backend.popen_loky_posix"),
        ("python", "-W", "loky.backend.popen_loky_posix"),
        ("python", "-m", "x.joblib.externals.loky.backend.popen_loky_posix"),
        ("python", "-c", "print('from multiprocessing.resource_tracker import main')"),
    ],
)
def test_a_program_that_only_mentions_a_framework_is_none_of_its_processes(argv: tuple[str, ...]) -> None:
    assert signatures.recognise(process(201, argv=argv)) == ("other", Role.WORKER)


def test_a_forked_process_is_known_by_its_thread_name_or_as_forked() -> None:
    assert signatures.recognise(process(201, forked=True, comm="pt_data_worker"))[0] == "torch DataLoader"
    assert signatures.recognise(process(201, forked=True, comm="python")) == ("forked", Role.WORKER)


def test_a_tracker_in_the_family_is_known_as_one() -> None:
    found = family(
        process(
            201, argv=("python", "-c", "from multiprocessing.resource_tracker import main;main(3)"), **STAMP
        )
    )
    assert [member.role for member in found.members.values()] == [Role.TRACKER]


# -- a control group of the session's own -----------------------------------------------------------

ISOLATED = session(scope=SCOPE)


def test_whoever_runs_in_the_session_s_own_cgroup_is_a_member_without_any_mark() -> None:
    found = family(
        process(201, cgroup=SCOPE), process(202, 77, cgroup=f"{SCOPE}/below"), process(203), of=ISOLATED
    )
    assert pids(found) == {201, 202}
    assert evidence(found, 201) == "runs in the control group that was made for the session"


def test_in_the_session_s_own_cgroup_too_only_the_same_uid_and_no_elder_counts() -> None:
    found = family(
        process(201, cgroup=SCOPE, uid=0),
        process(202, cgroup=SCOPE, uid=None),
        process(203, cgroup=SCOPE, start=999),
        process(204, cgroup=SCOPE, dead=True),
        of=ISOLATED,
    )
    assert not found.members


def test_the_spared_and_the_protected_are_left_alone_in_the_session_s_own_cgroup() -> None:
    found = family(
        process(201, cgroup=SCOPE, **SPARED),
        process(202, 201, cgroup=SCOPE),
        process(203, cgroup=SCOPE, comm="mlflow"),
        process(204, 203, cgroup=SCOPE),
        of=ISOLATED,
        policy=Policy(protected_names=frozenset(("mlflow",))),
    )
    assert not found.members
    assert left_alone(found).keys() == {201, 202, 203, 204}


def test_a_leader_that_unregistered_may_start_anything_in_the_session_s_own_cgroup() -> None:
    ending = session(scope=SCOPE, ending=True)
    assert not family(leader(cgroup=SCOPE), process(201, 100, cgroup=SCOPE), of=ending).members
    dead = ending._replace(cause=UNKNOWN_CAUSE)
    later = process(
        202, cgroup=SCOPE, forked=True, **STAMP
    )  # the leader's own environment has it, where that was run
    assert not family(process(201, cgroup=SCOPE), later, of=dead).members


def test_the_cgroup_of_another_session_of_the_same_user_tells_nothing() -> None:
    assert not family(process(201, cgroup=OTHERS_SCOPE), of=ISOLATED).members
    assert not family(process(201, cgroup=SCOPE)).members


def test_who_was_moved_into_a_session_s_cgroup_by_reaper_is_no_less_a_worker() -> None:
    found = family(
        process(201, cgroup=OTHERS_SCOPE, **STAMP),
        process(202, 201, cgroup=OTHERS_SCOPE),
        process(203, cgroup="/elsewhere.scope", **STAMP),
        process(204, cgroup=f"/user.slice/reaper-{UID + 1}-x.scope", **STAMP),
    )
    assert pids(found) == {201, 202}
    assert left_alone(found).keys() == {203, 204}


def test_workers_from_before_the_leader_was_moved_are_known_where_it_was() -> None:
    assert pids(family(process(201, **STAMP), process(202, 201), of=ISOLATED)) == {201, 202}
