"""What reaperctl prints: hostile text, widths, empty states, and the words for causes, times and sizes."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.ctl import render
from reaperd.ctl.text import Look, columns, command_line, cut, plain
from reaperd.ctl.units import number_of, parse_when, plural
from reaperd.times import moment, rfc3339
from reaperd.words import duration, size

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)
ID = "4242-1a2b3c-0011aabb-deadbeef"
OTHER_ID = "77-2-0011aabb-deadbeef"
FANCY = Look(width=80, colour=False, unicode=True)
ASCII = Look(width=80, colour=False, unicode=False)

HOSTILE = [
    "\x1b]0;title\x07",  # sets the window's title
    "\x1b[2J\x1b[H",  # clears the screen
    "\x9b31m",  # CSI as one C1 character
    "two\nlines\r\x0b\x0c\x85\u2028\u2029",
    "\x00\x08\x7f\t",
    "gpj.\u202eexe\u2066\u2069\u200f",  # bidi controls
    "zero\u200bwidth\u200d\ufeff\u00ad",
    "\udcff\udc1b",  # bytes that were no UTF-8, as os.fsdecode carries them
    "\ue000\U000e0041\U0010ffff",  # private, tag and unassigned characters
]


def worker(pid: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "role": "worker",
        "framework": "loky",
        "cpu_percent": 99.84,
        "rss_bytes": 1288490188,
        "evidence": ["REAPER_LINEAGE names the session"],
        **more,
    }


def session(**more: Any) -> dict[str, Any]:
    return {
        "id": ID,
        "name": "risk",
        "uid": 1000,
        "state": "running",
        "started_at": "2026-01-31T11:47:00Z",
        "leader": {"pid": 4242, "start_ticks": 7, "cmdline": ["/usr/bin/python3", "train.py", "--jobs", "4"]},
        "progress": None,
        "workers": [],
        **more,
    }


def event(**more: Any) -> dict[str, Any]:
    return {
        "at": "2026-01-31T11:47:00.123Z",
        "kind": "reaped",
        "session": ID,
        "uid": 1000,
        "cause": {"kind": "signal", "code": 9},
        "processes": [],
        "latency_s": None,
        "freed": {"rss_bytes": 0, "shm_bytes": 0, "gpu_bytes": 0},
        **more,
    }


def tree(*found: Any, look: Look = FANCY) -> list[str]:
    return render.sessions(list(found), look, now=NOW, user_of=lambda uid: {1000: "alice"}.get(uid, str(uid)))


# -- hostile text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_escape_or_bidi_character_leaves_plain(text: str) -> None:
    assert plain(text).isprintable()
    assert "\x1b" not in plain(text)


def test_what_is_taken_out_is_written_out_so_that_a_person_sees_it_was_there() -> None:
    assert plain("a\x1b[31m\n\u202eb\udcff") == r"a\x1b[31m\n\u202eb\xff"


def test_ordinary_text_of_any_script_stays_as_it_is() -> None:
    text = "Straße 東京 Привет naïve C:\\temp 100 %"
    assert plain(text) == text


@given(st.text())
def test_plain_returns_one_printable_line_for_any_text(text: str) -> None:
    assert plain(text).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_session_may_be_hostile_in_every_field_and_still_prints_safely(text: str) -> None:
    hostile = session(
        id=text,
        name=text,
        state=text,
        started_at=text,
        leader={"pid": 1, "cmdline": [f"/bin/{text}", text, ""]},
        progress={"done": 1, "total": 2, "message": text},
        workers=[worker(2, role=text, framework=text, evidence=[text, text])],
        left_alone=[{"pid": 3, "reason": text}],
    )
    for look in (FANCY, ASCII, Look()):
        lines = render.sessions([hostile], look, now=NOW, user_of=lambda uid: text)
        assert all(line.isprintable() for line in lines)
        assert len(lines) == 5


@pytest.mark.parametrize("text", HOSTILE)
def test_an_event_may_be_hostile_in_every_field_and_stays_one_line(text: str) -> None:
    hostile = event(
        at=text,
        kind=text,
        name=text,
        session=text,
        message=text,
        processes=[{"pid": 1, "signal": text, "framework": text}],
    )
    assert render.event(hostile, FANCY).isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_status_may_be_hostile_in_every_field(text: str) -> None:
    lines = render.status({"version": text, "mode": text, "config": [text], "pid": text}, text, FANCY)
    assert all(line.isprintable() for line in lines)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(session())), inner),
    max_leaves=10,
)


@settings(max_examples=40)  # seconds matter: each example renders everything
@given(
    json_like, st.dictionaries(st.sampled_from([*session(), *event(), *worker(1), "left_alone"]), json_like)
)
def test_replies_of_any_shape_are_rendered_without_an_exception(
    anything: Any, fields: dict[str, Any]
) -> None:
    for found in (anything, fields):
        render.sessions(
            [found, session(workers=[found], leader=found, progress=found, left_alone=[found])],
            FANCY,
            now=NOW,
        )
        render.event(found, FANCY)
        render.event(event(processes=[found], cause=found, freed=found), FANCY)
        render.status(found, "/s", FANCY)
        render.remaining(found)


# -- ps -------------------------------------------------------------------------------------------


def test_no_sessions_says_how_a_script_becomes_one() -> None:
    assert tree() == ["no sessions: a script becomes one with `import agent; agent.register()`"]


def test_a_session_is_a_tree_with_its_leader_progress_and_workers() -> None:
    found = session(
        progress={"done": 16, "total": 64, "message": "fold 3"},
        workers=[
            worker(4250),
            worker(14251, role="tracker", framework="multiprocessing", cpu_percent=0, rss_bytes=12345678),
        ],
    )
    assert tree(found, look=Look(width=100, unicode=True)) == [
        "risk  4242-1a2b3c-0011aabb-deadbeef  alice  running  13 min",
        "├─ leader     4242  python3 train.py --jobs 4",
        "├─ progress  [█████░░░░░░░░░░░░░░░] 25 %  16 of 64  fold 3",
        "├─ worker     4250  loky             99.8 %   1.2 GiB  REAPER_LINEAGE names the session",
        "└─ tracker   14251  multiprocessing   0.0 %  11.8 MiB  REAPER_LINEAGE names the session",
    ]


def test_who_is_left_alone_is_one_line_below_the_workers_with_the_reasons() -> None:
    spared = {"pid": 4711, "reason": "was started under spared()"}
    below = {"pid": 4712, "reason": "is below pid 4711, which was started under spared()"}
    lines = tree(session(workers=[worker(9)], left_alone=[spared]))
    assert lines[-1] == "└─ 1 left alone: pid 4711 was started under spared()"
    assert lines[-2].startswith("├─ worker")
    assert tree(session(left_alone=[spared, below]), look=Look())[-1] == (
        "`- 2 left alone: pid 4711 was started under spared(); "
        "pid 4712 is below pid 4711, which was started under spared()"
    )
    assert tree(session(left_alone=[]))[-1].startswith("└─ leader")


def test_of_many_left_alone_the_first_are_named_and_the_rest_counted() -> None:
    many = [{"pid": pid, "reason": "is spared"} for pid in range(1, 201)]
    line = render.left_alone_line(many)
    assert line.startswith("200 left alone: pid 1 is spared; pid 2 is spared; ")
    assert line.endswith("; pid 10 is spared; 190 more")


def test_where_the_terminal_cannot_show_boxes_the_tree_is_ascii() -> None:
    lines = tree(session(progress={"done": 1, "total": 2, "message": ""}, workers=[worker(1)]), look=ASCII)
    assert [line[:3] for line in lines[1:]] == ["|- ", "|- ", "`- "]
    assert "[##########----------] 50 %" in lines[2]
    assert all(line.isascii() for line in lines)


def test_columns_align_over_all_sessions() -> None:
    lines = tree(
        session(workers=[worker(9), worker(123456, framework="torch", cpu_percent=1234.5)]),
        session(id=OTHER_ID, workers=[worker(10, rss_bytes=512)]),
    )
    ends = {line.index(" %") for line in lines if " %" in line}
    assert len(ends) == 1


def test_what_is_not_known_is_a_dash_and_not_a_zero() -> None:
    line = tree(session(workers=[worker(9, framework=None, cpu_percent=None, rss_bytes=None, evidence=[])]))[
        -1
    ]
    assert line.split() == ["└─", "worker", "9", "-", "-", "-"]


def test_the_command_line_of_another_user_is_said_to_be_hidden() -> None:
    assert tree(session(leader={"pid": 1, "cmdline": None}))[1].endswith("(command line not shown)")


def test_arguments_with_spaces_are_quoted() -> None:
    assert command_line(["/opt/my python", "-c", "print(1); x()", ""]) == "'my python' -c 'print(1); x()' ''"


def test_a_session_without_a_name_is_known_by_its_id() -> None:
    assert tree(session(name=""))[0].startswith(ID)


@pytest.mark.parametrize("width", [80, 81, 100, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, unicode: bool) -> None:
    found = session(
        name="nächtliche Läufe 東京" * 5,
        state="running" * 9,
        leader={"pid": 4242, "cmdline": ["python", "x" * 500, "東" * 300]},
        progress={"done": 1.5, "total": 3, "message": "m" * 500},
        workers=[worker(4194304, framework="multiprocessing.resource_tracker", evidence=["e" * 300] * 3)],
    )
    found["left_alone"] = [{"pid": 4711, "reason": "東" * 300}]
    found["workers"].append(worker(5, role="r" * 99, cpu_percent=25600.0, rss_bytes=1023 * 1024**4))
    lines = tree(found, session(), look=Look(width=width, unicode=unicode))
    assert max(columns(line) for line in lines) <= width


def test_into_a_pipe_nothing_is_cut() -> None:
    words = "x" * 500
    assert words in tree(session(leader={"pid": 1, "cmdline": ["python", words]}), look=Look())[1]


def test_a_cut_id_keeps_the_beginning_that_stop_takes() -> None:
    line = tree(session(name="n" * 40), look=Look(width=80, unicode=True))[0]
    assert re.search(r" 4242-1a2b3c\S*…", line)


def test_colours_take_no_columns_and_are_absent_without_them() -> None:
    found = session(
        progress={"done": 1, "total": 3, "message": "x"}, workers=[worker(1), worker(2, role="tracker")]
    )
    coloured = tree(found, look=Look(width=80, colour=True, unicode=True))
    assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == tree(found)
    assert all(line.count("\033[") % 2 == 0 for line in coloured)
    assert not any("\033" in line for line in tree(found))


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        ({"done": 3, "total": None, "message": ""}, "3 done"),
        ({"done": 0, "total": 0, "message": "warming up"}, "0 done  warming up"),
        ({"done": 9, "total": 3, "message": ""}, "[####################] 100 %  9 of 3"),
        ({"done": -1, "total": 3, "message": ""}, "[--------------------] 0 %  -1 of 3"),
        ({"done": 0.25, "total": 2.5, "message": ""}, "[##------------------] 10 %  0.25 of 2.5"),
        ({"done": float("inf"), "total": 3, "message": "x"}, "x"),
        ({"done": 999, "total": 1000, "message": ""}, "[###################-] 99 %  999 of 1000"),
    ],
)
def test_progress_of_any_kind_is_shown(progress: dict[str, Any], text: str) -> None:
    assert render.progress_line(progress, ASCII) == text


def test_wide_and_combining_characters_are_counted_as_a_terminal_does() -> None:
    assert columns("東京") == 4
    assert columns("e\u0301") == 1
    assert cut("東京東京", 5, FANCY) == "東京…"
    assert cut("abcdefgh", 5, ASCII) == "ab..."
    assert cut("abc", 3, ASCII) == "abc"


# -- events ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ({"kind": "signal", "code": 9}, "killed by SIGKILL"),
        ({"kind": "signal", "code": 11}, "killed by SIGSEGV"),
        ({"kind": "signal", "code": 6, "core_dumped": True}, "killed by SIGABRT (core dumped)"),
        ({"kind": "signal", "code": 42}, "killed by signal 42"),
        ({"kind": "signal", "code": None}, "killed by a signal"),
        ({"kind": "exit", "code": 0}, "ended by itself"),
        ({"kind": "exit", "code": 3}, "exited with code 3"),
        ({"kind": "oom", "code": 9}, "out of memory"),
        ({"kind": "unknown", "code": None}, "cause unknown"),
        (None, ""),
    ],
)
def test_a_cause_is_said_in_words(cause: Any, words: str) -> None:
    assert render.cause_in_words(cause) == words


def test_an_event_says_when_what_who_why_how_many_how_fast_and_what_it_freed() -> None:
    one = event(
        name="risk",
        processes=[{"pid": 1, "signal": 15}, {"pid": 2, "signal": "SIGKILL"}, {"pid": 3, "signal": 15}],
        latency_s=0.0123,
        freed={"rss_bytes": 1288490188, "shm_bytes": 33554432, "gpu_bytes": 0},
    )
    assert render.event(one, Look()) == (
        "2026-01-31T11:47:00Z  reaped       risk  killed by SIGKILL, 3 processes (1 SIGKILL, 2 SIGTERM), "
        "gone in 12 ms, freed 1.2 GiB of memory and 32.0 MiB of shared memory"
    )


LOKY = {"framework": "loky", "result": "kept", "signal": None}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "orphan", "would": "kill", "rule": "stays"}, "would have been ended, rule stays"),
        ({"kind": "orphan", "would": "quarantine", "rule": "gpu"}, "would have been stopped, rule gpu"),
        ({"kind": "orphan", "would": "report", "rule": "gpu"}, "told of, and left alone, rule gpu"),
        ({"kind": "orphan", "rule": "uncertain"}, "told of, and left alone, rule uncertain"),
        ({"kind": "orphan", "outcome": "exited", "after_s": 330.2}, "ended by itself 5 min 30 s later"),
        ({"kind": "orphan", "outcome": "claimed", "after_s": 2.0}, "belongs to a session after all"),
        ({"kind": "quarantined", "rule": "gpu"}, "stopped, rule gpu"),
        ({"kind": "released", "rule": "protected"}, "goes on, rule protected"),
    ],
)
def test_an_event_about_one_orphan_says_which_whose_and_what_became_of_it(
    fields: dict[str, Any], words: str
) -> None:
    one = {"uid": 1000, "processes": [{"pid": 4711, **LOKY}], **fields}
    assert render.what_happened(one) == f"pid 4711 (loky), uid 1000, {words}"


def test_an_event_about_orphans_that_were_ended_names_the_first_of_them_and_who_asked_for_it() -> None:
    processes = [{"pid": pid, **LOKY, "signal": "SIGTERM"} for pid in range(1, 11)]
    one = {"kind": "killed", "uid": 7, "asked_by_uid": 0, "rule": "cleanup", "processes": processes}
    assert render.what_happened(one) == (
        "pids 1, 2, 3, 4, 5, 6, 7, 8, 2 more (loky), uid 7, rule cleanup, asked for by uid 0, "
        "10 processes (10 SIGTERM)"
    )


def test_an_event_of_the_daemon_itself_has_no_session_and_no_trailing_blanks() -> None:
    one = event(kind="stopped", session=None, uid=None, cause=None)
    assert render.event(one, Look()) == "2026-01-31T11:47:00Z  stopped"


def test_a_reload_says_which_settings_hold() -> None:
    assert render.what_happened({"kind": "reload", "faults": []}) == "settings reloaded"
    assert (
        render.what_happened({"kind": "reload", "faults": ["a\n", "b"]}) == r"kept the old settings: a\n; b"
    )


def test_an_event_without_a_name_shows_the_session_id() -> None:
    assert ID in render.event(event(), Look())


def test_what_could_not_be_ended_is_counted_and_named() -> None:
    results = ("stuck", "denied", "killed", "exited")
    one = event(processes=[{"pid": pid, "result": result} for pid, result in enumerate(results, 7)])
    assert render.remaining(one) == [7, 8]
    assert render.what_happened(one) == "killed by SIGKILL, 4 processes, 2 still there"
    assert render.remaining(event()) == []


def test_a_dry_run_never_claims_to_have_ended_anything() -> None:
    one = event(dry_run=True, processes=[{"pid": 1, "signal": None, "result": "kept"}], latency_s=0.1)
    assert render.what_happened(one) == "killed by SIGKILL, dry run: would have ended 1 process"


def test_a_registration_names_the_leader_and_whether_it_was_found_running() -> None:
    one = event(kind="registered", cause=None, leader={"pid": 42})
    assert render.what_happened(one) == "leader 42"
    assert render.what_happened({**one, "adopted": True}) == "leader 42, adopted"


def test_processes_left_alone_are_counted() -> None:
    one = event(cause={"kind": "exit", "code": 0}, left_alone=[{"pid": 5, "reason": "x"}])
    assert render.what_happened(one) == "ended by itself, 1 left alone"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], ""),
        (["since"], " in that time"),
        (["of_session"], " of that session"),
        (["of_session", "since"], " of that session in that time"),
        (["since", "of_owner", "of_kind"], " of that kind of that user that you may see in that time"),
    ],
)
def test_where_there_are_no_events_only_what_was_asked_for_is_denied(asked: list[str], said: str) -> None:
    assert render.which_events(**dict.fromkeys(asked, True)) == said


# -- status ---------------------------------------------------------------------------------------


def status(**more: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "pid": 12,
        "uptime_s": 3723.5,
        "mode": "user",
        "config": "/etc/reaper/reaper.toml",
        "sessions": 1,
        "workers": 4,
        "orphans": 0,
        "reaped_total": 17,
        "freed_bytes_total": 12345678900,
        "dry_run": False,
        "stuck": 0,
        **more,
    }


def test_a_status_is_a_short_block() -> None:
    assert render.status(status(), "/run/reaper/reaper.sock", Look()) == [
        "reaperd 0.1.0, pid 12, user mode, up 1 h 2 min",
        "  socket    /run/reaper/reaper.sock",
        "  config    /etc/reaper/reaper.toml",
        "  sessions  1 with 4 workers",
        "  orphans   0",
        "  reaped    17 processes so far, 11.5 GiB freed",
    ]


def test_a_dry_run_and_stuck_processes_are_said_in_the_status() -> None:
    lines = render.status(status(dry_run=True, stuck=[3, 4], quarantined=1, config=None), "/s", Look())
    assert "  config    built-in defaults" in lines
    assert "dry run" in lines[-3]
    assert lines[-2].startswith("  2 processes survived SIGKILL")
    assert lines[-1].startswith("  1 process stopped and waiting")


def test_there_is_no_trouble_where_nothing_is_stuck_or_quarantined() -> None:
    assert render.troubles(status()) == []
    assert render.troubles({}) == []


# -- times, sizes, counts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1.5 * 1024**3, "1.5 GiB"),
        (1024**6, "1024.0 PiB"),
        (-1, "-"),
        (None, "-"),
    ],
)
def test_sizes_are_in_human_units(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0004, "0.4 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1.0 s"),
        (2.44, "2.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (90061, "1 d 1 h"),
        (-1, "-"),
        (None, "-"),
    ],
)
def test_durations_are_in_human_units(value: float | None, text: str) -> None:
    assert duration(value) == text


def test_counts_agree_with_their_noun() -> None:
    assert [plural(0, "worker"), plural(1, "worker"), plural(2, "process")] == [
        "0 workers",
        "1 worker",
        "2 processes",
    ]


def test_a_number_is_a_finite_number_and_not_a_boolean() -> None:
    assert number_of({"a": 1.5}, "a") == 1.5
    for value in (True, "1", None, float("inf"), float("nan"), []):
        assert number_of({"a": value}, "a") is None
    assert number_of([], "a") is None


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-01-31T12:00:00Z", NOW),
        ("2026-01-31T12:00:00.5Z", NOW + timedelta(milliseconds=500)),
        ("2026-01-31T12:00:00.123456789Z", NOW + timedelta(microseconds=123456)),
        ("2026-01-31T13:00:00+01:00", NOW),
        ("2026-01-31T13:00:00.25+01:00", NOW + timedelta(milliseconds=250)),
        ("2026-01-31 12:00", NOW),
        ("2026-01-31", NOW - timedelta(hours=12)),
        ("10min", NOW - timedelta(minutes=10)),
        ("1.5 h ago", NOW - timedelta(minutes=90)),
        ("30s", NOW - timedelta(seconds=30)),
        ("5m", NOW - timedelta(minutes=5)),
        ("2d", NOW - timedelta(days=2)),
        ("1w", NOW - timedelta(days=7)),
    ],
)
def test_since_takes_times_and_ages(text: str, when: datetime) -> None:
    assert parse_when(text, NOW) == when


@pytest.mark.parametrize(
    "text", ["", "yesterday-ish", "min", "-5min", "5", "1e3s", "99999999999999d", "2026-13-01", "٣min", "²s"]
)
def test_since_refuses_what_is_neither(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_when(text, NOW)


@given(st.text())
def test_a_time_of_any_text_is_a_time_or_none(text: str) -> None:
    found = moment(text)
    assert found is None or found.tzinfo is not None


def test_times_go_out_as_rfc_3339_in_utc() -> None:
    assert rfc3339(NOW.astimezone(timezone(timedelta(hours=5)))) == "2026-01-31T12:00:00.000Z"


def test_which_attempt_it_is_stands_in_the_tree_and_in_the_history() -> None:
    told = {"attempt": {"number": 2, "most": 4}}
    assert "13 min  attempt 2 of 4" in render.sessions([session(**told)], FANCY, now=NOW)[0]
    assert "attempt 2 of 4, killed by SIGKILL" in render.event(
        {"kind": "reaped", "cause": {"kind": "signal", "code": 9}, **told}, FANCY
    )
    for nothing in (None, {}, {"number": "2", "most": 4}, 7, {"number": 1, "most": 1}):
        assert "attempt" not in render.sessions([session(attempt=nothing)], FANCY, now=NOW)[0]
