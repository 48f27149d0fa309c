"""``reaperctl report``: what was ended and freed, from the events that tell of it, one by one."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from reaperd.ctl import DONE
from reaperd.ctl.events import asked_of, is_wanted
from reaperd.ctl.link import Link, so_far
from reaperd.ctl.tally import GROUPINGS, KINDS, History
from reaperd.ctl.terminal import look_of_stdout, put, put_json
from reaperd.ctl.units import text_of


def report(options: Namespace) -> int:
    """Sum up the history that the caller may see."""
    link, found = Link.of(options), History((options.by,) if options.by else GROUPINGS)
    first = last = None
    asked = asked_of(options, KINDS)
    for event in so_far(link, asked):
        if is_wanted(event, options, KINDS) and found.add(event):
            last = text_of(event, "at") or last
            first = first or last
    if options.json:
        put_json(document(found, since=asked.get("since"), first=first, last=last))
        return DONE
    from reaperd.ctl.commands import user_of
    from reaperd.ctl.render import which_events
    from reaperd.ctl.render_report import report as rendered

    within = which_events(of_owner=options.owner is not None, since=bool(options.since))
    put(rendered(found, look_of_stdout(), within=within, user_of=user_of))
    return DONE


def document(found: History, *, since: str | None, first: str | None, last: str | None) -> dict[str, Any]:
    """Return what --json prints; ``first`` and ``last`` are the times of the events that were counted."""
    return {
        "since": since,
        "first_at": first,
        "last_at": last,
        "total": found.total.record(),
        "by": {
            grouping: [{_KEYS[grouping]: key, **tally.record()} for key, tally in found.rows(grouping)]
            for grouping in found.groups
        },
    }


_KEYS = {"framework": "framework", "user": "uid", "cause": "cause"}
