"""What becomes of the command with its terminal: it ends where that goes away, and gives it back to a shell for a while.

Textual leaves out the first: at a terminal that is gone it would read for ever, and take a core for it.
"""

from __future__ import annotations

import os
import select
import signal
import threading

HUNG_UP = 128 + signal.SIGHUP  # the exit code, with the signal or without


def end_with(terminal: int) -> None:
    """End this process as soon as nobody is at the other end of ``terminal`` any more; watched in a thread of its own.

    SIGHUP is not enough: nohup(1) has it ignored, who is not of the terminal's own session gets none, and whoever waits
    for room in a terminal that takes nothing more does not get to it. There is nothing left to restore, or to say to anybody.
    """

    def watch() -> None:
        hangup = select.poll()
        hangup.register(terminal, 0)  # POLLHUP comes unasked
        hangup.poll()
        os._exit(HUNG_UP)

    threading.Thread(target=watch, name="terminal", daemon=True).start()


def has_shell() -> bool:
    """Say whether a shell has started this process by itself, which can continue it once it is stopped (job control).

    Where a script has, the shell would go on to wait for that, at a terminal that nobody reads.
    """
    return os.getpgrp() == os.getpid() != os.getsid(0)
