"""What people and programs are told: events, sessions and status as JSON-ready values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import wire
from reaperd import pages
from reaperd.escalation import Stage
from reaperd.hunt import Hunt
from reaperd.ledger import Entry, Phase, Target
from reaperd.model import SIGNAL_NAMES, Cause, CauseKind, Freed, Member, ProcessId, Session, Usage
from reaperd.verdicts import Circumstances, Suspect, Verdict

STATES = ("running", "ending", "ended")  # of a session


def cause_words(cause: Cause | None) -> str:
    """Return a cause for a log line."""
    if cause is None or cause.kind is CauseKind.UNKNOWN:
        return "unknown"
    return f"{cause.kind.value}:{cause.code}" + ("+core" if cause.core_dumped else "")


def cause_record(cause: Cause | None) -> dict[str, Any] | None:
    """Return a cause as it stands in an event."""
    if cause is None:
        return None
    record: dict[str, Any] = {"kind": cause.kind.value, "code": cause.code}
    if cause.core_dumped:
        record["core_dumped"] = True
    return record


def event(kind: str, **fields: Any) -> dict[str, Any]:
    """Return an event with every field that others rely on; its time is added when it is stored."""
    return {
        "kind": kind,
        "session": None,
        "uid": None,
        "cause": None,
        "processes": [],
        "latency_s": None,
        "freed": _freed_record(Freed()),
        **fields,
    }


def session_event(kind: str, session: Session, **fields: Any) -> dict[str, Any]:
    """Return an event about a session."""
    return event(
        kind,
        session=session.id,
        name=session.name,
        uid=session.uid,
        leader={"pid": session.leader.pid, "start_ticks": session.leader.start_ticks},
        **_container_field(session.namespaces.pid),
        **({"attempt": _attempt_record(session)} if session.attempt else {}),
        **{"cause": cause_record(session.cause), **fields},
    )


def _container_field(pid_namespace: str) -> dict[str, str]:
    """Return where a session was, if not on the machine itself: whoever is of its uid elsewhere is somebody else."""
    on_machine = pid_namespace in ("", f"pid:[{wire.PID_NAMESPACE_OF_MACHINE}]")
    return {} if on_machine else {"container": pid_namespace}


def end_event(entry: Entry, *, dry_run: bool) -> dict[str, Any]:
    """Return the one event that tells how a session ended and what was done about what it left."""
    targets = entry.targets.values()
    gone_at_s = [t.gone_at_s for t in targets if t.gone_at_s is not None and not t.tracker]
    latency_s = max(gone_at_s) - entry.died_at_s if gone_at_s and entry.died_at_s is not None else None
    touched = any(target.signals or (dry_run and target.stage is not Stage.GONE) for target in targets)
    return session_event(
        "reaped" if touched else "ended",
        entry.session,
        processes=[process_record(target) for target in targets],
        left_alone=_left_alone(entry),
        stopped_by_uid=entry.stopped_by_uid,
        latency_s=None if latency_s is None else round(latency_s, 6),
        freed=_freed_record(freed_by(entry)),
        **({"dry_run": True} if dry_run else {}),
    )


def _left_alone(entry: Entry) -> list[dict[str, Any]]:
    return [{"pid": id_.pid, "reason": reason} for id_, reason in entry.left_alone.items()]


def _freed_record(freed: Freed) -> dict[str, int]:
    return {"rss_bytes": freed.rss_bytes, "shm_bytes": freed.shm_bytes, "gpu_bytes": freed.gpu_bytes}


def freed_by(entry: Entry) -> Freed:
    """Return the memory that the end of a session gave back."""
    gone = [t for t in entry.targets.values() if t.stage is Stage.GONE and t.signals]
    shm_bytes = entry.reclaimed.shm_bytes if entry.reclaimed is not None else 0
    return Freed(rss_bytes=sum(t.member.process.rss_bytes for t in gone), shm_bytes=shm_bytes)


def process_record(target: Target) -> dict[str, Any]:
    """Return what an event says of one process."""
    member = target.member
    signals = [SIGNAL_NAMES[number] for number in target.signals]
    return {
        "pid": member.process.id.pid,
        "role": member.role.value,
        "framework": member.framework,
        "signal": signals[-1] if signals else None,
        "signals": signals,
        "result": result_of(target),
        "evidence": list(member.evidence),
    }


def result_of(target: Target) -> str:
    """Return what became of a process, in a word."""
    if target.stage is Stage.GONE:
        return "killed" if target.signals else "exited"
    if target.denied:
        return "denied"
    return "stuck" if target.stage is Stage.STUCK else "kept"


def orphan_process(one: Suspect, verdict: Verdict) -> dict[str, Any]:
    """Return what an event says of one orphan that was not ended."""
    return {
        "pid": one.id.pid,
        "start_ticks": one.id.start_ticks,
        "role": one.role.value,
        "framework": one.framework,
        "signal": None,
        "signals": [],
        "result": "kept",
        "evidence": list(verdict.evidence),
    }


def orphan_outcome(id_: ProcessId, uid: int | None, outcome: str, after_s: float) -> dict[str, Any]:
    """Return the event that tells what became of an orphan that was left alone: ``exited`` or ``claimed`` by a session."""
    process: dict[str, Any] = {
        "pid": id_.pid,
        "start_ticks": id_.start_ticks,
        "signal": None,
        "signals": [],
        "result": outcome,
    }
    return event("orphan", uid=uid, outcome=outcome, after_s=after_s, processes=[process])


def hunt_event(kind: str, hunt: Hunt) -> dict[str, Any]:
    """Return the event that tells how the orphans of one dead pool parent were ended."""
    touched = [target for target in hunt.targets.values() if target.signals or target.denied]
    _, freed = ended_by(hunt)
    gone_at_s = [t.gone_at_s for t in touched if t.gone_at_s is not None]
    return event(
        kind,
        uid=hunt.uid,
        rule=hunt.rule,
        asked_by_uid=hunt.asked_by_uid,
        **_container_field(hunt.container),
        processes=[
            {**process_record(target), "start_ticks": target.member.process.id.start_ticks}
            for target in touched
        ],
        latency_s=round(max(gone_at_s) - hunt.began_s, 6) if gone_at_s else None,
        freed=_freed_record(freed),
    )


def ended_by(hunt: Hunt) -> tuple[int, Freed]:
    """Return how many have ended after a signal of ours, and what that has given back to the machine."""
    gone = [t.member.process for t in hunt.targets.values() if t.signals and t.stage is Stage.GONE]
    gpu_bytes = sum(hunt.gpu_bytes.get(one.id, 0) for one in gone)
    return len(gone), Freed(rss_bytes=sum(one.rss_bytes for one in gone), gpu_bytes=gpu_bytes)


def orphan_record(
    one: Suspect,
    given: Circumstances,
    verdict: Verdict,
    target: Target | None,
    *,
    ends_in_s: float | None = None,
) -> dict[str, Any]:
    """Return what ``orphans`` says of one. ``verdict`` may be older than ``given``, which is of now."""
    record = given.record
    stopped_s = None if record.quarantined_at_s is None else given.now_s - record.quarantined_at_s
    return {
        "pid": one.id.pid,
        "start_ticks": one.id.start_ticks,
        "uid": one.process.uid,
        "verdict": verdict.fate.value,
        "rule": verdict.rule,
        "framework": one.framework,
        "role": one.role.value,
        "orphaned_s": round(given.now_s - record.lost_at_s, 1) if one.is_lost else None,
        "cpu_percent": None if given.load is None else round(given.load.mean, 1),
        "rss_bytes": one.process.rss_bytes,
        "gpu_bytes": one.gpu_bytes,
        "quarantined_s": None if stopped_s is None else round(stopped_s, 1),
        "ends_in_s": None if ends_in_s is None else round(ends_in_s, 1),
        "ends_by_itself": _alone(one),
        "cmdline": list(one.process.argv) or None,
        "evidence": list(verdict.prospects),
        "result": None if target is None or not target.done else result_of(target),
    }


def explanation(one: Suspect, verdict: Verdict, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``explain`` says of a process that lives."""
    is_workers = one.signature is not None or one.process.forked
    return {
        "pid": one.id.pid,
        "alive": True,
        "verdict": verdict.fate.value,
        "rule": verdict.rule,
        "evidence": list(verdict.prospects),
        "session": one.session or one.spared_by_session or None,
        "framework": one.framework if is_workers else None,
        "role": one.role.value if is_workers else None,
        "ends_by_itself": _alone(one),
        "cmdline": list(one.process.argv) or None,
        "events": events,
    }


def _alone(one: Suspect) -> str | None:
    """Return what such a process does once its parent is gone, in words."""
    return (one.signature.alone or None) if one.signature else None


def explanation_of_the_gone(pid: int, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``explain`` says of a process that is no more: what the history has of it."""
    last = events[-1]
    told: dict[str, Any] = next((one for one in last["processes"] if one.get("pid") == pid), {})
    return {
        "pid": pid,
        "alive": False,
        "verdict": "kill" if told.get("signals") else "spare",
        "rule": last.get("rule") or last["kind"],
        "evidence": told.get("evidence", []),
        "session": last.get("session"),
        "framework": told.get("framework"),
        "role": told.get("role"),
        "ends_by_itself": None,
        "cmdline": None,
        "events": events,
    }


def session_record(
    entry: Entry,
    members: Mapping[ProcessId, Member],
    usage: Mapping[ProcessId, Usage],
    *,
    leader_cmdline: list[str] | None,
    progress: pages.Progress | None,
) -> dict[str, Any]:
    """Return what ``ps`` says of one session; the command line is None for who may not see it.

    ``usage`` is of the members, and of the leader while it lives.
    """
    session = entry.session
    leader = usage.get(session.leader)
    return {
        "id": session.id,
        "name": session.name,
        "uid": session.uid,
        "state": state_of(entry),
        "phase": entry.phase.value,
        "started_at": session.started_at_utc,
        "attempt": _attempt_record(session),
        "isolated": session.scope is not None,
        "leader": {
            "pid": session.leader.pid,
            "start_ticks": session.leader.start_ticks,
            "cmdline": leader_cmdline,
            "cpu_percent": None if leader is None else round(leader.cpu_percent, 1),
            "rss_bytes": None if leader is None else leader.rss_bytes,
        },
        "cause": cause_record(session.cause),
        "progress": None if progress is None else progress_record(progress),
        "workers": [
            {
                "pid": id_.pid,
                "start_ticks": id_.start_ticks,
                "role": member.role.value,
                "framework": member.framework,
                "cpu_percent": round(usage[id_].cpu_percent, 1),
                "rss_bytes": usage[id_].rss_bytes,
                "evidence": list(member.evidence),
            }
            for id_, member in members.items()
        ],
        "left_alone": _left_alone(entry),
    }


def _attempt_record(session: Session) -> dict[str, int] | None:
    if session.attempt is None:
        return None
    number, most = session.attempt
    return {"number": number, "most": most}


def progress_record(progress: pages.Progress) -> dict[str, Any]:
    """Return how far a session says it is."""
    done, total = (_whole(number) for number in (progress.done, progress.total))
    return {"done": done, "total": total, "message": progress.message}


def _whole(number: float | None) -> float | int | None:
    return int(number) if number is not None and abs(number) < 2**53 and number == int(number) else number


def state_of(entry: Entry) -> str:
    """Return one of ``STATES``."""
    if entry.concluded:
        return "ended"
    return "running" if entry.phase is Phase.WATCHED and not entry.session.ending else "ending"
