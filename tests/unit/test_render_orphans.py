"""What reaperctl prints of orphans: hostile text, widths, empty states, and the words for verdicts and results."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.ctl import render_orphans as render
from reaperd.ctl.text import Look, columns, wrapped

FANCY = Look(width=80, unicode=True)
ASCII = Look(width=80)
ALICE = 1000

HOSTILE = [
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "two\nlines\r\x0b\x85\u2028",
    "\x00\x08\x7f\t",
    "gpj.\u202eexe\u2066\u200f",
    "zero\u200bwidth\ufeff\u00ad",
    "\udcff\udc1b",
    "\ue000\U000e0041",
]

REASON = "never below cpu_threshold (50 %): it would be ended at the next scan"


def record(pid: int = 4711, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "start_ticks": 7,
        "uid": ALICE,
        "verdict": "kill",
        "rule": "cpu_threshold",
        "framework": "loky",
        "role": "worker",
        "orphaned_s": 845.3,
        "cpu_percent": 99.84,
        "rss_bytes": 1288490188,
        "gpu_bytes": 0,
        "quarantined_s": None,
        "ends_by_itself": "ends about 330 s after its last queued task",
        "cmdline": ["/usr/bin/python3", "-m", "loky.backend.popen_loky_posix"],
        "evidence": ["its parent is init (pid 1)", REASON],
        "result": None,
        **more,
    }


def leftover(**more: Any) -> dict[str, Any]:
    return {
        "path": "/dev/shm/joblib_memmapping_folder_4700_a",
        "kind": "joblib folder",
        "uid": ALICE,
        "owner_pid": 4700,
        "bytes": 33554432,
        "evidence": ["pid 4700 is gone", "nobody maps it"],
        "result": None,
        **more,
    }


def explained(**more: Any) -> dict[str, Any]:
    return {**record(), "alive": True, "session": None, "events": [], **more}


def user_of(uid: int) -> str:
    return {ALICE: "alice"}.get(uid, str(uid))


def listed(*found: Any, look: Look = FANCY, everything: bool = False) -> list[str]:
    return render.orphans(found, look, everything=everything, user_of=user_of)


def whole(lines: list[str]) -> str:
    """Return wrapped lines as the one text that they were."""
    return re.sub(r"\s+", " ", " ".join(lines))


# -- the table ------------------------------------------------------------------------------------


def test_an_orphan_is_a_line_with_its_command_and_the_evidence_below() -> None:
    assert listed(
        record(), record(47, framework="multiprocessing spawn", cpu_percent=0, orphaned_s=12.2)
    ) == [
        " PID  USER   VERDICT  FRAMEWORK              ORPHANED     CPU   MEMORY",
        "4711  alice  kill     loky                     14 min  99.8 %  1.2 GiB",
        "    python3 -m loky.backend.popen_loky_posix",
        "    its parent is init (pid 1); never below cpu_threshold (50 %): it would be",
        "    ended at the next scan",
        "  47  alice  kill     multiprocessing spawn      12 s   0.0 %  1.2 GiB",
        "    python3 -m loky.backend.popen_loky_posix",
        "    its parent is init (pid 1); never below cpu_threshold (50 %): it would be",
        "    ended at the next scan",
    ]


def test_where_there_is_no_orphan_one_sentence_says_so() -> None:
    assert listed(look=Look()) == [render.NO_ORPHANS]


@pytest.mark.parametrize("rule", ["parent", "session", "protected", "tracker", "uncertain"])
def test_what_is_no_orphan_is_counted_unless_everything_is_asked_for(rule: str) -> None:
    other = record(5, verdict="spare", rule=rule)
    assert listed(record(), other)[-2:] == ["", "1 more is spared: --all shows it"]
    assert listed(record(), other, other)[-1] == "2 more are spared: --all shows them"
    assert listed(other)[0].startswith("no orphans: ")
    assert listed(other, look=Look())[-1] == "1 process that might have been one is spared: --all shows it"
    assert any(line.startswith("   5  alice  spare") for line in listed(record(), other, everything=True))


def test_an_orphan_that_no_rule_condemns_yet_is_shown() -> None:
    lines = listed(record(verdict="wait", rule="age", orphaned_s=0.02))
    assert lines[1].startswith("4711  alice  wait")
    assert lines[1].split()[4] == "now"
    assert not any("--all" in line for line in lines)


@pytest.mark.parametrize("rule", ["parent", "uncertain"])
def test_what_is_told_of_is_shown_whatever_the_rule(rule: str) -> None:
    assert listed(record(verdict="report", rule=rule))[1].startswith("4711  alice  report")


def test_what_was_done_stands_in_the_place_of_what_would_be() -> None:
    assert "stuck" in listed(record(result="stuck"))[1]


def test_a_stopped_process_comes_with_the_command_that_lets_it_go_on() -> None:
    lines = listed(record(verdict="quarantine", quarantined_s=12))
    assert lines[-1] == "    to let it go on: reaperctl release 4711"
    assert "release" not in whole(listed(record()))


def test_gpu_memory_has_a_column_only_where_somebody_holds_any() -> None:
    assert "GPU" not in listed(record())[0]
    lines = listed(record(gpu_bytes=2 * 1024**3), record(5))
    assert lines[0].endswith("     GPU")
    assert lines[1].endswith(" 2.0 GiB")


def test_what_is_not_known_is_a_dash_and_not_a_zero() -> None:
    bare = {"pid": 4711, "verdict": "report"}
    assert listed(bare)[1].split() == ["4711", "-", "report", "-", "-", "-", "-"]
    assert len(listed(bare)) == 2


def test_a_tracker_is_told_from_a_worker() -> None:
    assert "loky tracker" in listed(record(role="tracker"))[1]


@pytest.mark.parametrize("width", [40, 41, 60, 80, 120, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_terminal_and_no_evidence_is_lost(width: int, unicode: bool) -> None:
    look = Look(width=width, unicode=unicode)
    wide = record(
        4194304,
        framework="multiprocessing forkserver " * 3,
        verdict="quarantine",
        quarantined_s=5,
        orphaned_s=1e6,
        cpu_percent=25600.0,
        rss_bytes=1023 * 1024**4,
        gpu_bytes=1023 * 1024**4,
        cmdline=["python", "x" * 300, "東" * 200],
        evidence=["東京" * 60, "y" * 200, REASON],
    )
    lines = [
        *listed(look=look),
        *render.leftovers([], look),
        *listed(wide, record(), record(1, verdict="spare", rule="parent"), look=look),
        *render.leftovers([leftover(path="/dev/shm/" + "東" * 200), leftover()], look),
        *render.explanation(explained(**wide), look),
        *render.outcome({**wide, "result": "kept"}, look),
        *render.score(score(), look),
    ]
    assert max(columns(line) for line in lines) <= width
    assert unicode or "…" not in whole(lines)
    squeezed = "".join(listed(wide, look=look)).replace(" ", "")
    for fact in wide["evidence"]:
        assert fact.replace(" ", "") in squeezed


def test_at_forty_columns_who_and_what_becomes_of_it_is_left() -> None:
    head, line = listed(record(4194304, verdict="quarantine"), look=Look(width=40))[:2]
    assert head.split() == ["PID", "VERDICT", "ORPHANED", "MEMORY"]
    assert line.split()[:2] == ["4194304", "quarantine"]


def test_the_name_of_the_framework_gives_way_before_a_column_does() -> None:
    head, line = listed(record(4194304, framework="multiprocessing forkserver", verdict="quarantine"))[:2]
    assert "USER" in head
    assert "multiproces" in line
    assert "…" in line


def test_colours_take_no_columns() -> None:
    coloured = listed(record(), look=Look(width=80, colour=True, unicode=True))
    assert "\033[31mkill\033[0m" in coloured[1]
    assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == listed(record())


# -- hostile text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("look", [FANCY, ASCII, Look(width=40), Look()])
def test_a_record_may_be_hostile_in_every_field_and_still_prints_safely(text: str, look: Look) -> None:
    fields = dict.fromkeys(record(), text)
    hostile = {
        **fields,
        "pid": 1,
        "uid": 2,
        "result": text,
        "cmdline": [f"/bin/{text}", text],
        "evidence": [text, text],
    }
    event = {"kind": text, "at": text, "message": text, "processes": [hostile, {**hostile, "result": "kept"}]}
    lines = [
        *render.orphans([hostile], look, everything=True, user_of=lambda uid: text),
        *render.leftovers([{**dict.fromkeys(leftover(), text), "evidence": [text]}], look),
        *render.withheld([text, None], look),
        *render.explanation({**hostile, "alive": True, "session": text, "events": [event]}, look),
        *render.explanation({**hostile, "alive": False, "session": text, "events": [event]}, look),
        *render.outcome(hostile, look),
        *render.leftover_outcome({"path": text, "result": text}, look),
        *render.score({"since": text, "condemned": 1}, look),
    ]
    assert all(line.isprintable() for line in lines)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(record())), inner),
    max_leaves=10,
)


@settings(max_examples=40)  # seconds matter: each example renders everything
@given(
    json_like,
    st.dictionaries(st.sampled_from([*explained(), *leftover(), "since", "condemned", "exited"]), json_like),
)
def test_replies_of_any_shape_are_rendered_without_an_exception(
    anything: Any, fields: dict[str, Any]
) -> None:
    for found in (anything, fields):
        render.orphans([found, record()], FANCY, everything=True)
        render.leftovers([found, leftover()], FANCY)
        render.explanation(found, FANCY)
        render.explanation(explained(events=[found, {"processes": [found]}]), FANCY)
        render.outcome(found, FANCY)
        render.leftover_outcome(found, FANCY)
        render.score(found, FANCY)
        render.score(score(exited_after_s=found), FANCY)
        render.remains(found)


# -- wrapping -------------------------------------------------------------------------------------


def test_words_are_wrapped_and_only_those_too_wide_are_broken() -> None:
    assert wrapped("one two three", Look(width=9), "- ", "  ") == ["- one two", "  three"]
    assert wrapped("a bbbbbbbbbb c", Look(width=6)) == ["a", "bbbbbb", "bbbb c"]
    assert wrapped("one two", Look(), "- ", "  ") == ["- one two"]
    assert wrapped("", Look(width=9), "- ") == ["- "]


@given(st.text(st.sampled_from("ab 東e\u0301")), st.integers(8, 30))
def test_wrapping_loses_no_character_and_keeps_to_the_width(text: str, width: int) -> None:
    lines = wrapped(text, Look(width=width), "- ", "  ")
    assert "".join(line[2:] for line in lines).replace(" ", "") == text.replace(" ", "")
    assert all(columns(line) <= width for line in lines)


# -- leftovers ------------------------------------------------------------------------------------


def test_a_leftover_is_a_path_with_what_it_is_and_the_evidence_below() -> None:
    assert render.leftovers(
        [leftover(), leftover(path="/dev/shm/psm_1", owner_pid=None)], FANCY, user_of=user_of
    ) == [
        "/dev/shm/joblib_memmapping_folder_4700_a",
        "    32.0 MiB, joblib folder, alice, of pid 4700; pid 4700 is gone; nobody maps",
        "    it",
        "/dev/shm/psm_1",
        "    32.0 MiB, joblib folder, alice; pid 4700 is gone; nobody maps it",
        "",
        "2 leftovers, 64.0 MiB",
    ]
    assert render.leftovers([], Look()) == [render.NO_LEFTOVERS]


# -- the score ------------------------------------------------------------------------------------


def score(**more: Any) -> dict[str, Any]:
    return {
        "since": "2026-01-30T08:00:00.000Z",
        "condemned": 37,
        "exited": 31,
        "exited_after_s": {"median": 240, "max": 540},
        "claimed": 1,
        "still_there": 5,
        "killed": 0,
        **more,
    }


def test_a_score_says_in_words_what_became_of_those_a_rule_would_have_ended() -> None:
    assert render.score(score(), Look())[0] == (
        "37 orphans would have been ended since 2026-01-30 08:00 UTC: 31 ended by themselves later "
        "(median 4 min, at most 9 min), 1 turned out to belong to a session, 5 are still there."
    )
    assert 'Arm it with [scan] action = "kill"' in render.score(score(), Look())[1]


def test_a_score_of_one_agrees_with_it() -> None:
    one = score(condemned=1, exited=1, claimed=0, still_there=0, exited_after_s={"median": None, "max": None})
    assert render.score(one, Look())[0].endswith("1 orphan would have been ended since 2026-01-30 08:00 UTC: "
                                                 "1 ended by itself later.")  # fmt: skip


def test_what_is_armed_is_not_told_to_be_armed() -> None:
    lines = render.score(score(killed=2), Look())
    assert "2 were ended by Reaper" in lines[0]
    assert len(lines) == 1


def test_without_any_orphan_there_is_no_score() -> None:
    assert whole(render.score(score(condemned=0, since=None), Look())).startswith(
        "no orphan would have been ended: "
    )
    assert render.score(None, Look()) == render.score({}, Look())


# -- one process ----------------------------------------------------------------------------------


def test_an_explanation_is_a_verdict_then_the_evidence_then_what_such_a_process_does() -> None:
    assert render.explanation(explained(), FANCY) == [
        "pid 4711 (loky worker) is an orphan, and is to be ended (rule: cpu_threshold)",
        "  python3 -m loky.backend.popen_loky_posix",
        "",
        "why:",
        "  - its parent is init (pid 1)",
        "  - never below cpu_threshold (50 %): it would be ended at the next scan",
        "",
        "what such a process does once its parent is gone:",
        "  - ends about 330 s after its last queued task",
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"verdict": "quarantine"}, "is an orphan, and is stopped or to be stopped until somebody decides"),
        ({"verdict": "report"}, "is told of, and otherwise left alone"),
        ({"verdict": "wait"}, "is an orphan that no rule would have ended yet"),
        ({"verdict": "spare"}, "is left alone"),
        ({"verdict": None}, "has no verdict: it was not judged"),
        ({"verdict": "odd"}, "has no verdict: odd"),
        ({"verdict": "spare", "session": "risk-1"}, "belongs to session risk-1, and goes with that"),
    ],
)
def test_every_verdict_is_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    found = render.explanation(explained(**fields, rule=None), Look())
    assert found[0] == f"pid 4711 (loky worker) {sentence}"


def test_of_what_is_no_framework_s_nothing_is_said_of_its_work() -> None:
    found = render.explanation(explained(framework=None, role=None, verdict="spare", rule=None), Look())
    assert found[0] == "pid 4711 is left alone"


def test_of_a_process_that_is_gone_it_is_told_what_happened_and_of_that_one_alone() -> None:
    ended = record(result="killed", signals=["SIGTERM", "SIGKILL"])
    other = record(5, result="killed", evidence=["the other"])
    event = {"kind": "killed", "at": "2026-01-31T11:47:00Z", "processes": [other, ended]}
    found = explained(alive=False, verdict=None, rule=None, evidence=[], cmdline=None, events=[event])
    lines = render.explanation(found, Look())
    assert lines[0] == "pid 4711 (loky worker) is gone"
    assert lines[-4:] == [
        "  - 2026-01-31T11:47:00Z  killed       2 processes",
        "    - ended by SIGTERM, then SIGKILL",
        "    - its parent is init (pid 1)",
        f"    - {REASON}",
    ]
    assert "the other" not in whole(lines)


# -- cleanup --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"result": "killed", "signals": ["SIGTERM"]}, "ended by SIGTERM"),
        ({"result": "killed"}, "ended"),
        ({"result": "exited"}, "had ended by then"),
        ({"result": "stuck"}, "outlived SIGKILL, inside the kernel (state D)"),
        ({"result": "denied"}, "may not be signalled"),
        ({"result": "kept", "evidence": ["a", "it is protected"]}, "left alone: it is protected"),
        ({"result": "kept", "evidence": []}, "left alone"),
        ({"result": None}, "nothing was told of it"),
    ],
)
def test_every_result_is_said_in_words(fields: dict[str, Any], words: str) -> None:
    assert render.outcome(record(**fields), Look()) == [f"pid 4711 (loky): {words}"]


@pytest.mark.parametrize("result", ["killed", "exited", "stuck", "denied", "kept", "stopped", None, "odd"])
def test_only_what_has_ended_does_not_remain(result: str | None) -> None:
    assert render.remains(record(result=result)) == (result not in ("killed", "exited"))
