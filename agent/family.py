"""What this process has started since a moment, and how it is ended from in here, without a daemon's help.

The daemon looks harder (daemon/reaperd/lineage.py): this is for the way out of a ``training_session()``, while the
leader lives and so do the links to its parents. Trackers and forkservers are left to the process that uses them: they
end with it, and ending them sooner leaks what they guard.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from agent import session, wire

_TRACKER_MAINS = ("resource_tracker import main", "semaphore_tracker import main")
_SERVER_MAIN = "from multiprocessing.forkserver import main"
_PF_FORKNOEXEC = 0x40  # of linux/sched.h
_SETTLE_S = 0.02  # between two looks, the second of which is to find nobody
_KILLED_WITHIN_S = 2.0  # SIGKILL takes effect at once; who outlives it is in the kernel (state D)

Id = tuple[int, int]  # pid, start ticks


class Process(NamedTuple):
    """One process in /proc (proc(5))."""

    pid: int
    ppid: int
    start_ticks: int
    state: str
    cpu_ticks: int
    forked: bool  # has run no program since it was forked: its environment is the one of who has forked it

    @property
    def id(self) -> Id:
        """Who it is, for as long as the machine runs."""
        return self.pid, self.start_ticks


class Family:
    """Everybody that this process has started since the family began, directly or not, and that it did not spare."""

    def __init__(self, session_id: str) -> None:
        """Begin now; ``session_id`` is the mark that is in the environment of whoever is started ("" for none)."""
        self._session = session_id
        self._pid = os.getpid()
        # A forkserver starts workers for whoever asks: those that it has by now are not ours, later ones are.
        before = [one for one in _Listing().below(self._pid) if not self._serves(one)]
        self._before = frozenset(one.id for one in before)
        self._pools_before = _pools()  # held: an id() that is given back may be another pool's
        self._since_ticks = _ticks_now()

    def workers(self) -> list[Process]:
        """Return those that live, trackers and forkservers apart."""
        listing = _Listing()
        below = [one for one in listing.below(self._pid, self._left_out()) if one.state not in "ZX"]
        return self._workers_among([*below, *self._lost(listing)])

    def lost(self) -> list[Process]:
        """Return those of the workers that have lost their parent: who bears our mark, and is below somebody else."""
        return self._workers_among(self._lost(_Listing()))

    def _lost(self, listing: _Listing) -> list[Process]:
        ours = {self._pid, *(one.pid for one in listing.below(self._pid))}
        # Process 1 adopts, or a subreaper above us: below anybody else it is somebody else's job (at, sbatch).
        adopters = {1, *listing.above(self._pid)}
        lost = [
            one
            for one in listing.processes.values()
            if one.pid not in ours and one.ppid in adopters and self._is_member(one)
        ]
        # What an orphan has started is lost with it, whatever its environment says.
        return [*lost, *(below for one in lost for below in listing.below(one.pid) if below not in lost)]

    def _left_out(self) -> frozenset[Id]:
        """Return whose children are no business of ours: who was there before, the workers of such pools, and the spared."""
        old = {pid for pool, _ in self._pools_before.values() for pid in _pids_of(pool)}
        ids = {(pid, ticks) for pid in old if (ticks := _started(pid)) is not None}
        return self._before | frozenset(session.spared_processes()) | ids

    def _is_member(self, one: Process) -> bool:
        """Say whether ``one``, which is below somebody else by now, bears our mark and began after us."""
        began = one.start_ticks >= self._since_ticks and one.id not in self._before
        return began and one.state not in "ZX" and _bears_mark(one, self._session)

    def _workers_among(self, found: list[Process]) -> list[Process]:
        """Return those that are no trackers or forkservers, and were not put elsewhere on purpose."""
        return [one for one in _in_our_cgroup(found) if not self._serves(one)]

    def _serves(self, one: Process) -> bool:
        """Say whether a process is a tracker, or a forkserver that is ours."""
        return is_tracker(one) or (_code_of(one).startswith(_SERVER_MAIN) and one.ppid == self._pid)

    # -- the end of them ---------------------------------------------------------------------

    def end(self, grace_s: float) -> list[Process]:
        """End all workers, pools by their own means first, and return whoever outlives SIGKILL.

        SIGTERM, ``grace_s``, SIGKILL; whoever is started meanwhile as well.
        """
        if os.getpid() != self._pid:
            return []
        pools = [one for place, one in _pools().items() if place not in self._pools_before]
        shutting_down = _shut_down(pools, grace_s)
        left = _end_all(self.workers, grace_s)
        if shutting_down is not None and not left:
            _unlock(pool for pool, _ in pools)
            shutting_down.join(_KILLED_WITHIN_S)
        return left

    def end_now(self) -> list[Process]:
        """End all workers at once."""
        return [] if os.getpid() != self._pid else _signal_all(self.workers, signal.SIGKILL, _KILLED_WITHIN_S)


class Remains:
    """What a dead child of this process has left, which has become ours (PR_SET_CHILD_SUBREAPER): those that bear its mark.

    Nothing else is known of them, so who has no mark is left alone: it may have been spared.
    """

    def __init__(self, session_id: str, spared: Iterable[Id] = (), *, ended: bool = False) -> None:
        """``session_id`` is the dead child's; "" marks nobody. ``spared`` are those that its page names.

        ``ended``: it had ended that session, so what it forked afterwards, whose environment cannot say so, is left alone.
        """
        self._session, self._ended = session_id, ended
        # It may have begun another one since.
        self._prefix = session_id[: len(session_id.rpartition("-")[0].rpartition("-")[0]) + 1]
        self._spared = frozenset(spared)

    def workers(self) -> list[Process]:
        """Return those that live, trackers apart, and what each has started."""
        listing = _Listing()
        found: dict[int, Process] = {}
        for one in listing.below(os.getpid()):
            if one.state not in "ZX" and (one.ppid in found or self._is_marked(one)):
                found[one.pid] = one
        for one in [one for one in found.values() if self._is_spared(one)]:
            for pid in (one.pid, *(below.pid for below in listing.below(one.pid))):
                found.pop(pid, None)
        return [one for one in _in_our_cgroup(found.values()) if not is_tracker(one)]

    def end(self, grace_s: float) -> list[Process]:
        """End them, by SIGTERM, ``grace_s`` and SIGKILL, and return whoever outlives even that."""
        return _end_all(self.workers, grace_s)

    def _is_marked(self, one: Process) -> bool:
        marks = {id_ for id_ in _marks_of(one, wire.LINEAGE_VARIABLE) if self._is_ours(id_)}
        return bool(marks - {self._session} if self._ended and one.forked else marks)

    def _is_ours(self, session_id: str) -> bool:
        return bool(self._prefix) and session_id.startswith(self._prefix)

    def _is_spared(self, one: Process) -> bool:
        """Say whether it was started under ``spared()``; who was forked there has an environment that does not say so."""
        try:
            maps = _read_bytes(f"/proc/{one.pid}/maps")
        except OSError:
            return True
        named = any(map(self._is_ours, _marks_of(one, wire.SPARED_VARIABLE)))
        return (
            named or one.id in self._spared or f"/memfd:{wire.SPARED_PREFIX}{self._prefix}".encode() in maps
        )


def of_session(session_id: str, leader: Id | None) -> list[Process]:
    """Return who belongs to a session, as far as this can be told from outside: leader, workers, trackers and all they started.

    Those that bear its mark, and what is below its ``leader`` while that lives. Nobody is to be signalled on this alone.
    """
    listing = _Listing()
    found = {
        one.pid: one
        for one in listing.processes.values()
        if one.state not in "ZX" and ((session_id and _bears_mark(one, session_id)) or one.id == leader)
    }
    for pid in list(found):
        found.update({one.pid: one for one in listing.below(pid) if one.state not in "ZX"})
    return [one for one in found.values() if session_id not in _marks_of(one, wire.SPARED_VARIABLE)]


# -- the end of processes -------------------------------------------------------------------------


def _end_all(workers: Callable[[], list[Process]], grace_s: float) -> list[Process]:
    """End whoever ``workers`` returns, from look to look, by SIGTERM, ``grace_s`` and SIGKILL; return who outlives that."""
    stubborn = _signal_all(workers, signal.SIGTERM, grace_s)
    return _signal_all(workers, signal.SIGKILL, _KILLED_WITHIN_S) if stubborn else []


def _signal_all(
    workers: Callable[[], list[Process]], number: signal.Signals, within_s: float
) -> list[Process]:
    """Send a signal to each once, those that are started meanwhile too, and return who lives on after ``within_s``."""
    due_s = time.monotonic() + within_s
    signalled: set[Id] = set()
    while True:
        living = workers()
        handles = []
        for one in living:
            if (handle := _open(one)) is None:
                continue
            handles.append(handle)
            if one.id not in signalled:
                signalled.add(one.id)
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(handle, number)
                    if number != signal.SIGKILL:  # one that is stopped cannot end in good order
                        signal.pidfd_send_signal(handle, signal.SIGCONT)
        _wait(handles, due_s)
        left_s = due_s - time.monotonic()
        if not living:
            return []
        if left_s <= 0:
            return workers()
        time.sleep(min(_SETTLE_S, left_s))


# -- who is who -----------------------------------------------------------------------------------


def _bears_mark(one: Process, session_id: str) -> bool:
    """Say whether the environment of a process names a session, and does not say that it was spared of it."""
    return session_id in _marks_of(one, wire.LINEAGE_VARIABLE) and session_id not in _marks_of(
        one, wire.SPARED_VARIABLE
    )


def _marks_of(one: Process, variable: str) -> set[str]:
    """Return the session ids in a variable of a process's environment; none where it is another user's, or gone."""
    try:
        variables = _read_bytes(f"/proc/{one.pid}/environ").split(b"\0")
    except OSError:
        return set()
    prefix = f"{variable}=".encode()
    found = (text[len(prefix) :] for text in variables if text.startswith(prefix))
    return {word for text in found for word in text.decode("utf-8", "replace").split(":") if word}


def _in_our_cgroup(found: Iterable[Process]) -> list[Process]:
    """Return those that run in this process's cgroup or below: others were put there on purpose (``systemd-run --scope``)."""
    mine = _cgroup_of(os.getpid())

    def is_here(one: Process) -> bool:
        theirs = _cgroup_of(one.pid)
        return theirs is not None and (theirs == mine or (mine != "/" and theirs.startswith(f"{mine}/")))

    return [one for one in found if is_here(one)]


def is_tracker(one: Process) -> bool:
    """Say whether a process guards shared memory for the others."""
    return any(main in _code_of(one) for main in _TRACKER_MAINS)


def _code_of(one: Process) -> str:
    """Return what a Python was given to run with ``-c``."""
    try:
        words = _read_bytes(f"/proc/{one.pid}/cmdline").decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "-c"), "")


def _wait(handles: list[int], due_s: float) -> None:
    """Wait until all have ended, or until the monotonic ``due_s``, and close the handles."""
    poller = select.poll()
    for handle in handles:
        poller.register(handle, select.POLLIN)
    left = set(handles)
    while left and (left_s := due_s - time.monotonic()) > 0:
        for handle, _ in poller.poll(left_s * 1000):
            poller.unregister(handle)
            left.discard(handle)
    for handle in handles:
        os.close(handle)


def _open(one: Process) -> int | None:
    """Return a pidfd of exactly ``one``; None where it has ended."""
    try:
        handle = os.pidfd_open(one.pid)
    except OSError:
        return None
    # Opened first, then compared: who bears the pid after that and began then has borne it all along.
    if _started(one.pid) == one.start_ticks:
        return handle
    os.close(handle)
    return None


# -- pools ----------------------------------------------------------------------------------------


def _end_pool(pool: Any) -> None:
    pool.terminate()
    pool.join()


def _end_loky(pool: Any) -> None:
    if hasattr(pool, "terminate"):  # joblib's, which removes the arrays that it has mapped, too
        pool.terminate(kill_workers=True)
    else:
        pool.shutdown(wait=True, kill_workers=True)


def _end_executor(pool: Any) -> None:
    if hasattr(pool, "terminate_workers"):  # from Python 3.14 on
        pool.terminate_workers()
    else:  # what it has queued is dropped, and the signal ends its workers
        pool.shutdown(wait=False, cancel_futures=True)


_ENDINGS = (
    ("multiprocessing.pool", "Pool", _end_pool),
    ("concurrent.futures.process", "ProcessPoolExecutor", _end_executor),
    ("joblib.externals.loky.process_executor", "ProcessPoolExecutor", _end_loky),
    ("loky.process_executor", "ProcessPoolExecutor", _end_loky),
)


def _pools() -> dict[int, tuple[Any, Callable[[Any], None]]]:
    """Return the pools of processes in this process by their ``id()``, and how each is ended; nothing is imported for it."""
    endings = {
        kind: end
        for module, name, end in _ENDINGS
        if (kind := getattr(sys.modules.get(module), name, None)) is not None
    }
    if not endings:
        return {}
    threads = getattr(sys.modules.get("multiprocessing.pool"), "ThreadPool", None)
    import gc

    found: dict[int, tuple[Any, Callable[[Any], None]]] = {}
    # By the id of the type: there are hundreds of thousands of objects, and a type may have a hash of its own.
    known: dict[int, Callable[[Any], None] | None] = {}
    for one in gc.get_objects():
        kind = type(one)  # isinstance() would ask objects that lie about themselves
        if id(kind) not in known:
            base = next((base for base in kind.__mro__ if base in endings or base is threads), threads)
            known[id(kind)] = None if base is threads else endings[base]
        end = known[id(kind)]
        if end is not None:
            found[id(one)] = one, end
    return found


def _pids_of(pool: Any) -> list[int]:
    """Return the pids of a pool's workers, of a Pool (``_pool``) or of an executor (``_processes``)."""
    workers = getattr(pool, "_pool", None) or getattr(pool, "_processes", None) or ()
    if isinstance(workers, int):  # what a Pool calls the number of them
        return []
    processes = list(workers.values()) if isinstance(workers, dict) else list(workers)
    return [pid for one in processes if isinstance(pid := getattr(one, "pid", None), int)]


def _shut_down(pools: list[tuple[Any, Callable[[Any], None]]], within_s: float) -> threading.Thread | None:
    """Have each pool end its workers; who does not manage in time is ended by signals.

    Killed behind its back, an idle pool of loky raises TerminatedWorkerError at its next use. Returns who is still at it.
    """
    if not pools:
        return None

    def shut_down() -> None:
        for pool, end in pools:
            with contextlib.suppress(Exception):  # whatever goes wrong in there, signals come next
                end(pool)

    thread = threading.Thread(target=shut_down, name="reaper-shutdown", daemon=True)
    thread.start()
    thread.join(within_s)
    return thread if thread.is_alive() else None


def _unlock(pools: Iterable[Any]) -> None:
    """Give back what a dead worker holds: Pool.terminate() waits for the lock of its queue (multiprocessing/pool.py)."""
    for pool in pools:
        lock: Any = getattr(getattr(pool, "_inqueue", None), "_rlock", None)
        with contextlib.suppress(Exception):  # it is private, and may be another thing one day
            lock.acquire(False)
            lock.release()


# -- /proc ----------------------------------------------------------------------------------------


class _Listing:
    """Everybody in /proc at one moment."""

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self._children: dict[int, list[Process]] = {}
        # Of another pid namespace, it has our pids for other processes: nobody is better than those.
        names = os.listdir("/proc") if session.proc_is_ours() else []
        for name in filter(str.isdigit, names):
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
                one = _parse_stat(_read_bytes(f"/proc/{name}/stat"))
                self.processes[one.pid] = one
                self._children.setdefault(one.ppid, []).append(one)

    def below(self, pid: int, leave_out: frozenset[Id] = frozenset()) -> list[Process]:
        """Return all descendants of ``pid`` but for some and theirs, parents first."""
        found: list[Process] = []
        level = [pid]
        while level:
            below = [one for parent in level for one in self._children.get(parent, ())]
            below = [one for one in below if one.id not in leave_out]
            found += below
            level = [one.pid for one in below]
        return found

    def above(self, pid: int) -> set[int]:
        """Return the pids of the ancestors of ``pid``."""
        found: set[int] = set()
        while (one := self.processes.get(pid)) is not None and one.ppid not in found:
            found.add(one.ppid)
            pid = one.ppid
        return found


def _parse_stat(data: bytes) -> Process:
    """Return what ``/proc/PID/stat`` says (proc(5)); the name in it may hold anything, parentheses too."""
    pid, _, rest = data.partition(b" ")
    fields = rest.rpartition(b")")[2].split()
    return Process(
        int(pid),
        int(fields[1]),
        int(fields[19]),
        fields[0].decode("ascii", "replace"),
        int(fields[11]) + int(fields[12]),
        bool(int(fields[6]) & _PF_FORKNOEXEC),
    )


def _ticks_now() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _started(pid: int) -> int | None:
    """Return the start ticks of whoever has ``pid``, None where nobody has, or where that is not told."""
    try:
        return session.read_start_ticks(pid) if session.proc_is_ours() else None
    except (OSError, ValueError, IndexError):
        return None


def _cgroup_of(pid: int) -> str | None:
    try:
        return wire.parse_cgroup(_read_bytes(f"/proc/{pid}/cgroup").decode("utf-8", "surrogateescape"))
    except OSError:
        return None


def _read_bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = b""
        while chunk := file.read(65536):
            data += chunk
        return data
