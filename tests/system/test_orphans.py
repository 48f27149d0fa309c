"""Workers whose pool parent was SIGKILLed and whom nobody registered: the scan finds them, tells why, and ends them.

Each daemon has a pid namespace of its own, with settings that are as aggressive as can be.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import pytest
from enclosure import AGGRESSIVE, Enclosure, Keeper
from harness import (
    PARENT,
    STRANGER,
    ZOO,
    Leader,
    describe,
    has_ended,
    interpreter_for,
    pids_within,
    repeat_until,
)

pytestmark = pytest.mark.needs_root

GONE_WITHIN_S = 15.0
OLD_S = 3.0  # longer than a restart and the clocks' unrest together
DISABLED = {"REAPER_DISABLE": "1", "REAPER_TEST_LIGHT": "1"}
THRESHOLDS = ("cpu_threshold", "memory_threshold")
# The leader's parent is a shell, which collects it: init adopts its workers.
BELOW_A_SHELL = ["sh", "-c", '"$@"; true', "sh"]


@dataclass(frozen=True)
class Case:
    """One pool, and what its orphans are shown as."""

    name: str
    arguments: tuple[str, ...]
    framework: str
    adopter: str = "init"
    module: str = ""
    fate: str = "killed"
    trackers: int = 0

    @property
    def why_not(self) -> str:
        missing = self.module and importlib.util.find_spec(self.module) is None
        return f"the module {self.module} is not installed" if missing else ""


def case(name: str, *arguments: str, framework: str, **more: Any) -> Case:
    return Case(name, arguments, framework, **more)


def executor(method: str, load: str, **more: Any) -> Case:
    name = f"executor-{method}-{load}"
    arguments = ("executor", "--method", method, f"--{load}")
    return case(name, *arguments, framework=f"multiprocessing {method}", **{"trackers": 1, **more})


DATALOADER = "torch DataLoader"
LOADS = ("busy", "idle")
BELOW_INIT = [
    *(case(f"joblib-loky-{load}", "joblib-loky", f"--{load}", framework="loky", trackers=2) for load in LOADS),
    *(
        case(f"loky-{load}", "loky-alone", f"--{load}", framework="loky", module="loky", trackers=2)
        for load in LOADS
    ),
    case("joblib-memmap", "memmap", "--busy", framework="loky", trackers=2),
    *(executor(method, load) for method in ("spawn", "forkserver") for load in LOADS),
    case("pool-spawn-busy", "pool", "--method", "spawn", "--busy", framework="multiprocessing spawn", trackers=1),
    *(
        case(f"process-{method}-{load}", "process", "--method", method, f"--{load}", framework=f"multiprocessing {method}", trackers=1)
        for method in ("spawn", "forkserver")
        for load in LOADS
    ),
    case("shared-memory", "shared-memory", "--method", "spawn", framework="multiprocessing spawn", trackers=1),
    *(case(f"like-a-dataloader-{load}", "like-a-dataloader", f"--{load}", framework=DATALOADER) for load in LOADS),
    *(
        case(f"torch-dataloader-{load}", "dataloader", f"--{load}", framework=DATALOADER, module="torch")
        for load in LOADS
    ),
    case("torch-process", "torch-process", "--busy", framework="multiprocessing spawn", module="torch", trackers=1),
]  # fmt: skip
FORKED = [
    executor("fork", "idle", fate="orphan", trackers=0),
    case("joblib-multiprocessing", "joblib-mp", "--busy", framework="forked", fate="orphan"),
]
ADOPTED = [
    found
    for adopter in ("systemd", "supervise", "python")
    for found in (
        executor("spawn", "idle", adopter=adopter),
        case("joblib-loky-busy", "joblib-loky", "--busy", framework="loky", trackers=2, adopter=adopter),
        case("like-a-dataloader-busy", "like-a-dataloader", "--busy", framework=DATALOADER, adopter=adopter),
    )
]
CASES = [*BELOW_INIT, *FORKED, *ADOPTED]


def name_of(one: Case) -> str:
    return one.name if one.adopter == "init" else f"{one.name}-below-{one.adopter}"


def adopting(enclosure: Enclosure, adopter: str) -> list[str]:
    """Return a command that runs another one below ``adopter``."""
    if adopter == "init":
        return BELOW_A_SHELL
    if adopter == "python":
        return [sys.executable, PARENT, "subreaper"]
    shell = enclosure.scratch.file(adopter)
    if not os.path.exists(shell):
        shutil.copy(os.path.realpath(shutil.which("sh") or "/bin/sh"), shell)
    return [sys.executable, os.path.join(ZOO, "subreaper.py"), shell]


class Pool:
    """A training script that nobody registered, with its workers. Pids are those of the enclosure's namespace."""

    def __init__(
        self,
        enclosure: Enclosure,
        arguments: tuple[str, ...],
        adopter: str = "init",
        uid: int | None = None,
        **env: str,
    ) -> None:
        self.enclosure = enclosure
        inside = [*enclosure.inside, *adopting(enclosure, adopter)]
        env = {**DISABLED, **env}
        with enclosure.births():
            self.leader = Leader(
                enclosure.scratch, enclosure.run, "pools.py", *arguments, inside=inside, env=env, uid=uid
            )

    def up(self) -> Pool:
        self.leader.up()
        inner = {pid: pids_within(pid)[1] for pid in [self.leader.pid, *self.leader.family.everyone]}
        family = self.leader.family
        self.pid = inner[self.leader.pid]
        servers = family.facts["pids"].get("forkserver", [])
        self.workers = [inner[pid] for pid in family.workers if pid not in servers]
        self.servers = [inner[pid] for pid in servers]
        self.trackers = [inner[pid] for pid in family.trackers]
        self._outer = {pid: outer for outer, pid in inner.items()}
        self.adopter = self.enclosure.parent_of(self.pid)
        return self

    def alive(self, pids: list[int]) -> list[int]:
        living = self.leader.still_alive([self._outer[pid] for pid in pids])
        return [pid for pid in pids if self._outer[pid] in living]

    def assert_gone(self, pids: list[int], within_s: float = GONE_WITHIN_S) -> None:
        end_s = time.monotonic() + within_s
        for pid in pids:
            assert has_ended(self.leader._pidfds[self._outer[pid]], within_s=end_s - time.monotonic()), (
                describe([self._outer[pid]])
            )


class Herd:
    """One pool for each case in one enclosure. Each has been looked at while its parent lived, and lost it then."""

    def __init__(self, enclosure: Enclosure) -> None:
        self.keeper = enclosure.daemon(AGGRESSIVE.format(action="kill", quarantine_for="1h"))
        started = {
            name_of(one): Pool(enclosure, one.arguments, one.adopter) for one in CASES if not one.why_not
        }
        self.pools = {name: pool.up() for name, pool in started.items()}
        self.shm = enclosure.shm()
        self.keeper.wait_scanned()
        self.called_orphans = self.keeper.orphans()
        self.lost = {
            name: lost
            for name, pool in self.pools.items()
            if (lost := set(pool.workers) - set(pool.alive(pool.workers)))
        }
        for pool in self.pools.values():
            pool.leader.kill9()

    def pool(self, one: Case) -> Pool:
        if one.why_not:
            pytest.skip(one.why_not)
        return self.pools[name_of(one)]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.leader.end_family()
            pool.leader.close()


@pytest.fixture(scope="module")
def herd() -> Iterator[Herd]:
    enclosure = Enclosure()
    try:
        herd = Herd(enclosure)
        yield herd
        herd.close()
    finally:
        enclosure.close()


@pytest.fixture
def enclosure() -> Iterator[Enclosure]:
    one = Enclosure()
    yield one
    one.close()


@pytest.fixture
def start_pool(enclosure: Enclosure) -> Iterator[Callable[..., Pool]]:
    """Start a pool that nobody registered; its workers are up when this returns."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, adopter: str = "init", uid: int | None = None, **env: str) -> Pool:
            pool = Pool(enclosure, arguments, adopter, uid, **env)
            stack.callback(pool.leader.close)
            stack.callback(pool.leader.end_family)
            return pool.up()

        yield start


def settings(action: str = "kill", quarantine_for: str = "1h", **changed: str) -> str:
    text = AGGRESSIVE.format(action=action, quarantine_for=quarantine_for)
    # Twice as fast: there are many tests, and each waits for several looks.
    changed = {"interval": '"0.25s"', "orphan_age_limit": '"0.5s"', "cpu_window": '"0.5s"', **changed}
    for key, value in changed.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{key} ="))
        text = text.replace(line, f"{key} = {value}")
    return text


# -- while the parent lives, and when it is gone --------------------------------------------------


def test_while_its_pool_s_parent_lives_nobody_is_called_an_orphan(herd: Herd) -> None:
    everyone = {pid for pool in herd.pools.values() for pid in (pool.pid, *pool.workers, *pool.trackers)}
    assert everyone & herd.called_orphans.keys() == set()
    assert herd.lost == {}


@pytest.mark.parametrize("one", [*BELOW_INIT, *ADOPTED], ids=name_of)
def test_orphans_are_found_and_ended_on_evidence(one: Case, herd: Herd) -> None:
    pool, keeper = herd.pool(one), herd.keeper
    # A forkserver lives as long as its workers do, and is an orphan itself.
    adopter = pool.servers[0] if pool.servers else 1 if one.adopter == "init" else pool.adopter
    assert len(pool.workers) == 2
    assert len(pool.servers) == ("forkserver" in one.arguments)
    assert len(pool.trackers) >= one.trackers
    for pid in pool.workers:
        told = keeper.wait_event(pid, "killed", "stuck")
        words = "; ".join(told["evidence"])
        assert (told["result"], told["role"], told["framework"]) == ("killed", "worker", one.framework), told
        assert told["signals"][0] == "SIGTERM"
        assert one.framework in words  # what it is
        assert f"(pid {adopter})" in words  # who has adopted it
        assert "seen to be an orphan" in words  # since when
        assert told["event"]["rule"] in THRESHOLDS
        assert any(name in words for name in THRESHOLDS), words
        told = keeper.get("explain", pid=pid)["explain"]
        assert told["alive"] is False
        assert told["events"][-1]["kind"] == "killed"
    for pid in pool.servers:
        assert "(pid 1)" in "; ".join(keeper.wait_event(pid, "killed", "stuck")["evidence"])
    pool.assert_gone([*pool.workers, *pool.servers])


@pytest.mark.parametrize("one", [*BELOW_INIT, *ADOPTED], ids=name_of)
def test_trackers_end_by_themselves_after_the_workers(one: Case, herd: Herd) -> None:
    pool = herd.pool(one)
    pool.assert_gone(pool.trackers)
    for pid in pool.trackers:
        kinds = [event["kind"] for event in herd.keeper.events_of(pid)]
        assert kinds == []


@pytest.mark.parametrize("one", FORKED, ids=name_of)
def test_forked_orphans_are_told_of_and_left_alone(one: Case, herd: Herd) -> None:
    pool, keeper = herd.pool(one), herd.keeper
    assert pool.workers
    for pid in pool.workers:
        told = keeper.wait_event(pid, "orphan")
        assert (told["framework"], told["result"], told["signals"]) == ("forked", "kept", []), told
    assert pool.alive(pool.workers) == pool.workers
    assert {keeper.orphans()[pid]["verdict"] for pid in pool.workers} == {"report"}


def test_nothing_of_the_ended_is_left_in_shared_memory(herd: Herd) -> None:
    """The trackers have removed it. What belongs to the pools of forked workers stays, for those live on."""
    for one in (*BELOW_INIT, *ADOPTED):
        if not one.why_not:
            herd.pool(one).assert_gone([*herd.pool(one).workers, *herd.pool(one).trackers])
    assert {name.split("_")[0] for name in herd.shm} >= {"joblib", "psm"}  # there was something to remove
    theirs = tuple(f"joblib_memmapping_folder_{herd.pool(one).pid}_" for one in FORKED)
    assert [name for name in herd.keeper.enclosure.shm() if not name.startswith(theirs)] == []


# -- thresholds and actions -----------------------------------------------------------------------


def test_only_who_is_busy_is_ended_where_memory_does_not_count(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings(memory_threshold='"1TiB"', cpu_threshold="10"))
    busy = start_pool("executor", "--method", "spawn", "--busy", "--workers", "1", REAPER_TEST_LIGHT="")
    idle = start_pool("executor", "--method", "spawn", "--idle", "--workers", "1")
    for pool in (busy, idle):
        pool.leader.kill9()
    assert keeper.wait_event(busy.workers[0], "killed")["event"]["rule"] == "cpu_threshold"
    (pid,) = idle.workers
    assert idle.alive([pid]) == [pid]
    told = keeper.orphans()[pid]
    assert told["verdict"] == "wait"
    assert told["rule"] in ("harmless", "age")
    assert told["ends_by_itself"]


def test_before_the_age_limit_nobody_is_judged_and_a_restart_does_not_make_an_orphan_younger(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings(orphan_age_limit='"1h"'))
    pool = start_pool("executor", "--method", "spawn", "--busy")
    pool.leader.kill9()

    def old_enough() -> dict[int, dict[str, Any]] | None:
        records = wait_listed(keeper, pool)
        return records if min(record["orphaned_s"] for record in records.values()) >= OLD_S else None

    found = repeat_until(old_enough, GONE_WITHIN_S, "time passes for orphans")
    assert {record["rule"] for record in found.values()} == {"age"}
    before = time.monotonic()
    older_s = max(record["orphaned_s"] for record in found.values())
    keeper.restart()
    now = wait_listed(keeper, pool)
    assert min(record["orphaned_s"] for record in now.values()) >= older_s + time.monotonic() - before - 1.0
    assert pool.alive(pool.workers) == pool.workers


def wait_listed(keeper: Keeper, pool: Pool) -> dict[int, dict[str, Any]]:
    """Return the records of a pool's workers, once all of them are called orphans."""

    def listed() -> dict[int, dict[str, Any]] | None:
        records = keeper.orphans()
        return {pid: records[pid] for pid in pool.workers} if records.keys() >= set(pool.workers) else None

    return repeat_until(listed, GONE_WITHIN_S, f"{pool.workers} are not listed among the orphans")


def test_with_the_action_report_orphans_are_told_of_and_nothing_is_done(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings("report"))
    pool = start_pool("joblib-loky", "--busy")
    pool.leader.kill9()
    for pid in pool.workers:
        told = keeper.wait_event(pid, "orphan")
        assert (told["framework"], told["result"], told["signals"]) == ("loky", "kept", [])
    assert {record["verdict"] for record in wait_listed(keeper, pool).values()} == {"report"}
    keeper.wait_scanned()
    assert pool.alive(pool.workers) == pool.workers
    for pid in pool.workers:
        assert [event["kind"] for event in keeper.events_of(pid)] == ["orphan"]  # told once
    score = keeper.get("orphans", score=True)["score"]
    assert score["condemned"] >= 2
    assert score["still_there"] >= 2


def test_a_released_orphan_goes_on_and_is_spared_while_another_in_quarantine_is_ended_in_time(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings("quarantine", quarantine_for="6s"))
    pool = start_pool("executor", "--method", "spawn", "--busy")
    released, other = pool.workers
    assert keeper.ask("release", pid=released)["kind"] == "not-quarantined"
    pool.leader.kill9()
    for pid in pool.workers:
        assert keeper.wait_event(pid, "quarantined")["result"] == "stopped"
        assert enclosure.state_of(pid) == "T"
    assert keeper.get("release", pid=released)["pid"] == released
    keeper.wait_event(released, "released")
    assert enclosure.state_of(released) in "RS"
    assert keeper.wait_event(other, "killed")["event"]["rule"] == "quarantine"
    keeper.wait_scanned()
    assert pool.alive(pool.workers) == [released]
    assert enclosure.state_of(released) in "RS"
    assert keeper.orphans()[released]["rule"] == "protected"


def test_a_daemon_that_comes_back_goes_on_with_a_quarantine(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings("quarantine", quarantine_for="1h"))
    pool = start_pool("executor", "--method", "spawn", "--busy")
    pool.leader.kill9()
    for pid in pool.workers:
        keeper.wait_event(pid, "quarantined")
    keeper.restart()
    keeper.wait_scanned(1)
    for pid in pool.workers:
        assert enclosure.state_of(pid) == "T"
        # It was not stopped anew by a daemon that knew nothing of it.
        assert [event["kind"] for event in keeper.events_of(pid)].count("quarantined") == 1
        assert keeper.get("release", pid=pid)["pid"] == pid
        assert enclosure.state_of(pid) in "RS"
    assert pool.alive(pool.workers) == pool.workers


def test_a_protected_orphan_is_spared(enclosure: Enclosure, start_pool: Callable[..., Pool]) -> None:
    keeper = enclosure.daemon(settings())
    pool = start_pool("executor", "--method", "spawn", "--idle")
    protected, other = pool.workers
    assert keeper.get("protect", pid=protected)["pid"] == protected
    pool.leader.kill9()
    keeper.wait_event(other, "killed")
    keeper.wait_scanned()
    assert pool.alive(pool.workers) == [protected]
    assert keeper.get("explain", pid=protected)["explain"]["rule"] == "protected"
    assert keeper.get("protect", pid=protected, undo=True)["pid"] == protected
    assert keeper.wait_event(protected, "killed")["result"] == "killed"


@pytest.mark.parametrize("place", [0, 1], ids=["orphan", "child-of-an-orphan"])
def test_the_pool_of_whoever_is_protected_is_in_use_down_to_the_last_of_it(
    place: int, enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings())
    protected, other = (
        start_pool("nested", "--method", "spawn", "--workers", "3", "--busy") for _ in range(2)
    )
    chain = [protected.pid]
    while len(chain) <= len(protected.workers):
        chain.append(next(pid for pid in protected.workers if enclosure.parent_of(pid) == chain[-1]))
    first, *below = chain[1 + place :]
    keeper.get("protect", pid=first)
    for pool in (protected, other):
        pool.leader.kill9()
    for pid in other.workers:
        assert keeper.wait_event(pid, "killed")["result"] == "killed"
    for pid in chain[1 : 1 + place]:
        keeper.wait_event(pid, "killed")
    keeper.wait_scanned()
    assert protected.alive([first, *below]) == [first, *below]
    rules = {pid: keeper.get("explain", pid=pid)["explain"]["rule"] for pid in [first, *below]}
    assert rules == {first: "protected", **dict.fromkeys(below, "parent")}
    ids = [[pid, int(enclosure.stat(pid)[19])] for pid in [first, *below]]
    assert {record["verdict"] for record in keeper.get("cleanup", processes=ids)["orphans"]} <= {"spare"}
    keeper.wait_scanned(1)
    assert protected.alive([first, *below]) == [first, *below]


def test_workers_whose_forkserver_alone_has_died_are_of_use_still(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings())
    pool = start_pool("process", "--method", "forkserver", "--busy")
    keeper.wait_scanned(1)
    (server,) = pool.servers
    harness.end_process(pool._outer[server])
    keeper.wait_scanned()
    assert pool.alive(pool.workers) == pool.workers
    for pid in pool.workers:
        assert keeper.get("explain", pid=pid)["explain"]["rule"] == "uncertain"
    found = keeper.get("cleanup", dry_run=True)["orphans"]
    assert not {one["pid"] for one in found if one["verdict"] == "kill"} & set(pool.workers)


# -- a daemon that comes too late to see the parent ------------------------------------------------


@pytest.mark.parametrize("adopter", ["init", "systemd"])
def test_orphans_from_before_the_daemon_are_ended(
    adopter: str, enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    pool = start_pool("joblib-loky", "--idle", adopter=adopter)
    pool.leader.kill9()
    keeper = enclosure.daemon(settings())
    for pid in pool.workers:
        assert "re-parented" in "; ".join(keeper.wait_event(pid, "killed")["evidence"])
    pool.assert_gone([*pool.workers, *pool.trackers])


@pytest.mark.parametrize("adopter", ["supervise", "python"])
def test_below_a_parent_that_may_have_started_them_workers_from_before_the_daemon_are_left_alone(
    adopter: str, enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    """It was never seen that they had another parent."""
    pool = start_pool("executor", "--method", "spawn", "--busy", adopter=adopter)
    pool.leader.kill9()
    keeper = enclosure.daemon(settings())
    keeper.wait_scanned()
    assert pool.alive(pool.workers) == pool.workers
    for pid in pool.workers:
        assert keeper.get("explain", pid=pid)["explain"]["rule"] == "parent"
        assert keeper.events_of(pid) == []


def test_a_clean_up_ends_what_no_threshold_would_and_nobody_whose_parent_lives(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings("report", orphan_age_limit='"1h"'))
    dead = start_pool("joblib-loky", "--idle")
    living = start_pool("joblib-loky", "--idle")
    dead.leader.kill9()
    wait_listed(keeper, dead)
    everyone = [*dead.workers, *living.workers, living.pid]
    ids = [[pid, int(enclosure.stat(pid)[19])] for pid in everyone]
    dry = {record["pid"]: record["verdict"] for record in keeper.get("cleanup", dry_run=True)["orphans"]}
    assert {pid for pid, verdict in dry.items() if verdict == "kill"} == set(dead.workers)
    assert keeper.get("cleanup", processes=ids)["after"] >= 0
    for pid in dead.workers:
        assert keeper.wait_event(pid, "killed")["result"] == "killed"
    dead.assert_gone([*dead.workers, *dead.trackers])
    assert living.alive([*living.workers, living.pid]) == [*living.workers, living.pid]
    status = keeper.get("status")["status"]
    assert status["reaped_total"] == len(dead.workers)
    assert status["freed_bytes_total"] > 0


def reaperctl(enclosure: Enclosure, *words: str) -> bytes:
    """Return what a command printed as JSON."""
    command = enclosure.start([sys.executable, "-m", "reaperd.ctl.main", *words, "--json"])
    assert command.stdout is not None
    told = command.stdout.read()
    assert command.wait() == 0, enclosure.read_errors()
    return told


def test_without_a_daemon_orphans_are_watched_and_cleaned_up_but_for_whoever_is_named(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    dead, living = (start_pool("joblib-loky", "--idle") for _ in range(2))
    dead.leader.kill9()
    left, *others = dead.workers
    told = reaperctl(enclosure, "monitor", "--local", "--duration", "1", "--interval", "0.2")
    lines = [json.loads(line) for line in told.splitlines()]
    assert len(lines) > 1
    assert [line["orphans"]["processes"] for line in lines] == [len(dead.workers)] * len(lines)
    assert {one["pid"] for one in lines[-1]["busiest"]} >= set(dead.workers)
    assert lines[-1]["sessions"] is None
    records = json.loads(reaperctl(enclosure, "cleanup", "--local", "--yes", "--except", str(left)))
    assert [one["pid"] for one in records if one["result"] == "killed"] == others
    assert dead.alive(dead.workers) == [left]
    assert living.alive([*living.workers, living.pid]) == [*living.workers, living.pid]


# -- from a script --------------------------------------------------------------------------------


def clean_up(enclosure: Enclosure, socket: str) -> dict[str, Any]:
    """Return what a script that has called ``agent.emergency_cleanup()`` says of it."""
    script = enclosure.start([sys.executable, os.path.join(ZOO, "cleaner.py")], REAPER_SOCKET=socket)
    assert script.stdout is not None
    line = script.stdout.readline()
    assert line, enclosure.read_errors()
    assert script.wait() == 0
    told: dict[str, Any] = json.loads(line)
    return told


@pytest.mark.parametrize("action", ["report", None])
def test_a_script_ends_its_users_orphans_with_a_daemon_or_without(
    action: str | None, enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    """What no threshold would end, for they are idle and young; nobody whose parent lives, and nobody else's."""
    socket = "/nonexistent/reaper.sock"
    keeper = enclosure.daemon(settings(action, orphan_age_limit='"1h"')) if action else None
    if keeper:
        socket = keeper.daemon.socket
    mine, living = start_pool("joblib-loky", "--idle"), start_pool("joblib-loky", "--idle")
    theirs = start_pool("joblib-loky", "--idle", uid=STRANGER) if interpreter_for(STRANGER) else None
    for pool in filter(None, (mine, theirs)):
        pool.leader.kill9()
        if keeper:
            wait_listed(keeper, pool)
    told = clean_up(enclosure, socket)
    assert set(mine.workers) <= set(told["killed"]) <= {*mine.workers, *mine.trackers}
    assert (told["denied"], told["remaining"], told["loaded"]) == ([], [], [])
    assert all(any("loky" in sentence for sentence in evidence) for evidence in told["evidence"])
    assert told["own"] == told["own_after"] != []
    mine.assert_gone([*mine.workers, *mine.trackers])
    assert living.alive([*living.workers, living.pid]) == [*living.workers, living.pid]
    if theirs:
        assert theirs.alive(theirs.workers) == theirs.workers
    again = clean_up(enclosure, socket)
    assert (again["killed"], again["reclaimed"], again["remaining"]) == ([], [], [])


def test_a_daemon_that_signals_nobody_ends_none_for_a_script_either(
    enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    keeper = enclosure.daemon(settings("report") + "dry_run = true\n")
    pool = start_pool("joblib-loky", "--idle")
    pool.leader.kill9()
    wait_listed(keeper, pool)
    assert "dry_run" in clean_up(enclosure, keeper.daemon.socket)["refused"]
    assert pool.alive(pool.workers) == pool.workers


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_ignores_sigterm_is_killed(
    method: str, enclosure: Enclosure, start_pool: Callable[..., Pool]
) -> None:
    """A forkserver has ended by then, and no orphan stands above its workers any more."""
    keeper = enclosure.daemon(settings())
    pool = start_pool("executor", "--method", method, "--busy", REAPER_TEST_IGNORE="SIGTERM")
    for pid in pool.workers:
        assert int(_status(enclosure, pid, "SigIgn"), 16) >> (signal.SIGTERM - 1) & 1
    pool.leader.kill9()
    for pid in pool.workers:
        assert keeper.wait_event(pid, "killed")["signals"] == ["SIGTERM", "SIGKILL"]
    pool.assert_gone(pool.workers)


def _status(enclosure: Enclosure, pid: int, name: str) -> str:
    lines = enclosure.read(pid, "status").decode().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
