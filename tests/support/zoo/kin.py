"""Start processes as training scripts, launchers and shells do, some of which shake off every trace of their parent."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import stage

import agent

PYTHON = sys.executable
HERE = os.path.abspath(__file__)
MARK = {name: os.environ[name] for name in ("REAPER_TEST_FAMILY", "REAPER_TEST_RUN") if name in os.environ}
BARE = ["env", "-i", *(f"{name}={value}" for name, value in MARK.items())]
MAX_FORKS = 400
# HOP PIPE COMMAND ...: starts itself anew by COMMAND, as the next hop.
HOPPING = """\
trap '' TERM
hop=$(($1 + 1)) pipe=$2
shift 2
[ $hop != 3 ] || echo $$ >"$pipe"
[ $hop -ge 4000 ] || "$@" setsid sh "$0" $hop "$pipe" "$@" &
"""

# What a shell does that is up: say so, then become a sleeper.
SLEEPER = f'echo $$ > "$0"; exec sleep {stage.LIFETIME_S:g}'


def sleeper(pipe: str) -> list[str]:
    return ["sh", "-c", SLEEPER, pipe]


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked child that never returns, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    finally:
        os._exit(0)


class Kin:
    """One method a kind: it starts the processes, returns when they are up, and yields pids that are no descendants."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.muster = stage.Muster()
        self.kept: list[Any] = []
        self.facts: dict[str, Any] = {}

    def popen(self, arguments: list[str], **options: Any) -> int:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options)
        self.kept.append(process)
        return process.pid

    def again(self, role: str, **options: Any) -> int:
        """Run this script as the child that ``role`` says."""
        return self.popen([PYTHON, HERE, role, "--pipe", self.muster.pipe], **options)

    def subprocess(self) -> list[int]:
        self.popen(sleeper(self.muster.pipe))
        self.popen(sleeper(self.muster.pipe))
        return self.muster.wait(2)

    def setsid(self) -> list[int]:
        """Grandchildren in sessions of their own: one whose parent stays, one whose parent has gone."""
        quoted = shlex.join(["setsid", *sleeper(self.muster.pipe)])
        self.popen(["sh", "-c", f"{quoted} & wait"])
        detached = subprocess.Popen(["sh", "-c", f"{quoted} & exit 0"], stdin=subprocess.DEVNULL)
        detached.wait()
        return self.muster.wait(2)

    def double_fork(self) -> list[int]:
        """A daemon in the classical way, that closes every descriptor it inherited."""

        def daemonize() -> None:
            os.setsid()
            fork(self.shed_descriptors)

        os.waitpid(fork(daemonize), 0)
        return self.muster.wait(1)

    def shed_descriptors(self) -> None:
        pipe = os.open(self.muster.pipe, os.O_WRONLY)
        os.dup2(pipe, 0)
        os.closerange(1, 65536)
        os.write(0, f"{os.getpid()}\n".encode())
        os.close(0)
        stage.hold()

    def scrubbed(self) -> list[int]:
        """A living member whose child has next to nothing in its environment."""
        bare = [*BARE, *sleeper(self.muster.pipe)]
        self.popen(["sh", "-c", f"{shlex.join(bare)}; true"])
        return self.muster.wait(1)

    def escapes(self) -> list[int]:
        """A worker without a mark, in a session of its own, that stood below the leader for a moment only."""
        bare = [*BARE, "setsid", *sleeper(self.muster.pipe)]
        subprocess.run(
            ["sh", "-c", f"{shlex.join(bare)} >/dev/null & exit 0"], stdin=subprocess.DEVNULL, check=True
        )
        return self.muster.wait(1)

    def escapes_and_hops(self) -> list[int]:
        """Eight rows of shells without a mark, each of which starts the next and is gone: no listing of /proc catches all."""
        script = os.path.join(self.muster.directory, "hop.sh")
        with open(script, "w", encoding="ascii") as file:
            file.write(HOPPING)
        words = ["sh", script, "0", self.muster.pipe, *BARE]
        for _ in range(8):
            subprocess.run([*BARE, "setsid", *words], stdin=subprocess.DEVNULL, check=True)
        return self.muster.wait(8)

    def bare_environment(self) -> list[int]:
        """A child that was given an environment without the stamp."""
        self.popen(sleeper(self.muster.pipe), env={"PATH": os.environ["PATH"], **MARK})
        return self.muster.wait(1)

    def deep(self) -> list[int]:
        """Five levels: fork, exec, fork, exec of a shell, setsid of its child."""
        fork(self.deep_second)
        return self.muster.wait(5)

    def deep_second(self) -> None:
        stage.report(self.muster.pipe)
        self.again("deep-third")
        stage.hold()

    def stubborn(self) -> list[int]:
        """Workers that ignore what asks them to end: a forked one, an exec'ed one and its child."""
        ignoring = (
            f'trap "" TERM HUP INT; echo $$ > "$0"; {shlex.join(["sh", "-c", SLEEPER])} "$0" & wait; exit 0'
        )
        self.popen(["sh", "-c", ignoring, self.muster.pipe])

        def ignore() -> None:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            stage.report(self.muster.pipe)
            stage.hold()

        fork(ignore)
        return self.muster.wait(3)

    def forks_on_term(self) -> list[int]:
        """A worker that answers each SIGTERM with two more processes, which do the same."""
        fork(lambda: self.fork_on_term(0))
        return self.muster.wait(1)

    def fork_on_term(self, generation: int) -> None:
        def multiply(number: int, frame: object) -> None:
            if generation < 4:
                fork(lambda: self.fork_on_term(generation + 1))
                fork(lambda: self.fork_on_term(generation + 1))

        signal.signal(signal.SIGTERM, multiply)
        if not generation:
            stage.report(self.muster.pipe)
        stage.hold()

    def keeps_forking(self) -> list[int]:
        """A worker that starts a sleeping child every few milliseconds and ignores SIGTERM."""

        def multiply() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            for count in range(MAX_FORKS):
                fork(stage.hold)
                if count == 3:
                    stage.report(self.muster.pipe)
                time.sleep(0.01)
            stage.hold()

        fork(multiply)
        return self.muster.wait(1)

    def hops(self) -> list[int]:
        """A worker that forks and exits every few milliseconds, so that it never has one pid for long."""

        def hop() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            end_s = time.monotonic() + 20
            hops = 0
            while time.monotonic() < end_s:
                time.sleep(0.005)
                hops += 1
                if hops == 3:
                    stage.report(self.muster.pipe)
                if os.fork():
                    os._exit(0)

        fork(hop)
        return self.muster.wait(1)

    def nested(self) -> list[int]:
        """A leader of its own below this one, with workers; both levels started something else too."""
        command = [PYTHON, HERE, "subprocess", "--deaf"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self.kept.append(process)
        assert process.stdout is not None
        self.facts["inner"] = json.loads(process.stdout.readline())
        self.popen(sleeper(self.muster.pipe))
        return self.muster.wait(1)

    def everything_left(self) -> list[int]:
        """What a script leaves behind that ends in good order: a child, a setsid grandchild, a daemon."""
        return [*self.subprocess(), *self.double_fork()]

    def spared(self) -> list[int]:
        """Beside a worker: processes that are meant to outlive the leader, and what they start themselves."""
        self.popen(sleeper(self.muster.pipe))
        worker = self.muster.wait(1)
        with agent.spared():
            self.popen(sleeper(self.muster.pipe))
            quoted = shlex.join(sleeper(self.muster.pipe))
            self.popen(["sh", "-c", f'echo $$ > "$0"; setsid {quoted} & wait', self.muster.pipe])
            fork(self.spared_parent)
        self.facts["spared"] = self.muster.wait(5)
        self.popen(sleeper(self.muster.pipe))  # after the context, all is as before
        return [*worker, *self.muster.wait(1)]

    def spared_bare(self) -> list[int]:
        """Beside a worker: one that was spared, and whose environment does not say so."""
        self.popen(sleeper(self.muster.pipe))
        worker = self.muster.wait(1)
        with agent.spared():
            self.popen(sleeper(self.muster.pipe), env={"PATH": os.environ["PATH"], **MARK})
        self.facts["spared"] = self.muster.wait(1)
        return worker

    def stopped(self) -> list[int]:
        """Workers that a stop signal holds: a SIGTERM waits until they go on."""
        pids = self.subprocess()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
        return pids

    def hostile_names(self) -> list[int]:
        """Names that a careless reader of /proc/PID/stat takes for the fields behind them."""

        def rename(name: str) -> None:
            with open("/proc/self/comm", "w", encoding="ascii") as file:
                file.write(name)

        def pretend() -> None:
            rename("a) Z 1 1 (b")
            stage.report(self.muster.pipe)
            self.popen(sleeper(self.muster.pipe))
            stage.hold()

        rename(") R 0 0 (\n1 S")
        fork(pretend)
        return self.muster.wait(2)

    def headless(self) -> list[int]:
        """A forked worker whose main thread has ended: it looks like a zombie, and its other thread works on."""

        def lose_head() -> None:
            threading.Thread(target=self.report_and_hold).start()
            stage.end_this_thread()

        fork(lose_head)
        return self.muster.wait(1)

    def report_and_hold(self) -> None:
        stage.report(self.muster.pipe)
        stage.hold()

    def becomes_another_user(self) -> list[int]:
        """Beside a worker: two children of another user, one forked and one exec'ed."""
        uid = int(os.environ["REAPER_TEST_UID"])
        os.chmod(self.muster.pipe, 0o666)

        def change() -> None:
            os.setresuid(uid, uid, uid)
            self.report_and_hold()

        fork(change)
        self.popen(["setpriv", f"--reuid={uid}", "--clear-groups", *sleeper(self.muster.pipe)])
        self.facts["spared"] = self.muster.wait(2)
        self.popen(sleeper(self.muster.pipe))
        return self.muster.wait(1)

    def execs_itself(self) -> list[int]:
        """A leader that starts a worker, becomes another program, registers again and starts more."""
        self.popen(sleeper(self.muster.pipe))
        first = self.muster.wait(1)
        sys.stdout.write(json.dumps({"before_exec": os.environ.get("REAPER_LINEAGE"), "pids": first}) + "\n")
        sys.stdout.flush()
        os.execv(PYTHON, [PYTHON, HERE, "subprocess"])

    def own_pid_namespace(self) -> list[int]:
        """A container: its init has no handler for SIGTERM, so it ignores it."""
        self.popen(["unshare", "--pid", "--fork", *sleeper(self.muster.pipe)])
        self.muster.wait(1)  # it says 1, which is true where it lives
        return []

    # -- later, on demand

    def start_more(self, words: list[str]) -> None:
        """Start another kind of processes."""
        stage.answer(pids=getattr(self, words[0].replace("-", "_"))())

    def have_a_worker_eat(self, words: list[str]) -> None:
        """Fork a worker that fills that many bytes, and say which signal ended it (0: none)."""
        worker = fork(lambda: print(len(bytearray(b"\1") * int(words[0])), file=sys.stderr))
        stage.answer(signal=os.waitpid(worker, 0)[1] & 0x7F)

    def spared_parent(self) -> None:
        stage.report(self.muster.pipe)
        self.popen(sleeper(self.muster.pipe))
        stage.hold()


def deep_third(pipe: str) -> None:
    """The levels below the exec'ed one."""
    stage.report(pipe)

    def fourth() -> None:
        stage.report(pipe)
        tail = shlex.join(["setsid", *sleeper(pipe)])
        subprocess.run(["sh", "-c", f'echo $$ > "$0"; {tail} & wait', pipe], check=False)

    fork(fourth)
    stage.hold()


KINDS = (
    "subprocess",
    "setsid",
    "double-fork",
    "scrubbed",
    "bare-environment",
    "escapes",
    "escapes-and-hops",
    "deep",
    "stubborn",
    "forks-on-term",
    "keeps-forking",
    "hops",
    "nested",
    "everything-left",
    "spared",
    "spared-bare",
    "stopped",
    "hostile-names",
    "headless",
    "becomes-another-user",
    "execs-itself",
    "own-pid-namespace",
)


def unregister(words: list[str]) -> None:
    agent.unregister()
    stage.answer(lineage=os.environ.get("REAPER_LINEAGE"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "deep-third"])
    parser.add_argument("--pipe", help="where a child of this script reports")
    parser.add_argument("--name")
    parser.add_argument("--deaf", action="store_true", help="pay no heed to stdin, and live on when it ends")
    parser.add_argument("--headless", action="store_true", help="live on in a thread, without the main one")
    options = parser.parse_args()
    if options.kind == "deep-third":
        deep_third(options.pipe)
        return
    agent.register(options.name or options.kind)
    kin = Kin(options.kind)
    pids = getattr(kin, options.kind.replace("-", "_"))()
    stage.announce(pids, **kin.facts)
    if options.deaf:
        stage.hold()
    commands = {"more": kin.start_more, "worker-eats": kin.have_a_worker_eat, "unregister": unregister}
    if options.headless:
        threading.Thread(target=stage.live, args=[commands]).start()
        stage.end_this_thread()
    stage.live(commands)


if __name__ == "__main__":
    main()
