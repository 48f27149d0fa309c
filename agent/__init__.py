"""Reaper's agent: one line in a training script, and nothing the script started outlives it.

    import agent
    agent.register()

Importing this costs two milliseconds, so that ``register()`` need not: nobody waits for what is loaded by then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `import typing` alone takes longer than all of this module
    import os
    from contextlib import AbstractContextManager

    from agent.cleanup import CleanupError, CleanupReport
    from agent.limits import Estimator
    from agent.session import RegistrationError, Session, Spared
    from agent.status import Status, StatusError
    from agent.training import ProcessManager

__all__ = [
    "CleanupError",
    "CleanupReport",
    "ProcessManager",
    "RegistrationError",
    "Session",
    "Status",
    "StatusError",
    "emergency_cleanup",
    "limit_workers",
    "n_jobs",
    "progress",
    "read_status",
    "register",
    "spared",
    "training_session",
    "unregister",
]


def register(
    name: str | None = None,
    *,
    socket: str | None = None,
    timeout: float = 1.0,
    required: bool = False,
    isolate: bool = False,
) -> Session:
    """Make this process the leader of a session: when it dies, Reaper ends all that it started.

    ``name`` (1 to 200 characters) is what people see, the script's name by default. ``socket`` is the daemon's, else
    ``REAPER_SOCKET``, else the user's own daemon's if one answers, else the system's. ``timeout`` is in seconds.

    Idempotent in one process. A forked worker gets its leader's session back and never becomes a leader itself.
    Without a daemon it marks what is started all the same, warns once and returns: a daemon that starts later adopts
    the session. ``required=True`` raises RegistrationError instead. ``REAPER_DISABLE=1`` switches everything off.
    ``isolate=True`` asks the daemon for a control group of the session's own, which no worker leaves whatever it does, and
    may wait five seconds more for it. Where there is none to be had a RuntimeWarning says why, and all goes on as without.
    No thread, socket or signal handler stays behind.
    """
    from agent import session

    return session.register(name, socket=socket, timeout=timeout, required=required, isolate=isolate)


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


def training_session(
    name: str | None = None,
    *,
    max_workers: int | None = None,
    status_file: str | os.PathLike[str] | None = None,
    monitoring_interval: float = 30.0,
    orphan_age_limit: float = 300.0,
    cpu_threshold: float = 50.0,
    socket: str | None = None,
    required: bool = False,
    isolate: bool = False,
    grace: float = 5.0,
) -> ProcessManager:
    """Return a context in which this process is the leader of a session, and which leaves nothing of what is started in it.

        with agent.training_session(name="risk", status_file="run.json") as session:
            GridSearchCV(model, grid, n_jobs=session.n_jobs).fit(X, y)

    On any way out (the end, an exception, a signal, ``sys.exit()``) the workers that were started inside are gone before
    control returns: pools are ended by their own means, then everybody else by SIGTERM and, after ``grace`` seconds, by
    SIGKILL. Trackers of shared memory end with this process; what was there before, and what ``spared()`` started, lives on.

    In the main thread SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise SystemExit (128 + the signal's number); another
    one (or the same, 0.2 s later or more) ends everything at once. A signal that was ignored stays so, and a handler of one's
    own stays in charge. Afterwards all handlers are as they were.

    ``max_workers`` limits ``n_jobs`` (None: the daemon's ``[sessions] max_workers``, else 4). ``status_file`` is written at
    the start and at the end; see ``read_status()``. ``socket``, ``required`` and ``isolate`` are as for ``register()``. A worker
    that lost its pool ``orphan_age_limit`` seconds ago and uses ``cpu_threshold`` percent of a core is told of: by the
    daemon at its scans (its log, ``reaperctl events``), and without one by a thread that looks every
    ``monitoring_interval`` seconds (logger ``agent``).

    Nested sessions are one to the daemon; each ends what was started inside it. RuntimeError: entered twice.
    """
    from agent import training

    return training.ProcessManager(
        max_workers,
        monitoring_interval,
        orphan_age_limit,
        cpu_threshold,
        name=name,
        status_file=status_file,
        socket=socket,
        required=required,
        isolate=isolate,
        grace=grace,
    )


def n_jobs(limit: int | None = None) -> int:
    """Return how many workers to start: the least of ``limit``, the CPUs this process may use, and ``REAPER_MAX_WORKERS``.

    ``limit`` None is the daemon's ``[sessions] max_workers``, 4 where none has told it. CPUs are counted with the affinity,
    the cgroup's quota and ``LOKY_MAX_CPU_COUNT``. ValueError for less than 1.
    """
    from agent import limits

    return limits.n_jobs(limit)


def limit_workers(estimator: Estimator, limit: int | None = None) -> AbstractContextManager[Estimator]:
    """Return a context in which ``estimator`` and all in it (steps, searches and their grids) have at most ``n_jobs(limit)`` workers.

    The outermost that asks for more than one worker gets the limit, what works inside its workers gets 1; None stays None.
    Afterwards each asks for what it did before.
    """
    from agent import limits

    return limits.limit_workers(estimator, limit)


def read_status(path: str | os.PathLike[str]) -> Status:
    """Return what a ``status_file`` says of a run; a dead run never reads as running, with a daemon or without.

    ``state`` is ``running``, ``completed``, ``failed``, ``interrupted``, ``killed``, or ``unknown`` for one that says that it runs
    on another machine or in another pid namespace. OSError where there is no file (yet), StatusError for what is none.
    """
    from agent import status

    return status.read_status(path)


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
    if name in ("Status", "StatusError"):
        from agent import status

        return getattr(status, name)
    if name == "ProcessManager":
        from agent import training

        return training.ProcessManager
    raise AttributeError(f"module 'agent' has no attribute {name!r}")
