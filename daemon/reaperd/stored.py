"""What the rows of reaper.db say: sessions, suspects and events, written as JSON and read. Pure.

A file can be damaged, or be another's work: what is read has the types that it is said to have, or is a ValueError.
"""

from __future__ import annotations

import json
import math
from typing import Any

from agent import wire
from reaperd.model import Cause, CauseKind, Namespaces, ProcessId, Session
from reaperd.verdicts import Record

_MORE_THAN_ANY = 2**63  # start ticks are the largest: unsigned long in proc(5), 10 ms each
# What comes of taking one kind of JSON for another, and of JSON that is nested without end.
_NONSENSE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    wire.WireError,
)


def pack_session(session: Session) -> str:
    """Return a session as its row has it."""
    return json.dumps(_record(session))


def parse_session(text: Any) -> Session:
    """Return the session in a row; ValueError."""
    try:
        return _session(json.loads(text))
    except _NONSENSE as error:
        raise ValueError(f"no session: {error!r:.200}") from None


def pack_suspect(record: Record) -> str:
    """Return what is remembered of a suspect as its row has it, its samples apart."""
    return json.dumps(
        [record.lost_at_s, record.lost_parent, record.quarantined_at_s, record.condemned_at_s, record.uid]
    )


def parse_suspect(text: Any) -> Record:
    """Return what is remembered of a suspect; ValueError."""
    try:
        return _suspect(json.loads(text))
    except _NONSENSE as error:
        raise ValueError(f"no suspect: {error!r:.200}") from None


def parse_process_id(pid: Any, start_ticks: Any) -> ProcessId:
    """Return the process that two columns name; ValueError."""
    if not _are_numbers(pid, start_ticks):
        raise ValueError(f"no process: {pid!r:.40}, {start_ticks!r:.40}")
    return ProcessId(pid, start_ticks)


def parse_event(text: Any) -> dict[str, Any]:
    """Return an event with the fields that others rely on, of which there may be none in an old row; ValueError."""
    try:
        event = json.loads(text)
        processes = event.get("processes", [])
        if not isinstance(event["kind"], str) or not isinstance(event.get("at", ""), str):
            raise TypeError("its kind or its time is no text")
        if not isinstance(event.get("leader") or {}, dict) or not isinstance(processes, list):
            raise TypeError("its leader or its processes are none")
        if not _are_numbers(*(one["pid"] for one in processes)):
            raise TypeError("a pid is none")
    except _NONSENSE as error:
        raise ValueError(f"no event: {error!r:.200}") from None
    found: dict[str, Any] = event
    return found


def _are_numbers(*values: Any) -> bool:
    return all(type(value) is int and -1 <= value < _MORE_THAN_ANY for value in values)


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _record(session: Session) -> dict[str, Any]:
    cause = session.cause
    return {
        "id": session.id,
        "name": session.name,
        "uid": session.uid,
        "gid": session.gid,
        "leader": session.leader,
        "started_at": session.started_at_utc,
        "page_fd": session.page_fd,
        "page_inode": session.page_inode,
        "cgroup": session.cgroup,
        "scope": session.scope,
        "adopters": sorted(session.adopters),
        "subreapers": sorted(session.subreapers),
        "init": session.init,
        # Without what is empty at the end, which an earlier daemon does not know.
        "namespaces": list(session.namespaces if session.namespaces.shm else session.namespaces[:3]),
        "oom_counter": session.oom_counter,
        "oom_kills": session.oom_kills,
        "spared": sorted(session.spared),
        "seen": sorted(session.seen),
        "kept": sorted(session.kept),
        "cause": None if cause is None else [cause.kind.value, cause.code, cause.core_dumped, cause.clean],
        "groups": session.groups,
        "temp_dirs": session.temp_dirs,
        "ending": session.ending,
        "attempt": session.attempt,
    }


def _session(record: dict[str, Any]) -> Session:
    cause = record["cause"]
    session = Session(
        id=record["id"],
        name=record["name"],
        uid=record["uid"],
        gid=record["gid"],
        leader=ProcessId(*record["leader"]),
        started_at_utc=record["started_at"],
        page_fd=record["page_fd"],
        page_inode=record["page_inode"],
        cgroup=record["cgroup"],
        scope=record.get("scope"),
        adopters=frozenset(ProcessId(*pair) for pair in record["adopters"]),
        subreapers=frozenset(ProcessId(*pair) for pair in record.get("subreapers", ())),
        init=None if record["init"] is None else ProcessId(*record["init"]),
        namespaces=Namespaces(*_list(record["namespaces"])),
        oom_counter=record["oom_counter"],
        oom_kills=record["oom_kills"],
        kept=frozenset(ProcessId(*pair) for pair in record["kept"]),
        seen=frozenset(ProcessId(*pair) for pair in record["seen"]),
        spared=frozenset(ProcessId(*pair) for pair in record["spared"]),
        cause=None if cause is None else Cause(CauseKind(cause[0]), *cause[1:]),
        groups=tuple(_list(record.get("groups", []))),
        temp_dirs=tuple(_list(record["temp_dirs"])),
        ending=record["ending"],
        attempt=wire.attempt_field(record),
    )
    _check(session)
    return session


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):  # a text is a sequence, too
        raise TypeError(f"not a list: {value!r:.60}")
    return value


def _check(session: Session) -> None:
    """Raise TypeError where a field is not of its type: JSON has others in the same place."""
    ids = (
        session.leader,
        *session.adopters,
        *session.subreapers,
        *(() if session.init is None else (session.init,)),
        *session.kept,
        *session.seen,
        *session.spared,
    )
    known = (session.page_inode, session.oom_kills, session.cause and session.cause.code)
    numbers = (
        *(session.uid, session.gid, *session.groups, session.page_fd),
        *(number for number in known if number is not None),
        *(number for id_ in ids for number in id_),
    )
    if not _are_numbers(*numbers):
        raise TypeError("a uid, a gid, a descriptor, a pid, a count or a start time is none")
    texts = (session.id, session.name, session.started_at_utc, session.oom_counter, *session.temp_dirs)
    groups = (one for one in (session.cgroup, session.scope) if one is not None)
    if not _are_texts(*texts, *session.namespaces, *groups):
        raise TypeError("an id, a name, a time, a namespace or a path is no text")
    session.id.encode()  # it is a key: half of a surrogate pair could not be asked for
    cause = session.cause
    switches = (session.ending, *(() if cause is None else (cause.core_dumped, cause.clean)))
    if not all(isinstance(switch, bool) for switch in switches):
        raise TypeError("whether it is ending, or how its leader ended, is not said")


def _suspect(told: Any) -> Record:
    lost_at_s, lost_parent, quarantined_at_s, condemned_at_s, uid = _list(told)
    times = [at_s for at_s in (lost_at_s, quarantined_at_s, condemned_at_s) if at_s is not None]
    if not all(isinstance(at_s, float) and math.isfinite(at_s) for at_s in times) or lost_at_s is None:
        raise TypeError("a time is none")
    parent = None if lost_parent is None else parse_process_id(*_list(lost_parent))
    if uid is not None and not _are_numbers(uid):
        raise TypeError("the uid is none")
    return Record(lost_at_s, (), parent, quarantined_at_s, condemned_at_s, uid)
