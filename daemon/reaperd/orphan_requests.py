"""What people may ask about orphans that nobody registered, and have done about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent import wire
from reaperd import report
from reaperd.core import Core
from reaperd.gate_link import Peer
from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone
from reaperd.model import Process, ProcessId
from reaperd.orphans import Judged, Orphans
from reaperd.questions import is_of

_MAX_PROCESSES = 10_000  # in one request

MaySee = Callable[[Peer, int | None, int | None], bool]


class OrphanRequests:
    """The operations; a peer sees and acts on what is of its own uid, unless ``may_act`` says otherwise."""

    def __init__(self, core: Core, orphans: Orphans, may_act: MaySee) -> None:
        self._core = core
        self._orphans = orphans
        self._may_act = may_act
        self.operations: dict[str, Callable[[Peer, dict[str, Any]], dict[str, Any]]] = {
            "orphans": self._list,
            "cleanup": self._clean_up,
            "explain": self._explain,
            "protect": self._protect,
            "release": self._release,
        }

    def _list(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        if _switch(message, "score"):
            return {"score": self._score(peer)}
        return {"orphans": self._records(peer, self._orphans.listing()), "leftovers": []}

    def _records(self, peer: Peer, found: list[Judged]) -> list[dict[str, Any]]:
        return [self._orphans.describe(one) for one in found if self._may_act_on(peer, one.suspect.process)]

    def _may_act_on(self, peer: Peer, process: Process) -> bool:
        return self._may_act(peer, process.uid, process.id.pid)

    def _clean_up(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        if _switch(message, "dry_run"):
            return {"orphans": self._records(peer, self._orphans.cleanable()), "leftovers": []}
        if self._core.policy.dry_run:
            raise wire.WireError("not-allowed", "the daemon runs with dry_run: it signals nobody")
        wanted, last = _processes(message.get("processes")), self._core.store.last_event()
        found = self._orphans.clean_up(
            wanted,
            lambda one: self._may_act_on(peer, one.process),
            by_uid=peer.uid,
            container=peer.container,
        )
        return {"orphans": self._records(peer, found), "leftovers": [], "after": last}

    def _explain(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        pid = _pid(peer, message)
        sees_all = self._may_act(peer, None, None)
        events = self._core.store.events_about(pid, uid=None if sees_all else peer.uid)
        try:
            told = self._orphans.explain(pid)
            if not _is_meant(message, told.suspect.id):
                raise ProcessGone(str(pid))
        except ProcessGone:
            if not events:
                nothing = f"there is no process {pid}, and the history does not name it"
                raise wire.WireError("unknown-process", nothing) from None
            return {"explain": report.explanation_of_the_gone(pid, events)}
        if not self._may_act_on(peer, told.suspect.process):
            raise wire.WireError("not-allowed", "that process is another user's")
        return {"explain": report.explanation(told.suspect, told.verdict, events)}

    def _protect(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        undo, (id_, name) = _switch(message, "undo"), self._own_process(peer, message)
        if not undo:
            self._heed(self._orphans.spare(id_, peer.uid))
        elif id_ in self._core.policy.spared:
            self._heed(self._orphans.spare_no_longer(id_, peer.uid))
        else:
            raise wire.WireError("not-protected", f"process {id_.pid} was not spared by hand")
        return {"pid": id_.pid, "start_ticks": id_.start_ticks, "name": name}

    def _release(self, peer: Peer, message: dict[str, Any]) -> dict[str, Any]:
        id_, _ = self._own_process(peer, message)
        if not self._orphans.is_quarantined(id_):
            raise wire.WireError("not-quarantined", f"process {id_.pid} is not in quarantine")
        self._heed(self._orphans.spare(id_, peer.uid))
        return {"pid": id_.pid, "start_ticks": id_.start_ticks}

    def _heed(self, spared: frozenset[ProcessId]) -> None:
        """Spare these whoever would end them: a scan, or the session that they belong to."""
        self._core.policy = self._core.policy._replace(spared=spared)

    def _own_process(self, peer: Peer, message: dict[str, Any]) -> tuple[ProcessId, str]:
        """Return the process that is meant, which must be one that ``peer`` may act on."""
        pid = _pid(peer, message)
        try:
            stat = self._core.observer.proc.stat(pid)
            uid = pidfd.uid_of(pid, self._core.observer.proc)
        except ProcessGone:
            raise wire.WireError("unknown-process", f"there is no process {pid}") from None
        if not _is_meant(message, stat.id):
            raise wire.WireError("unknown-process", f"process {pid} has ended, and another one has its pid")
        if not self._may_act(peer, uid, pid):
            raise wire.WireError("not-allowed", "that process is another user's")
        return stat.id, stat.comm

    def _score(self, peer: Peer) -> dict[str, Any]:
        """Sum up what was left alone although a rule would have had it ended, and what became of it.

        A clean-up that somebody asked for says nothing of the rules.
        """
        events = self._core.store.events_of_kinds("orphan", "killed")
        if not self._may_act(peer, None, None):
            events = [one for one in events if one.get("uid") == peer.uid and is_of(peer.container, one)]
        condemned = {
            _first(one): one["at"]
            for one in events
            if one["kind"] == "orphan" and one.get("would") and _first(one) and "at" in one
        }
        became = [one for one in events if "outcome" in one and _first(one) in condemned]
        exited_s = [one["after_s"] for one in became if one["outcome"] == "exited" and _lasted(one)]
        claimed = sum(one["outcome"] == "claimed" for one in became)
        still = [one.suspect for one in self._orphans.listing() if one.suspect.id in condemned]
        by_rules = [one for one in events if one["kind"] == "killed" and one.get("asked_by_uid") is None]
        return {
            "since": min(condemned.values(), default=None),
            "condemned": len(condemned),
            "exited": len(exited_s),
            "exited_after_s": {
                "median": sorted(exited_s)[len(exited_s) // 2] if exited_s else None,
                "max": max(exited_s, default=None),
            },
            "claimed": claimed,
            "still_there": len([one for one in still if self._may_act_on(peer, one.process)]),
            "killed": sum(len(one.get("processes", ())) for one in by_rules),
        }


def _pid(peer: Peer, message: dict[str, Any]) -> int:
    """Return the pid that is asked about, which must be one of our namespace."""
    if peer.container:
        raise wire.WireError(
            "not-allowed",
            "in a container, a pid is another process's than outside: ask from where the daemon runs",
        )
    return wire.integer_field(message, "pid", least=1)


def _is_meant(message: dict[str, Any], found: ProcessId) -> bool:
    """Say whether who has the pid is the process that is asked about, and not one that has got the pid since."""
    return wire.integer_field(message, "start_ticks", default=found.start_ticks) == found.start_ticks


def _first(one: dict[str, Any]) -> ProcessId | None:
    """Return whom an event about one process is about; None where a damaged one does not say."""
    for process in one.get("processes", ()):
        ticks = process.get("start_ticks")
        return ProcessId(process["pid"], ticks) if type(ticks) is int else None
    return None


def _lasted(one: dict[str, Any]) -> bool:
    return isinstance(one.get("after_s"), (int, float))


def _switch(message: dict[str, Any], key: str) -> bool:
    value = message.get(key, False)
    if not isinstance(value, bool):
        raise wire.WireError("bad-request", f"{key}: must be true or false, got {value!r:.60}")
    return value


def _processes(value: Any) -> list[ProcessId]:
    def is_number(number: Any) -> bool:
        return type(number) is int and 0 <= number < 2**63

    if (
        not isinstance(value, list)
        or len(value) > _MAX_PROCESSES
        or not all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in value)
    ):
        raise wire.WireError(
            "bad-request",
            f"processes: must be a list of at most {_MAX_PROCESSES} pairs of pid and start ticks",
        )
    return [ProcessId(pid, start_ticks) for pid, start_ticks in value]
