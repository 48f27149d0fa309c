"""The validated rules that decisions are made by. Pure."""

from __future__ import annotations

from typing import NamedTuple

from reaperd.model import Process, ProcessId


class Policy(NamedTuple):
    """How a dead leader's session is ended, and who is never touched."""

    grace_s: float = 5.0  # from SIGTERM to SIGKILL
    exit_grace_s: float = 10.0  # what a clean exit leaves before SIGTERM
    tracker_grace_s: float = 10.0  # what trackers get once the workers are gone
    reclaim_shm: bool = True
    dry_run: bool = False
    max_per_uid: int = 1000  # sessions
    untouchable: frozenset[ProcessId] = frozenset()  # the daemon and its ancestors
    daemon_pid: int = 0  # whose children are helpers: forked, they hold every session page for a moment
    only_uid: int | None = None  # the one user whose processes a daemon without root may signal
    protected_uids: frozenset[int] = frozenset()
    protected_names: frozenset[str] = frozenset()
    protected_units: frozenset[str] = frozenset()
    spared: frozenset[ProcessId] = frozenset()  # by hand

    def protection(self, process: Process) -> str | None:
        """Return why ``process`` must never be signalled, in words; None when nothing protects it."""
        if process.id.pid <= 1 or process.id in self.untouchable:
            return "is init, the daemon itself or one of the daemon's ancestors"
        if self.daemon_pid and process.ppid == self.daemon_pid:
            return "is a helper of the daemon"
        if process.id in self.spared:
            return "was spared by hand (reaperctl protect or release)"
        if self.only_uid is not None and process.uid not in (None, self.only_uid):
            return f"belongs to uid {process.uid}, and a daemon of uid {self.only_uid} ends nobody else's"
        if process.uid in self.protected_uids:
            return f"belongs to uid {process.uid}, which [protect] users names"
        for name in (process.comm, process.argv[0].rpartition("/")[2] if process.argv else ""):
            if name and name in self.protected_names:
                return f"is called {name!r}, which [protect] names has"
        for unit in self.protected_units.intersection((process.cgroup or "").split("/")):
            return f"runs in {unit}, which [protect] units names"
        return None
