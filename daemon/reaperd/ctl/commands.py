"""The commands that ask the daemon one question and print the answer."""

from __future__ import annotations

import time
from argparse import Namespace

from reaperd.ctl import DONE, FAILED
from reaperd.ctl.link import Link
from reaperd.ctl.terminal import look_of_stdout, put, put_json
from reaperd.ctl.text import plain
from reaperd.ctl.units import list_of


def ping(options: Namespace) -> int:
    """Ask the daemon whether it is there."""
    link = Link.of(options)
    link.ask("ping")  # finds the daemon, and imports what the first question imports
    began = time.monotonic()
    reply = link.ask("ping")
    latency_s = time.monotonic() - began
    version, pid = reply.get("version"), reply.get("pid")
    if options.json:
        put_json({"version": version, "pid": pid, "socket": link.socket, "latency_s": round(latency_s, 6)})
    else:
        who = plain(f"reaperd {version!s:.40}, pid {pid!s:.40}, answered on {link.socket}")
        put(f"{who} in {latency_s * 1000:.1f} ms")
    return DONE


def status(options: Namespace) -> int:
    """Print what the daemon is doing; with --check the exit code says whether something needs attention."""
    from reaperd.ctl import render

    link = Link.of(options)
    found = link.ask("status").get("status")
    if options.json:
        put_json(found)
    else:
        put(render.status(found, link.socket, look_of_stdout()))
    return FAILED if options.check and render.troubles(found) else DONE


def ps(options: Namespace) -> int:
    """Print the sessions and their workers."""
    found = list_of(Link.of(options).ask("ps"), "sessions")
    if options.json:
        put_json(found)
        return DONE
    from datetime import datetime, timezone

    from reaperd.ctl import render

    put(render.sessions(found, look_of_stdout(), now=datetime.now(timezone.utc), user_of=user_of))
    return DONE


def user_of(uid: int) -> str:
    """Return the login name of ``uid``, else its number (a user of a container has no name out here)."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
