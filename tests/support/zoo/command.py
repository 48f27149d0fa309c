"""What ``reaperctl run`` runs in the tests: each attempt tells what it finds, leaves what it is told to, and ends as told.

    command.py FOLDER WORDS ...        one word an attempt, the last one for all that follow

Each attempt writes FOLDER/told.N. The words: exit:CODE, signal:NUMBER, wait (for signals, which it says on its standard output;
it leaves once FOLDER/leave, a FIFO, was opened for writing), stubborn (the same, and exits with 1 at SIGINT), left (processes of all kinds, then SIGKILL), eat:BYTES.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import agent

SLEEP = [sys.executable, "-c", "import signal; signal.pause()"]


def main(folder: str, words: list[str]) -> None:
    number = next(n for n in range(1, 100) if not os.path.exists(os.path.join(folder, f"told.{n}")))
    word, _, argument = words[min(number, len(words)) - 1].partition(":")
    session = agent.register("its own name")
    agent.progress(number, len(words), word)
    told: dict[str, Any] = {
        "pid": os.getpid(),
        "session": session.id,
        "name": session.name,
        "n_jobs": agent.n_jobs(64),
        "workers": os.environ.get("REAPER_MAX_WORKERS"),
        "cpus": os.environ.get("LOKY_MAX_CPU_COUNT"),
        "lost": _lost(folder, number - 1),
        "left": [],
        "spared": [],
    }
    if word == "left":
        told["left"], told["spared"] = _leave()
    _write(os.path.join(folder, f"told.{number}"), told)
    if word == "exit":
        sys.exit(int(argument))
    elif word == "signal":
        os.kill(os.getpid(), int(argument))
    elif word == "left":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "eat":
        kept = [b"x" * (1 << 20) for _ in range(int(argument) >> 20)]
        sys.exit(len(kept) == 0)
    else:
        _wait(folder, stubborn=word == "stubborn")


def _lost(folder: str, number: int) -> list[int]:
    """Return who of the attempt before lives on."""
    path = os.path.join(folder, f"told.{number}")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [pid for pid in json.load(file)["left"] if os.path.exists(f"/proc/{pid}")]


def _leave() -> tuple[list[int], list[int]]:
    plain = subprocess.Popen(SLEEP).pid
    detached = _double_fork()
    reading, writing = os.pipe()
    forked = os.fork()
    if forked == 0:
        with agent.spared():
            os.write(writing, str(subprocess.Popen(SLEEP).pid).encode())
        signal.pause()
    of_a_worker = int(os.read(reading, 20))
    with agent.spared():
        spared = [
            of_a_worker,
            subprocess.Popen(SLEEP).pid,
            subprocess.Popen(SLEEP, env={"REAPER_TEST_RUN": os.environ["REAPER_TEST_RUN"]}).pid,
        ]
        child = os.fork()
        if child == 0:
            signal.pause()
        spared.append(child)
    return [plain, detached, forked], spared


def _double_fork() -> int:
    """Start a process of a session of its own, whose parent ends at once; return its pid."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writing, str(os.getpid()).encode())
            os.execv(SLEEP[0], SLEEP)
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reading, 20))


def _wait(folder: str, *, stubborn: bool) -> None:
    os.mkfifo(os.path.join(folder, "leave"))

    def note(number: int, _: object) -> None:
        _say(signal=number)
        if number in (signal.SIGINT, signal.SIGTERM):
            with open(
                os.path.join(folder, "leave"), "rb"
            ) as fifo:  # a second one would come while this waits
                fifo.read()
            sys.exit(1 if stubborn else 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    _say(ready=os.getpid())
    while True:
        signal.pause()


def _say(**words: int) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def _write(path: str, value: object) -> None:
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
