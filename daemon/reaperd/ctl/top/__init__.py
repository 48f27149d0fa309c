"""``reaperctl top``: the sessions, the orphans and the events on one screen that is live, and keys to act on them.

This module imports nothing of Textual: without it, and without a terminal, the command says so.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from reaperd.ctl import DONE, FAILED, USAGE, CommandError
from reaperd.ctl.link import Link

_MISSING = (
    "top needs Textual, which is not installed: pip install 'reaperd[ui]'. `reaperctl monitor` does without"
)


def top(options: Namespace) -> int:
    """Show the screen until somebody leaves it."""
    try:
        from reaperd.ctl.top.app import Top
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("textual", "rich"):
            raise
        raise CommandError(_MISSING, FAILED) from None
    # Textual reads from the first and draws on the last.
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise CommandError(
            "top needs a terminal: `reaperctl monitor` and `ps` print into pipes and files", USAGE
        )
    if os.environ.get("TERM", "dumb") == "dumb":
        raise CommandError(
            "top needs a terminal that can move its cursor, and TERM says that this one cannot", USAGE
        )
    if not os.environ.get("NO_COLOR"):
        os.environ.pop("NO_COLOR", None)  # an empty one means nothing, but to Textual it does
    from reaperd.ctl.terminal import look_of_stdout
    from reaperd.gpu import GpuMeter

    link = Link.of(options)
    # Settles which daemon is meant, or that there is none, before the terminal is taken over.
    link.ask("ping")
    # It forks beside other threads. Its child does no more than ask NVML and answer; should it wait for a lock that was another
    # thread's, it is ended within half a second, as one that the driver keeps waiting.
    screen = Top(link, options.interval, gpu=GpuMeter().read, unicode=look_of_stdout().unicode)
    ended = screen.run()
    return screen.return_code or DONE if ended is None else ended
