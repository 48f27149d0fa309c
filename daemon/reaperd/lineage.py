"""Who belongs to a session. Pure: a session and a snapshot in, its family out.

The rules, in order:
1. A member has the leader's uid, in every sense, and started no earlier than the leader.
2. A spared or protected process is no member, and neither is what stands below it.
3. The session page, held or mapped, makes a member: only a fork of the leader or of a worker can have it.
4. The environment stamp makes a member in the leader's cgroup or below it. Queue systems copy environments, so where
   that cgroup tells nothing, the parent must also be a member, or one that adopts what the leader leaves.
5. A child of a member is a member, in the leader's cgroup or below it; so is what was found to be one before.
   A leader that has unregistered passes nothing on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from reaperd import signatures
from reaperd.model import Family, Member, Process, ProcessId, Session, Snapshot


def family(session: Session, snapshot: Snapshot, protection: Callable[[Process], str | None]) -> Family:
    """Return the living members of ``session`` other than its leader, and who was left alone and why.

    ``protection`` returns the reason why a process must never be touched, None where there is none.
    """
    return _Search(session, snapshot, protection).run()


class _Search:
    """One fixed-point search."""

    def __init__(
        self, session: Session, snapshot: Snapshot, protection: Callable[[Process], str | None]
    ) -> None:
        self.session = session
        self.protection = protection
        self.processes = snapshot.processes
        self.living_adopters = {id_.pid for id_ in session.adopters & snapshot.adopters}
        self.adopters = {1}
        self.members: dict[ProcessId, Member] = {}
        self.left_alone: dict[ProcessId, str] = {}
        self.barred: dict[
            ProcessId, str
        ] = {}  # spared or protected, or below such; not all look like members
        self.children: defaultdict[int, list[Process]] = defaultdict(list)
        self.stamped: dict[ProcessId, Process] = {}  # carry the stamp, and wait for their parent to be known

    def run(self) -> Family:
        for process in self.processes.values():
            if self._may_belong(process):
                self.children[process.ppid].append(process)
        self._spare()
        self.adopters |= self._subreapers()
        for processes in list(self.children.values()):
            for process in processes:
                self._judge_alone(process)
        self._descend(self.session.leader.pid, self.session.leader)
        for member in list(self.members.values()):
            self._descend(member.process.id.pid, member.process.id)
        self._accept_stamped()
        for process_id, process in self.stamped.items():
            if process_id not in self.members:
                self.left_alone[process_id] = (
                    f"carries the session's stamp, but its parent {process.ppid} is neither a member nor one that"
                    " adopted it"
                )
        return Family(self.members, self.left_alone)

    def _subreapers(self) -> set[int]:
        """Return the leader's ancestors that have adopted a process which was the leader's or a worker's child before.

        /proc does not tell who is a subreaper, and an ancestor may have started a job of its own with a copied stamp.
        """
        session = self.session
        return {
            process.ppid
            for pid in self.living_adopters
            for process in self.children.get(pid, ())
            if session.id in process.pages or process.id in session.kept or process.id in session.seen
        }

    def _may_belong(self, process: Process) -> bool:
        session = self.session
        return (
            not process.dead
            and process.uid == session.uid
            and process.id != session.leader
            and process.id.start_ticks >= session.leader.start_ticks
        )

    def _spare(self) -> None:
        """Leave alone what must be, and all that stands below it: its environment may be one that says nothing."""
        everyone = [process for processes in self.children.values() for process in processes]
        for process in everyone:
            if self.session.id in process.spared or process.id in self.session.spared:
                self._bar(process, "was started under spared()")
        self.left_alone.update(self.barred)
        for process in everyone:
            protection = self.protection(process)
            if protection is not None:
                self._bar(process, protection)

    def _bar(self, process: Process, reason: str) -> None:
        pending = [(process, reason)]
        while pending:
            process, reason = pending.pop()
            if process.id not in self.barred:
                self.barred[process.id] = reason
                below = f"is below pid {process.id.pid}, which {reason}"
                pending += [(child, below) for child in self.children.get(process.id.pid, ())]

    def _judge_alone(self, process: Process) -> None:
        """Judge what a process's own marks tell."""
        session_id = self.session.id
        if process.id in self.barred:
            if session_id in (*process.pages, *process.lineage) or process.id in self.session.kept:
                self.left_alone[process.id] = self.barred[process.id]
        elif session_id in process.pages:
            self._accept(
                process, "holds the session page: it was forked by the leader or by a worker", marked=True
            )
        elif process.id in self.session.kept and not self._in_cgroup(process):
            self.left_alone[process.id] = (
                f"was found below the leader, but was put into cgroup {process.cgroup!r}"
            )
        elif process.id in self.session.kept:
            self._accept(process, "was found below the leader while the leader lived", marked=False)
        elif session_id in process.lineage:
            if not self._in_cgroup(process):
                self.left_alone[process.id] = (
                    f"carries the session's stamp, but runs in cgroup {process.cgroup!r}"
                )
            elif self.session.cgroup == "/":
                self.stamped[process.id] = process
            else:
                self._accept(process, "carries REAPER_LINEAGE of the session in its environment", marked=True)

    def _accept_stamped(self) -> None:
        """Accept stamped processes whose parent is one that adopts; their descendants follow."""
        for process in self.stamped.values():
            if process.ppid in self.adopters and process.id not in self.members:
                self._accept(
                    process,
                    f"carries REAPER_LINEAGE of the session in its environment and was adopted by pid {process.ppid}",
                    marked=True,
                )
                self._descend(process.id.pid, process.id)

    def _descend(self, pid: int, parent: ProcessId) -> None:
        pending = [(pid, parent)]
        while pending:
            pid, parent = pending.pop()
            holder = self.processes.get(pid)
            if holder is None or holder.id != parent:  # gone, and the pid may be somebody else's by now
                continue
            for child in self.children.get(pid, ()):
                if child.id in self.members or child.id in self.left_alone:
                    continue
                if child.id.start_ticks < parent.start_ticks:
                    continue
                if child.id in self.barred:
                    self.left_alone[child.id] = self.barred[child.id]
                    continue
                if not self._in_cgroup(child):
                    self.left_alone[child.id] = (
                        f"is a child of pid {pid}, but was put into cgroup {child.cgroup!r}"
                    )
                    continue
                marked = child.id in self.stamped
                if parent == self.session.leader and self.session.ending and not marked:
                    continue
                reason = f"is a child of pid {pid}, a member"
                if marked:
                    reason = f"carries REAPER_LINEAGE of the session in its environment and {reason}"
                self._accept(child, reason, marked=marked)
                pending.append((child.id.pid, child.id))

    def _in_cgroup(self, process: Process) -> bool:
        """Say whether ``process`` runs where the leader ran, or below.

        Everything is below the root, which therefore tells nothing: a process in any other cgroup was put there by
        somebody, on purpose.
        """
        cgroup = self.session.cgroup
        if cgroup is None or process.cgroup == cgroup:
            return cgroup is not None
        return cgroup != "/" and process.cgroup.startswith(cgroup + "/")

    def _accept(self, process: Process, reason: str, *, marked: bool) -> None:
        framework, role = signatures.recognise(process)
        self.members[process.id] = Member(process, role, framework, (reason,), marked)
