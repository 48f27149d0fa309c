"""What the page is told and shows, where it listens, and what it does; drawn it is in tests/ui."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from agent.jobs import Job
from reaperd.ctl import CommandError
from reaperd.ctl.link import Link, NoDaemonError
from reaperd.ctl.ui import deeds, serve, shaping
from reaperd.ctl.ui.recorder import Recorder

NOW = datetime(2026, 1, 31, 12, 30, tzinfo=timezone.utc)
HOSTILE = "\x1b[2J\u202e*a*"


def session(**more: Any) -> dict[str, Any]:
    return {
        "id": "1-2-3-4",
        "name": "risk",
        "uid": 1000,
        "state": "running",
        "phase": "watched",
        "started_at": "2026-01-31T12:00:00.000Z",
        "leader": {"pid": 1, "start_ticks": 2, "cmdline": ["/usr/bin/python", "train.py"]},
        "progress": {"done": 1, "total": 4, "message": "fold"},
        "workers": [
            {"pid": 2, "role": "worker", "framework": "loky", "cpu_percent": 50.0, "rss_bytes": 1 << 20}
        ],
        **more,
    }


def orphan(pid: int, **more: Any) -> dict[str, Any]:
    facts = {"role": "worker", "framework": "loky", "cpu_percent": 1.0, "rss_bytes": pid << 20, "uid": 1000}
    return {
        "pid": pid,
        "start_ticks": 5,
        "verdict": "wait",
        "evidence": ["why"],
        "orphaned_s": 61.0,
        **facts,
        **more,
    }


# -- where it listens -----------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_it_listens_where_no_other_machine_reaches(address: str) -> None:
    assert serve.loopback(address, 8501)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "::ffff:10.0.0.1", "8.8.8.8"])
def test_it_listens_nowhere_else(address: str) -> None:
    with pytest.raises(CommandError, match=r"will not listen on .*ssh -L 9000:127") as refused:
        serve.loopback(address, 9000)
    assert refused.value.code == 2
    assert "reaperctl ui --port 9000" in str(refused.value)


def test_a_port_that_is_not_known_yet_is_never_advised() -> None:
    with pytest.raises(CommandError, match=r"--port 8501.*ssh -L 8501:127\.0\.0\.1:8501"):
        serve.loopback("0.0.0.0", 0)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(CommandError, match=r"must be an IP address or localhost, got .example\.org."):
        serve.loopback("example.org", 8501)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=rf"port {port} of 127.0.0.1 is in use: choose another"):
            serve._free_port("127.0.0.1", port)
    assert serve._free_port("127.0.0.1", 0) > 0


def test_the_secret_is_not_on_the_command_line() -> None:
    assert "token" not in " ".join(serve._command("127.0.0.1", 1))


# -- what it shows --------------------------------------------------------------------------------


def test_only_what_is_ones_own_is_shown_and_to_root_everything() -> None:
    records = [session(), session(uid=1001), {"id": "x"}]
    assert shaping.mine(records, 1000) == records[:1]
    assert shaping.mine(records, None) == records


def test_a_session_is_a_card() -> None:
    (card,) = shaping.session_cards([session()], NOW, lambda uid: f"u{uid}")
    assert (card.id, card.name, card.state, card.can_stop) == ("1-2-3-4", "risk", "running", True)
    assert card.facts == "u1000, for 30 min, pid 1, 50 % CPU, 1.0 MiB"
    assert (card.command, card.share, card.progress) == ("python train.py", 0.25, "1 of 4, fold")
    assert card.workers == [{"PID": "2", "What": "loky worker", "CPU": "50.0 %", "Memory": "1.0 MiB"}]


def test_a_session_whose_script_has_ended_cannot_be_stopped() -> None:
    (card,) = shaping.session_cards([session(phase="reaping", state="ending")], NOW)
    assert not card.can_stop
    assert card.command == "its script has ended"


def test_the_newest_session_comes_first_and_what_is_no_record_is_passed_over() -> None:
    older = session(id="9", started_at="2026-01-30T12:00:00.000Z")
    assert [card.id for card in shaping.session_cards([older, session(), {}], NOW)] == ["1-2-3-4", "9"]


def test_hostile_names_are_written_out() -> None:
    (card,) = shaping.session_cards(
        [session(name=HOSTILE, progress={"done": 1, "total": 2, "message": HOSTILE})], NOW
    )
    assert card.name.isprintable()
    assert card.progress.isprintable()
    (one,) = shaping.orphan_cards([orphan(7, framework=HOSTILE, cmdline=[HOSTILE])], frozenset())
    assert one.title.isprintable()
    assert one.command.isprintable()


def test_orphans_that_can_be_ended_come_first_then_those_that_hold_most() -> None:
    found = shaping.orphan_cards([orphan(1), orphan(2), orphan(3), {"pid": 4}], frozenset({(1, 5)}))
    assert [(card.pid, card.can_end) for card in found] == [(1, True), (3, False), (2, False)]
    assert found[0].verdict == "waits: too young, or too small"
    assert "orphaned for 61 s" in found[0].facts or "orphaned for 1 min 1 s" in found[0].facts


def test_another_process_with_the_pid_of_one_that_can_be_ended_is_not_it() -> None:
    (card,) = shaping.orphan_cards([orphan(1, start_ticks=6)], frozenset({(1, 5)}))
    assert not card.can_end


def test_what_came_of_a_cleanup_is_told_in_a_sentence() -> None:
    killed = orphan(1, result="killed")
    assert shaping.outcome([killed], [{"result": "removed", "bytes": 1 << 20}]) == (
        True,
        "1 process ended; 1 leftover removed; 2.0 MiB given back.",
    )
    good, text = shaping.outcome([killed, orphan(2, result="denied"), orphan(3)], [])
    assert not good
    assert text.startswith("1 process ended; 1 process may not be signalled; 1 process had not ended in time")
    assert shaping.outcome([], []) == (True, "There was nothing to clean up.")


def test_the_charts_have_a_gap_where_no_daemon_answered() -> None:
    points = [
        shaping.point(NOW, {"reaped_total": 3}, [session()], [orphan(9, verdict="kill")]),
        shaping.Point(NOW),
    ]
    charts = shaping.series(points)
    assert charts["processes"]["workers"] == [1, None]
    assert charts["processes"]["orphans"] == [1, None]
    assert charts["cpu"]["CPU %"] == [51.0, None]
    assert charts["memory"]["MiB"] == [10.0, None]


def test_what_was_ended_is_counted_by_the_hour() -> None:
    ended = {"processes": [{"result": "killed"}, {"result": "killed"}, {"result": "exited"}]}
    events = [
        {"at": "2026-01-31T12:01:00.000Z", **ended},
        {"at": "2026-01-31T10:59:00.000Z", **ended},
        {"at": "2026-01-29T10:59:00.000Z", **ended},
        {"at": "nonsense", **ended},
    ]
    bars = shaping.reaped_by_hour(events, NOW)
    assert len(bars["at"]) == shaping.REAPED_HOURS
    assert bars["processes"][-3:] == [2, 0, 2]
    assert sum(bars["processes"]) == 4


def test_history_is_told_from_its_end_and_chosen_by_kind_and_session() -> None:
    events = [
        {"at": "2026-01-31T12:00:00.000Z", "kind": "registered", "name": "risk", "session": "1"},
        {"at": "2026-01-31T12:00:01.000Z", "kind": "reaped", "name": "Risk", "session": "1"},
        {"at": "2026-01-31T12:00:02.000Z", "kind": "reaped", "name": "other", "session": "2"},
    ]
    assert [row["Session"] for row in shaping.event_rows(events)] == ["other", "Risk", "risk"]
    assert [row["Session"] for row in shaping.event_rows(events, only="reaped", about="risk")] == ["Risk"]
    assert len(shaping.event_rows(events, most=2)) == 2
    assert shaping.kinds_of(events) == ["reaped", "registered"]


def test_problems_come_before_limits_and_what_is_well() -> None:
    told = {"checks": [{"check": one, "level": one, "fact": "f"} for one in ("ok", "limit", "problem")]}
    assert [one.level for one in shaping.checks(told)] == ["problem", "limit", "ok"]
    assert shaping.checks(None) == []


def test_what_needs_attention_is_said() -> None:
    said = shaping.troubles(
        {"stuck": 1, "dry_run": True, "limits": [{"fact": "no pidfds", "advice": "upgrade"}]}
    )
    assert len(said) == 3
    assert "Dry run" in said[1]
    assert said[2] == "no pidfds: upgrade"


# -- what it keeps --------------------------------------------------------------------------------


class Answering:
    """A daemon that answers, or is gone."""

    def __init__(self) -> None:
        self.gone = False
        self.socket = "/s"
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.pids: dict[int, int] = {}  # of what processes there are: when each began
        self.answers, self.is_asked = threading.Event(), threading.Event()
        self.answers.set()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self.asked.append(op)
        if not self.answers.is_set():
            self.is_asked.set()
            self.answers.wait()
        self.told.append((op, fields))
        if op in ("protect", "release"):  # as an older daemon does it, by the pid alone
            return {"pid": fields["pid"], "start_ticks": self.pids[fields["pid"]]}
        if self.gone:
            raise NoDaemonError("no daemon answers: /s", "Start one")
        if op == "stop":
            return {"session": fields["session"], "after": 4}
        if op == "events":
            found = [one for one in self.events if one["seq"] > fields["after"]]
            return {"events": found, "last": self.events[-1]["seq"] if self.events else 0}
        return {
            "status": {"status": {"reaped_total": 1}},
            "ps": {"sessions": [session(), session(uid=1001)]},
            "orphans": {"orphans": [orphan(7), orphan(8, uid=1001)]},
        }[op]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def recorder(uid: int = 1000) -> tuple[Recorder, Answering, Clock]:
    link, clock = Answering(), Clock()
    return Recorder(link, uid, clock=clock), link, clock  # type: ignore[arg-type]


def test_the_checks_are_of_the_daemon_that_the_page_is_about() -> None:
    assert Link(["/one"], timeout_s=1).place == "/one"
    assert Link(["/one", "/two"], timeout_s=1).place == ""


def test_who_looks_again_at_once_does_not_ask_again() -> None:
    one, link, clock = recorder()
    first = one.look()
    asked = len(link.asked)
    assert one.look() is first
    assert len(link.asked) == asked
    clock.now_s += 1
    assert one.look() is not first
    assert len(one.points()) == 1  # a point every few seconds
    clock.now_s += 5
    one.look()
    assert len(one.points()) == 2


def test_others_sessions_and_orphans_are_left_out_but_for_root() -> None:
    facts = recorder()[0].look()
    assert (len(facts.sessions), len(facts.orphans)) == (1, 1)
    facts = recorder(0)[0].look()
    assert (len(facts.sessions), len(facts.orphans)) == (2, 2)


@pytest.mark.parametrize(("deed", "op"), [(deeds.spare, "protect"), (deeds.let_go, "release")])
def test_who_is_spared_is_named_by_pid_and_start_time(deed: Callable[..., deeds.Outcome], op: str) -> None:
    one, link, _ = recorder()
    link.pids = {7: 5}
    assert deed(one, 7, 5).good
    assert link.told[-1] == (op, {"pid": 7, "start_ticks": 5})
    with pytest.raises(CommandError, match="process 7 has ended, and another one has its pid"):
        deed(one, 7, 4)
    # A daemon that passed over the start time has spared somebody whom nobody meant.
    assert (link.told[-1][1].get("undo") is True) == (op == "protect")


def test_who_is_in_quarantine_now_is_not_released_in_place_of_another_that_had_its_pid() -> None:
    """By no daemon, not even one that passes over the start time."""
    one, link, _ = recorder()
    now = orphan(7)["start_ticks"]
    with pytest.raises(CommandError, match="process 7 has ended, and another one has its pid"):
        deeds.let_go(one, 7, now - 1)
    assert "release" not in link.asked
    link.pids = {7: now}
    assert deeds.let_go(one, 7, now).good


def test_while_the_daemon_takes_its_time_what_it_said_before_is_shown() -> None:
    one, link, clock = recorder()
    before = one.look()
    link.answers.clear()
    clock.now_s += 5
    slow = Job("Looking", one.look)
    assert link.is_asked.wait(30)
    # In threads: who waited for the daemon would never come back.
    shown = [Job("Showing", work) for work in (one.look, one.points, one.events)]
    try:
        assert all(job.wait(30) for job in shown)
        assert shown[0].result() is before
    finally:
        link.answers.set()
    assert slow.result() is not before


def test_an_admin_who_is_told_of_everybody_sees_what_is_his_and_nobody_s() -> None:
    for uid, seen in ((1000, [1, 3]), (0, [1, 2, 3])):
        one, link, _ = recorder(uid)
        link.events = [{"seq": 1, "uid": 1000}, {"seq": 2, "uid": 1001}, {"seq": 3, "uid": None}]
        one.look()
        assert [each["seq"] for each in one.events()] == seen


@pytest.mark.parametrize(
    ("result", "good", "said"), [("killed", True, "risk was stopped: "), ("stuck", False, "still there: 7")]
)
def test_a_session_that_is_stopped_is_told_of_as_the_daemon_tells_of_its_end(
    result: str, good: bool, said: str
) -> None:
    one, link, _ = recorder()
    processes = [orphan(7, result=result, signal="SIGTERM")]
    link.events = [
        {"seq": 4, "kind": "reaped", "name": "before", "processes": []},
        {"seq": 5, "kind": "reaped", "name": "risk", "processes": processes},
    ]
    outcome = deeds.stop_session(one, "1-2-3-4")
    assert (outcome.good, said in outcome.text) == (good, True)
    assert ("stop", {"session": "1-2-3-4"}) in link.told


def test_a_daemon_that_went_and_came_back_is_told_of() -> None:
    one, link, clock = recorder()
    one.look()
    link.gone = True
    clock.now_s += 5
    facts = one.look()
    assert (facts.no_daemon, facts.advice, facts.sessions) == ("no daemon answers: /s", "Start one", ())
    assert one.points()[-1].processes is None
    link.gone = False
    clock.now_s += 5
    assert not one.look().no_daemon


def test_each_event_is_kept_once_and_a_history_that_begins_anew_replaces_the_old() -> None:
    one, link, clock = recorder()
    link.events = [{"seq": number} for number in (1, 2, 3)]
    one.look()
    link.events.append({"seq": 4})
    clock.now_s += 5
    one.look()
    assert [each["seq"] for each in one.events()] == [1, 2, 3, 4]
    link.events = [{"seq": 1}]
    for _ in range(2):
        clock.now_s += 5
        one.look()
    assert [each["seq"] for each in one.events()] == [1]
    assert timedelta(0) <= datetime.now(timezone.utc) - one.look().at


def test_a_table_shows_each_text_as_it_is() -> None:
    assert shaping.table([{"PID": "1", "What": "a|b *c*"}, {"PID": "2", "What": "d"}]) == (
        "| PID | What |\n| --- | --- |\n| 1 | a\\|b \\*c\\* |\n| 2 | d |"
    )
    assert shaping.table([]) == ""
