"""``training_session()``: a session that ends what it started, on whatever way out, before it gives back control.

It acts in the process that began it, and there alone: forked workers inherit the object and get their signal handlers
back as they were. What cannot be done from in here (SIGKILL, a crash of the interpreter) the daemon does.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from agent import family, limits, session, strays
from agent.session import Session
from agent.status import COMPLETED, FAILED, INTERRUPTED, MAX_ERROR_CHARS, StatusFile

log = logging.getLogger("agent")

# Who signals a process group, and who passes a signal on to it, send the same one twice (timeout(1), `kill %1`, systemd).
SAME_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Worker(NamedTuple):
    """A process that a session has started, directly or not."""

    pid: int
    start_ticks: int  # as in /proc/PID/stat: with the pid, it names one process of this boot


class ProcessManager:
    """A training session; ``training_session()`` returns one, to be used as a context manager.

    By itself: ``start()``, and ``stop()`` on every way out. ``workers()`` are those that it has started and that live,
    ``cleanup()`` ends them now, ``n_jobs`` is how many to start.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        monitoring_interval: float = 30.0,
        orphan_age_limit: float = 300.0,
        cpu_threshold: float = 50.0,
        *,
        name: str | None = None,
        status_file: str | os.PathLike[str] | None = None,
        socket: str | None = None,
        required: bool = False,
        isolate: bool = False,
        grace: float = 5.0,
    ) -> None:
        """Nothing happens before ``start()``; see ``agent.training_session`` for what it takes."""
        limits.n_jobs(max_workers)  # refuses what is no limit
        for what, value in (
            ("monitoring_interval", monitoring_interval),
            ("orphan_age_limit", orphan_age_limit),
            ("cpu_threshold", cpu_threshold),
            ("grace", grace),
        ):
            if type(value) not in (int, float) or not 0 < value < 1e9:
                raise ValueError(f"{what}: must be a number, more than 0, got {value!r:.60}")
        self._max_workers = max_workers
        self._strays = _Strays(self, monitoring_interval, orphan_age_limit, cpu_threshold)
        self._options: dict[str, Any] = {
            "name": name, "socket": socket, "required": required, "isolate": isolate,
        }  # fmt: skip
        self._status_path = status_file
        self._grace_s = float(grace)
        self._pid = 0  # of the process in which it runs; 0: it does not
        self._family: family.Family | None = None
        self._status: StatusFile | None = None
        # What the page says of the session around this one.
        self._status_before: dict[str, object] = {}
        self._stray_before: dict[str, object] = {}
        self._owns_session = False
        self._signals = _Signals(self)
        self.session: Session | None = None

    # -- what it tells -----------------------------------------------------------------------

    @property
    def n_jobs(self) -> int:
        """How many workers to start: the least of ``max_workers``, the usable CPUs and ``REAPER_MAX_WORKERS``."""
        return limits.n_jobs(self._max_workers)

    @property
    def running(self) -> bool:
        """Whether it has begun, in this process, and not ended."""
        return self._pid == os.getpid()

    def workers(self) -> list[Worker]:
        """Return who has been started since ``start()`` and lives: neither trackers nor what was spared."""
        if self._family is None or not self.running:
            return []
        return [Worker(*one.id) for one in self._family.workers()]

    def strays(self) -> list[Worker]:
        """Return the workers that lost their own pool parent ``orphan_age_limit`` ago and use ``cpu_threshold`` of a core.

        Since when is counted from the first look at which one was seen so, and CPU between the last two: by itself, that is
        from call to call.
        """
        return [] if self._family is None or not self.running else self._strays.look(self._family)

    # -- its life ----------------------------------------------------------------------------

    def start(self) -> ProcessManager:
        """Begin: register, take over the signals, and write the status file. RuntimeError where it runs already.

        RegistrationError with ``required=True`` and no daemon; OSError for a status file that cannot be written.
        """
        if self.running:
            raise RuntimeError("this training session has begun already; use another one for what is inside")
        self._owns_session = not session.is_registered()
        self.session = session.register(**self._options)
        self._owns_session = self._owns_session and not session.is_handed_over()
        try:
            if self._status_path is not None:
                self._status = StatusFile(self._status_path, self.session.name, self.session.id)
                self._status_before = session.say(status_file=self._status.path)
                session.listen(self._status.note_progress)
        except BaseException:
            if self._owns_session:
                session.unregister()
            raise
        if not session.proc_is_ours():
            log.warning(
                "/proc is of another pid namespace than this process: what the training starts cannot be told from others, and"
                " only its pools are ended with it (mount a /proc of this namespace: unshare --mount-proc)"
            )
        self._family = family.Family(self.session.id)
        self._pid = os.getpid()
        if self._max_workers is not None:
            session.push_limit(self._max_workers)
        _running.add(self)
        atexit.register(self._at_exit)
        try:
            self._signals.install()
            if self.session.socket is None:
                self._strays.start()
            else:
                self._stray_before = session.say(stray=self._strays.thresholds)
        except BaseException as error:  # a signal, for one: whoever called has nothing to end yet
            self.stop(error)
            raise
        return self

    def stop(self, error: BaseException | None = None) -> list[Worker]:
        """End what was started since ``start()``, and the session; return whoever outlives even SIGKILL (state D).

        ``error`` is what the training ended with: it decides the state in the status file. Does nothing where it does not run.
        """
        if not self.running:
            return []
        with self._signals.deferred():
            return self._end(error)

    def cleanup(self) -> list[Worker]:
        """End the workers that were started since ``start()``, and go on; return whoever outlives even SIGKILL."""
        if self._family is None or not self.running:
            return []
        return [Worker(*one.id) for one in self._family.end(self._grace_s)]

    def __enter__(self) -> ProcessManager:
        """Begin."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, whatever the way out is."""
        try:
            self.stop(error)
        except (KeyboardInterrupt, SystemExit) as late:
            self.stop(late)  # a signal that came before the first line of it: else, this does nothing
            raise

    def _end(self, error: BaseException | None) -> list[Worker]:
        self._strays.stop()
        session.say(**self._stray_before)
        try:
            left = self.cleanup()
            if left:
                pids = ", ".join(str(one.pid) for one in left)
                log.warning("cannot end pid %s: SIGKILL was sent, the kernel holds on to it (state D)", pids)
        finally:
            self._note_end(error)
            self._pid = 0
            if self._max_workers is not None:
                session.pop_limit(self._max_workers)
            _running.discard(self)
            atexit.unregister(self._at_exit)
            if self._owns_session:
                session.unregister()
            self._family = self._status = None
        return left

    def _note_end(self, error: BaseException | None) -> None:
        if self._status is None:
            return
        try:
            session.unlisten(self._status.note_progress)
            self._status.end(**_outcome(error, self._signals.received))
        except OSError as failure:
            log.warning("cannot write the status file %s: %s", self._status.path, failure.strerror)
        finally:
            session.say(**self._status_before)

    def _at_exit(self) -> None:
        # What has ended the program, where it was not stopped before; of SystemExit, nothing is left to see.
        error: BaseException | None = KeyboardInterrupt() if self._signals.received else None
        self.stop(error or getattr(sys, "last_value", None))

    def end_at_once(self, number: int) -> None:
        """End all workers with SIGKILL, and then this process by the signal that asked for it."""
        if self._family is not None:
            self._family.end_now()
        self._note_end(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


_running: weakref.WeakSet[ProcessManager] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for manager in list(_running):
        manager._signals.restore()
    _running.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _outcome(error: BaseException | None, received: int | None) -> dict[str, Any]:
    """Return the state, the error and the cause of a training that ended with ``error``, after a signal or none."""
    if isinstance(error, KeyboardInterrupt) or (received and isinstance(error, SystemExit)):
        number = received or signal.SIGINT
        return {"state": INTERRUPTED, "cause": {"kind": "signal", "code": int(number)}}
    if error is None or isinstance(error, GeneratorExit):
        return {"state": COMPLETED, "cause": {"kind": "exit", "code": 0}}
    if isinstance(error, SystemExit):
        code = error.code
        number = 0 if code is None else code if isinstance(code, int) else 1
        said = None if isinstance(code, int) or code is None else str(code)[:MAX_ERROR_CHARS]
        state = COMPLETED if number == 0 else FAILED
        return {"state": state, "error": said, "cause": {"kind": "exit", "code": number}}
    text = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    return {"state": FAILED, "error": text, "cause": {"kind": "exit", "code": 1}}


# -- signals --------------------------------------------------------------------------------------


class _Signals:
    """The handlers of one session: the first signal unwinds, the second ends at once.

    A signal that was ignored stays ignored (nohup). One that somebody has a handler for is that one's: it is called, and
    what it does decides; only Python's own for SIGINT, and the kernel's for the others, are ours to replace.
    """

    def __init__(self, manager: ProcessManager) -> None:
        self._manager = weakref.proxy(manager)
        self._before: dict[int, Any] = {}
        self._deferring = False
        self._deferred: int | None = None
        self._over = False
        self.received: int | None = None
        self._received_at_s = 0.0

    def install(self) -> None:
        """Take over the signals; in the main thread of the main interpreter alone, for Python lets no other."""
        self.received = self._deferred = None
        self._over = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: not from Python, and it could not be put back
                self._before[number] = before
                signal.signal(number, self._received)

    def restore(self) -> None:
        """Put back what was there; whoever has replaced our handler meanwhile keeps theirs.

        Another thread than the main one cannot: then ours stays, and does what the one before would.
        """
        self._over = threading.current_thread() is not threading.main_thread()
        if self._over:
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._received:
                signal.signal(number, before)
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal wait until the block is over; after that nothing of ours is left, and it happens."""
        self._deferring = True
        try:
            yield
        finally:
            waited = self._deferred
            before: Any = None if waited is None else self._before.get(waited)
            self._deferring, self._deferred = False, None
            self.restore()
            if waited is not None and _is_somebodys(before):
                before(waited, None)
            elif waited is not None:
                _unwind(waited)

    def _received(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number, signal.SIG_DFL)
        if self._over:
            self.restore()
            before(number, frame) if callable(before) else signal.raise_signal(number)
        elif self._deferring and self._deferred is None:
            self._deferred = number
            self.received = self.received or number
        elif _is_somebodys(before):
            before(number, frame)
        elif self.received is None:
            self.received, self._received_at_s = number, time.monotonic()
            _unwind(number)
        elif number != self.received or time.monotonic() - self._received_at_s >= SAME_S:
            self._manager.end_at_once(number)


def _is_somebodys(handler: Any) -> bool:
    """Say whether a handler is neither Python's own nor the kernel's."""
    return callable(handler) and handler is not signal.default_int_handler


def _unwind(number: int) -> None:
    """Raise what ends the program in good order, and with the exit code that a shell gives for the signal."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


# -- strays ---------------------------------------------------------------------------------------


class _Strays:
    """Tells of workers that have lost their pool parent and compute on; only where no daemon looks after them."""

    def __init__(self, manager: ProcessManager, interval_s: float, age_s: float, cpu_percent: float) -> None:
        self._manager = weakref.ref(manager)
        self._interval_s = interval_s
        self.thresholds = age_s, cpu_percent
        self._watch = strays.Watch(age_s, cpu_percent)
        self._told: set[Worker] = set()
        self._over = threading.Event()

    def start(self) -> None:
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(self._over,), name="reaper-monitor", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _run(self, over: threading.Event) -> None:
        while not over.wait(self._interval_s):
            manager = self._manager()
            if manager is None or not manager.running:
                return
            for one in manager.strays():
                if one not in self._told:
                    self._told.add(one)
                    log.warning(
                        "pid %d has lost its pool and computes on: `reaperctl explain %d`", one.pid, one.pid
                    )

    def look(self, among: family.Family) -> list[Worker]:
        """Return the workers past both thresholds."""
        found = self._watch.look(time.monotonic(), {one.id: one.cpu_ticks for one in among.lost()})
        return [Worker(*one.id) for one in found]
