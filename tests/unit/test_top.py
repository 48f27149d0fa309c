"""What the screen of ``reaperctl top`` makes of the daemon's answers: rows, order, filters, widths and hostile text."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from reaperd.ctl.answers import Answers
from reaperd.ctl.link import Link
from reaperd.ctl.text import columns
from reaperd.ctl.top import actions, layout, model
from reaperd.ctl.top.app import Top
from reaperd.ctl.top.help import HELP
from reaperd.ctl.top.model import Kind, Sort, View
from reaperd.ctl.top.widgets import changed

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)
MIB = 1024**2
HOSTILE = [
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "two\nlines\r",
    "gpj.\u202eexe",
    "\udcff",
    "\ue000",
    "[bold]x[/]",
    "漢字" * 40,
    "x" * 10_000,
    "שלום \u200f" * 30,
]


def worker(pid: int, **more: Any) -> dict[str, Any]:
    told = {
        "pid": pid,
        "start_ticks": pid + 1,
        "role": "worker",
        "framework": "loky",
        "evidence": ["holds the page"],
    }
    return {**told, "cpu_percent": 50.0, "rss_bytes": 100 * MIB, **more}


def session(name: str, *workers: Any, leader: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{leader}-{name}",
        "name": name,
        "uid": 1000,
        "state": "running",
        "phase": "watched",
        "started_at": "2026-01-31T11:00:00.000Z",
        "leader": {
            "pid": leader, "start_ticks": 5, "cmdline": ["/usr/bin/python", "train.py"], "cpu_percent": 1.0,
            "rss_bytes": 10 * MIB,
        },
        "cause": None,
        "progress": None,
        "workers": list(workers),
        "left_alone": [],
        **more,
    }  # fmt: skip


def orphan(pid: int, **more: Any) -> dict[str, Any]:
    facts = ["argv has 'popen_loky_posix'", "its parent was pid 3, which has ended", "below all thresholds"]
    told = {"verdict": "wait", "rule": "age", "uid": 1000, "orphaned_s": 30.0, "ends_in_s": 252.4}
    return {**worker(pid), **told, "gpu_bytes": 0, "result": None, "evidence": facts, **more}


def picture(*sessions: Any, orphans: tuple[Any, ...] = (), **more: Any) -> model.Picture:
    return model.picture(Answers(NOW, {}, list(sessions), list(orphans)), **more)


def shown(found: model.Picture, **chosen: Any) -> list[str]:
    """Return what is in the rows, the heads by name and the others by pid."""
    rows = [line.row for line in model.lines(found, View(**chosen))]
    return [str(row.pid) if row.kind not in (Kind.SESSION, Kind.ORPHANS) else row.name for row in rows]


def text_of(found: model.Picture, width: int = 200) -> list[str]:
    at = layout.layout(width, gpu=bool(found.sums.gpu_bytes))
    return ["".join(text for text, _ in layout.row(line, at)) for line in model.lines(found, View())]


def test_orphans_come_first_and_workers_hang_on_their_leader_trackers_last() -> None:
    found = picture(
        session("risk", worker(13, role="tracker"), worker(12), worker(11, cpu_percent=99.0)),
        orphans=(orphan(21),),
    )
    assert shown(found) == ["ORPHANS", "21", "risk", "1", "11", "12", "13"]


def test_what_is_no_orphan_or_stands_below_a_session_already_is_not_among_the_orphans() -> None:
    found = picture(
        session("risk", worker(11)), orphans=(orphan(11), orphan(22, verdict="spare", rule="tracker"))
    )
    assert shown(found) == ["risk", "1", "11"]
    assert found.sums.orphans == 0


def test_the_sums_count_the_workers_of_the_living_and_what_the_dead_left_as_orphans() -> None:
    found = picture(
        session("risk", worker(11)),
        session("gone", worker(12), leader=2, state="ending", phase="reaping"),
        orphans=(orphan(21),),
    )
    assert found.sums[:4] == (2, 1, 2, 1.0 + 50.0 + 1.0 + 50.0 + 50.0)


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        (Sort.CPU, ["busy", "large", "old"]),
        (Sort.MEMORY, ["large", "busy", "old"]),
        (Sort.AGE, ["old", "busy", "large"]),
        (Sort.NAME, ["busy", "large", "old"]),
    ],
)
def test_sessions_are_sorted_by_what_is_chosen_and_else_by_name(sort: Sort, names: list[str]) -> None:
    found = picture(
        session("old", leader=1, started_at="2026-01-30T11:00:00Z"),
        session("large", worker(12, cpu_percent=0, rss_bytes=900 * MIB), leader=2),
        session("busy", worker(13), leader=3),
    )
    assert shown(found, sort=sort, fold_all=True) == names


def test_a_filter_shows_a_session_that_has_the_text_whole_and_of_others_the_workers_that_have_it() -> None:
    found = picture(
        session("risk", worker(11, framework="torch DataLoader"), worker(12)),
        session("other", worker(14), leader=2),
        orphans=(orphan(21), orphan(22, framework="torch DataLoader")),
    )
    assert shown(found, text="DATALOADER") == ["ORPHANS", "22", "risk", "11"]
    assert shown(found, text="oth") == ["other", "2", "14"]
    assert shown(found, text="12") == ["risk", "12"]
    assert shown(found, only_uid=0) == []


def test_what_is_folded_hides_what_hangs_on_it_and_nothing_else() -> None:
    found = picture(session("a", worker(11), leader=1), session("b", worker(12), leader=2))
    key = found.sessions[0].head.key
    assert shown(found, sort=Sort.NAME, folded=frozenset({key})) == ["a", "b", "2", "12"]
    assert shown(found, sort=Sort.NAME, folded=frozenset({key}), fold_all=True) == ["a", "1", "11", "b"]


def test_an_orphan_shows_its_verdict_the_time_it_has_and_how_it_lost_its_parent() -> None:
    _, line = text_of(picture(orphans=(orphan(21),)))
    assert "wait 4:12" in line
    assert "its parent was pid 3, which has ended" in line
    _, line = text_of(picture(orphans=(orphan(21, verdict="quarantine", ends_in_s=3725),)))
    assert "quarantine 1:02…" in line or "quarantine 1:02:05" in line
    _, line = text_of(picture(orphans=(orphan(21, ends_in_s=None),)))
    assert "wait  " in line


def test_a_session_shows_how_far_it_is_and_one_that_ends_how_its_leader_did() -> None:
    head = text_of(picture(session("risk", progress={"done": 3, "total": 4, "message": "fold 3"})))[0]
    assert "██████████████████░░░░░░  75 %  3/4  fold 3" in head
    head = text_of(
        picture(session("risk", state="ending", phase="reaping", cause={"kind": "signal", "code": 9}))
    )[0]
    assert "killed by SIGKILL" in head


def test_gpu_memory_has_a_column_where_somebody_holds_some() -> None:
    found = picture(session("risk", worker(11)), gpu={11: 512 * MIB})
    assert "512.0 MiB" in text_of(found, 80)[2]
    assert "512.0 MiB" in text_of(found, 80)[0]


def test_another_users_command_line_is_said_not_to_be_shown() -> None:
    found = picture({**session("risk"), "leader": {"pid": 7, "cmdline": None}})
    assert "(command line not shown)" in text_of(found)[1]


@pytest.mark.parametrize("bad", HOSTILE)
@pytest.mark.parametrize("width", [80, 133, 200])
def test_every_line_is_as_wide_as_the_screen_and_can_be_printed(bad: str, width: int) -> None:
    progress = {"done": 1, "total": 3, "message": bad}
    told = worker(11, framework=bad, role=bad, evidence=[bad])
    hostile = session(bad, told, state=bad, progress=progress, left_alone=[{"pid": 4, "reason": bad}])
    found = picture(
        hostile, orphans=(orphan(21, framework=bad, verdict=bad, evidence=[bad]),), user_of=lambda _: bad
    )
    at = layout.layout(width, gpu=False)
    event = layout.event({"at": bad, "kind": bad, "name": bad, "session": bad, "message": bad}, at)
    lines = [*text_of(found, width), "".join(text for text, _ in event)]
    for pieces in (
        *layout.head(found, View(text=bad.replace("\n", "")), at)[:2],
        *layout.lost("away", NOW, at),
    ):
        lines.append("".join(text for text, _ in pieces))
    assert [columns(line) for line in lines] == [width] * len(lines)
    assert all(line.isprintable() for line in lines)


def test_a_session_that_is_as_it_was_keeps_its_rows_and_grows_older_and_any_change_is_seen() -> None:
    families = model.Families()

    def look(told: Any, after_s: float = 0.0, **more: Any) -> model.Family:
        answers = Answers(NOW + timedelta(seconds=after_s), {}, [told], [])
        return model.picture(answers, families=families, **more).sessions[0]

    def told() -> Any:  # each answer is parsed anew
        return session("risk", worker(11), worker(12, cpu_percent=60.0))

    first = look(told())
    again = look(told(), 7.0)
    assert again.below is first.below
    assert again.lines(Sort.CPU) is first.lines(Sort.CPU)
    assert again.head == first.head._replace(age_s=first.head.age_s + 7.0)
    busier = look(session("risk", worker(11, cpu_percent=99.0), worker(12, cpu_percent=60.0)))
    assert [line.row.pid for line in busier.lines(Sort.CPU)] == [1, 11, 12]
    assert busier.head.cpu_percent == 160.0
    assert look(told()).lines(Sort.CPU)[1].row.pid == 12
    assert look(told(), gpu={11: MIB}).head.gpu_bytes == MIB
    assert look(told(), gpu={}).head.gpu_bytes is None


@pytest.mark.parametrize(
    ("before", "after", "columns_changed"),
    [
        (["up ", "59", " s"], ["up ", "59", " s"], (0, 0)),
        (["up ", "59", " s"], ["up ", "58", " s"], (3, 5)),
        (["字", "a", "字"], ["字", "b", "字"], (2, 3)),
        (["a", "b"], ["c", "d"], (0, 2)),
        (["ab"], ["a", "b"], (0, 2)),
        (["a", "a"], ["a"], (1, 2)),
        ([], [], (0, 0)),
    ],
)
def test_of_a_line_the_pieces_that_have_changed_are_drawn_and_no_others(
    before: list[str], after: list[str], columns_changed: tuple[int, int]
) -> None:
    def strip(texts: list[str]) -> Strip:
        return Strip([Segment(text) for text in texts]).adjust_cell_length(sum(map(columns, before)))

    assert changed(strip(before), strip(after)) == columns_changed


def test_a_change_of_colour_alone_is_a_change() -> None:
    before, after = (Strip([Segment("a"), Segment("b", style)]) for style in (Style(), Style(bold=True)))
    assert changed(before, after) == (1, 2)


def test_no_line_of_the_help_is_wrapped_on_a_screen_of_80_columns() -> None:
    assert max(map(len, HELP)) <= layout.LEAST_WIDTH * 9 // 10 - 5  # frame, padding and scroll bar


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_what_a_key_asks_for_is_said_in_place_of_that_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(Top, "say", lambda _, lines, style="": said.append((" ".join(lines), style)))

    async def look() -> None:
        told = asyncio.Event()

        def heard(message: object) -> None:
            if isinstance(message, Top.Told):
                told.set()

        app = Top(Link(["/nowhere"], timeout_s=1.0), 60.0)
        async with app.run_test(size=(80, 24), message_hook=heard) as pilot:
            app._ask("Protect", lambda: actions.Answer({}["a mistake"]))
            await asyncio.wait_for(told.wait(), 20.0)
            await pilot.pause()

    asyncio.run(look())
    assert said[0] == ("Protect: asking the daemon ...", "dim")
    assert said[-1] == ("Protect: this has failed: nobody knows how far it went", "bold red")


def test_a_clean_up_with_a_filter_ends_nobody_before_anybody_was_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meant: list[object] = []
    monkeypatch.setattr(Top, "_clean_up", lambda _, only: meant.append(only))
    app = Top(Link(["/nowhere"], timeout_s=1.0), 60.0)
    app.action_clean_up()
    app.seen = View(text="loky")
    app.action_clean_up()
    assert meant == [None, frozenset()]


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*session("x"), *orphan(1), "done", "total", "message"]), inner, max_size=6
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(anything, max_size=3), st.lists(anything, max_size=3), anything)
def test_answers_that_make_no_sense_are_shown_as_far_as_they_do(
    sessions: Any, orphans: Any, status: Any
) -> None:
    found = model.picture(Answers(NOW, status, sessions, orphans))
    at = layout.layout(80, gpu=False)
    for line in model.lines(found, View()):
        assert columns("".join(text for text, _ in layout.row(line, at))) == 80
    layout.head(found, View(), at)
    layout.event(status, at)
