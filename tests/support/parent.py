"""Be the parent of a leader, for the tests: ``parent.py {waits,leaves,subreaper} COMMAND...``.

``waits`` is blocked in wait(2) when the leader dies, as a shell is; ``leaves`` has gone before, as a
closed terminal; ``subreaper`` adopts every orphan below it, as `systemd --user` and tini do.
The leader inherits stdin and stdout; a parent that stays ends when its stdin does.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    mode, *command = sys.argv[1:]
    if mode == "subreaper" and ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SystemExit("prctl(PR_SET_CHILD_SUBREAPER) failed")
    leader = subprocess.Popen(command)
    if mode == "leaves":
        return
    code = leader.wait()
    sys.stdout.write(json.dumps({"waited_for": leader.pid, "code": code}) + "\n")
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of the adopted: none stays a zombie
    sys.stdin.read()


if __name__ == "__main__":
    main()
