"""Pids that are given to somebody else: run as the init of a pid namespace, with a daemon of its own inside.

    unshare --pid --fork --mount-proc --kill-child python reuse.py CASE

In there ``ns_last_pid`` decides which pid the next fork gets, and nobody else's. Each case ends with an
exit code of 0, or with an AssertionError and the daemon's log.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import harness
from harness import GRACE_S, RUN_MARK, WORKERS_GONE_S, Daemon, Scratch, alive, wait_gone

import agent

LIFETIME_S = 60
REUSED_WITHIN_S = 10.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
FAR = itertools.count(1000, 100)  # pids that nobody had yet
SLEEPER = ["sleep", str(LIFETIME_S)]


# -- processes ------------------------------------------------------------------------------------


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(LIFETIME_S)
        body()
    except BaseException:  # noqa: BLE001 - a fork must never return into the code of its parent
        traceback.print_exc()
    finally:
        os._exit(0)


def hold() -> None:
    while True:
        signal.pause()


def start_ticks(pid: int) -> int:
    fields = harness.read_proc(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields else 0


def end(pid: int, *, child: bool = True) -> None:
    """SIGKILL ``pid`` and return when its number is free: when we, or whoever its parent is, have waited for it."""
    os.kill(pid, signal.SIGKILL)
    if child:
        os.waitpid(pid, 0)
    wait_free(pid)


def wait_free(pid: int) -> None:
    end_s = time.monotonic() + REUSED_WITHIN_S
    while os.path.exists(f"/proc/{pid}"):  # nothing tells when somebody else has waited for a zombie
        assert time.monotonic() < end_s, f"{pid} is not free: {harness.read_proc(pid, 'status')!r}"


def set_last_pid(pid: int) -> None:
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
        file.write(str(pid))


def take_pid(pid: int, body: Callable[[], None]) -> int:
    """Run ``body`` in a child that has ``pid``, a free one."""
    end_s = time.monotonic() + REUSED_WITHIN_S

    def elsewhere_then_body() -> None:
        if os.getpid() == pid:
            set_last_pid(next(FAR))  # or its children would get the pids of the next to be reused
            body()

    while time.monotonic() < end_s:
        set_last_pid(pid - 1)
        child = fork(elsewhere_then_body)
        if child == pid:
            return child
        os.waitpid(child, 0)
    raise AssertionError(f"no child got {pid}")


@dataclass
class Channel:
    """Pids that forks report."""

    ends: tuple[int, int] = field(default_factory=os.pipe)

    def say(self, *pids: int) -> None:
        os.write(self.ends[1], "".join(f"{pid} " for pid in pids).encode())

    def hear(self, count: int) -> list[int]:
        data = b""
        while data.count(b" ") < count:
            data += os.read(self.ends[0], 4096)
        return [int(word) for word in data.split()]


@dataclass
class Session:
    """A leader that is a fork of ours, and its workers."""

    leader: int
    workers: list[int]

    def kill_leader(self) -> None:
        end(self.leader)


def start_session(daemon: Daemon, *kinds: str) -> Session:
    """Start a leader with one worker of each kind: ``forked``, ``stubborn``, ``execed``, ``bare``, ``parent`` of two."""
    channel = Channel()

    def lead() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is waited for, so its pid is free
        agent.register("reuse", socket=daemon.socket, timeout=10.0, required=True)
        workers = [WORKERS[kind]() for kind in kinds]
        channel.say(*workers)
        hold()

    def parent() -> int:
        return fork(lambda: (channel.say(bare()), hold())[1])

    WORKERS["parent"] = parent
    leader = fork(lead)
    found = channel.hear(len(kinds) + kinds.count("parent"))
    # What is known by descent alone must have been seen by a scan.
    harness.repeat_until(
        lambda: listed(daemon, leader, found), 10.0, f"{found} are not listed below {leader}"
    )
    return Session(leader, found)


def listed(daemon: Daemon, leader: int, pids: list[int]) -> bool | None:
    session = daemon.session_of(leader)
    return True if session and {w["pid"] for w in session["workers"]} >= set(pids) else None


def stubborn() -> int:
    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hold()

    return fork(ignore)


def bare() -> int:
    """A worker that no mark tells: it lost the page when it exec'ed, and was given an empty environment."""
    mark = {RUN_MARK: os.environ[RUN_MARK]}
    return subprocess.Popen(SLEEPER, env={"PATH": os.environ["PATH"], **mark}).pid


WORKERS: dict[str, Callable[[], int]] = {
    "forked": lambda: fork(hold),
    "stubborn": stubborn,
    "execed": lambda: subprocess.Popen(SLEEPER).pid,
    "bare": bare,
}


@dataclass
class Bystanders:
    """An innocent process that got the pid of a dead one, and its child. They have our uid and none of the marks."""

    pids: list[int]
    folder: str

    def check(self) -> None:
        assert os.path.isdir(self.folder), f"{self.folder} was taken from its living owner"
        dead = [pid for pid in self.pids if not alive(pid)]
        assert not dead, f"bystanders of {self.pids} were ended: {dead}"

    def end(self) -> None:
        self.check()
        os.rmdir(self.folder)
        for pid in self.pids[1:]:
            os.kill(pid, signal.SIGKILL)
        end(self.pids[0])


def reuse(
    pid: int, register_with: Daemon | None = None, kinds: tuple[str, ...] = ("forked", "bare")
) -> Bystanders:
    """Give ``pid`` to an innocent that starts children, has a folder as joblib makes them, and maybe leads a session."""
    channel = Channel()
    folder = f"/dev/shm/joblib_memmapping_folder_{pid}_theirs"

    def live() -> None:
        os.mkdir(folder)
        if register_with is not None:
            agent.register("afresh", socket=register_with.socket, timeout=10.0, required=True)
        channel.say(pid, *(WORKERS[kind]() for kind in kinds))
        hold()

    take_pid(pid, live)
    return Bystanders(channel.hear(1 + len(kinds)), folder)


# -- cases ----------------------------------------------------------------------------------------


def assert_reaped(daemon: Daemon, workers: list[int], innocent: Bystanders) -> None:
    left = wait_gone([w for w in workers if w not in innocent.pids], WORKERS_GONE_S)
    assert not left, f"workers live on: {left}"
    innocent.check()


def wait_over(daemon: Daemon, leader: int) -> None:
    """Return when every session of ``leader`` that was ever registered is over."""

    def over() -> bool | None:
        kinds = [e["kind"] for e in daemon.events() if (e.get("session") or "").startswith(f"{leader}-")]
        return True if "reaped" in kinds or "ended" in kinds else None

    harness.repeat_until(over, 20.0, f"the session of {leader} is not over")


def worker_while_reaping(daemon: Daemon) -> None:
    """A worker ends at once, one lasts until it is killed, and between them somebody else gets the pid of the first."""
    session = start_session(daemon, "forked", "execed", "bare", "stubborn")
    *quick, last = session.workers
    session.kill_leader()
    for pid in quick:
        wait_free(pid)
    innocents = [reuse(pid) for pid in quick]
    assert alive(last), "the reap must not be over, or this proves nothing"
    for innocent in innocents:
        assert_reaped(daemon, session.workers, innocent) if innocent is innocents[0] else innocent.check()
    wait_over(daemon, session.leader)
    for innocent in innocents:
        innocent.end()


def worker_in_the_same_tick(daemon: Daemon) -> None:
    """The worker, its end and its pid's next owner all fall into one tick: pid and start time are the same."""
    hits = 0
    end_s = time.monotonic() + 25.0
    while hits < 3 and time.monotonic() < end_s:
        hits += _try_same_tick(daemon)
    print(f"{hits} times in the same tick", file=sys.stderr)


def _try_same_tick(daemon: Daemon) -> bool:
    channel, go = Channel(), Channel()

    def lead() -> None:
        agent.register("reuse", socket=daemon.socket, timeout=10.0, required=True)
        lasting = stubborn()
        channel.say(lasting)
        os.read(go.ends[0], 1)
        channel.say(fork(hold))
        os.kill(os.getpid(), signal.SIGKILL)

    leader = fork(lead)
    (lasting,) = channel.hear(1)
    harness.repeat_until(lambda: listed(daemon, leader, [lasting]), 10.0, "the session is not listed")
    while time.clock_gettime(time.CLOCK_BOOTTIME) % TICK_S > TICK_S / 20:
        pass
    go.say(0)
    (worker,) = channel.hear(1)
    ticks = start_ticks(worker)
    os.waitpid(leader, 0)
    wait_free(worker)
    innocent = reuse(worker)
    hit = start_ticks(worker) == ticks
    try:
        assert_reaped(daemon, [lasting], innocent)
        wait_over(daemon, leader)
        innocent.check()
    except AssertionError as error:
        raise AssertionError(f"{error} (same tick: {hit})") from None
    innocent.end()
    return hit


def leader_while_reaping(daemon: Daemon) -> None:
    """Somebody else has the leader's pid, and a folder named after it, before the last worker is gone."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    innocent = reuse(session.leader)
    assert alive(session.workers[1]), "the reap must not be over, or this proves nothing"
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.end()


def leader_registers_afresh(daemon: Daemon) -> None:
    """Whoever got the leader's pid leads a session itself, while the old one's workers are being ended."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    innocent = reuse(session.leader, daemon)
    assert alive(session.workers[1]), "the reap must not be over, or this proves nothing"
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.check()
    ours = daemon.session_of(session.leader)
    assert ours is not None
    assert ours["name"] == "afresh", ours
    end(session.leader)
    left = wait_gone(innocent.pids[1:], WORKERS_GONE_S)
    assert not left, f"the new session's workers live on: {left}"
    harness.repeat_until(lambda: None if os.path.exists(innocent.folder) else True, 10.0, "its folder stays")


def while_the_daemon_is_down(daemon: Daemon) -> None:
    """The leader and a worker die unseen, and others have both their pids when the daemon comes back."""
    session = start_session(daemon, "forked", "execed", "bare", "stubborn")
    daemon.kill9()
    session.kill_leader()
    for pid in (session.workers[0], session.workers[2]):
        end(pid, child=False)
    innocents = [reuse(pid) for pid in (session.leader, session.workers[0], session.workers[2])]
    daemon.start()
    for innocent in innocents:
        assert_reaped(daemon, [session.workers[1], session.workers[3]], innocent)
    wait_over(daemon, session.leader)
    for innocent in innocents:
        innocent.end()


def while_the_daemon_forgets(daemon: Daemon) -> None:
    """As before, and the daemon has lost its state: it knows the session by the page that a worker holds."""
    session = start_session(daemon, "forked", "execed", "stubborn")
    daemon.kill9()
    for name in os.listdir(daemon.state):
        os.unlink(os.path.join(daemon.state, name))
    session.kill_leader()
    innocent = reuse(session.leader)
    daemon.start()
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.end()


def afresh_while_the_daemon_is_down(daemon: Daemon) -> None:
    """Whoever got the leader's pid has registered, with nobody there: both sessions are known by their pages."""
    session = start_session(daemon, "forked", "execed", "stubborn")
    daemon.kill9()
    session.kill_leader()
    channel = Channel()
    folder = f"/dev/shm/joblib_memmapping_folder_{session.leader}_theirs"

    def live() -> None:
        os.mkdir(folder)
        agent.register("afresh", socket=daemon.socket)
        channel.say(os.getpid(), fork(hold), subprocess.Popen(SLEEPER).pid)
        hold()

    take_pid(session.leader, live)
    innocent = Bystanders(channel.hear(3), folder)
    daemon.start()
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.check()
    ours = daemon.session_of(session.leader)
    assert ours is not None
    assert ours["name"] == "afresh", ours
    end(session.leader)
    assert not wait_gone(innocent.pids[1:], WORKERS_GONE_S)
    os.rmdir(folder) if os.path.exists(folder) else None


def kept_while_the_leader_lives(daemon: Daemon) -> None:
    """A worker that only descent tells ends while the leader lives, and its pid goes to somebody else."""
    session = start_session(daemon, "bare", "bare", "forked")
    end(session.workers[0], child=False)
    innocent = reuse(session.workers[0])
    session.kill_leader()
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.end()


def parent_of_orphans(daemon: Daemon) -> None:
    """A worker ends and leaves a child; whoever gets its pid has children too, and they are nobody's orphans."""
    session = start_session(daemon, "parent", "stubborn")
    child, parent, last = sorted(
        session.workers, key=lambda pid: (harness.parent_of(pid) == session.leader, pid)
    )
    assert harness.parent_of(child) == parent
    end(parent, child=False)
    innocent = reuse(parent, kinds=("forked", "bare", "execed"))
    session.kill_leader()
    assert_reaped(daemon, [child, last], innocent)
    wait_over(daemon, session.leader)
    innocent.end()


def reused_again_and_again(daemon: Daemon) -> None:
    """A worker's pid changes hands all the time that its session is being reaped."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    wait_free(session.workers[0])
    end_s = time.monotonic() + GRACE_S * 1.5
    count = 0
    while time.monotonic() < end_s:
        innocent = reuse(session.workers[0], kinds=("forked",))
        innocent.end()
        wait_free(innocent.pids[1])
        count += 1
    innocent = reuse(session.workers[0])
    assert_reaped(daemon, session.workers, innocent)
    wait_over(daemon, session.leader)
    innocent.end()
    assert count > 10


CASES: dict[str, Callable[[Daemon], None]] = {
    case.__name__.replace("_", "-"): case
    for case in (
        worker_while_reaping,
        worker_in_the_same_tick,
        leader_while_reaping,
        leader_registers_afresh,
        while_the_daemon_is_down,
        while_the_daemon_forgets,
        afresh_while_the_daemon_is_down,
        kept_while_the_leader_lives,
        parent_of_orphans,
        reused_again_and_again,
    )
}


def run(name: str) -> int:
    """Run one case with a daemon of its own and return the exit code."""
    scratch = Scratch()
    daemon = Daemon(scratch, os.environ[RUN_MARK])
    os.environ["TMPDIR"] = scratch.path
    try:
        daemon.start()
        CASES[name](daemon)
    except AssertionError:
        traceback.print_exc()
        sys.stderr.write(daemon.read_log())
        return 1
    finally:
        with contextlib.suppress(AssertionError):
            daemon.close()
        scratch.remove()
    return 0


def main() -> None:
    if os.getpid() != 1:
        raise SystemExit("this must be the init of a pid namespace")
    # A /dev/shm of our own: pids in here are small, and folders named after them would be others' outside.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    case = os.fork()
    if not case:
        code = 2
        try:
            code = run(sys.argv[1])
        except BaseException:  # noqa: BLE001 - a fork must never return into the code of its parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    while True:  # an init waits for whoever it adopts, so that pids become free
        pid, status = os.wait()
        if pid == case:
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
