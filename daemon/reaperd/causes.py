"""Why a leader is dead, asked of the kernel by somebody who is not its parent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from reaperd.linux import pidfd
from reaperd.linux.procfs import ProcessGone
from reaperd.model import UNKNOWN_CAUSE, Cause, CauseKind, Session
from reaperd.observer import Observer


def read_cause(session: Session, leader: int, observer: Observer, vanished: Callable[[], int]) -> Cause:
    """Return why the leader with pidfd ``leader`` is dead, whether its parent has waited for it yet or not.

    The OOM killer's SIGKILL looks like any other. Its cgroup's counter must have risen since the leader was last seen
    alive, by more than the ``vanished`` members that may have been its victims.
    """
    status = pidfd.exit_status(leader)
    if status is None:
        with contextlib.suppress(ProcessGone, ValueError):
            stat = observer.proc.stat(session.leader.pid)
            if stat.id == session.leader and stat.dead:
                status = stat.exit_status
    if status is None:  # its parent may have waited for it between the two questions
        status = pidfd.exit_status(leader)
    if status is None:
        return UNKNOWN_CAUSE
    cause = Cause.of_status(status)
    if cause.kind is CauseKind.SIGNAL and cause.code == 9 and session.oom_kills is not None:
        kills = observer.oom_kills_in(session)
        if kills is not None and kills - session.oom_kills > vanished():
            return cause._replace(kind=CauseKind.OOM)
    return cause
