"""Attack a real daemon at full length: ``run.py [--seed N] [--quick] [--only NAME]``.

Each assault has a daemon of its own. Leaders die before it and while it lasts: what was promised of their workers must hold,
the core must stay the process it was, no fatter, and nobody else may be touched. The exit code is 1 where anything was not so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

from attackers import Attacker, Siege, answers, gate_of, lengthen_history, routing_id_of_a_reply
from harness import (
    STRANGER,
    WORKERS_GONE_S,
    Daemon,
    Leader,
    Scratch,
    needed_interpreter,
    wait_gone,
)
from scarcity import bad_time, faulty, limited, lowest_free_descriptor

from reaperd import gate_link

IDLE_REAPS, REAPS = 7, 9
HISTORY = 300_000
IDLE_WITHIN_S = 60.0
SCANNED_WITHIN_S = 1.2


class Assault:
    """What an assault has at hand: the siege it is made on, and where its attackers are kept."""

    def __init__(
        self, siege: Siege, scratch: Scratch, rng: random.Random, stack: contextlib.ExitStack
    ) -> None:
        self.siege = siege
        self.daemon = siege.daemon
        self.scratch = scratch
        self.random = rng
        self._stack = stack

    def attacker(self, kind: str, **options: Any) -> Attacker:
        return self._stack.enter_context(Attacker(self.daemon, kind, **options))

    def reap(self) -> None:
        """Have one victim's leader die, in the middle of it all."""
        self.siege.reap()

    def reap_all(self) -> None:
        while self.siege.victims:
            self.reap()


Script = Callable[[Assault, float], str]
SCRIPTS: dict[str, Script] = {}


def assault(script: Script) -> Script:
    SCRIPTS[script.__name__.replace("_", "-")] = script
    return script


# -- through the socket ---------------------------------------------------------------------------


@assault
def garbage(at: Assault, scale: float) -> str:
    """Messages of every hostile kind, from several users at once."""
    users, each = 5, int(20_000 * scale)
    sessions = [at.siege.stays.session, at.siege.victims[0].session]
    attackers = [
        at.attacker(
            "garbage", uid=STRANGER + 10 + n, seed=at.random.randrange(2**32), count=each, sessions=sessions
        )
        for n in range(users)
    ]
    for attacker in attackers:
        attacker.read_until("ready")
    at.reap_all()
    kinds = Counter[str]()
    for attacker in attackers:
        told = attacker.read_line(within_s=3600)
        assert told["sent"] == each
        kinds.update(told["kinds"])
    assert not kinds["internal"], "the daemon made a mistake: " + at.daemon.read_log()[-3000:]
    assert kinds["ok"], "the daemon granted nothing at all"
    return f"{users * each} messages: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


@assault
def openings(at: Assault, scale: float) -> str:
    """Handshakes that are none, held open, and some that come byte by byte."""
    attackers = [at.attacker("openings", uid=STRANGER + n) for n in range(max(1, int(5 * scale)))]
    at.reap_all()
    return f"{sum(attacker.read_until('done')['done'] for attacker in attackers)} held open"


@assault
def connects(at: Assault, scale: float) -> str:
    """Bare connections up to the gate's limit, again and again."""
    attackers = [at.attacker("connects", uid=STRANGER + n) for n in range(2)]
    for attacker in attackers:
        attacker.read_line()
    paced(at, 60 * scale)
    told = [attacker.stop() for attacker in attackers]
    return f"{sum(one['connects'] for one in told)} connections"


@assault
def endless(at: Assault, scale: float) -> str:
    """Messages of ever more frames."""
    attackers = [
        at.attacker("endless", uid=STRANGER + n, messages=max(1, int(5 * scale)), megabytes=600)
        for n in range(2)
    ]
    for attacker in attackers:
        attacker.read_line()
    at.reap_all()
    told = [attacker.read_line(within_s=600) for attacker in attackers]
    return f"{sum(one['sent_bytes'] for one in told) / 1e6:.0f} MB in messages without end"


@assault
def planted(at: Assault, scale: float) -> str:
    """Routing ids that the gate would give next."""
    rounds = max(1, int(5 * scale))
    for _ in range(rounds):
        answers(at.daemon)
        gate = gate_of(at.daemon)
        assert gate is not None
        last = int.from_bytes(routing_id_of_a_reply(at.daemon, gate)[1:], "big")
        following = [f"00{(last + n) & 0xFFFFFFFF:08x}" for n in range(2, 200)]
        with Attacker(at.daemon, "planted", identities=following) as attacker:
            attacker.read_until("planted")
            at.reap()
    return f"{rounds} times"


@assault
def deaf(at: Assault, scale: float) -> str:
    """Large replies that nobody reads, over one and over many connections."""
    owner = at.attacker("many", sessions=int(300 * scale))
    registered = owner.read_line(within_s=300)["registered"]
    attackers = [
        at.attacker("deaf", uid=STRANGER + n, message=message, connections=connections)
        for n, (message, connections) in enumerate(
            [({"op": "ps"}, 1), ({"op": "ps"}, 50), ({"op": "events"}, 1), ({"op": "events"}, 50)]
        )
    ]
    for attacker in attackers:
        attacker.read_line()
    # That much of what nobody reads is kept for each user, and the allocator keeps it for the next time.
    at.siege.watch.may_grow_bytes += len(attackers) * gate_link.MAX_WAITING_BYTES_OF_ONE_UID
    slowest_s = max(paced(at, 30 * scale, between=lambda: answers(at.daemon)))
    growth_bytes = at.siege.watch.growth_bytes
    assert growth_bytes < at.siege.watch.may_grow_bytes, f"core +{growth_bytes / 2**20:.0f} MiB"
    asked = sum(attacker.stop()["asked"] for attacker in attackers)
    return f"{asked} requests, {registered} sessions to tell of; another user's ping took {slowest_s:.2f} s at most"


@assault
def waiters(at: Assault, scale: float) -> str:
    """Those who wait for events that never come, in a long history, and hang up."""
    at.daemon.stop()
    lengthen_history(at.daemon, int(HISTORY * scale))
    at.daemon.start()
    at.siege.watch.renew()
    attackers = [at.attacker("waiters", uid=STRANGER + n, connections=200) for n in range(5)]
    for attacker in attackers:
        attacker.read_line()
    at.reap_all()
    slowest_s = max(answers(at.daemon) for _ in range(20))
    return f"1000 waiters, {int(HISTORY * scale)} events on record; a ping took {slowest_s:.2f} s at most"


@assault
def registrar(at: Assault, scale: float) -> str:
    """One process that registers ever new sessions."""
    attackers = [at.attacker("registrar", uid=STRANGER + n) for n in range(2)]
    for attacker in attackers:
        attacker.read_line()
    paced(at, 20 * scale)
    return f"{sum(attacker.stop()['registered'] for attacker in attackers)} registrations"


@assault
def gate_killed(at: Assault, scale: float) -> str:
    """A gate that is killed as soon as it is there; sessions begin meanwhile."""
    rounds, late = max(2, int(20 * scale)), []
    for number in range(rounds):
        answers(at.daemon)
        gate = gate_of(at.daemon)
        if gate is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(gate, signal.SIGKILL)
        late.append(at.siege.victim())
        if number % 2 and at.siege.victims:
            at.reap()
    answers(at.daemon)
    for leader in late:
        at.daemon.wait_listed(leader.pid, leader.family.workers)
    at.siege.victims += late
    at.reap_all()
    return f"{rounds} times, {len(late)} sessions began meanwhile"


@assault
def gate_stopped(at: Assault, scale: float) -> str:
    """A gate that stands still."""
    gate = gate_of(at.daemon)
    assert gate is not None
    os.kill(gate, signal.SIGSTOP)
    try:
        late = [at.siege.victim() for _ in range(3)]
        paced(at, 15 * scale)
    finally:
        os.kill(gate, signal.SIGCONT)
    answers(at.daemon)
    for leader in late:
        at.daemon.wait_listed(leader.pid, leader.family.workers)
    at.siege.victims += late
    at.reap_all()
    return f"{15 * scale:.0f} s long"


@assault
def held_down(at: Assault, scale: float) -> str:
    """A gate that strangers fill or bring down for ten minutes on end; sessions begin and leaders die meanwhile."""
    attackers = [at.attacker("connects", uid=STRANGER + n) for n in range(2)]
    for attacker in attackers:
        attacker.read_line()
    at.reap_all()
    began_s, waits_s = time.monotonic(), [0.0]
    until_s = began_s + 600 * scale
    sessions: list[str] = []
    while time.monotonic() < until_s:
        leader = at.siege.victim()
        waits_s.append(taken_on_within(at.daemon, leader.session))
        sessions.append(leader.session)
        at.siege.victims.append(leader)
        at.reap()
        select.select([], [], [], 2.0)
    log = at.daemon.read_log()
    adopted = sum(f"adopted session={session}" in log for session in sessions)
    assert adopted, "nobody was kept from registering"
    for attacker in attackers:
        attacker.stop()
    return (
        f"{time.monotonic() - began_s:.0f} s, {len(sessions)} sessions began, {adopted} of them were adopted by their pages;"
        f" taken on {max(waits_s) * 1e3:.0f} ms after their scripts had begun at the latest"
    )


def taken_on_within(daemon: Daemon, session: str) -> float:
    """Return how long it takes from now until the daemon has taken a session on; AssertionError beyond a scan.

    It cannot be asked: nobody reaches it. The scans are 0.2 s apart, and the machine has a second for one.
    """
    began_s = time.monotonic()
    while f"adopted session={session}" not in (log := daemon.read_log()):
        if f"registered session={session}" in log:
            break
        assert time.monotonic() - began_s < SCANNED_WITHIN_S, f"{session} is not taken on:\n{log[-3000:]}"
        select.select([], [], [], 0.01)
    return time.monotonic() - began_s


# -- through pages and processes ------------------------------------------------------------------


@assault
def pages(at: Assault, scale: float) -> str:
    """Thousands of pages of every kind, that exist when the daemon starts as well as later."""
    attackers = [start_pages(at, n, int(4000 * scale)) for n in range(2)]
    at.reap()
    at.daemon.stop()
    at.daemon.start()
    at.siege.watch.renew()
    attackers += [start_pages(at, n, int(4000 * scale)) for n in range(2, 4)]
    paced(at, 20 * scale)
    for attacker in attackers:
        attacker.close()
    return f"{len(attackers)} processes with {int(4000 * scale)} pages and more each"


def start_pages(at: Assault, number: int, many: int) -> Attacker:
    attacker = at.attacker(
        "pages",
        uid=STRANGER + 10 + number,
        victim=at.siege.stays.session,
        innocent=at.siege.stays.pid,
        finished="29999-1-00000000-00000000",
        directory=at.scratch.directory("names", 0o777),
        numbers=[1000, 5000, 12_000],
        many=many,
    )
    attacker.read_line()
    return attacker


@assault
def dear(at: Assault, scale: float) -> str:
    """Processes of many descriptors and mappings, of a session and of nobody, and somebody who asks for them."""
    for number, registers in enumerate((True, False)):
        at.attacker(
            "crowd", uid=STRANGER + number, processes=int(150 * scale), registers=registers,
            descriptors=8000, mappings=20_000,
        ).read_line(within_s=300)  # fmt: skip
    at.attacker("deaf", uid=STRANGER + 2, message={"op": "ps"}, connections=1).read_line()
    paced(at, 20 * scale)
    return f"{2 * int(150 * scale)} processes of 8000 descriptors and 20000 mappings"


@assault
def folders(at: Assault, scale: float) -> str:
    """Folders in /dev/shm that are too deep, and too wide."""
    for depth, width in ((4000, 0), (0, int(200_000 * scale))):
        leader = at.siege.stranger()
        with contextlib.ExitStack() as stack:
            maker = at.attacker("deep", leader=leader.pid, depth=depth, width=width)
            folder = os.path.join("/dev/shm", maker.read_line()["made"])
            stack.callback(subprocess.run, ["rm", "-rf", folder], check=False)
            leader.kill9()
            assert wait_gone(leader.family.workers, WORKERS_GONE_S) == []
            at.reap()
            at.reap()
            at.daemon.wait_end(leader.session, within_s=90)
    at.reap_all()
    return f"4000 deep, and {int(200_000 * scale)} wide"


@assault
def unreadable(at: Assault, scale: float) -> str:
    """A process whose memory nobody can read."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        at.reap_all()
        return "left out: there is no /dev/fuse"
    python = needed_interpreter(STRANGER)
    directory = at.scratch.directory("stalled")
    holder = at.attacker("stalled", uid=None, holds=STRANGER, directory=directory, python=python)
    try:
        holder.read_until("holds")
        paced(at, 15 * scale)
        assert answers(at.daemon, within_s=10) < 10
    finally:
        holder.close()
    return f"for {15 * scale:.0f} s"


# -- on a failing machine -------------------------------------------------------------------------


@assault
def starved(at: Assault, scale: float) -> str:
    """Descriptors that run out and come back, while leaders die."""
    rounds = max(3, int(40 * scale))
    for _ in range(rounds):
        leader = at.siege.victim()
        most = lowest_free_descriptor(at.daemon.pid) + at.random.randrange(8)
        with limited(at.daemon.pid, resource.RLIMIT_NOFILE, most):
            late = at.siege.victim()
            leader.kill9()
            select.select([], [], [], at.random.random())
        caught_up(at, leader)
        at.daemon.wait_listed(late.pid, late.family.workers)
        late.kill9()
        caught_up(at, late)
    return f"{rounds} times"


@assault
def failing(at: Assault, scale: float) -> str:
    """A core in which a call fails for want of memory or files now and then, anywhere."""
    rounds = max(4, int(60 * scale))
    for number in range(rounds):
        kind, gap = ("memory", "files")[number % 2], at.random.choice((80, 300, 900, 3000))
        run_inside(at, faulty(kind, at.random.randrange(2**32), gap))
        leaders = [at.siege.victim() for _ in range(2)]
        with bad_time(at.daemon):
            for leader in leaders:
                leader.kill9()
            select.select([], [], [], at.random.random())
        for leader in leaders:
            caught_up(at, leader)
        assert "Traceback" not in at.daemon.read_log(), at.daemon.read_log()[-3000:]
    run_inside(at, [])
    return f"{rounds} times"


def run_inside(at: Assault, command: list[str]) -> None:
    at.daemon.stop()
    at.daemon.inside = command
    at.daemon.start()
    at.siege.watch.renew()


def caught_up(at: Assault, leader: Leader) -> None:
    """What could not be done in a bad time must be done soon after it."""
    assert not (ended := at.siege.watch.lives()), ended
    left = leader.wait_all_gone(15)
    assert left == [], f"{left} of {leader.session} live on:\n{at.daemon.read_log()[-8000:]}"
    at.daemon.wait_end(leader.session)


# -- running --------------------------------------------------------------------------------------


def paced(at: Assault, seconds: float, between: Callable[[], float] = lambda: 0.0) -> list[float]:
    """Spread the victims' deaths over so many seconds, and return what ``between`` returned after each."""
    found, count = [0.0], len(at.siege.victims)
    began_s = time.monotonic()
    for number in range(count):
        at.reap()
        found.append(between())
        select.select([], [], [], max(0.0, began_s + seconds * (number + 1) / count - time.monotonic()))
    return found


@contextlib.contextmanager
def besieged() -> Iterator[tuple[Siege, Scratch]]:
    scratch, run = Scratch(), uuid.uuid4().hex[:12]
    daemon = Daemon(scratch, run)
    with contextlib.ExitStack() as stack:
        stack.callback(scratch.remove)
        stack.callback(daemon.close)

        def start_leader(script: str, *arguments: str, **settings: Any) -> Leader:
            leader = Leader(scratch, run, script, *arguments, **settings)
            stack.callback(leader.close)
            leader.up()
            stack.callback(leader.end_family)
            return leader

        daemon.start()
        yield stack.enter_context(Siege(daemon, start_leader, victims=IDLE_REAPS + REAPS)), scratch


def run_one(name: str, seed: int, scale: float) -> bool:
    """Run one assault and print what came of it; say whether everything held."""
    print(f"\n{name}: {(SCRIPTS[name].__doc__ or '').splitlines()[0]}", flush=True)
    with besieged() as (siege, scratch):
        idle, attacked, fault, told = [], [], "", ""
        gates = 0
        try:
            siege.promise_s = IDLE_WITHIN_S
            for _ in range(IDLE_REAPS):
                siege.reap()
            idle = list(siege.latencies_s)
            # On a machine that is busy with something else, the promise is as good as that machine.
            siege.promise_s = max(WORKERS_GONE_S, 3 * max(idle))
            siege.latencies_s.clear()
            with contextlib.ExitStack() as stack:
                told = SCRIPTS[name](Assault(siege, scratch, random.Random(f"{seed} {name}"), stack), scale)
            attacked = list(siege.latencies_s)
            answers(siege.daemon)
            gates = siege.daemon.ask("status").get("gate_restarts", 0)
            siege.check()
        except (AssertionError, subprocess.TimeoutExpired):
            fault = traceback.format_exc(limit=-2)
            attacked = attacked or list(siege.latencies_s)
        if told:
            print(f"  {told}")
        print(
            f"  leader's death to last worker's: idle {shown(idle)}, under attack {shown(attacked)};"
            f" gate replaced {gates} times, core {siege.watch.growth_bytes / 2**20:+.1f} MiB",
            flush=True,
        )
        if fault:
            print("  WRONG: " + fault.replace("\n", "\n    "), flush=True)
        return not fault


def shown(latencies_s: list[float]) -> str:
    if not latencies_s:
        return "none"
    return f"median {statistics.median(latencies_s) * 1e3:.1f} ms, max {max(latencies_s) * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the length")
    parser.add_argument("--only", action="append", choices=sorted(SCRIPTS), help="may be given again")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("this needs root: the attackers and their victims are other users")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was started is ended
    print(f"seed {options.seed}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    chosen = options.only or list(SCRIPTS)
    wrong = [name for name in chosen if not run_one(name, options.seed, 0.1 if options.quick else 1.0)]
    print(f"\n{len(chosen) - len(wrong)} of {len(chosen)} assaults changed nothing")
    if wrong:
        print("WRONG: " + ", ".join(wrong))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
