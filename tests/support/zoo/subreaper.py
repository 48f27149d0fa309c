"""Be a shell that adopts every orphan below it, then run a command: ``subreaper.py SHELL COMMAND...``.

The shell is no Python; what it is called is for whoever copied it to decide.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h; it outlives execve(2)
# A shell that waits collects whoever it has adopted; "&" alone would take stdin away.
SCRIPT = 'exec 3<&0; "$@" <&3 3<&- & exec 3<&-; sleep infinity & wait'


def main() -> None:
    shell, *command = sys.argv[1:]
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SystemExit("prctl(PR_SET_CHILD_SUBREAPER) failed")
    os.execv(shell, [shell, "-c", SCRIPT, shell, *command])


if __name__ == "__main__":
    main()
