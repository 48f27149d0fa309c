"""Who belongs to a session. Pure: a session and a snapshot in, its family out.

The rules, in order:
1. A member has the leader's uid, in every sense, and started no earlier than the leader.
2. A spared or protected process is no member, and neither is what stands below it.
3. The session page, held or mapped, makes a member: only a fork of the leader or of a worker can have it.
4. The environment stamp makes a member in the leader's cgroup or below it. Queue systems copy environments, so where
   that cgroup tells nothing, the parent must also be a member, or one that adopts what the leader leaves.
   A cgroup that Reaper itself has made for a session of the same user is no other place.
5. Whoever runs in the cgroup that was made for this session is a member: nobody is put there but by a member's fork.
6. A child of a member is a member, in the leader's cgroup or below it; so is what was found to be one before.
   A leader that has unregistered passes nothing on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from reaperd import isolation, signatures
from reaperd.model import Family, Member, Process, ProcessId, Session, Snapshot


def family(session: Session, snapshot: Snapshot, protection: Callable[[Process], str | None]) -> Family:
    """Return the living members of ``session`` other than its leader, and who was left alone and why.

    ``protection`` returns the reason why a process must never be touched, None where there is none.
    """
    return _Search(session, snapshot, protection).run()


class _Bar(NamedTuple):
    """Who must not be touched, and why: nor must what stands below."""

    pid: int
    reason: str


class _Search:
    """One fixed-point search. It visits the session's own processes, not all of the snapshot's."""

    def __init__(
        self, session: Session, snapshot: Snapshot, protection: Callable[[Process], str | None]
    ) -> None:
        self.session = session
        self.snapshot = snapshot
        self.processes = snapshot.processes
        self.protection = protection
        self.members: dict[ProcessId, Member] = {}
        self.left_alone: dict[ProcessId, str] = {}
        self.spared: dict[ProcessId, str] = {}  # spared or below such, with the reason
        self.bars: dict[ProcessId, _Bar | None] = {}  # of those that were asked for
        self.subreapers: frozenset[ProcessId] = frozenset()
        self.stamped: dict[ProcessId, Process] = {}  # carry the stamp, and wait for their parent to be known

    def run(self) -> Family:
        self._spare()
        self.subreapers = self.session.subreapers | self._seen_adopting()
        for process in self._conspicuous():
            self._judge_alone(process)
        # Else its children have been given to others, and its pid may have been, too.
        if self.session.cause is None:
            self._descend(self.session.leader.pid, self.session.leader)
        for member in list(self.members.values()):
            self._descend(member.process.id.pid, member.process.id)
        self._accept_stamped()
        strays = tuple(one for one in self.stamped.values() if one.id not in self.members)
        for process in strays:
            self.left_alone[process.id] = (
                f"carries the session's stamp, but its parent {process.ppid} is neither a member nor one that"
                " adopted it"
            )
        return Family(self.members, self.left_alone, self.subreapers, strays)

    def _conspicuous(self) -> Iterable[Process]:
        """Return those that carry a mark of the session, or were found to be members before."""
        marked = [p for p in self.snapshot.marked.get(self.session.id, ()) if self._may_belong(p)]
        found = (*marked, *self._residents(), *self._present(self.session.kept))
        return {process.id: process for process in found}.values()

    def _residents(self) -> list[Process]:
        """Return who runs in the session's own cgroup."""
        scope = self.session.telling_scope
        if scope is None:
            return []
        groups = (
            some for cgroup, some in self.snapshot.residents.items() if isolation.is_within(cgroup, scope)
        )
        return [process for some in groups for process in some if self._may_belong(process)]

    def _present(self, wanted: frozenset[ProcessId]) -> Iterator[Process]:
        for id_ in wanted:
            process = self.processes.get(id_.pid)
            if process is not None and process.id == id_ and self._may_belong(process):
                yield process

    def _children(self, pid: int) -> list[Process]:
        return [process for process in self.snapshot.children.get(pid, ()) if self._may_belong(process)]

    def _seen_adopting(self) -> frozenset[ProcessId]:
        """Return the leader's ancestors that have adopted a process which was a member before.

        /proc does not tell who is a subreaper, and an ancestor may have started a job of its own with a copied stamp.
        """
        session = self.session
        living = {id_.pid: id_ for id_ in session.adopters & self.snapshot.adopters}
        if not living:
            return frozenset()
        forked = [p for p in self.snapshot.marked.get(session.id, ()) if session.id in p.pages]
        known = (*filter(self._may_belong, forked), *self._present(session.kept | session.seen))
        return frozenset(living[process.ppid] for process in known if process.ppid in living)

    def _adopters(self) -> set[int]:
        """Return init, and whoever else is known to adopt what the leader leaves."""
        session = self.session
        proven = self.subreapers if session.init is None else {*self.subreapers, session.init}
        return {1, *(id_.pid for id_ in proven & self.snapshot.adopters)}

    def _may_belong(self, process: Process) -> bool:
        session = self.session
        return (
            not process.dead
            and process.uid == session.uid
            and process.id != session.leader
            and process.id.start_ticks >= session.leader.start_ticks
        )

    def _spare(self) -> None:
        """Leave alone what was spared, and all that stands below it: its environment may be one that says nothing."""
        named = [p for p in self.snapshot.spared.get(self.session.id, ()) if self._may_belong(p)]
        pending = [
            (process, "was started under spared()")
            for process in (*named, *self._present(self.session.spared))
        ]
        while pending:
            process, reason = pending.pop()
            if process.id not in self.spared:
                self.spared[process.id] = reason
                below = f"is below pid {process.id.pid}, which {reason}"
                pending += [(child, below) for child in self._children(process.id.pid)]
        self.left_alone.update(self.spared)

    def _bar(self, process: Process) -> str | None:
        """Return why ``process`` must not be touched: it is spared or protected, or below such; None where it may be."""
        chain: dict[ProcessId, None] = {}
        bar, at = None, process
        while at.id not in self.bars:
            chain[at.id] = None
            reason = self.spared.get(at.id) or self.protection(at)
            if reason is not None:
                bar = _Bar(at.id.pid, reason)
                break
            parent = self.processes.get(at.ppid)
            if parent is None or parent.id in chain or not self._may_belong(parent):
                break
            at = parent
        else:
            bar = self.bars[at.id]
        self.bars.update(dict.fromkeys(chain, bar))
        if bar is None or bar.pid == process.id.pid:
            return bar and bar.reason
        return f"is below pid {bar.pid}, which {bar.reason}"

    def _judge_alone(self, process: Process) -> None:
        """Judge what a process's own marks tell."""
        session_id = self.session.id
        barred = self._bar(process)
        if barred is not None:
            self.left_alone[process.id] = barred
        elif session_id in process.pages:
            self._accept(
                process, "holds the session page: it was forked by the leader or by a worker", marked=True
            )
        elif self._is_resident(process):
            self._accept(process, "runs in the control group that was made for the session", marked=True)
        elif process.id in self.session.kept and not self._in_cgroup(process):
            self.left_alone[process.id] = (
                f"was found below the leader, but was put into cgroup {process.cgroup!r}"
            )
        elif process.id in self.session.kept:
            self._accept(process, "was found below the leader while the leader lived", marked=False)
        elif not self._in_cgroup(process):
            self.left_alone[process.id] = (
                f"carries the session's stamp, but runs in cgroup {process.cgroup!r}"
            )
        elif self.session.ending and process.forked:
            # The environment of the leader itself, where `reaperctl run` ran that, is no evidence of when it was forked: before
            # the end it would have the page. Below a member it is one all the same.
            return
        elif self.session.cgroup == "/":
            self.stamped[process.id] = process
        else:
            self._accept(process, "carries REAPER_LINEAGE of the session in its environment", marked=True)

    def _accept_stamped(self) -> None:
        """Accept stamped processes whose parent is one that adopts; their descendants follow."""
        adopters = self._adopters() if self.stamped else {1}
        for process in self.stamped.values():
            if process.ppid in adopters and process.id not in self.members:
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
            for child in self._children(pid):
                if child.id in self.members or child.id in self.left_alone:
                    continue
                if child.id.start_ticks < parent.start_ticks:
                    continue
                barred = self._bar(child)
                if barred is not None:
                    self.left_alone[child.id] = barred
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
        if isolation.is_scope_of_user(self.session.uid, process.cgroup):
            return True
        if cgroup is None or process.cgroup == cgroup:
            return cgroup is not None
        return cgroup != "/" and process.cgroup is not None and process.cgroup.startswith(cgroup + "/")

    def _is_resident(self, process: Process) -> bool:
        scope = self.session.telling_scope
        return scope is not None and isolation.is_within(process.cgroup, scope)

    def _accept(self, process: Process, reason: str, *, marked: bool) -> None:
        framework, role = signatures.recognise(process)
        self.members[process.id] = Member(process, role, framework, (reason,), marked)
