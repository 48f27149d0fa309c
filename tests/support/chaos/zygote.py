"""The program that leaders come from: ``zygote.py REPORT CONTROL [subreaper]``, or below a leader ``zygote.py nested ...``.

It has imported the agent and never registers itself. On command it forks leaders, which register in a millisecond, and
bystanders. Each process tells on REPORT that it is up, handing over a pidfd of its own, and every signal that it gets:
all that can be blocked are, from before its birth. Who becomes another program or closes everything keeps them
blocked where it is meant to be deaf or must never be signalled: what was sent then shows in /proc/PID/status.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import agent
import agent.client
import agent.page
import agent.session
import agent.zmtp

Wish = dict[str, Any]

LIFETIME_S = 3600  # whoever is still there then ends by itself
SLEEPER = "/bin/sleep"
STUB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stub")
ALL = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
MARKS = ("REAPER_TEST_RUN", "REAPER_TEST_FAMILY")
_SET_DUMPABLE, _SET_CHILD_SUBREAPER = 4, 36  # linux/prctl.h
_CRASHED = 97
NOT_YET_SPARED = "spared-when-started"  # it is spared once its leader has told that it was started


class Reporter:
    """The one socket on which every process tells what happens to it."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)

    def tell(self, what: str, **facts: Any) -> None:
        self.socket.send(_line(what, **facts))

    def up(self, token: str, fate: str, marks: str, **facts: Any) -> None:
        """Tell that this process is what it is to be: ``fate`` says who may end it, ``marks`` how it is known."""
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(self.socket, [_line("up", token=token, fate=fate, marks=marks, **facts)], [pidfd])
        os.close(pidfd)


def _line(what: str, **facts: Any) -> bytes:
    return json.dumps({"what": what, "pid": os.getpid(), "at": time.monotonic(), **facts}).encode()


# -- processes that wait for signals --------------------------------------------------------------


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block all signals, so that a child is born with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def fork(reporter: Reporter, body: Callable[[], None]) -> int:
    """Run ``body``, which never returns, in a child that has all signals blocked, and return its pid."""
    with blocked():
        pid = os.fork()
        if pid:
            return pid
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - it is told, and ends this process
            with contextlib.suppress(OSError):
                reporter.tell("crashed", error=repr(error))
        finally:
            os._exit(_CRASHED)


def listen(reporter: Reporter, on_term: Callable[[], None] | None = None) -> NoReturn:
    """Tell of every signal but those of children; ``on_term`` is what SIGTERM does."""
    signal.alarm(LIFETIME_S)
    while True:
        info = signal.sigwaitinfo(ALL)
        if info.si_signo == signal.SIGALRM:
            os._exit(_CRASHED)
        if info.si_signo == signal.SIGCHLD:
            continue
        reporter.tell("signal", number=info.si_signo, sender=info.si_pid, code=info.si_code)
        if info.si_signo == signal.SIGTERM and on_term is not None:
            on_term()


def end() -> None:
    os._exit(0)


def sleep_as(environment: dict[str, str], *, deaf: bool) -> NoReturn:
    """Become another program; ``deaf`` keeps all signals blocked."""
    if not deaf:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execve(SLEEPER, ["sleep", str(LIFETIME_S)], environment)


def bare_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in MARKS if name in os.environ}


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1)  # else its /proc/self is root's, and it cannot register


def settle(wish: Wish) -> None:
    """Move into the cgroup and become the user that are wished."""
    if wish.get("cgroup"):
        with open(wish["cgroup"], "w", encoding="ascii") as file:
            file.write("0")
    if wish.get("uid"):
        become(wish["uid"])


# -- leaders --------------------------------------------------------------------------------------


class Leader:
    """A training script: what it starts, and how it ends."""

    def __init__(self, reporter: Reporter, wish: Wish) -> None:
        self.reporter = reporter
        self.wish = wish
        self.token: str = wish["token"]
        self.fate = "worker"
        self.tracker_pipe = -1

    # -- its life

    def begin(self) -> None:
        """Register, with what it is to start before and after."""
        reporter, wish = self.reporter, self.wish
        settle(wish)
        reporter.up(self.token, "leader", "none", outer=wish.get("outer"))
        if wish.get("deaf"):
            signal.signal(signal.SIGTERM, lambda number, frame: None)
        if wish.get("waits_for_none"):
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        self.start(wish.get("early", []), early=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = agent.register(wish["name"], timeout=wish["timeout"])
        reporter.tell("registered", token=self.token, session=session.id, accepted=session.socket is not None)
        self.start(wish.get("workers", []))

    def obey(self, control: socket.socket) -> None:
        """Do what is asked on ``control``, until one of the words ends this process."""
        while data := control.recv(65536):
            order = json.loads(data)
            match order["op"]:
                case "start":
                    self.start(order["workers"])
                case "unregister":
                    agent.unregister()
                    self.fate = "stranger"  # whatever it starts from here on is nobody's
                    self.reporter.tell("unregistered", token=self.token)
                case "exit":
                    leave(order["manner"], order.get("code", 0))

    def start(self, workers: list[list[str]], *, early: bool = False) -> None:
        """Start workers, each given as (token, kind); ``early``: before the session began, so that they carry no mark."""
        for token, kind in workers:
            getattr(self, "start_" + kind.replace("-", "_"))(token, "descent" if early else "page")
        if workers:
            self.reporter.tell("started", token=self.token, workers=[token for token, _ in workers])

    # -- what it starts: one method a kind, called with the worker's token and how a forked one is known

    def fork(self, body: Callable[[], None]) -> int:
        return fork(self.reporter, body)

    def up(self, token: str, marks: str, **facts: Any) -> None:
        self.reporter.up(token, facts.pop("fate", self.fate), marks, leader=self.token, **facts)

    def start_forked(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, marks)
            listen(self.reporter, end)

        self.fork(body)

    def start_bare(self, token: str, marks: str) -> None:
        """One that closes all descriptors, as daemons do, and keeps the map."""

        def body() -> None:
            self.up(token, marks)
            os.closerange(0, 4096)
            signal.alarm(LIFETIME_S)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            while True:
                signal.pause()

        self.fork(body)

    def start_execed(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "stamp" if marks == "page" else "descent")
            sleep_as(dict(os.environ), deaf=False)

        self.fork(body)

    def start_scrubbed(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "descent")
            sleep_as(bare_environment(), deaf=False)

        self.fork(body)

    def start_scrubbed_below(self, token: str, marks: str) -> None:
        """A stamped program whose child has next to nothing in its environment."""

        def child() -> None:
            self.up(f"{token}.child", "descent", parent=token)
            sleep_as(bare_environment(), deaf=False)

        def body() -> None:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self.up(token, "stamp")
            self.fork(child)
            os.close(writer)
            os.read(reader, 1)  # the child has become another program
            sleep_as(dict(os.environ), deaf=False)

        self.fork(body)

    def start_grandchild(self, token: str, marks: str) -> None:
        def child() -> None:
            self.up(f"{token}.child", marks)
            listen(self.reporter, end)

        def body() -> None:
            self.up(token, marks)
            self.fork(child)
            listen(self.reporter, end)

        self.fork(body)

    def start_detached(self, token: str, marks: str) -> None:
        self._detach(lambda: self.start_forked(token, marks))

    def start_detached_execed(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "stamp", detached=True)
            sleep_as(dict(os.environ), deaf=False)

        self._detach(lambda: self.fork(body))

    def _detach(self, start: Callable[[], Any]) -> None:
        def between() -> None:
            os.setsid()
            start()
            os._exit(0)

        pid = self.fork(between)
        with contextlib.suppress(ChildProcessError):  # this leader waits for none
            os.waitpid(pid, 0)

    def start_deaf(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, marks)
            listen(self.reporter)

        self.fork(body)

    def start_deaf_execed(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "stamp" if marks == "page" else "descent", silent=True)
            sleep_as(dict(os.environ), deaf=True)

        self.fork(body)

    def start_breeder(self, token: str, marks: str) -> None:
        """One that starts another when it is asked to end, and then ends."""

        def child() -> None:
            self.up(f"{token}.child", marks)
            listen(self.reporter, end)

        def breed() -> None:
            self.fork(child)
            os._exit(0)

        def body() -> None:
            self.up(token, marks)
            listen(self.reporter, breed)

        self.fork(body)

    def start_slow(self, token: str, marks: str) -> None:
        """One that takes most of the grace period to end well."""

        def linger() -> None:
            time.sleep(0.3)
            os._exit(0)

        def body() -> None:
            self.up(token, marks)
            listen(self.reporter, linger)

        self.fork(body)

    def start_nested(self, token: str, marks: str) -> None:
        """A leader of its own below this one, with workers."""
        report = self.reporter.socket.fileno()
        wish = {
            "token": token,
            "outer": self.token,
            "name": "nested",
            "timeout": self.wish["timeout"],
            "workers": [[f"{token}.a", "forked"], [f"{token}.b", "execed"], [f"{token}.c", "deaf"]],
        }

        def body() -> None:
            self.up(f"{token}.shell", "stamp")
            os.set_inheritable(report, True)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            arguments = [
                sys.executable,
                "-S",
                os.path.abspath(__file__),
                "nested",
                str(report),
                json.dumps(wish),
            ]
            os.execve(sys.executable, arguments, dict(os.environ))

        self.fork(body)

    def start_spared(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "none", fate="spared")
            listen(self.reporter)

        with agent.spared():
            self.fork(body)

    def start_spared_execed(self, token: str, marks: str) -> None:
        def body() -> None:
            self.up(token, "none", fate="spared", silent=True)
            sleep_as(dict(os.environ), deaf=True)

        with agent.spared():
            self.fork(body)

    def start_spared_scrubbed(self, token: str, marks: str) -> None:
        """One that only the session page can name; it is spared once the block was left."""

        def body() -> None:
            self.up(token, "none", fate=NOT_YET_SPARED, silent=True)
            sleep_as(bare_environment(), deaf=True)

        with agent.spared():
            self.fork(body)

    def start_spared_family(self, token: str, marks: str) -> None:
        """A spared one with a child whose environment says nothing."""

        def child() -> None:
            self.up(f"{token}.child", "none", fate="spared", silent=True)
            sleep_as(bare_environment(), deaf=True)

        def body() -> None:
            self.up(token, "none", fate="spared")
            self.fork(child)
            listen(self.reporter)

        with agent.spared():
            self.fork(body)

    def start_moved(self, token: str, marks: str) -> None:
        """A program that was put into another cgroup, as queue systems do; it is left alone once it is one."""
        reader, writer = os.pipe2(os.O_CLOEXEC)

        def body() -> None:
            settle({"cgroup": self.wish["elsewhere"]})
            self.up(token, "none", fate=NOT_YET_SPARED, silent=True)
            sleep_as(dict(os.environ), deaf=True)

        self.fork(body)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)

    def start_turncoat(self, token: str, marks: str) -> None:
        """One that becomes another user, page and all."""

        def body() -> None:
            become(self.wish["other_uid"])
            self.up(token, "none", fate="spared")
            listen(self.reporter)

        self.fork(body)

    def start_tracker(self, token: str, marks: str) -> None:
        self._track(token, 0.02, stubborn=False)

    def start_stubborn_tracker(self, token: str, marks: str) -> None:
        self._track(token, 0.0, stubborn=True)

    def _track(self, token: str, linger_s: float, *, stubborn: bool) -> None:
        """Start what looks like a resource tracker; the leader and its forked workers hold the pipe that it reads."""
        reader, writer = os.pipe()
        self.tracker_pipe = writer
        report = self.reporter.socket.fileno()

        def body() -> None:
            os.close(writer)
            self.up(token, "stamp", fate="worker" if self.fate == "worker" else self.fate)
            os.set_inheritable(report, True)
            os.set_inheritable(reader, True)
            code = (
                "from multiprocessing.resource_tracker import main; "
                f"main({report}, {reader}, {token!r}, {linger_s}, {stubborn})"
            )
            os.chdir(STUB)
            os.execve(sys.executable, [sys.executable, "-S", "-c", code], dict(os.environ))

        self.fork(body)
        os.close(reader)


def leave(manner: str, code: int) -> NoReturn:
    """End this process: at once, or as an interpreter does that comes to its end."""
    match manner:
        case "at-once":
            os._exit(code)
        case "unregister":
            agent.unregister()
            raise SystemExit(code)
        case "unregister-at-once":
            agent.unregister()
            os._exit(code)
        case "exception":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise RuntimeError("the training failed")
        case _:
            raise SystemExit(code)


# -- bystanders -----------------------------------------------------------------------------------


def stand_by(reporter: Reporter, wish: Wish) -> None:
    """Live on as somebody who is no concern of Reaper's."""
    token = wish["token"]
    settle(wish)

    def stay() -> None:
        reporter.up(token, "bystander", "none", silent=bool(wish.get("stamp")))
        if wish.get("stamp"):
            sleep_as({**os.environ, "REAPER_LINEAGE": wish["stamp"]}, deaf=True)
        listen(reporter)

    if wish.get("orphan"):
        fork(reporter, stay)
        os._exit(0)
    stay()


# -- the zygote -----------------------------------------------------------------------------------


class Zygote:
    """Forks on command, and waits for its children: at once, or later where a dead leader is to stay a zombie."""

    def __init__(self, reporter: Reporter, control: socket.socket, *, adopts: bool) -> None:
        self._reporter = reporter
        self._control = control
        self._adopts = adopts
        self._children: dict[int, tuple[str, float]] = {}  # token, and for how long it stays a zombie
        self._zombies: dict[int, float] = {}

    def run(self) -> None:
        """Serve until the other end of the control socket is closed."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(reader, select.POLLIN)
        while True:
            ready = dict(poll.poll(50 if self._zombies else None))
            if reader.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    reader.recv(4096)
            self._wait()
            if self._control.fileno() in ready and not self._take_order():
                signal.set_wakeup_fd(-1)
                return

    def _take_order(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, 65536, 1)
        if not data:
            return False
        wish = json.loads(data)
        with blocked():
            pid = os.fork()
            if not pid:
                self._become(wish, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[pid] = (wish["token"], wish.get("zombie_s", 0.0))
        return True

    def _become(self, wish: Wish, descriptors: list[int]) -> NoReturn:
        """Be what ``wish`` says; a leader that ends as an interpreter does ends through SystemExit, past all of this."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            if wish["op"] == "bystander":
                stand_by(self._reporter, wish)
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            leader = Leader(self._reporter, wish)
            leader.begin()
            leader.obey(socket.socket(fileno=descriptors[0]))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._reporter.tell("crashed", error=repr(error))
        os._exit(_CRASHED)

    def _wait(self) -> None:
        now_s = time.monotonic()
        if self._adopts:
            with contextlib.suppress(ChildProcessError):
                while (waited := os.waitpid(-1, os.WNOHANG))[0]:
                    self._tell_waited(*waited)
            return
        for pid, (_, zombie_s) in list(self._children.items()):
            until_s = self._zombies.get(pid)
            if (
                until_s is None
                and zombie_s
                and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            ):
                until_s = self._zombies[pid] = now_s + zombie_s
            if until_s is None or until_s <= now_s:
                waited = os.waitpid(pid, os.WNOHANG)
                if waited[0]:
                    self._tell_waited(*waited)

    def _tell_waited(self, pid: int, status: int) -> None:
        self._zombies.pop(pid, None)
        token, _ = self._children.pop(pid, ("", 0.0))
        if token:
            with contextlib.suppress(BrokenPipeError):  # nobody listens any more
                self._reporter.tell("waited", token=token, status=status)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()
    gc.freeze()
    if sys.argv[1] == "nested":
        leader = Leader(Reporter(int(sys.argv[2])), json.loads(sys.argv[3]))
        leader.begin()
        signal.alarm(LIFETIME_S)
        while True:
            signal.pause()
    adopts = "subreaper" in sys.argv
    if adopts:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
    Zygote(Reporter(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2])), adopts=adopts).run()


if __name__ == "__main__":
    main()
