"""What the monitor makes of the daemon's answers, and how that looks: sums, widths, heights and hostile text."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.ctl import render_monitor as render
from reaperd.ctl.text import Look, columns

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)
MIB = 1024**2
HOSTILE = ["\x1b[2J\x1b[H", "\x9b31m", "two\nlines\r", "gpj.\u202eexe", "\udcff", "\ue000"]


def process(pid: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "role": "worker",
        "framework": "loky",
        "cpu_percent": 50.0,
        "rss_bytes": 100 * MIB,
        **more,
    }


def session(*workers: Any, leader: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": "1-2-3-4",
        "name": "risk",
        "phase": "watched",
        "leader": {"pid": leader},
        "workers": list(workers),
        **more,
    }


def orphan(pid: int, **more: Any) -> dict[str, Any]:
    return {**process(pid), "verdict": "kill", "rule": "cpu_threshold", "gpu_bytes": 0, **more}


def status(**more: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "pid": 12,
        "uptime_s": 3723.5,
        "reaped_total": 17,
        "freed_bytes_total": 12345678900,
        **more,
    }


def figures(*sessions: Any, orphans: tuple[Any, ...] = (), **more: Any) -> render.Figures:
    return render.figures(list(sessions), list(orphans), status(**more), NOW)


def categories(found: render.Figures) -> dict[int, str]:
    return {one.pid: one.category for one in found.processes}


# -- who is what ----------------------------------------------------------------------------------


def test_everybody_has_one_category() -> None:
    found = figures(
        session(process(2), process(3, role="tracker")),
        session(process(5), process(6, role="tracker"), leader=4, phase="reaping"),
        orphans=(orphan(7), orphan(8, role="tracker", verdict="spare", rule="tracker"), orphan(2)),
    )
    assert categories(found) == {
        1: "leaders", 2: "workers", 3: "trackers", 5: "orphans", 6: "trackers", 7: "orphans", 8: "trackers",
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["parent", "session", "protected", "uncertain"])
def test_what_is_no_orphan_is_not_counted(rule: str) -> None:
    assert categories(figures(orphans=(orphan(7, verdict="spare", rule=rule),))) == {}


def test_an_orphan_that_is_too_young_to_be_judged_is_counted() -> None:
    assert categories(figures(orphans=(orphan(7, verdict="wait", rule="age"),))) == {7: "orphans"}


def test_without_a_daemon_nothing_is_said_of_it_nor_of_sessions() -> None:
    found = render.figures(None, [orphan(7)], None, NOW)
    assert render.document(found)["sessions"] is None
    lines = render.frame(found, Look())
    assert lines[0].endswith("without a daemon: nobody knows of sessions")
    assert not any("reaperd" in line or "reaped" in line for line in lines)
    assert categories(found) == {7: "orphans"}


def test_sums_are_of_what_is_known_and_unknown_where_nothing_is() -> None:
    found = figures(session(process(2), process(3, cpu_percent=None)), orphans=(orphan(7, gpu_bytes=5),))
    assert found.sum_of("workers") == (2, 50.0, 200 * MIB, None)
    assert found.sum_of("leaders") == (1, None, None, None)
    assert found.sum_of("trackers") == (0, 0, 0, 0)
    assert found.sum_of() == (4, 100.0, 300 * MIB, 5)


def test_a_leaders_load_is_shown_where_the_daemon_tells_it() -> None:
    found = figures(session(leader=9) | {"leader": process(9, cpu_percent=3.0)})
    assert found.sum_of("leaders").cpu_percent == 3.0


def test_the_busiest_come_first_and_who_takes_nothing_does_not_come() -> None:
    found = figures(
        session(
            process(2, cpu_percent=1),
            process(3, cpu_percent=9),
            process(5, cpu_percent=1, rss_bytes=200 * MIB),
        )
    )
    assert [one.pid for one in found.busiest()] == [3, 5, 2]


# -- how it looks ---------------------------------------------------------------------------------


def test_a_frame_is_a_head_the_sums_and_the_busiest() -> None:
    found = figures(session(process(2), process(3, role="tracker", cpu_percent=0)), orphans=(orphan(4711),))
    assert render.frame(found, Look(width=80)) == [
        "2026-01-31 12:00:00 UTC  reaperd 0.1.0, pid 12, up 1 h 2 min",
        "1 session; 17 processes reaped so far, 11.5 GiB freed",
        "",
        "           COUNT       CPU     MEMORY",
        "leaders        1         -          -",
        "workers        1    50.0 %  100.0 MiB",
        "orphans        1    50.0 %  100.0 MiB",
        "trackers       1     0.0 %  100.0 MiB",
        "total          4   100.0 %  300.0 MiB",
        "",
        "BUSIEST      PID       CPU     MEMORY  WHAT",
        "worker         2    50.0 %  100.0 MiB  loky, risk",
        "orphan      4711    50.0 %  100.0 MiB  loky",
        "tracker        3     0.0 %  100.0 MiB  loky, risk",
    ]


def test_where_there_is_nobody_there_are_zeros_and_no_list() -> None:
    lines = render.frame(figures(), Look())
    assert lines[-1] == "total          0     0.0 %        0 B"
    assert not any("BUSIEST" in line for line in lines)


def test_gpu_memory_is_shown_only_where_somebody_holds_any() -> None:
    lines = render.frame(figures(orphans=(orphan(7, gpu_bytes=2048 * MIB),)), Look())
    assert any(line.endswith("MEMORY  GPU") for line in lines)
    assert lines[-1].endswith("loky, 2.0 GiB of GPU memory")
    assert not any("GPU" in line for line in render.frame(figures(orphans=(orphan(7),)), Look()))


def test_a_dry_run_and_what_is_stuck_is_said_at_the_top() -> None:
    lines = render.frame(figures(dry_run=True, stuck=1), Look())
    assert lines[2] == "dry run: nothing is signalled, only reported"
    assert lines[3].startswith("1 process survived SIGKILL")


@pytest.mark.parametrize("width", [40, 41, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    look = Look(width=width, unicode=True)
    wide = process(4194304, framework="東京" * 50, cpu_percent=25600.0, rss_bytes=1023 * 1024**4)
    found = figures(
        session(wide, name="n" * 200), orphans=(orphan(7, gpu_bytes=1023 * MIB),), stuck=3, version="v" * 99
    )
    lines = [*render.frame(found, look), *render.lost(NOW, "x" * 300 + " " + "y " * 50, look)]
    assert max(columns(line) for line in lines) <= width


@pytest.mark.parametrize("height", [1, 5, 9, 10, 11, 12, 24, 100])
def test_no_frame_is_higher_than_the_terminal_and_the_busiest_give_way_first(height: int) -> None:
    found = figures(session(*(process(pid) for pid in range(2, 90))))
    lines = render.frame(found, Look(width=80), height=height)
    assert len(lines) <= height
    assert (lines[-1].split()[0] in ("worker", "total")) == (height >= 9)
    assert len(render.frame(found, Look())) == 11 + render.BUSIEST


def test_ascii_is_enough_and_colours_take_no_columns() -> None:
    found = figures(session(process(2, framework="multiprocessing " * 9)), orphans=(orphan(7),))
    assert all(line.isascii() for line in render.frame(found, Look(width=60)))
    assert not any("\033" in line for line in render.frame(found, Look(width=60)))
    assert any("\033[33morphan" in line for line in render.frame(found, Look(width=60, colour=True)))


@pytest.mark.parametrize("text", HOSTILE)
def test_answers_may_be_hostile_in_every_field(text: str) -> None:
    hostile = process(2, role=text, framework=text)
    found = figures(session(hostile, name=text, id=text), orphans=(orphan(7, framework=text),), version=text)
    for look in (Look(width=80, unicode=True), Look()):
        assert all(line.isprintable() for line in render.frame(found, look))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(orphan(1))), inner),
    max_leaves=10,
)


@settings(max_examples=40)  # seconds matter: each example renders everything
@given(json_like)
def test_answers_of_any_shape_become_figures(anything: Any) -> None:
    found = render.figures([anything, session(anything)], [anything], anything, NOW)
    render.frame(found, Look(width=80))
    render.document(found)


# -- as a document --------------------------------------------------------------------------------


def test_a_document_has_each_category_the_total_and_the_busiest() -> None:
    found = render.document(figures(session(process(2)), orphans=(orphan(7),), quarantined=2))
    assert json.loads(json.dumps(found)) == found
    assert found["at"] == "2026-01-31T12:00:00.000Z"
    assert found["workers"] == {
        "processes": 1,
        "cpu_percent": 50.0,
        "rss_bytes": 100 * MIB,
        "gpu_bytes": None,
    }
    assert found["total"]["processes"] == 3
    assert found["quarantined"] == 2
    assert found["busiest"][1] == {
        "pid": 7, "category": "orphans", "framework": "loky", "session": "", "cpu_percent": 50.0,
        "rss_bytes": 100 * MIB, "gpu_bytes": 0,
    }  # fmt: skip
