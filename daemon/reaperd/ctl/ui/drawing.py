"""Draws the page with Streamlit: what there is to say comes from ``shaping``, what there is to do goes to ``deeds``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import streamlit as st

from agent.jobs import Job
from agent.panel import as_markdown, bold
from reaperd.ctl import CommandError
from reaperd.ctl.cleanup import Target, target_of
from reaperd.ctl.commands import user_of
from reaperd.ctl.ui import deeds, shaping
from reaperd.ctl.ui.recorder import HISTORY_DAYS, Facts, Recorder
from reaperd.ctl.units import list_of, plural, text_of
from reaperd.words import duration

_CARDS = 40  # that are drawn one by one
_CHART_PX, _LEGEND_PX = 180, 54
_CHART_WIDTH_PX, _TILE_WIDTH_PX = 335, 120  # as wide as the legend; six tiles on a small screen
_COLOURS = {"leaders": "#3465a4", "workers": "#5b9bdf", "trackers": "#9a9a9a", "orphans": "#d9534f"}
_STATES = {"running": "green", "ending": "orange", "ended": "red"}
_ICONS = {"problem": ":material/error:", "limit": ":material/info:"}
_WORKING, _SAID, _ASKED, _LOOKING, _FOUND = "working", "said", "asked", "looking", "found"
_LOOK_AGAIN_S = 10.0  # where looking takes long


# -- what is being done ---------------------------------------------------------------------------


def begin(what: str, work: Callable[[], deeds.Outcome]) -> None:
    """Begin a deed: one at a time, with the buttons off."""
    st.session_state[_WORKING] = Job(what, work)
    st.session_state.pop(_SAID, None)
    st.session_state.pop(_ASKED, None)
    st.rerun()


def is_working() -> bool:
    """Say whether a deed goes on."""
    return st.session_state.get(_WORKING) is not None


def draw_deeds() -> None:
    """Say what is being done, or what came of it."""
    job: Job[deeds.Outcome] | None = st.session_state.get(_WORKING)
    if job is not None and job.over:
        failed = job.failed_in_words(CommandError, OSError, ValueError)
        st.session_state[_SAID] = deeds.Outcome(False, failed) if failed else job.result()
        for name in (_LOOKING, _FOUND, _WORKING):
            st.session_state.pop(name, None)
        st.rerun()
    if job is not None:
        st.info(f"{as_markdown(job.what)} … {duration(round(job.lasted_s))}", icon=":material/pending:")
    said: deeds.Outcome | None = st.session_state.get(_SAID)
    if said is not None:
        text, close = st.columns((9, 1), vertical_alignment="center")
        (text.success if said.good else text.warning)(as_markdown(said.text))
        if close.button("Close", key="close"):
            del st.session_state[_SAID]
            st.rerun()


def _confirmed(key: str, question: str, yes: str) -> bool:
    """Ask, where ``key`` is what is asked about, and say whether the answer is yes: in the page itself, which goes on."""
    if st.session_state.get(_ASKED) != key:
        return False
    st.warning(as_markdown(question))
    with st.container(horizontal=True):
        agreed = bool(st.button(yes, type="primary", key=f"yes {key}"))
        if st.button("No", key=f"no {key}"):
            del st.session_state[_ASKED]
            st.rerun()
    return agreed


def _ask(key: str, label: str, icon: str, **more: Any) -> None:
    """Draw the button that asks first."""
    if st.button(label, key=f"ask {key}", icon=f":material/{icon}:", disabled=is_working(), **more):
        st.session_state[_ASKED] = key
        st.rerun()


def draw_daemon(facts: Facts) -> None:
    """Say who answers, or that nobody does."""
    if facts.no_daemon:
        said = [
            f"{facts.no_daemon[:1].upper()}{facts.no_daemon[1:]}",
            *([facts.advice.replace("`", "")] if facts.advice else []),
        ]
        st.error(
            f"{as_markdown('. '.join(said))}. Nothing that a killed script leaves is ended meanwhile; orphans are looked for from here.",
            icon=":material/cloud_off:",
        )
    for trouble in shaping.troubles(facts.status):
        st.warning(as_markdown(trouble))


# -- overview -------------------------------------------------------------------------------------


def overview(recorder: Recorder) -> None:
    """Draw the figures, and their course."""
    facts = recorder.look()
    draw_daemon(facts)
    with st.container(horizontal=True, gap="small"):
        for one in shaping.tiles(facts.status, facts.sessions, facts.orphans):
            value = "-" if facts.no_daemon else one.value
            st.metric(one.label, value, help=one.note or None, width=_TILE_WIDTH_PX)
    points = recorder.points()
    if len(points) < 2:
        st.caption("The charts begin in a few seconds.")
    else:
        _draw_charts(points)
    st.subheader("Reaped in the last 24 hours", anchor=False)
    bars = shaping.reaped_by_hour(recorder.events(), facts.at)
    if any(bars["processes"]):
        st.bar_chart(
            bars,
            x="at",
            y="processes",
            x_label="",
            y_label="processes",
            color=_COLOURS["orphans"],
            height=_CHART_PX,
        )
    else:
        st.caption("Nothing had to be ended.")


def _draw_charts(points: list[shaping.Point]) -> None:
    charts = shaping.series(points)
    titles = {"processes": "Processes", "cpu": "CPU, % of one core", "memory": "Memory, MiB"}
    beside = st.container(horizontal=True, gap="small")
    for name, title in titles.items():
        with beside.container(width=_CHART_WIDTH_PX):
            st.subheader(title, anchor=False)
            y = [key for key in charts[name] if key != "at"]
            # One above the other: lines of the same height would hide each other.
            st.area_chart(
                charts[name],
                x="at",
                y=y,
                x_label="",
                y_label="",
                color=[_COLOURS.get(key, _COLOURS["workers"]) for key in y],
                height=_CHART_PX + (_LEGEND_PX if len(y) > 1 else 0),
                stack=True,
            )


# -- sessions -------------------------------------------------------------------------------------


def sessions(recorder: Recorder) -> None:
    """Draw each session with its workers."""
    facts = recorder.look()
    draw_daemon(facts)
    cards = shaping.session_cards(facts.sessions, facts.at, who)
    if not cards and not facts.no_daemon:
        st.info(
            "No sessions. A script becomes one with `import agent; agent.register()`, any command with "
            "`reaperctl run -- COMMAND`.",
            icon=":material/hourglass_empty:",
        )
    for card in cards[:_CARDS]:
        _draw_session(recorder, card)
    if len(cards) > _CARDS:
        st.caption(f"{len(cards) - _CARDS} more: `reaperctl ps` has them all.")


def _draw_session(recorder: Recorder, card: shaping.SessionCard) -> None:
    with st.container(border=True, key=f"session {card.id}"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(bold(card.name), width="content")
            st.badge(card.state or "?", color=_STATES.get(card.state, "gray"))
            st.caption(as_markdown(card.facts), width="content")
        if card.command:
            st.code(card.command, language=None, wrap_lines=True)
        if card.share is not None:
            st.progress(card.share, text=as_markdown(f"{int(card.share * 100)} %, {card.progress}"))
        elif card.progress:
            st.caption(as_markdown(card.progress))
        if card.left_alone:
            st.caption(as_markdown(card.left_alone))
        if card.workers:
            with st.expander(plural(len(card.workers), "process") + " of its own"):
                st.markdown(shaping.table(card.workers))
        if card.can_stop:
            key = f"stop {card.id}"
            _ask(key, "Stop", "stop_circle")
            question = f"Stop {card.name}? It is asked to end, then ended, with all its workers."
            if _confirmed(key, question, "Yes, stop it"):
                begin(f"Stopping {card.name}", functools.partial(deeds.stop_session, recorder, card.id))


# -- orphans --------------------------------------------------------------------------------------


def orphans(recorder: Recorder) -> None:
    """Draw who may be an orphan and why, with what can be done about each."""
    facts = recorder.look()
    draw_daemon(facts)
    with_leftovers = st.toggle(
        "Leftovers in shared memory and temporary folders, too",
        key="leftovers",
        help="What dead workers left in /dev/shm and in temporary folders; looking takes longer.",
    )
    reply = _cleanable(recorder, leftovers=with_leftovers, from_here=bool(facts.no_daemon))
    if isinstance(reply, str):
        st.caption(as_markdown(reply))
        return
    target = target_of(reply)
    listed = list_of(reply, "orphans") if facts.no_daemon else facts.orphans
    shown = [one for one in listed if text_of(one, "verdict") != "spare"]
    cards = shaping.orphan_cards(shown, frozenset(target.processes), who)
    if not cards:
        st.success("No orphans: every worker has its parent.", icon=":material/check_circle:")
    _draw_end_all(recorder, target)
    for card in cards[:_CARDS]:
        _draw_orphan(recorder, card, can_spare=not facts.no_daemon)
    if len(cards) > _CARDS:
        st.caption(f"{len(cards) - _CARDS} more: `reaperctl orphans` has them all.")
    if target.leftovers:
        st.subheader("Leftovers", anchor=False)
        st.markdown(shaping.table(shaping.leftover_rows(target.leftovers.values())))
    elif with_leftovers:
        st.caption("No leftovers.")
    spared = len(listed) - len(shown)
    if spared:
        st.caption(
            f"{plural(spared, 'process')} that look like one and are spared: `reaperctl orphans --all` says why."
        )


def _cleanable(recorder: Recorder, *, leftovers: bool, from_here: bool) -> dict[str, Any] | str:
    """Return what a clean-up would end, else a sentence: without a daemon, looking takes a second or two."""
    if not from_here and not leftovers:
        st.session_state.pop(_LOOKING, None)
        try:
            return recorder.cleanable(leftovers=False)[0]
        except (CommandError, OSError) as error:
            return str(error)
    how = (leftovers, from_here)
    before, looking = st.session_state.get(_LOOKING, (None, None))
    if before == how and looking.over:
        try:
            st.session_state[_FOUND] = looking.result()[0]
        except (CommandError, OSError) as error:  # OSError: no process can be started
            st.session_state[_FOUND] = str(error)
    elif before != how:
        st.session_state.pop(_FOUND, None)
    if before != how or (looking.over and looking.lasted_s > _LOOK_AGAIN_S):
        work = functools.partial(recorder.cleanable, leftovers=leftovers)
        st.session_state[_LOOKING] = how, Job("Looking", work)
    found: dict[str, Any] | str = st.session_state.get(_FOUND, "Looking …")
    return found


def _draw_end_all(recorder: Recorder, target: Target) -> None:
    """Draw the button that ends all; what it ends is what was shown when it was clicked."""
    if st.session_state.get(_ASKED) != "end all":
        st.session_state.pop("all", None)
    if target and "all" not in st.session_state:
        clicked = st.button(
            f"{target.in_words()} …",
            key="ask end all",
            icon=":material/cleaning_services:",
            disabled=is_working(),
        )
        if clicked:
            st.session_state[_ASKED], st.session_state["all"] = "end all", target
            st.rerun()
    chosen: Target | None = st.session_state.get("all")
    if chosen is not None and _confirmed(
        "end all", f"{chosen.in_words()}? This cannot be undone.", "Yes, do it"
    ):
        begin("Cleaning up", functools.partial(deeds.end, recorder, chosen))


def _draw_orphan(recorder: Recorder, card: shaping.OrphanCard, *, can_spare: bool) -> None:
    name = f"{card.pid} {card.start_ticks}"
    with st.container(border=True, key=f"orphan {name}"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(bold(card.title), width="content")
            st.badge(card.verdict, color="orange" if card.can_end else "gray")
            st.caption(as_markdown(card.facts), width="content")
        if card.command:
            st.code(card.command, language=None, wrap_lines=True)
        with st.expander("Why"):
            st.markdown("\n".join(f"- {as_markdown(one)}" for one in card.evidence))
        with st.container(horizontal=True):
            if card.can_end:
                _ask(f"end {name}", "End", "stop_circle")
            if card.stopped and can_spare:
                _ask(f"release {name}", "Let go on", "play_arrow")
            elif can_spare:
                _ask(f"spare {name}", "Spare", "shield")
        if _confirmed(
            f"end {name}", f"End {card.title}? SIGTERM, then SIGKILL. This cannot be undone.", "Yes, end it"
        ):
            one = Target({(card.pid, card.start_ticks): card.record}, {})
            begin(f"Ending pid {card.pid}", functools.partial(deeds.end, recorder, one))
        if _confirmed(f"spare {name}", f"Spare {card.title} for as long as it lives?", "Yes, spare it"):
            begin(
                f"Sparing pid {card.pid}",
                functools.partial(deeds.spare, recorder, card.pid, card.start_ticks),
            )
        if _confirmed(f"release {name}", f"Let {card.title} go on, and spare it?", "Yes, let it go on"):
            begin(
                f"Letting pid {card.pid} go on",
                functools.partial(deeds.let_go, recorder, card.pid, card.start_ticks),
            )


# -- history, settings ----------------------------------------------------------------------------


def history(recorder: Recorder) -> None:
    """Draw what happened."""
    facts = recorder.look()
    draw_daemon(facts)
    events = recorder.events()
    with st.container(horizontal=True):
        kind = st.selectbox("Kind", ["all", *shaping.kinds_of(events)], key="kind", width=200)
        about = st.text_input("Session", key="about", placeholder="name or id", width=260)
    rows = shaping.event_rows(events, only="" if kind == "all" else str(kind or ""), about=str(about or ""))
    if not rows:
        st.info(f"Nothing of that in the last {HISTORY_DAYS} days.", icon=":material/hourglass_empty:")
        return
    with st.container(key="events"):
        st.markdown(shaping.table(rows))
    st.caption(
        f"The newest {len(rows)} of the last {HISTORY_DAYS} days; `reaperctl events` has all, with evidence."
    )


def settings(recorder: Recorder) -> None:
    """Draw what ``doctor`` finds, and the settings that the daemon uses."""
    facts = recorder.look()
    draw_daemon(facts)
    st.subheader("Health", anchor=False)
    checking: Job[list[shaping.Check]] | None = st.session_state.get("checking")
    if st.button("Check this machine", key="check", icon=":material/health_and_safety:") or checking is None:
        st.session_state["checking"] = checking = Job(
            "Checking", functools.partial(deeds.examine, recorder.link.place)
        )
    if not checking.over:
        st.info(f"{checking.what} … {duration(round(checking.lasted_s))}", icon=":material/pending:")
    else:
        _draw_checks(checking)
    st.subheader("Settings", anchor=False)
    if facts.no_daemon:
        st.caption("`reaperctl config check` reads the file without a daemon.")
        return
    try:
        st.code(str(recorder.link.ask("config").get("toml", "")), language="toml")
    except CommandError as error:
        st.warning(as_markdown(str(error)))
    st.caption(
        f"From {as_markdown(text_of(facts.status, 'config'))}; `systemctl reload reaperd` reads it again."
    )


def _draw_checks(checking: Job[list[shaping.Check]]) -> None:
    try:
        found = checking.result()
    except (CommandError, OSError) as error:
        st.warning(as_markdown(str(error)))
        return
    good = [one for one in found if one.level == "ok"]
    for one in found:
        if one.level != "ok":
            draw = st.error if one.level == "problem" else st.info
            advice = f"  \n→ {as_markdown(one.advice.replace('`', ''))}" if one.advice else ""
            draw(f"{bold(one.subject)}: {as_markdown(one.fact)}{advice}", icon=_ICONS.get(one.level))
    with st.expander(f"{plural(len(good), 'check')} found nothing to mend", icon=":material/check_circle:"):
        st.markdown("\n".join(f"- {bold(one.subject)}: {as_markdown(one.fact)}" for one in good))


VIEWS: dict[str, Callable[[Recorder], None]] = {
    "Overview": overview,
    "Sessions": sessions,
    "Orphans": orphans,
    "History": history,
    "Settings": settings,
}


def who(uid: int) -> str:
    """Return a user's name, "uid 1000" for one without."""
    name = user_of(uid)
    return f"uid {uid}" if name == str(uid) else name


def stamp() -> str:
    """Return the time of day, as the page shows when it looked last."""
    return datetime.now(timezone.utc).strftime("%H:%M:%S UTC")
