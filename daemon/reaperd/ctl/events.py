"""The commands that read the event stream: ``events``, and ``stop``, which waits for the event it caused."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from reaperd.ctl import DONE, FAILED, render
from reaperd.ctl.link import Link, follow, next_after
from reaperd.ctl.terminal import look_of_stdout, put, put_now, tell
from reaperd.ctl.text import plain
from reaperd.ctl.units import list_of, number_of, text_of
from reaperd.times import rfc3339

ENDS = ("reaped", "ended")  # the kinds of event that end a session


def events(options: Namespace) -> int:
    """Print what happened, a line an event; with --follow go on until interrupted."""
    link, look = Link.of(options), look_of_stdout()
    asked: dict[str, Any] = {}
    if options.since:
        asked["since"] = rfc3339(options.since)
    elif options.follow:
        asked["since"] = rfc3339(datetime.now(timezone.utc))
    link.ask("ping")  # settles at once which daemon is followed, or that there is none
    found = follow(link, on_lost=tell, **asked) if options.follow else _so_far(link, asked)
    none = True
    for one in found:
        if options.session and not _is_of(one, options.session):
            continue
        none = False
        line = json.dumps(one) if options.json else render.event(one, look)
        if options.follow:
            put_now(line)
        else:
            put(line)
    if none and not options.json:
        put(render.no_events(of_session=bool(options.session), since=bool(options.since)))
    return DONE


def _is_of(one: Any, session: str) -> bool:
    """Say whether an event is of the session meant; names are looked at here, for the ended ones only events know."""
    found = text_of(one, "session")
    return bool(found) and (found.startswith(session) or text_of(one, "name") == session)


def _so_far(link: Link, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events there are."""
    after = 0
    while found := list_of(reply := link.ask("events", after=after, **asked), "events"):
        yield from found
        before, after = after, next_after(reply, after)
        if after <= before:  # it counts anew, or is no daemon of ours: this would go on for ever
            return


def stop(options: Namespace) -> int:
    """End a session and wait until the daemon says what became of it."""
    link = Link.of(options)
    link.ask("ping")  # settles which daemon is meant: a request that is lost must not go to the next one
    began = time.monotonic()
    reply = link.ask("stop", session=options.session)
    session = text_of(reply, "session") or options.session
    happened = follow(
        link,
        after=int(number_of(reply, "after") or 0),
        on_lost=tell,
        until=began + options.wait,
        session=session,
    )
    for one in happened:
        if text_of(one, "kind") in ENDS:
            return _report(one, session)
    tell(
        f"session {session} was told to stop, but was not gone after {options.wait:g} s; "
        "`reaperctl ps` shows what is left of it"
    )
    return FAILED


def _report(one: dict[str, Any], session: str) -> int:
    name = text_of(one, "name")
    who = f"{name} ({session})" if name else session
    put(f"stopped {plain(who)}: {render.what_happened(one) or 'it had no workers'}")
    left = render.remaining(one)
    if not left:
        return DONE
    put(f"still there: {', '.join(map(str, left))}; the daemon goes on trying, see `reaperctl ps`")
    return FAILED
