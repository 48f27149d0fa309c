"""Train with whichever agent is imported, old or new: one worker that is forked, one that is another program.

``versioned.py [training STATUS_FILE]``. Obeys the words on stdin: ``progress DONE TOTAL MESSAGE``, ``unregister``, ``page``
(which is then told in hexadecimal digits), ``end``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import agent
import agent.session

LIFETIME_S = 150


def start_workers() -> list[int]:
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(LIFETIME_S)
        os.write(told, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return [pid, subprocess.Popen(["sleep", str(LIFETIME_S)], stdin=subprocess.DEVNULL).pid]


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def page() -> bytes:
    held = agent.session._process.page
    assert held is not None
    return os.pread(held.fd, 4096, 0)


def obey() -> None:
    for line in sys.stdin:
        word, *rest = line.split(None, 3)
        if word == "progress":
            agent.progress(float(rest[0]), float(rest[1]), rest[2].strip())
        elif word == "unregister":
            agent.unregister()
        elif word == "end":
            return
        say(done=word, **({"page": page().hex()} if word == "page" else {}))


def main() -> None:
    signal.alarm(LIFETIME_S)
    training = len(sys.argv) > 1
    around = (
        agent.training_session("aged", max_workers=2, status_file=sys.argv[2])
        if training
        else contextlib.nullcontext()
    )
    with around:
        session = agent.register("aged", timeout=10.0)
        agent.progress(3, 8, "fold 3")
        workers = start_workers()
        say(
            leader=os.getpid(),
            pids={"worker": workers},
            lineage=os.environ["REAPER_LINEAGE"],
            agent=agent.__file__,
            socket=session.socket,
        )
        obey()


if __name__ == "__main__":
    main()
