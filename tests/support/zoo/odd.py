"""Leaders that do odd things before, while or after they register, and workers that become leaders themselves, late."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import stage
from kin import fork, sleeper

import agent

PYTHON = sys.executable
HERE = os.path.abspath(__file__)
HOP_S = 0.001
HOPS_FOR_S = float(os.environ.get("REAPER_TEST_HOPS_S", "90"))
SET_DUMPABLE = 4  # PR_SET_DUMPABLE, linux/prctl.h
# A shell that starts another one and is gone, deaf to SIGTERM, until a file is removed: an exec each time.
HOPPING_SHELL = 'trap "" TERM; [ -e "$1" ] || exit 0; sh "$0" "$1" & exit 0'


class Odd:
    """One method a kind: it starts the processes, returns when they are up, and yields pids that are no descendants."""

    def __init__(self) -> None:
        self.muster = stage.Muster()
        self.kept: list[subprocess.Popen[bytes]] = []
        self.inner: subprocess.Popen[bytes] | None = None
        self.facts: dict[str, list[int]] = {}

    def popen(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.kept.append(process)
        return process

    def start_worker(self) -> list[int]:
        self.popen(sleeper(self.muster.pipe))
        return self.muster.wait(1)

    def nobody(self) -> list[int]:
        return []

    def worker(self) -> list[int]:
        """One that is known by the environment, and one by the page."""
        fork(lambda: (stage.report(self.muster.pipe), stage.hold()))
        return [*self.muster.wait(1), *self.start_worker()]

    # -- leaders below leaders, late

    def late_child(self) -> list[int]:
        """Beside a worker: a child that registers when it is told to, and has started a worker of its own by then."""
        return self.start_inner([PYTHON, HERE, "inner"])

    def late_grandchild(self) -> list[int]:
        """As before, and the one between them has gone."""
        command = shlex.join([PYTHON, HERE, "inner"])
        found = self.start_inner(["sh", "-c", f"exec 3<&0; {command} <&3 & exit 0"])
        assert self.inner is not None
        self.inner.wait()
        return found

    def start_inner(self, command: list[str]) -> list[int]:
        self.inner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.facts["below"] = found = self.ask_inner()["pids"]
        self.facts["beside"] = beside = self.start_worker()
        return [*found, *beside]

    def ask_inner(self, words: str = "") -> dict[str, list[int]]:
        assert self.inner is not None
        assert self.inner.stdin is not None
        assert self.inner.stdout is not None
        if words:
            self.inner.stdin.write(f"{words}\n".encode())
        answer: dict[str, list[int]] = json.loads(self.inner.stdout.readline())
        return answer

    def have_inner_register(self, words: list[str]) -> None:
        stage.answer(**self.ask_inner("register"))

    # -- never long the same

    def hops(self) -> list[int]:
        return self.hop()

    def hops_politely(self) -> list[int]:
        """It would end with SIGTERM, if that came in time."""
        return self.hop(deaf=False)

    def hops_in_new_sessions(self) -> list[int]:
        return self.hop(setsid=True)

    def hops_with_closed_descriptors(self) -> list[int]:
        """Only what is mapped tells whose it is."""
        return self.hop(closed=True)

    def hops_in_a_crowd(self) -> list[int]:
        for _ in range(7):
            self.hop()
        return self.hop()

    def hop(self, *, deaf: bool = True, setsid: bool = False, closed: bool = False) -> list[int]:
        """A worker that forks every millisecond, and each time the parent is gone at once.

        When the directory of this script goes, it goes too.
        """

        def run() -> None:
            if deaf:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            end_s = time.monotonic() + HOPS_FOR_S
            hops = 0
            while time.monotonic() < end_s and os.path.exists(self.muster.directory):
                time.sleep(HOP_S)
                hops += 1
                if hops == 3:
                    stage.report(self.muster.pipe)
                    if closed:  # but for stdout, by which the test knows that it is gone
                        os.closerange(2, 65536)
                if os.fork():
                    os._exit(0)
                if setsid:
                    os.setsid()

        fork(run)
        self.muster.wait(1)
        return []

    def hops_and_execs(self) -> list[int]:
        """A shell that starts another one and is gone: only the environment tells whose it is."""
        script, until = (os.path.join(self.muster.directory, name) for name in ("hop.sh", "until"))
        for path, text in ((script, HOPPING_SHELL), (until, "")):
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
        fork(lambda: (time.sleep(HOPS_FOR_S), os.unlink(until)))
        subprocess.run(["sh", script, until], stdin=subprocess.DEVNULL, check=True)
        return []

    # -- later, on demand

    def start_more(self, words: list[str]) -> None:
        stage.answer(pids=self.start_worker())

    def exec_away(self, words: list[str]) -> None:
        """Become a program that knows nothing of Reaper."""
        os.execvp("sh", ["sh", "-c", f"echo '{{}}'; exec sleep {stage.LIFETIME_S:g}"])

    def spawn_from(self, words: list[str]) -> None:
        """Start a process that blocks on a named pipe before its exec, which is how long its parent is in state D."""
        action = (os.POSIX_SPAWN_OPEN, 0, words[0], os.O_RDONLY, 0)
        os.posix_spawn("/bin/true", ["true"], dict(os.environ), file_actions=[action])
        stage.answer(spawned=True)


def be_inner() -> None:
    """Start a worker, register when told to, start another, and pay no heed to anything then."""
    odd = Odd()
    stage.answer(pids=[os.getpid(), *odd.start_worker()])
    if sys.stdin.readline() == "register\n":
        session = agent.register("inner")
        stage.answer(leader=os.getpid(), session=session.id, pids=odd.start_worker())
        stage.hold()


def end_main_thread() -> None:
    """End the main thread alone, in the way of the C library."""
    ctypes.CDLL(None).pthread_exit(None)


KINDS = (
    "nobody",
    "worker",
    "late-child",
    "late-grandchild",
    "hops",
    "hops-politely",
    "hops-in-new-sessions",
    "hops-with-closed-descriptors",
    "hops-in-a-crowd",
    "hops-and-execs",
)


def lead(kind: str, name: str) -> Odd:
    agent.register(name)
    odd = Odd()
    pids = getattr(odd, kind.replace("-", "_"))()
    stage.announce(pids, **odd.facts)
    return odd


def be_undumpable() -> None:
    ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)


def hide(words: list[str]) -> None:
    """Be what /proc does not show where it hides what is not the reader's to trace (hidepid)."""
    be_undumpable()
    stage.answer(hidden=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "inner"])
    parser.add_argument(
        "--headless",
        choices=["after", "before"],
        help="the main thread ends, after or before another one registers",
    )
    parser.add_argument(
        "--undumpable", action="store_true", help="be as a program with rights of its own: /proc is root's"
    )
    options = parser.parse_args()
    if options.kind == "inner":
        be_inner()
        return
    if options.undumpable:
        be_undumpable()

    def live(odd: Odd | None = None) -> None:
        odd = odd or lead(options.kind, options.kind)
        stage.live(
            {
                "inner-registers": odd.have_inner_register,
                "more": odd.start_more,
                "exec-away": odd.exec_away,
                "hide": hide,
                "spawn-from": odd.spawn_from,
            }
        )

    if options.headless:
        odd = lead(options.kind, options.kind) if options.headless == "after" else None
        threading.Thread(target=live, args=[odd]).start()
        end_main_thread()
    live()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
