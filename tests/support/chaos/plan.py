"""From a seed to a sequence of steps, the same for the same seed. Pure: no step depends on what happened in another.

Leaders, workers and bystanders bear tokens (``L3``, ``L3.w2``, ``B7``); what the daemon, the clock and the scheduler make
of a step is not known here, so a step may find that somebody it names is gone already.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_LEADERS = 14
MAX_BYSTANDERS = 12
MAX_WORKERS = 8
CALM_EVERY = 300  # steps

# Kinds of workers, with their weights: see the methods of zygote.Leader. The costly ones start an interpreter.
KINDS = {
    "forked": 20,
    "bare": 8,
    "execed": 16,
    "scrubbed": 7,
    "scrubbed-below": 6,
    "grandchild": 6,
    "detached": 6,
    "detached-execed": 7,
    "deaf": 7,
    "deaf-execed": 5,
    "breeder": 5,
    "slow": 6,
    "nested": 2,
    "spared": 4,
    "spared-execed": 4,
    "spared-scrubbed": 3,
    "spared-family": 2,
    "turncoat": 3,
    "moved": 2,
    "tracker": 3,
    "stubborn-tracker": 1,
}
COSTLY = ("nested", "tracker", "stubborn-tracker")
# What can have begun before its leader registered: it carries no mark, and is known by descent alone.
EARLY = ("forked", "execed", "bare", "slow")
# What a leader starts that has ended its session: it is nobody's.
STRAY = ("forked", "execed", "bare", "deaf")
ENDS = {"kill": 30, "term": 12, "segv": 6, "at-once": 10, "clean": 16, "exception": 6, "unregister": 10, "unregister-at-once": 4}  # fmt: skip
BYSTANDERS = {"plain": 5, "orphan": 3, "other-user": 3, "stamped-child": 3, "stamped-other-user": 3, "stamped-elsewhere": 3}  # fmt: skip
STEPS = {
    "leader": 24,
    "grow": 9,
    "end": 20,
    "burst": 2,
    "kill-workers": 5,
    "unregister": 3,
    "stop": 3,
    "bystander": 5,
    "dismiss": 4,
    "hold-daemon": 2,
    "freeze-daemon": 2,
    "hold-gate": 2,
    "fill-disk": 1,
    "kill-daemon": 3,
    "restart-daemon": 1,
    "reload": 1,
    "kill-gate": 1,
    "ask": 4,
    "pass": 13,
}


@dataclass(frozen=True)
class Abilities:
    """What can be done here: becoming another user, moving into cgroups and mounting all need root."""

    other_users: bool
    cgroups: bool
    freezing: bool = False  # of a cgroup on the unified hierarchy
    mounts: bool = False


@dataclass(frozen=True)
class Step:
    """One step; ``facts`` say whom it is about and how."""

    number: int
    op: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.number:6} {self.op:15} " + " ".join(
            f"{key}={value}" for key, value in self.facts.items()
        )


@dataclass
class _PlannedLeader:
    token: str
    other_user: bool
    registered: bool = True
    workers: list[str] = field(default_factory=list)


def plan(seed: int, steps: int, abilities: Abilities) -> Iterator[Step]:
    """Yield ``steps`` steps and some more, after which nothing is alive."""
    return _Planner(seed, abilities).run(steps)


class _Planner:
    def __init__(self, seed: int, abilities: Abilities) -> None:
        self._random = random.Random(seed)
        self._abilities = abilities
        self._leaders: dict[str, _PlannedLeader] = {}
        self._known: list[str] = []  # leaders that live or have lived lately: whose stamp can be copied
        self._bystanders: list[str] = []
        self._count = 0
        self._away = 0  # for how many steps there is no daemon yet
        self._full = 0  # for how many steps the daemon's disk is full yet

    def run(self, steps: int) -> Iterator[Step]:
        for number in range(1, steps + 1):
            if number % CALM_EVERY == 0:
                yield from self._calm(number)
                continue
            if self._away:
                self._away -= 1
                if not self._away:
                    yield Step(number, "start-daemon", self._start())
                    continue
            if self._full:
                self._full -= 1
                if not self._full:
                    yield Step(number, "free-disk", {})
                    continue
            op, facts = self._choose()
            yield Step(number, op, facts)
        yield from self._calm(steps + 1)

    def _calm(self, number: int) -> Iterator[Step]:
        """End everybody, and see that all is as it was in the beginning."""
        if self._away:
            self._away = 0
            yield Step(number, "start-daemon", {"eagerly": False, "read_only": False})
        if self._full:
            self._full = 0
            yield Step(number, "free-disk", {})
        ends = [(token, *self._manner()) for token in self._leaders]
        self._leaders.clear()
        yield Step(number, "calm", {"ends": ends, "bystanders": list(self._bystanders)})
        self._bystanders.clear()

    def _choose(self) -> tuple[str, dict[str, Any]]:
        while True:
            op = self._weighted(STEPS)
            facts: dict[str, Any] | None = getattr(self, "_" + op.replace("-", "_"))()
            if facts is not None:
                return op, facts

    # -- one method a step: its facts, None where it can't be done now

    def _leader(self) -> dict[str, Any] | None:
        if len(self._leaders) >= MAX_LEADERS:
            return None
        token = self._token("L")
        other_user = self._abilities.other_users and self._chance(0.25)
        leader = self._leaders[token] = _PlannedLeader(token, other_user)
        self._known = [*self._known[-20:], token]
        return {
            "token": token,
            "other_user": other_user,
            "cgroup": self._abilities.cgroups and self._chance(0.3),
            "adopted": self._chance(0.25),
            "deaf": self._chance(0.1),
            "waits_for_none": self._chance(0.3),
            "zombie_s": self._random.choice([0.0, 0.0, 0.0, 0.3, 3.0]),
            "early": self._workers(leader, self._random.choice([0, 0, 0, 1, 2]), EARLY),
            "workers": self._workers(leader, self._random.choice([0, 1, 1, 2, 2, 3, 4, 6, MAX_WORKERS])),
        }

    def _grow(self) -> dict[str, Any] | None:
        leader = self._some_leader()
        if leader is None or len(leader.workers) >= 2 * MAX_WORKERS:
            return None
        count = self._random.randint(1, 3)
        return {
            "token": leader.token,
            "workers": self._workers(leader, count, None if leader.registered else STRAY),
        }

    def _end(self) -> dict[str, Any] | None:
        leader = self._some_leader()
        if leader is None:
            return None
        del self._leaders[leader.token]
        # Impatient: whatever is still on its way then.
        return {"ends": [(leader.token, *self._manner())], "patient": self._chance(0.7)}

    def _burst(self) -> dict[str, Any] | None:
        if len(self._leaders) < 4:
            return None
        tokens = self._random.sample(list(self._leaders), self._random.randint(3, len(self._leaders)))
        for token in tokens:
            del self._leaders[token]
        return {"ends": [(token, *self._manner()) for token in tokens], "patient": self._chance(0.7)}

    def _kill_workers(self) -> dict[str, Any] | None:
        leader = self._some_leader()
        if leader is None or not leader.workers:
            return None
        count = self._random.randint(1, len(leader.workers))
        tokens = self._random.sample(leader.workers, count)
        leader.workers = [token for token in leader.workers if token not in tokens]
        return {"workers": tokens}

    def _unregister(self) -> dict[str, Any] | None:
        leader = self._some_leader()
        if leader is None or not leader.registered:
            return None
        leader.registered = False
        return {"token": leader.token}

    def _stop(self) -> dict[str, Any] | None:
        leader = self._some_leader()
        if leader is None or not leader.registered or self._away:
            return None
        del self._leaders[leader.token]
        return {"token": leader.token}

    def _bystander(self) -> dict[str, Any] | None:
        if len(self._bystanders) >= MAX_BYSTANDERS:
            return None
        kind = self._weighted(BYSTANDERS)
        if kind.endswith("other-user") and not self._abilities.other_users:
            return None
        if kind.endswith("elsewhere") and not self._abilities.cgroups:
            return None
        if kind.startswith("stamped") and not self._known:
            return None
        token = self._token("B")
        self._bystanders.append(token)
        facts = {"token": token, "kind": kind}
        return (
            {**facts, "stamp_of": self._random.choice(self._known)} if kind.startswith("stamped") else facts
        )

    def _dismiss(self) -> dict[str, Any] | None:
        if not self._bystanders:
            return None
        token = self._random.choice(self._bystanders)
        self._bystanders.remove(token)
        return {"token": token}

    def _hold_daemon(self) -> dict[str, Any] | None:
        return None if self._away else {"for_s": round(self._random.uniform(0.02, 0.7), 3)}

    def _freeze_daemon(self) -> dict[str, Any] | None:
        """Core and gate at once, as a container or a service is frozen."""
        return self._hold_daemon() if self._abilities.freezing else None

    def _hold_gate(self) -> dict[str, Any] | None:
        return self._hold_daemon()

    def _fill_disk(self) -> dict[str, Any] | None:
        if self._away or self._full or not self._abilities.mounts:
            return None
        self._full = self._random.choice([1, 2, 4, 8, 16])
        return {}

    def _start(self) -> dict[str, Any]:
        self._full = 0
        read_only = self._abilities.mounts and self._chance(0.1)
        return {"eagerly": not read_only and self._chance(0.4), "read_only": read_only}

    def _kill_daemon(self) -> dict[str, Any] | None:
        if self._away:
            return None
        self._away = self._random.choice([1, 1, 1, 2, 4, 8])
        return {"after_s": self._moment(), "forget": self._chance(0.2)}

    def _restart_daemon(self) -> dict[str, Any] | None:
        if self._away:
            return None
        self._away = self._random.choice([1, 1, 3])
        return {"forget": self._chance(0.1)}

    def _reload(self) -> dict[str, Any] | None:
        return None if self._away else {"good": self._chance(0.7)}

    def _kill_gate(self) -> dict[str, Any] | None:
        return None if self._away else {}

    def _ask(self) -> dict[str, Any] | None:
        return None if self._away else {}

    def _pass(self) -> dict[str, Any] | None:
        return {"for_s": self._moment() if self._chance(0.5) else round(self._random.uniform(0.05, 0.5), 3)}

    # -- choosing

    def _workers(
        self, leader: _PlannedLeader, count: int, kinds: tuple[str, ...] | None = None
    ) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        while len(found) < count:
            kind = self._weighted({name: KINDS[name] for name in kinds or KINDS})
            if kind == "turncoat" and (leader.other_user or not self._abilities.other_users):
                continue
            if kind == "moved" and (leader.other_user or not self._abilities.cgroups):
                continue
            if kind in COSTLY and leader.other_user:  # who may not execute our interpreter
                continue
            token = self._token(f"{leader.token}.w")
            leader.workers.append(token)
            found.append((token, kind))
        return found

    def _manner(self) -> tuple[str, int]:
        return self._weighted(ENDS), self._random.choice([0, 0, 1, 3, 77])

    def _moment(self) -> float:
        """Return seconds, most often a few milliseconds."""
        return round(self._random.expovariate(150.0), 4)

    def _some_leader(self) -> _PlannedLeader | None:
        return self._leaders[self._random.choice(list(self._leaders))] if self._leaders else None

    def _token(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _weighted(self, weights: dict[str, int]) -> str:
        return self._random.choices(list(weights), list(weights.values()))[0]
