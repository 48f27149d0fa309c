"""Random steps, and kills of the daemon at random moments, while every promise is checked. ``make chaos`` is the long run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from chaos.kin import Session, Violation
from chaos.perform import Performance, abilities, evidence
from chaos.plan import Abilities, plan
from chaos.stage import Stage
from harness import Scratch

FIXED_SEED = 20
STEPS = 80
MOMENTS = 20
# What has a mark of its own: a daemon that was killed before it noted anything still finds it.
MARKED = ("forked", "bare", "execed", "detached", "detached-execed", "deaf", "slow", "grandchild", "breeder")


@pytest.fixture
def stage(scratch: Scratch, run: str) -> Iterator[Stage]:
    found = Stage(scratch, run)
    yield found
    found.close()


def fresh_seed() -> int:
    return random.SystemRandom().randrange(2**32)


@pytest.mark.parametrize("choose", [lambda: FIXED_SEED, fresh_seed], ids=["a fixed seed", "a fresh seed"])
def test_no_promise_is_broken_in_some_hundred_random_steps(choose: Callable[[], int], stage: Stage) -> None:
    seed = choose()
    print(f"seed {seed}, {STEPS} steps")
    performance = Performance(stage)
    try:
        performance.run(plan(seed, STEPS, abilities(stage)))
    except Violation as violation:
        pytest.fail(f"seed {seed}: {evidence(violation, performance)}", pytrace=False)
    assert stage.counts["event reaped"] > 5, "so few sessions prove nothing"


def test_the_same_seed_gives_the_same_plan() -> None:
    every = Abilities(other_users=True, cgroups=True, freezing=True, mounts=True)
    first, second, other = ([*map(str, plan(seed, 2000, every))] for seed in (7, 7, 8))
    assert first == second
    assert first != other


def test_a_daemon_killed_at_twenty_moments_loses_no_session_and_leaves_nobody_alive(stage: Stage) -> None:
    seed = fresh_seed()
    print(f"seed {seed}")
    try:
        kill_daemon_at_moments(stage, random.Random(seed))
    except Violation as violation:
        pytest.fail(f"seed {seed}: {evidence(violation, Performance(stage))}", pytrace=False)
    assert stage.life.number == MOMENTS + 1


def kill_daemon_at_moments(stage: Stage, chance: random.Random) -> None:
    """Have as many sessions begin, live and end as there are moments, and SIGKILL the daemon in each of them."""
    stage.start_daemon()
    living: list[Session] = []
    numbers = itertools.count(1)
    for _ in range(MOMENTS):
        token = f"M{next(numbers)}"
        kinds = chance.choices(MARKED, k=chance.choice([0, 1, 1, 2, 3]))
        session = stage.start_leader(
            token, uid=0, timeout=0.5, workers=[(f"{token}.w{at}", kind) for at, kind in enumerate(kinds)]
        )
        living.append(session)
        when = chance.choice(["it registers", "it lives", "it dies", "it is reaped"])
        if when != "it registers":
            stage.wait_until(lambda session=session: session.told_s is not None, 60.0, "no leader registers")  # type: ignore[misc]
        if when in ("it dies", "it is reaped"):
            end(stage, living, session)
        stage.poll(chance.uniform(0.0, 0.6) if when == "it is reaped" else chance.expovariate(150.0))
        stage.watched.kill()
        while living and chance.random() < 0.5:  # unseen
            end(stage, living, chance.choice(living))
        stage.start_daemon()
    for session in list(living):
        end(stage, living, session)
    stage.be_calm()


DISTURBANCES: dict[str, Callable[[Stage], None]] = {
    "the daemon is stopped": lambda stage: stage.watched.hold(0.4),
    "core and gate are frozen": lambda stage: stage.watched.freeze(0.4),
    "the gate is stopped": lambda stage: stage.watched.hold_gate(0.4),
    "the disk is full": lambda stage: stage.fill_disk(),
    "the disk is read-only": lambda stage: None,
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_sessions_begin_and_end_as_ever_while(what: str, stage: Stage) -> None:
    if "frozen" in what and not stage.watched.can_freeze:
        pytest.skip("no cgroup can be frozen here")
    if "disk" in what and not stage.watched.has_disk:
        pytest.skip("no disk can be mounted here")
    stage.watched.let_write(what != "the disk is read-only")
    stage.start_daemon()
    living: list[Session] = []
    try:
        begin(stage, living, 4)
        DISTURBANCES[what](stage)
        for session in living[:2]:
            end(stage, living, session)
        begin(stage, living, 2)
        end(stage, living, living[0])
        stage.poll(0.3)
        stage.free_disk()
        begin(stage, living, 1)
        for session in list(living):
            end(stage, living, session)
        stage.be_calm()
    except Violation as violation:
        pytest.fail(evidence(violation, Performance(stage)), pytrace=False)
    told = stage.counts["event reaped"]
    assert told == 7 or (what == "the disk is full" and told < 7), (
        "what could not be written is missing, and only that"
    )
    assert stage.life.number == 1
    log = stage.daemon.read_log()
    assert ("cannot use the state database" in log) == (what == "the disk is full")
    assert ("are kept in memory only" in log) == (what == "the disk is read-only")


def begin(stage: Stage, living: list[Session], count: int) -> None:
    """Have that many sessions begin, each with workers of several kinds, and wait until each has said whether it was accepted."""
    for _ in range(count):
        token = f"D{len(stage.sessions) + 1}"
        workers = [(f"{token}.w{at}", kind) for at, kind in enumerate(("forked", "execed", "detached"))]
        session = stage.start_leader(token, uid=0, timeout=0.5, workers=workers)
        living.append(session)
        stage.wait_until(
            lambda session=session: session.told_s is not None and len(session.started) == 3,  # type: ignore[misc]
            60.0,
            "no leader registers",
        )


def end(stage: Stage, living: list[Session], session: Session) -> None:
    living.remove(session)
    stage.end_leader(session, "kill")
