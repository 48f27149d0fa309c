"""A scikit-learn callback that tells ``agent.progress()`` how many fits of a search are done, with workers or without.

    from agent.sklearn import ReportProgress
    GridSearchCV(model, grid, n_jobs=-1).set_callbacks(ReportProgress()).fit(X, y)

Needs scikit-learn 1.9, whose ``sklearn.callback`` calls the hooks inside the workers, on copies: their counts reach the leader
through a few bytes of shared memory that the leader holds.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from typing import Any, NamedTuple

from agent import session

_NAME = "progress-of-a-fit"
# Tasks that are done, those that are expected, and those that have an unknown number of parts.
_COUNTS = struct.Struct("<qqq")
_REPORT_S = 0.5  # the last value in the session page is no older, even when the leader is killed

_lock = threading.Lock()  # fits in several threads may begin and end at once


class _Counter(NamedTuple):
    """Three numbers in a memfd of the leader's. A worker finds it by the leader's descriptor, and writes with its own uid's rights."""

    pid: int
    start_ticks: int
    descriptor: int

    @classmethod
    def make(cls) -> _Counter:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.pwrite(descriptor, _COUNTS.pack(0, 0, 0), 0)
        return cls(os.getpid(), session.read_start_ticks(), descriptor)

    def add(self, done: int = 0, expected: int = 0, unknown: int = 0) -> None:
        """Count, whoever else counts at this moment; nothing where the leader is gone, or is out of sight."""
        try:
            if session.read_start_ticks(self.pid) != self.start_ticks:
                return  # the pid is another's by now
            path = f"/proc/{self.pid}/fd/{self.descriptor}"
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                return
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return
        try:
            # Of this descriptor alone (flock(2)): threads of one process exclude each other, too.
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = _COUNTS.unpack(os.pread(handle, _COUNTS.size, 0))
            after = (was + more for was, more in zip(before, (done, expected, unknown), strict=True))
            os.pwrite(handle, _COUNTS.pack(*after), 0)
        finally:
            os.close(handle)

    def read(self) -> tuple[int, int | None]:
        """Return what is done, and what is expected; in the leader alone."""
        done, expected, unknown = _COUNTS.unpack(os.pread(self.descriptor, _COUNTS.size, 0))
        return done, None if unknown else expected


class ReportProgress:
    """Reports done / total fits, as ``reaperctl ps`` and every front end shows them; ``message`` stands beside them.

    A FitCallback (sklearn.callback): it counts what the estimator that it is set on does, and goes down to none inside it. Of a
    search that are its candidates times its splits, and the refit. One may be used for several fits; what is told of those that
    go on at the same time, in threads, is told of them together.
    """

    def __init__(self, message: str = "") -> None:
        self.message = message
        self._fits = 0  # that go on
        self._counter: _Counter | None = None
        self._over: threading.Event | None = None
        self._reporter: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy in a worker counts, and reports nothing."""
        return {**self.__dict__, "_fits": 0, "_over": None, "_reporter": None}

    def setup(self, estimator: Any, context: Any) -> None:
        """Begin to report; called in the leader, before the fit."""
        del estimator, context
        with _lock:
            if self._fits:
                self._fits += 1
                return
            self._counter, self._over = _Counter.make(), threading.Event()
            self._fits = 1
            self._reporter = threading.Thread(
                target=self._report, args=(self._counter, self._over), name="reaper-progress", daemon=True
            )
            self._reporter.start()

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        """Expect what a task is made of."""
        del estimator
        parts, counter = context.max_subtasks, self._counter
        if parts is None and counter is not None:
            counter.add(unknown=1)
        elif parts and counter is not None:
            # A task that has parts was expected to be one itself.
            counter.add(expected=parts - (context.parent is not None))

    def on_fit_task_end(self, estimator: Any, context: Any) -> None:
        """Count a task that has no parts."""
        del estimator
        counter = self._counter
        if context.max_subtasks == 0 and counter is not None:
            counter.add(1, 1 if context.parent is None else 0)

    def teardown(self, estimator: Any, context: Any) -> None:
        """Report what was done, however the fit ended."""
        del estimator, context
        with _lock:
            self._fits = max(0, self._fits - 1)
            if self._fits:
                return
            if self._over is not None and self._reporter is not None and self._counter is not None:
                self._over.set()
                self._reporter.join()
                os.close(self._counter.descriptor)
            self._counter = self._over = self._reporter = None

    def _report(self, counter: _Counter, over: threading.Event) -> None:
        last: tuple[int, int | None] = (0, 0)
        while True:
            ended = over.wait(_REPORT_S)
            found = counter.read()
            if found != last:
                session.progress(*found, self.message)
                last = found
            if ended:
                return
