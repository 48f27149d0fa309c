"""Which processes the registered sessions lay claim to: those are the sessions' to end, or to spare, and no orphan of a scan."""

from __future__ import annotations

from agent import wire
from reaperd.linux.procfs import ProcFS
from reaperd.model import ProcessId
from reaperd.sessions import Sessions
from reaperd.verdicts import Suspect


class Marks:
    """What the marks of sessions tell alone, where no daemon knows of any."""

    def __init__(self, proc: ProcFS) -> None:
        self._proc = proc

    def session_of(self, one: Suspect) -> tuple[str, str]:
        """Return the session that ``one`` belongs to, and the one that it was meant to outlive; "" for none."""
        process = one.process
        if process.spared:
            return "", min(process.spared)
        for session in (*process.pages, *process.lineage):
            # Whoever has it on record, if anybody does.
            leader = _leader_of(session)
            if leader is not None and self._proc.is_alive(leader):
                return session, ""
        return "", ""


class Claims:
    """Of all sessions on record, and of leaders that live without one."""

    def __init__(self, sessions: Sessions, proc: ProcFS) -> None:
        self._sessions = sessions
        self._marks = Marks(proc)
        self._members: dict[ProcessId, str] = {}
        self._made_of: tuple[int, ...] = ()

    def session_of(self, one: Suspect) -> tuple[str, str]:
        """Return the session that ``one`` belongs to, and the one that it was meant to outlive; "" for none."""
        process = one.process
        if not process.spared:
            if process.id in (members := self._known_members()):
                return members[process.id], ""
            for session in (*process.pages, *process.lineage):
                if any((key.id, key.uid) == (session, process.uid) for key in self._sessions.entries):
                    return session, ""
        return self._marks.session_of(one)

    def _known_members(self) -> dict[ProcessId, str]:
        entries = self._sessions.entries.values()
        made_of = tuple(map(id, entries))  # an entry is never changed, only replaced
        if made_of != self._made_of:
            self._made_of = made_of
            self._members = {
                id_: entry.session.id
                for entry in entries
                for id_ in (entry.session.leader, *entry.session.seen, *entry.session.kept, *entry.targets)
            }
        return self._members


def _leader_of(session_id: str) -> ProcessId | None:
    try:
        told = wire.SessionId.parse(session_id)
    except wire.WireError:
        return None
    return ProcessId(told.pid, told.start_ticks)
