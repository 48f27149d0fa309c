"""What the keys have done: first what would be ended, in words to be agreed to, then what the daemon said to it.

Nothing here knows of widgets; each function asks the daemon, and runs where that may take its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from reaperd.ctl import render, render_orphans
from reaperd.ctl.cleanup import Id, Target, carry_out, target_of
from reaperd.ctl.commands import user_of
from reaperd.ctl.events import stop_session
from reaperd.ctl.link import Link, follow
from reaperd.ctl.orphans import ask_about, complete
from reaperd.ctl.text import Look
from reaperd.ctl.top.model import Family, Kind, Row
from reaperd.ctl.units import plural
from reaperd.words import size

WAIT_S = 60.0  # for the end of what is to be ended


class Answer(NamedTuple):
    """What the daemon has said to something that was to be done."""

    lines: tuple[str, ...]
    failed: bool = False


class Question(NamedTuple):
    """What somebody must agree to, and what is done then."""

    title: str
    lines: tuple[str, ...]
    act: Callable[[], Answer]


def explain(link: Link, row: Row, look: Look) -> Answer:
    """Return how a process is judged, and why."""
    known = {} if row.start_ticks is None else {"start_ticks": row.start_ticks}
    reply = link.ask("explain", pid=row.pid, **known)
    return Answer(tuple(render_orphans.explanation(reply.get("explain"), look)))


def protect(link: Link, row: Row, *, undo: bool = False) -> Answer:
    """Have a process left alone, or judged as any other again."""
    more = {"undo": True} if undo else {}
    reply = ask_about(link, "protect", row.pid, row.start_ticks, **more)
    return Answer((render_orphans.protected(reply, undo=undo),))


def release(link: Link, row: Row) -> Answer:
    """Let a process go on that was stopped."""
    return Answer((render_orphans.released(ask_about(link, "release", row.pid, row.start_ticks)),))


# -- ending ---------------------------------------------------------------------------------------


def stopping(link: Link, family: Family) -> Question:
    """Return what stopping a session would do."""
    head = family.head
    workers = [row for row in family.below if row.kind in (Kind.WORKER, Kind.TRACKER)]
    who = head.name if head.name == head.session else f"{head.name} ({head.session})"
    first = (
        f"Its leader, pid {head.pid}, gets SIGTERM, and SIGKILL if it is still there after the grace period."
    )
    if head.state != "running":
        first = "It is ending already."
    held = size(sum(row.rss_bytes or 0 for row in workers))
    lines = [
        who,
        head.about,
        "",
        first,
        f"Then {plural(len(workers), 'process')} that it started, {held} in all, are ended likewise"
        if workers
        else "It has no workers by now; those that it starts meanwhile are ended likewise",
    ]
    lines[-1] += ", and shared memory that they leave behind is removed."
    return Question("Stop this session?", tuple(lines), lambda: _stop(link, head))


def _stop(link: Link, head: Row) -> Answer:
    session, one = stop_session(link, head.session, wait_s=WAIT_S, on_lost=_unheard)
    if one is None:
        return Answer((render.not_stopped(session, WAIT_S),), failed=True)
    left = render.remaining(one)
    lines = [render.stopped(one, session)]
    if left:
        lines.append(f"still there: {', '.join(map(str, left))}; the daemon goes on trying")
    return Answer(tuple(lines), failed=bool(left))


def cleaning(link: Link, only: frozenset[Id] | None, owner: int | None, look: Look) -> Question | Answer:
    """Return what a clean-up would end: of all orphans those in ``only``, unless that is None, and of ``owner``."""
    ask = complete(link.ask, owner)
    target = target_of(ask("cleanup", dry_run=True))
    chosen = {id_: one for id_, one in target.processes.items() if only is None or id_ in only}
    target = Target(chosen, {})
    if not target:
        return Answer(("nothing to clean up: no orphan that may be ended",))

    def act() -> Answer:
        until_s = time.monotonic() + WAIT_S

        def news(after: int) -> Iterable[dict[str, Any]]:
            return follow(link, after=after, on_lost=_unheard, until=until_s)

        done = list(carry_out(target, ask, news).processes.values())
        lines = [line for record in done for line in render_orphans.outcome(record, Look())]
        return Answer(tuple(lines), failed=any(map(render_orphans.remains, done)))

    table = render_orphans.table(list(chosen.values()), look, user_of=user_of)
    signals = "Each gets SIGTERM, and SIGKILL if it is still there after the grace period."
    return Question(f"{target.in_words()}?", (signals, "", *table), act)


def _unheard(reason: str) -> None:
    """Say nothing: the screen tells by itself that no daemon answers."""
    del reason
