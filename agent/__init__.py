"""Reaper's agent: one line in a training script, and nothing the script started outlives it.

    import agent
    agent.register()

Importing this costs two milliseconds, so that ``register()`` need not: nobody waits for what is loaded by then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `import typing` alone takes longer than all of this module
    from agent.cleanup import CleanupError, CleanupReport
    from agent.session import RegistrationError, Session, Spared

__all__ = [
    "CleanupError",
    "CleanupReport",
    "RegistrationError",
    "Session",
    "emergency_cleanup",
    "progress",
    "register",
    "spared",
    "unregister",
]


def register(
    name: str | None = None, *, socket: str | None = None, timeout: float = 1.0, required: bool = False
) -> Session:
    """Make this process the leader of a session: when it dies, Reaper ends all that it started.

    ``name`` (1 to 200 characters) is what people see, the script's name by default. ``socket`` is the daemon's, else
    ``REAPER_SOCKET``, else the user's own daemon's if one answers, else the system's. ``timeout`` is in seconds.

    Idempotent in one process. A forked worker gets its leader's session back and never becomes a leader itself.
    Without a daemon it marks what is started all the same, warns once and returns: a daemon that starts later adopts
    the session. ``required=True`` raises RegistrationError instead. ``REAPER_DISABLE=1`` switches everything off.
    No thread, socket or signal handler stays behind.
    """
    from agent import session

    return session.register(name, socket=socket, timeout=timeout, required=required)


def unregister() -> None:
    """End the session cleanly: nothing that is started from now on belongs to it, and while this process lives
    none of its workers is touched. What they still are when this process ends gets ``exit_grace`` and is then ended.
    """
    from agent import session

    session.unregister()


def spared() -> Spared:
    """Return a context in which started processes are meant to outlive the leader (TensorBoard, a model server).

    It holds for what any thread of this process starts meanwhile. The mark is ``REAPER_SPARED`` in the environment; a
    child that is given another environment is known as well, but one that it daemonizes is not.
    """
    from agent import session

    return session.Spared()


def progress(done: float, total: float | None = None, message: str = "") -> None:
    """Say how far the work is, in any unit; costs microseconds and sends nothing.

    ``total`` is None where it is not known. Without a session, and in a worker, it does nothing.
    """
    from agent import session

    session.progress(done, total, message)


def emergency_cleanup(*, socket: str | None = None) -> CleanupReport:
    """End this user's orphans now, and remove what dead workers left in shared memory and temporary folders.

    As ``reaperctl cleanup`` does it: ages, loads and the daemon's ``action`` do not count, but a process is an orphan only
    with a framework's signature, without its pool parent, and outside of ``[protect]``. A pool whose parent lives, the
    caller's own included, is never touched; nor is another user's process, for root neither. A daemon does it (which one:
    as for ``register()``); without one, a process of the caller's own. Blocks until they have ended, a minute at most.
    CleanupError: nobody could do it, or the daemon may not (``dry_run``).
    """
    from agent import cleanup

    return cleanup.emergency_cleanup(socket)


# The daemon has use for the formats alone, and elsewhere than on Linux nothing is done.
if "reaperd" not in sys.modules and sys.platform == "linux":
    from agent import page, session  # noqa: F401


def __getattr__(name: str) -> object:
    if name in ("RegistrationError", "Session", "Spared"):
        from agent import session

        return getattr(session, name)
    if name in ("CleanupError", "CleanupReport"):
        from agent import cleanup

        return getattr(cleanup, name)
    raise AttributeError(f"module 'agent' has no attribute {name!r}")
