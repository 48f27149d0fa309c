"""A training script that outlives a long attack: one worker that it forked, and one that is another program."""

from __future__ import annotations

import os
import subprocess
import time

import stage

import agent

LIFETIME_S = 3600  # of each worker, should nobody end it


def main() -> None:
    agent.register("victim")
    muster = stage.Muster()
    if os.fork() == 0:
        stage.report(muster.pipe)
        time.sleep(LIFETIME_S)
        os._exit(0)
    sleeper = ["sh", "-c", f'echo $$ > "$0"; exec sleep {LIFETIME_S}', muster.pipe]
    worker = subprocess.Popen(sleeper, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    muster.wait(2)
    stage.announce()
    stage.live()
    worker.kill()


if __name__ == "__main__":
    main()
