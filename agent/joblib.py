"""A joblib backend whose pools keep to the session's limit of workers, and whose workers never outlive their parent.

    import agent.joblib
    agent.joblib.register(make_default=True)

It is loky's, with three things added: ``n_jobs`` is limited at each ``Parallel`` call, each worker has a guard that ends it
when its parent has ended (with a daemon or without), and ``ps`` shows whose worker it is. Needs the extra ``train``.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

from joblib._parallel_backends import LokyBackend
from joblib.parallel import register_parallel_backend

from agent import limits, session

NAME = "reaper"
_COMM_CHARS = 15  # TASK_COMM_LEN of linux/sched.h, without the NUL


def register(*, make_default: bool = False) -> None:
    """Let joblib know the backend "reaper", for ``joblib.parallel_config(backend="reaper")`` and ``Parallel(backend="reaper")``.

    ``make_default=True``, which is to be preferred, makes it take the place of loky where nobody names a backend: an estimator
    that prefers threads (a random forest) goes on with threads, which a backend that is named would override.
    """
    register_parallel_backend(NAME, ReaperBackend, make_default=make_default)


@contextlib.contextmanager
def progress(total: float | None = None, message: str = "") -> Iterator[None]:
    """Tell ``agent.progress()`` of each task that is done of the loops of this thread in here, with this backend.

    ``total`` is of all of them, None where it is not known; ``message`` stands beside it.
    """
    before, _current.telling = getattr(_current, "telling", None), _Telling(total, message)
    try:
        yield
    finally:
        _current.telling = before


_current = threading.local()


class _Telling:
    """Counts the tasks that are done."""

    def __init__(self, total: float | None, message: str) -> None:
        self._total, self._message = total, message
        self._done = 0
        self._lock = threading.Lock()  # each batch ends in a thread of the pool's

    def note(self, tasks: int) -> None:
        with self._lock:
            self._done += tasks
            session.progress(self._done, self._total, self._message)


class ReaperBackend(LokyBackend):  # type: ignore[misc]  # joblib has no types
    """loky's backend, with a limit, a guard and a label; see joblib/_parallel_backends.py."""

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many workers there will be: what loky gives, and no more than ``agent.n_jobs()``."""
        return min(int(super().effective_n_jobs(n_jobs)), limits.n_jobs())

    def configure(self, n_jobs: int = 1, parallel: Any = None, **more: Any) -> int:
        """Build the pool; each worker begins with its guard, then with the initializer that somebody has given."""
        # Noted here, for batches are submitted from threads of the pool's, too.
        self._telling: _Telling | None = getattr(_current, "telling", None)
        given = {**self.backend_kwargs, **more}
        begin = _Beginning(given.pop("initializer", None), given.pop("initargs", ()))
        return int(
            super().configure(
                n_jobs, parallel, **{**more, "initializer": begin, "initargs": (os.getpid(), _label())}
            )
        )

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Have a batch of tasks done, and told of."""
        telling = self._telling
        if telling is None or callback is None:
            return super().submit(func, callback)

        def done(future: Any) -> None:
            # Before the loop learns of it, and may return.
            if not future.cancelled() and future.exception() is None:
                telling.note(len(func))
            callback(future)

        return super().submit(func, done)

    def _prepare_worker_env(self, n_jobs: int) -> dict[str, str]:
        """Return the threads of BLAS and OpenMP in each worker: all of them together never exceed the usable CPUs."""
        env: dict[str, str] = super()._prepare_worker_env(n_jobs)
        if self.inner_max_num_threads is None:
            most = max(1, limits.usable_cpus() // n_jobs)
            for name in set(self.MAX_NUM_THREADS_VARS) - set(os.environ):
                env[name] = str(min(int(env[name]), most))
        return env


class _Beginning:
    """What a worker begins with. Equal ones make joblib use a pool once more."""

    def __init__(self, then: Callable[..., None] | None, with_: tuple[Any, ...]) -> None:
        self._then, self._with = then, tuple(with_)

    def __call__(self, parent: int, label: str) -> None:
        _guard(parent)
        register()  # for loops in here that name it, too
        with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="utf-8") as file:
            file.write(label)
        if self._then is not None:
            self._then(*self._with)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Beginning) and (self._then, self._with) == (other._then, other._with)

    __hash__ = None  # type: ignore[assignment]


def _guard(parent: int) -> None:
    """End this process once its parent has ended, from a thread that waits for nothing else.

    Not PR_SET_PDEATHSIG: that is bound to the thread of the parent that started us (prctl(2)), which may end before it. The
    thread needs the GIL to act: native code that never releases it holds it up.
    """
    try:
        handle = os.pidfd_open(parent)
    except (ProcessLookupError, FileNotFoundError):
        os._exit(1)  # the second since Linux 6.16, while it is being waited for
    except OSError:  # a sandbox that refuses it: then the daemon alone looks after us
        return
    # Opened first, then compared: if it is our parent now, it has been all along.
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_wait, args=(handle,), name="reaper-guard", daemon=True).start()


def _wait(handle: int) -> None:
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    poller.poll()
    os._exit(1)


def _label() -> str:
    """Return what ``ps`` and ``top`` show as the name of a worker: the session's."""
    return f"rp {session.name_of_session() or 'worker'}".encode("ascii", "replace").decode()[:_COMM_CHARS]
