"""Pids that are given to somebody else: run as the init of a pid namespace, with a daemon of its own inside.

    unshare --pid --fork --mount --mount-proc --cgroup --kill-child python reuse.py CASE DIRECTORY

Each case ends with an exit code of 0, with 1 and the reason and the daemon's log on stderr, or with 3 where this machine
cannot be made to show what the case is about.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import harness
from harness import GRACE_S, RUN_MARK, WORKERS_GONE_S, Daemon, Scratch, alive, parent_of, wait_gone
from pidspace import (
    SLEEPER,
    Channel,
    Innocent,
    ask,
    assert_reaped,
    end,
    fork,
    hold,
    reuse,
    session_of,
    start_session,
    start_ticks,
    stubborn,
    take_pid,
    wait_free,
    wait_listed,
    wait_over,
)
from tracer import PIDFD_OPEN, PIDFD_SEND_SIGNAL, Call, Tracer

import agent
from agent import client, wire

CANNOT_BE_SHOWN = 3
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
# What multiprocessing starts, as far as it can be told from outside.
WORKER = [
    *(sys.executable, "-I", "-S", "-c"),
    "from multiprocessing.spawn import spawn_main; import signal; signal.pause()",
    "--multiprocessing-fork",
]
STILL_REAPING = "the reap must not be over, or this proves nothing"
# Where a case waits for many sessions to be over, one after another.
QUICK_GRACE_S = 0.3
QUICK_GONE_S = QUICK_GRACE_S + 5.0  # no promise: what lives on so long is never ended
SLOW = {"folder-of-who-came-later": 2.5}
CONFIG = """\
[daemon]
log_level = "debug"
[scan]
interval = "{interval}"
[kill]
grace = "{grace:g}s"
exit_grace = "{grace:g}s"
"""


class CannotBeShown(Exception):
    """This machine is too slow, or too old, for what the case is about."""


# -- a pid changes hands while its session is being reaped ---------------------------------------


def worker_while_reaping(daemon: Daemon) -> None:
    """Workers end at once, one lasts until it is killed, and between them others get the pids of the first."""
    session = start_session(daemon, "forked", "execed", "bare", "stubborn")
    *quick, last = session.workers
    session.kill_leader()
    for pid in quick:
        wait_free(pid)
    innocents = [reuse(pid) for pid in quick]
    assert alive(last), STILL_REAPING
    assert_reaped(session.workers, innocents, WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    for innocent in innocents:
        innocent.end()


def worker_again_and_again(daemon: Daemon) -> None:
    """A worker's pid changes hands all the time that its session is being reaped."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    wait_free(session.workers[0])
    end_s = time.monotonic() + GRACE_S * 1.2
    count = 0
    while time.monotonic() < end_s:
        innocent = reuse(session.workers[0], ["forked"])
        innocent.end()
        wait_free(innocent.pids[1])
        count += 1
    innocent = reuse(session.workers[0])
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    innocent.end()
    assert count > 3


def leader_while_reaping(daemon: Daemon) -> None:
    """Somebody else has the leader's pid, and a folder named after it, before the last worker is gone."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    innocent = reuse(session.leader)
    assert alive(session.workers[1]), STILL_REAPING
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    innocent.end()


def leader_registers_afresh(daemon: Daemon) -> None:
    """Whoever got the leader's pid leads a session itself, while the old one's workers are being ended."""
    session = start_session(daemon, "forked", "stubborn", "execed")
    session.kill_leader()
    innocent = reuse(session.leader, lead=lambda: register_afresh(daemon))
    assert alive(session.workers[1]), STILL_REAPING
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    assert_leads(daemon, innocent)


def register_afresh(daemon: Daemon) -> None:
    agent.register("afresh", socket=daemon.socket, timeout=10.0, required=True)


def assert_leads(daemon: Daemon, innocent: Innocent) -> None:
    """Assert that ``innocent`` has a session of its own, which ends as every other does: with its folder freed."""
    innocent.check()
    session = session_of(daemon, innocent.pids[0])
    assert session is not None
    assert session["name"] == "afresh", session
    end(innocent.pids[0])
    left = wait_gone(innocent.pids[1:], WORKERS_GONE_S)
    assert not left, f"the new session's workers live on: {left}"
    wait_over(daemon, innocent.pids[0], sessions=2)
    assert not os.path.exists(innocent.folder)


def leader_s_pid_goes_to_its_own_worker(daemon: Daemon) -> None:
    """A worker starts another one that gets the pid of their dead leader: it is no leader for that."""
    heirs = start_heirs(daemon)
    left = wait_gone(heirs, WORKERS_GONE_S)
    assert not left, f"workers live on: {left}"
    wait_over(daemon, heirs[1])


def start_heirs(daemon: Daemon, *, before_death: Callable[[], object] = lambda: None) -> list[int]:
    """Return a worker that lasts, and its child that has the pid of their leader, which is dead."""
    channel, go = Channel(), Channel()

    def inherit() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel.say(os.getpid())
        leader = os.getppid()
        os.read(go.ends[0], 1)
        channel.say(take_pid(leader, hold))
        hold()

    def lead() -> None:
        register_afresh(daemon)
        fork(inherit)
        hold()

    leader = fork(lead)
    (heir,) = channel.hear(1)
    wait_listed(daemon, leader, [heir])
    before_death()
    end(leader)
    go.say(0)
    try:
        assert channel.hear(1) == [leader]
    except AssertionError:
        if alive(heir):
            raise
        raise CannotBeShown(
            "a worker was ended before it could start another: this machine is too slow"
        ) from None
    return [heir, leader]


def folder_of_who_came_later(daemon: Daemon) -> None:
    """Whoever got the leader's pid has gone again when the dead session's folders are freed: what it made stays."""
    session = start_session(daemon, "stubborn")
    lasting = os.pidfd_open(session.workers[0])
    session.kill_leader()
    over = harness.has_ended(lasting, within_s=1.3)  # so much later that no clock can be to blame
    innocent = reuse(session.leader, [])
    end(session.leader)
    assert not over, STILL_REAPING
    assert alive(session.workers[0]), STILL_REAPING
    wait_over(daemon, session.leader)
    assert os.path.isdir(innocent.folder), "a folder was taken that the dead leader never had"


def outlast_a_session(daemon: Daemon, *kinds: str) -> None:
    """Return when a session was reaped from beginning to end: what was due before it is done."""
    session = start_session(daemon, *kinds)
    session.kill_leader()
    wait_over(daemon, session.leader)


# -- within one tick: pid and start time are the same ---------------------------------------------


def worker_in_the_same_tick(daemon: Daemon) -> None:
    """A worker's start, its end and the start of its pid's next owner all fall into one tick."""
    try_until_hit(_worker_in_the_same_tick, daemon)


def kept_in_the_same_tick(daemon: Daemon) -> None:
    """As before, of a worker that was there before its leader registered, and while that leader lives."""
    try_until_hit(_kept_in_the_same_tick, daemon)


def leader_in_the_same_tick(daemon: Daemon) -> None:
    """A leader's start, its end and the start of its pid's next owner all fall into one tick."""
    try_until_hit(_leader_in_the_same_tick, daemon)


def try_until_hit(attempt: Callable[[Daemon], bool], daemon: Daemon) -> None:
    end_s = time.monotonic() + 15.0
    hits = 0
    while hits < 2:
        hits += attempt(daemon)
        if time.monotonic() > end_s:
            if hits:
                return
            raise CannotBeShown("not once did all of that happen within one tick: this machine is too slow")


def await_tick(wanted: Callable[[int], bool] | None = None) -> None:
    """Return at the beginning of a tick, the next one by default."""
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)
    while not (wanted or now.__lt__)(int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)):
        pass


def register_by_hand(daemon: Daemon) -> None:
    """Register without a page, in a third of the time that the agent takes."""
    ticks = start_ticks(os.getpid())
    place = wire.place_of(daemon.socket, "/", os.geteuid())
    ask(
        daemon,
        "register",
        session=wire.format_session_id(os.getpid(), ticks, place, 0),
        start_ticks=ticks,
    )


def _worker_in_the_same_tick(daemon: Daemon) -> bool:
    channel, go = Channel(), Channel()

    def lead() -> None:
        register_afresh(daemon)
        channel.say(stubborn())
        os.read(go.ends[0], 1)
        channel.say(fork(hold))
        os.kill(os.getpid(), signal.SIGKILL)

    leader = fork(lead)
    (lasting,) = channel.hear(1)
    await_tick()
    go.say(0)
    (worker,) = channel.hear(1)
    ticks = start_ticks(worker)
    os.waitpid(leader, 0)
    wait_free(worker)
    return _is_hit(daemon, leader, reuse(worker), ticks, lasting)


def _leader_in_the_same_tick(daemon: Daemon) -> bool:
    channel = Channel()

    def lead() -> None:
        lasting, ticks = stubborn(), start_ticks(os.getpid())
        place = wire.place_of(daemon.socket, "/", os.geteuid())
        session = wire.format_session_id(os.getpid(), ticks, place, 0)
        # In a third of the time that the agent takes.
        ask(daemon, "register", session=session, start_ticks=ticks)
        channel.say(lasting)
        hold()

    await_tick()
    leader = fork(lead)
    (lasting,) = channel.hear(1)
    ticks = start_ticks(leader)
    end(leader)
    return _is_hit(daemon, leader, reuse(leader), ticks, lasting)


def _kept_in_the_same_tick(daemon: Daemon) -> bool:
    channel, go = Channel(), Channel()

    def lead() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        lasting = stubborn()
        channel.say(lasting)
        os.read(go.ends[0], 1)
        worker = fork(hold)
        register_by_hand(daemon)
        channel.say(worker)
        hold()

    leader = fork(lead)
    (lasting,) = channel.hear(1)
    await_tick()
    go.say(0)
    (worker,) = channel.hear(1)
    ticks = start_ticks(worker)
    end(worker, child=False)
    innocent = reuse(worker)
    end(leader)
    return _is_hit(daemon, leader, innocent, ticks, lasting)


def _is_hit(daemon: Daemon, leader: int, innocent: Innocent, ticks: int, lasting: int) -> bool:
    """Say whether ``innocent`` started at ``ticks``; if so, its session must be reaped without it."""
    hit = start_ticks(innocent.pids[0]) == ticks
    if hit:
        assert_reaped([lasting], [innocent], QUICK_GONE_S)
    else:
        with contextlib.suppress(ProcessLookupError):  # the daemon may have been there first
            end(lasting, child=False)
    wait_over(daemon, leader)
    innocent.end()
    return hit


# -- a pid changes hands while no daemon is there ------------------------------------------------


def while_the_daemon_is_down(daemon: Daemon) -> None:
    """The leader and workers die unseen, and others have all their pids when the daemon comes back."""
    session = start_session(daemon, "forked", "execed", "bare", "stubborn")
    forked, execed, bare, lasting = session.workers
    daemon.kill9()
    session.kill_leader()
    for pid in (forked, bare):
        end(pid, child=False)
    innocents = [reuse(pid) for pid in (session.leader, forked, bare)]
    daemon.start()
    assert_reaped([execed, lasting], innocents, WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    for innocent in innocents:
        innocent.end()


def while_the_daemon_forgets(daemon: Daemon) -> None:
    """As before, and the daemon has lost its state: it knows the session by the page that a worker holds."""
    session = start_session(daemon, "forked", "execed", "stubborn")
    forget(daemon)
    session.kill_leader()
    innocent = reuse(session.leader)
    daemon.start()
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    innocent.end()


def forget(daemon: Daemon) -> None:
    """End the daemon, and all that it has on record."""
    daemon.kill9()
    for name in os.listdir(daemon.state):
        os.unlink(os.path.join(daemon.state, name))


def afresh_while_the_daemon_is_down(daemon: Daemon) -> None:
    """Whoever got the leader's pid has registered, with nobody there: both sessions are known by their pages."""
    session = start_session(daemon, "forked", "execed", "stubborn")
    daemon.kill9()
    session.kill_leader()
    innocent = reuse(
        session.leader, ["forked", "execed"], lead=lambda: agent.register("afresh", socket=daemon.socket)
    )
    daemon.start()
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    assert_leads(daemon, innocent)


def own_worker_while_the_daemon_forgets(daemon: Daemon) -> None:
    """A worker has the leader's pid, and the page that names it, when a daemon comes that knows of nothing."""
    heirs = start_heirs(daemon, before_death=lambda: forget(daemon))
    daemon.start()
    left = wait_gone(heirs, WORKERS_GONE_S)
    assert not left, f"workers live on: {left}"
    wait_over(daemon, heirs[1])


# -- a pid changes hands while the leader lives --------------------------------------------------


def kept_while_the_leader_lives(daemon: Daemon) -> None:
    """A worker that only descent tells ends while the leader lives, and its pid goes to somebody else."""
    session = start_session(daemon, "bare", "bare", "forked")
    end(session.workers[0], child=False)
    innocent = reuse(session.workers[0])
    session.kill_leader()
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    innocent.end()


def parent_of_orphans(daemon: Daemon) -> None:
    """A worker ends and leaves a child; whoever gets its pid has children too, and they are nobody's orphans."""
    session = start_session(daemon, "parent", "stubborn")
    parents = [pid for pid in session.workers if parent_of(pid) in session.workers]
    (child,) = parents
    parent = parent_of(child)
    end(parent, child=False)
    innocent = reuse(parent, ["forked", "bare", "execed"])
    session.kill_leader()
    assert_reaped(session.workers, [innocent], WORKERS_GONE_S)
    wait_over(daemon, session.leader)
    innocent.end()


def spared_pid_goes_to_a_worker(daemon: Daemon) -> None:
    """What was started under spared() ends, and a worker gets its pid: that one is not spared."""
    channel = Channel()

    def lead() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        register_afresh(daemon)
        with agent.spared():
            spared = subprocess.Popen(SLEEPER).pid
        begun = start_ticks(spared)
        os.kill(spared, signal.SIGKILL)
        wait_free(spared)
        await_tick(lambda ticks: ticks > begun)  # or the worker would be the same process for whoever looks
        channel.say(take_pid(spared, hold))
        hold()

    leader = fork(lead)
    (worker,) = channel.hear(1)
    end(leader)
    left = wait_gone([worker], WORKERS_GONE_S)
    assert not left, f"{left} was spared for the pid it was given"
    wait_over(daemon, leader)


def subreaper_s_pid_goes_to_a_scheduler(daemon: Daemon) -> None:
    """Who adopted the leader's workers ends; whoever gets its pid runs a job that was given a copy of the environment."""
    channel = Channel()

    def adopt() -> None:
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        leader = fork(lead)
        channel.say(leader)
        hold()

    def lead() -> None:
        register_afresh(daemon)
        fork(lambda: channel.say(subprocess.Popen(SLEEPER).pid))  # and its parent has gone
        fork(lambda: channel.say(fork(hold)))
        hold()

    subreaper = fork(adopt)
    leader, *workers = sorted(channel.hear(3), key=lambda pid: parent_of(pid) != subreaper)
    session = session_of(daemon, leader)
    if session is None:  # all three are children of the subreaper
        (leader,) = (pid for pid in (leader, *workers) if session_of(daemon, pid) is not None)
        session = session_of(daemon, leader)
    assert session is not None
    os.environ["REAPER_LINEAGE"] = session["id"]
    wait_listed(daemon, leader, session["workers"] and [worker["pid"] for worker in session["workers"]])
    end(subreaper)
    scheduler = reuse(subreaper, ["execed", "execed"])
    del os.environ["REAPER_LINEAGE"]
    end(leader, child=False)
    wait_over(daemon, leader)
    outlast_a_session(daemon, "execed")
    scheduler.end()


# -- a pid changes hands just before a chosen system call of the daemon -------------------------

# The daemon looks again and again: what it asks in one look is all that it ever asks.
MAX_MOMENTS = 8
KILL = {"x86_64": 62, "aarch64": 129}[os.uname().machine]


class Held:
    """Holds the daemon just before the ``moment``-th time that it asks about a pid (or signals it, with ``signals``)."""

    def __init__(self, daemon: Daemon, moment: int, *, signals: bool) -> None:
        self.daemon = daemon
        self.moment = moment
        self.signals = signals

    def __call__(
        self, pid: int, provoke: Callable[[], object], over: Callable[[], bool]
    ) -> Callable[[], None] | None:
        """Return, once it is held, what lets it go; None when it was ``over`` before the moment came."""
        seen = 0

        def wanted(call: Call) -> bool:
            nonlocal seen
            concerns = self._signals(call, pid) if self.signals else asks_about(call, pid)
            seen += concerns
            if concerns and seen == self.moment:
                about = next((path for path in call.paths if path.startswith(b"/proc/")), b"")
                print(f"moment {seen}: call {call.number} {about.decode()}", file=sys.stderr)
                return True
            return False

        tracer = Tracer(self.daemon.pid)
        tracer.hold()
        provoke()
        if tracer.run_until(wanted, over):
            return tracer.close
        tracer.close()
        return None

    def _signals(self, call: Call, pid: int) -> bool:
        if call.number != PIDFD_SEND_SIGNAL:
            return call.number == KILL and call.arguments[0] == pid
        facts = harness.read_proc(self.daemon.pid, f"fdinfo/{call.arguments[0]}")
        return b"\nPid:\t%d\n" % pid in facts


def asks_about(call: Call, pid: int) -> bool:
    if call.number == PIDFD_OPEN:
        return call.arguments[0] == pid
    return any(path.startswith(b"/proc/%d/" % pid) for path in call.paths)


def at_each_moment(daemon: Daemon, trial: Callable[[Held], bool], *, signalled: bool = False) -> None:
    """Try with the pid taken at the first, second, ... moment, until one does not come."""
    questions = count_moments(lambda moment: trial(Held(daemon, moment, signals=False)))
    signals = count_moments(lambda moment: trial(Held(daemon, moment, signals=True))) if signalled else 0
    print(f"held {questions} times before a question, {signals} times before a signal", file=sys.stderr)
    assert questions, "the daemon never asks about that pid: nothing was shown"
    assert signals or not signalled, "the daemon never signals that pid: nothing was shown"


def count_moments(trial: Callable[[int], bool]) -> int:
    moments = 0
    while moments < MAX_MOMENTS and trial(moments + 1):
        moments += 1
    return moments


def held_while_reaping(daemon: Daemon) -> None:
    """A worker ends, and its pid changes hands, at any moment from the leader's death to the last signal."""

    def trial(held: Held) -> bool:
        session = start_session(daemon, "stubborn", "stubborn")
        worker, lasting = session.workers
        go_on = held(worker, session.kill_leader, lambda: not alive(lasting))
        innocents = []
        if go_on is not None:
            end(worker, child=False)
            innocents = [reuse(worker)]
            go_on()
        assert_reaped([lasting], innocents, QUICK_GONE_S)
        wait_over(daemon, session.leader)
        for innocent in innocents:
            innocent.end()
        return bool(innocents)

    at_each_moment(daemon, trial, signalled=True)


def held_while_scanning(daemon: Daemon) -> None:
    """A worker that only descent tells ends, and its pid changes hands, at any moment of a scan while the leader lives."""

    def trial(held: Held) -> bool:
        session = start_session(daemon, "bare", "stubborn")
        worker, lasting = session.workers
        end_s = time.monotonic() + 1.0
        go_on = held(worker, lambda: None, lambda: time.monotonic() > end_s)
        innocents = []
        if go_on is not None:
            end(worker, child=False)
            innocents = [reuse(worker)]
            go_on()
            ask(daemon, "ps")  # a whole look since then
        session.kill_leader()
        assert_reaped([lasting], innocents, QUICK_GONE_S)
        wait_over(daemon, session.leader)
        for innocent in innocents:
            innocent.end()
        return bool(innocents)

    at_each_moment(daemon, trial)


def held_while_cleaning_up(daemon: Daemon) -> None:
    """An orphan that nobody registered ends, and its pid goes to a pool that lives, at any moment of a clean-up."""

    def trial(held: Held) -> bool:
        worker, lasting = start_orphans(daemon, 2)
        ids = [[pid, start_ticks(pid)] for pid in (worker, lasting)]
        askers: list[int] = []

        def provoke() -> None:
            askers.append(fork(lambda: ask(daemon, "cleanup", processes=ids)))

        go_on = held(worker, provoke, lambda: not alive(lasting))
        innocents = []
        if go_on is not None:
            end(worker, child=False)
            innocents = [reuse_in_a_living_pool(worker)]
            go_on()
        assert_reaped([worker, lasting], innocents, QUICK_GONE_S)
        os.waitpid(askers[0], 0)
        for innocent in innocents:
            innocent.end()
        return bool(innocents)

    at_each_moment(daemon, trial, signalled=True)


def start_orphans(daemon: Daemon, count: int) -> list[int]:
    """Return workers, deaf to SIGTERM, whose pool's parent the daemon has seen alive and is dead now."""
    channel = Channel()

    def lead() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        channel.say(*(fork(become_worker) for _ in range(count)))
        hold()

    leader = fork(lead)
    workers = channel.hear(count)
    for pid in workers:
        wait_worker(pid)
    assert condemned(daemon).isdisjoint(workers)
    end(leader)
    harness.repeat_until(lambda: condemned(daemon) >= set(workers) or None, 10.0, f"{workers} are no orphans")
    return workers


def condemned(daemon: Daemon) -> set[int]:
    found = ask(daemon, "cleanup", dry_run=True)["orphans"]
    return {one["pid"] for one in found if one["verdict"] == "kill"}


def become_worker() -> None:
    os.execv(WORKER[0], WORKER)


def wait_worker(pid: int) -> None:
    said = "\0".join(WORKER).encode() + b"\0"
    # Nothing tells when another process has exec'ed.
    harness.repeat_until(
        lambda: harness.read_proc(pid, "cmdline") == said or None, 10.0, f"{pid} became no worker"
    )


def reuse_in_a_living_pool(pid: int) -> Innocent:
    """Give ``pid`` to a worker as ``start_orphans()`` has them, but of a pool whose parent lives: of ours."""
    folder = f"/dev/shm/joblib_memmapping_folder_{pid}_theirs"
    os.mkdir(folder)
    take_pid(pid, become_worker)
    wait_worker(pid)
    return Innocent([pid], folder)


def held_at_the_leader_s_end(daemon: Daemon) -> None:
    """A dead leader is waited for, and its pid changes hands, at any moment of the reap."""

    def trial(held: Held) -> bool:
        session = start_session(daemon, "stubborn")
        go_on = held(
            session.leader,
            lambda: os.kill(session.leader, signal.SIGKILL),
            lambda: not alive(session.workers[0]),
        )
        os.waitpid(session.leader, 0)
        innocents = []
        if go_on is not None:
            innocents = [reuse(session.leader)]
            go_on()
        assert_reaped(session.workers, innocents, QUICK_GONE_S)
        wait_over(daemon, session.leader)
        for innocent in innocents:
            innocent.end()
        return bool(innocents)

    at_each_moment(daemon, trial)


def held_while_stopping(daemon: Daemon) -> None:
    """A leader that somebody wants ended pays no heed; it ends otherwise, and its pid changes hands, at any moment."""

    def trial(held: Held) -> bool:
        session = start_session(daemon, "stubborn", deaf=True)
        record = session_of(daemon, session.leader)
        assert record is not None
        asking: list[int] = []
        go_on = held(
            session.leader,
            lambda: asking.append(fork(lambda: ask(daemon, "stop", session=record["id"]))),
            lambda: not alive(session.leader),
        )
        innocents = []
        if go_on is not None:
            end(session.leader)
            innocents = [reuse(session.leader)]
            go_on()
        else:
            os.waitpid(session.leader, 0)
        assert_reaped(session.workers, innocents, QUICK_GONE_S)
        os.waitpid(asking[0], 0)
        wait_over(daemon, session.leader)
        for innocent in innocents:
            innocent.end()
        return bool(innocents)

    at_each_moment(daemon, trial, signalled=True)


def held_while_registering(daemon: Daemon) -> None:
    """A leader dies, and its pid changes hands, at any moment at which the daemon takes it on."""

    def trial(held: Held) -> bool:
        channel, go = Channel(), Channel()

        def lead() -> None:
            channel.say(stubborn())
            os.read(go.ends[0], 1)
            with contextlib.suppress(client.Unreachable, wire.WireError):
                register_by_hand(daemon)  # without a page, which would tell as well whose it is
            hold()

        leader = fork(lead)
        (worker,) = channel.hear(1)
        end_s = time.monotonic() + 1.0
        go_on = held(leader, lambda: go.say(0), lambda: time.monotonic() > end_s)
        end(leader)
        if go_on is not None:
            innocent = reuse(leader)
            go_on()
            outlast_a_session(daemon)
            end_who_leads_nobody(daemon, innocent)
        harness.end_process(worker)  # it is gone already where the leader was taken on before it died
        return go_on is not None

    at_each_moment(daemon, trial)


def end_who_leads_nobody(daemon: Daemon, innocent: Innocent) -> None:
    """End ``innocent`` and assert that its children live on."""
    innocent.check()
    os.rmdir(innocent.folder)
    end(innocent.pids[0])
    outlast_a_session(daemon)
    dead = [pid for pid in innocent.pids[1:] if not alive(pid)]
    assert not dead, f"{dead} were ended with {innocent.pids[0]}, which never registered"
    for pid in innocent.pids[1:]:
        end(pid, child=False)


def held_while_starting(daemon: Daemon) -> None:
    """A leader dies, and its pid changes hands, at any moment of the start of a daemon that has it on record."""

    def trial(held: Held) -> bool:
        session = start_session(daemon, "stubborn")
        daemon.kill9()
        daemon.drain_notifications().clear()
        daemon.launch()
        go_on = held(session.leader, lambda: None, lambda: "READY=1" in daemon.drain_notifications())
        end(session.leader)
        if go_on is not None:
            innocent = reuse(session.leader)
            go_on()
            daemon.wait_ready()
            assert_reaped(session.workers, [innocent], QUICK_GONE_S)
            end_who_leads_nobody(daemon, innocent)
        assert_reaped(session.workers, [], QUICK_GONE_S)
        wait_over(daemon, session.leader)
        return go_on is not None

    at_each_moment(daemon, trial)


CASES: dict[str, Callable[[Daemon], None]] = {
    case.__name__.replace("_s_", "s_").replace("_", "-"): case
    for case in (
        held_while_reaping,
        held_while_scanning,
        held_while_cleaning_up,
        held_at_the_leader_s_end,
        held_while_stopping,
        held_while_registering,
        held_while_starting,
        worker_while_reaping,
        worker_again_and_again,
        leader_while_reaping,
        leader_registers_afresh,
        leader_s_pid_goes_to_its_own_worker,
        folder_of_who_came_later,
        worker_in_the_same_tick,
        kept_in_the_same_tick,
        leader_in_the_same_tick,
        while_the_daemon_is_down,
        while_the_daemon_forgets,
        afresh_while_the_daemon_is_down,
        own_worker_while_the_daemon_forgets,
        kept_while_the_leader_lives,
        parent_of_orphans,
        spared_pid_goes_to_a_worker,
        subreaper_s_pid_goes_to_a_scheduler,
    )
}


def run(name: str, scratch: Scratch) -> int:
    """Run one case with a daemon of its own and return the exit code."""
    grace_s = QUICK_GRACE_S if name.startswith("held-") or name.endswith("-tick") else GRACE_S
    # What is held otherwise shall be held at what it is about, not in the scan that comes first.
    interval = "1h" if name.startswith("held-") and "scan" not in name else "50ms"
    config = CONFIG.format(interval=interval, grace=SLOW.get(name, grace_s))
    daemon = Daemon(scratch, os.environ[RUN_MARK], config=config)
    os.environ["TMPDIR"] = scratch.path
    try:
        daemon.start()
        CASES[name](daemon)
    except CannotBeShown as reason:
        print(reason, file=sys.stderr)
        return CANNOT_BE_SHOWN
    except AssertionError:
        traceback.print_exc()
        sys.stderr.write(daemon.read_log())
        return 1
    finally:
        with contextlib.suppress(AssertionError):
            daemon.close()
    return 0


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        print(*CASES, sep="\n")
        return
    if os.getpid() != 1:
        raise SystemExit("this must be the init of a pid namespace")
    if sys.argv[1].endswith("-tick"):
        with contextlib.suppress(
            PermissionError
        ):  # so that ten milliseconds are enough, however busy the machine is
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    # A /dev/shm of our own: pids in here are small, and folders named after them would be others' outside.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    case = os.fork()
    if not case:
        code = 2
        try:
            code = run(sys.argv[1], Scratch(sys.argv[2]))
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
