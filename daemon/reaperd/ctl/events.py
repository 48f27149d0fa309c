"""The commands that read the event stream: ``events``, and ``stop``, which waits for the event it caused."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from reaperd.ctl import DONE, FAILED, render
from reaperd.ctl.link import Link, follow, so_far
from reaperd.ctl.terminal import look_of_stdout, put, put_now, tell
from reaperd.ctl.units import number_of, text_of
from reaperd.times import rfc3339

ENDS = ("reaped", "ended")  # the kinds of event that end a session


def events(options: Namespace) -> int:
    """Print what happened, a line an event; with --follow go on until interrupted."""
    link, look = Link.of(options), look_of_stdout()
    kinds = tuple(options.kind)
    asked = asked_of(options, kinds)
    if options.follow and not options.since:
        asked["since"] = rfc3339(datetime.now(timezone.utc))
    link.ask("ping")  # settles at once which daemon is followed, or that there is none
    found = follow(link, on_lost=tell, **asked) if options.follow else so_far(link, asked)
    none = True
    for one in found:
        if not is_wanted(one, options, kinds) or (options.session and not _is_of(one, options.session)):
            continue
        none = False
        line = json.dumps(one) if options.json else render.event(one, look)
        if options.follow:
            put_now(line)
        else:
            put(line)
    if none and not options.json:
        which = render.which_events(
            of_session=bool(options.session),
            of_kind=bool(kinds),
            of_owner=options.owner is not None,
            since=bool(options.since),
        )
        put(f"no events{which}")
    return DONE


def asked_of(options: Namespace, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a question for the daemon: how long ago, whose, and of which kinds."""
    return {
        **({"since": rfc3339(options.since)} if options.since else {}),
        **({"owner": options.owner} if options.owner is not None else {}),
        **({"kinds": list(kinds)} if kinds else {}),
    }


def is_wanted(one: Any, options: Namespace, kinds: Sequence[str]) -> bool:
    """Say whether an event is of the user and of a kind meant: a daemon that does not know these fields tells of all."""
    return (options.owner is None or number_of(one, "uid") == options.owner) and (
        not kinds or text_of(one, "kind") in kinds
    )


def _is_of(one: Any, session: str) -> bool:
    """Say whether an event is of the session meant; names are looked at here, for the ended ones only events know."""
    found = text_of(one, "session")
    return bool(found) and (found.startswith(session) or text_of(one, "name") == session)


def stop(options: Namespace) -> int:
    """End a session and wait until the daemon says what became of it."""
    link = Link.of(options)
    link.ask("ping")  # settles which daemon is meant: a request that is lost must not go to the next one
    session, one = stop_session(link, options.session, wait_s=options.wait, on_lost=tell)
    if one is None:
        tell(f"{render.not_stopped(session, options.wait)}; `reaperctl ps` shows what is left of it")
        return FAILED
    put(render.stopped(one, session))
    left = render.remaining(one)
    if not left:
        return DONE
    put(f"still there: {', '.join(map(str, left))}; the daemon goes on trying, see `reaperctl ps`")
    return FAILED


def stop_session(
    link: Link, session: str, *, wait_s: float, on_lost: Callable[[str], None]
) -> tuple[str, dict[str, Any] | None]:
    """Have a session ended; return its id, and the event that tells of its end, None where none came in time."""
    began = time.monotonic()
    reply = link.ask("stop", session=session)
    found = text_of(reply, "session") or session
    happened = follow(
        link,
        after=int(number_of(reply, "after") or 0),
        on_lost=on_lost,
        until=began + wait_s,
        session=found,
    )
    return found, next((one for one in happened if text_of(one, "kind") in ENDS), None)
