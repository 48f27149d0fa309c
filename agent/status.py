"""The status file of a training: what became of a run, for whoever did not start it (a back end, cron, a dashboard).

JSON, always whole: it is written beside itself and renamed. Nothing here needs a daemon; where the process was killed
before it could write its end, the daemon has it written, and ``read_status()`` tells it without one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from datetime import datetime, timezone
from typing import Any, NamedTuple

from agent.session import proc_is_ours, read_start_ticks
from agent.wire import MAX_MESSAGE_BYTES

RUNNING, COMPLETED, FAILED, INTERRUPTED, KILLED = "running", "completed", "failed", "interrupted", "killed"
UNKNOWN = "unknown"  # it says that it runs, and from here nobody can tell
MAX_ERROR_CHARS = 2000
REFRESH_S = 5.0  # between two writes of progress at least: each time the disk is waited for
MAX_FILE_BYTES = 64 * 1024
_ASKING = (1, 2, 15)  # SIGHUP, SIGINT, SIGTERM
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class StatusError(ValueError):
    """A file is no status file; the text says what is wrong with it."""


class Status(NamedTuple):
    """What a status file says. Times are RFC 3339 in UTC; None where something is not known, or not yet."""

    state: str  # running, completed, failed, interrupted or killed; read_status() alone: unknown
    name: str
    session: str  # its id; "" where nothing was registered
    pid: int
    start_ticks: int  # as in /proc/PID/stat: with the pid and the boot, it names one process
    boot_id: str
    started_at: str
    ended_at: str | None = None
    # {done, total, message} as told to agent.progress(); of a running one, not always the last.
    progress: dict[str, Any] | None = None
    error: str | None = None  # of a failed run: the exception's type and text
    cause: dict[str, Any] | None = None  # {kind, code}: how the process ended
    host: str | None = None  # its name: a boot that is over is told from another machine's by that
    pid_namespace: int | None = None  # the inode of /proc/PID/ns/pid: a pid means something in there alone
    time_namespace: int | None = None  # that of /proc/PID/ns/time, and so does a start time


def read_status(path: str | os.PathLike[str]) -> Status:
    """Return what the status file at ``path`` says of a run, with a daemon or without.

    A run that says it is running is looked for: one whose process has ended reads as ``killed``, and one that lives in
    another pid or time namespace or on another machine as ``unknown``. OSError where it cannot be read (FileNotFoundError before the
    run has begun), StatusError for what is no status file.
    """
    return read_owned_status(path)[0]


def read_owned_status(path: str | os.PathLike[str]) -> tuple[Status, int]:
    """Return what ``read_status()`` does, and the uid of the file that says so: another may have taken its name by now."""
    with open(path, "rb") as file:
        data, owner = file.read(MAX_FILE_BYTES + 1), os.fstat(file.fileno()).st_uid
    return _seen_from_here(parse_status(data)), owner


def _seen_from_here(status: Status) -> Status:
    if status.state != RUNNING:
        return status
    if status.boot_id != read_boot_id():
        return status._replace(state=KILLED if status.host == os.uname().nodename else UNKNOWN)
    # Elsewhere, its pid and start time are another process's, or nobody's.
    if status.pid_namespace not in (None, _namespace("pid")) or not proc_is_ours():
        return status._replace(state=UNKNOWN)
    if status.time_namespace not in (None, _namespace("time")):
        return status._replace(state=UNKNOWN)
    return status if lives(status.pid, status.start_ticks) else status._replace(state=KILLED)


def parse_status(data: bytes) -> Status:
    """Return what the bytes of a status file say; StatusError. Fields that this version does not know are passed over."""
    if len(data) > MAX_FILE_BYTES:
        raise StatusError(f"a status file has at most {MAX_FILE_BYTES} bytes")
    try:
        told = json.loads(data)
        # Whoever passes it on to a browser could write neither NaN nor half of a surrogate pair.
        json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise StatusError(f"the status file is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise StatusError(f"the status file must hold one JSON object, got {type(told).__name__}")
    found: dict[str, Any] = {}
    for key, kinds in _KINDS.items():
        value = told.get(key, Status._field_defaults.get(key))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise StatusError(f"{key}: must be {_in_words(kinds)}, got {value!r:.60}")
        found[key] = value
    if found["state"] not in _STATES:
        raise StatusError(f"state: must be one of {', '.join(_STATES)}, got {found['state']!r:.60}")
    return Status(**found)


def _in_words(kinds: tuple[type, ...]) -> str:
    names = {str: "a text", int: "a whole number", dict: "an object", type(None): "null"}
    return " or ".join(names[kind] for kind in kinds)


_STATES = (RUNNING, COMPLETED, FAILED, INTERRUPTED, KILLED)
_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "state": (str,),
    "name": (str,),
    "session": (str,),
    "pid": (int,),
    "start_ticks": (int,),
    "boot_id": (str,),
    "started_at": (str,),
    "ended_at": (str, _NONE),
    "progress": (dict, _NONE),
    "error": (str, _NONE),
    "cause": (dict, _NONE),
    "host": (str, _NONE),
    "pid_namespace": (int, _NONE),
    "time_namespace": (int, _NONE),
}


class StatusFile:
    """The status file of one run, as the run itself writes it."""

    def __init__(self, path: str | os.PathLike[str], name: str, session: str) -> None:
        """Begin the run: from here on the file says that it is running. OSError where it cannot be written."""
        self.path = os.path.abspath(path)
        # A signal handler may end the run while this very thread writes.
        self._lock = threading.RLock()
        self._refreshed_s = time.monotonic()
        self._progress: dict[str, Any] | None = None
        pid = os.getpid()
        self._status = Status(
            RUNNING,
            name,
            session,
            pid,
            read_start_ticks(),
            read_boot_id(),
            _now(),
            host=os.uname().nodename,
            pid_namespace=_namespace("pid"),
            time_namespace=_namespace("time"),
        )
        write_status(self.path, self._status)

    def note_progress(self, done: float, total: float | None, message: str) -> None:
        """Keep how far the run is, and write it down where that was not done for ``REFRESH_S``.

        Where it cannot be written now, the next time or the end will do.
        """
        if not math.isfinite(done):  # JSON has no such number
            return
        known = None if total is None or not math.isfinite(total) else _plain(total)
        # As in the session page: a file that grew too long could not be read.
        text = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
        self._progress = {"done": _plain(done), "total": known, "message": text}
        now_s = time.monotonic()
        if now_s - self._refreshed_s < REFRESH_S or not self._lock.acquire(blocking=False):
            return
        try:
            if self._status.state == RUNNING:
                self._refreshed_s = now_s
                write_status(self.path, self._status._replace(progress=self._progress))
        except OSError:
            pass
        finally:
            self._lock.release()

    def end(self, state: str, **more: Any) -> None:
        """Say how the run has ended; ``more`` is of the fields of ``Status``. OSError."""
        with self._lock:
            self._status = self._status._replace(
                state=state, ended_at=_now(), progress=self._progress, **more
            )
            write_status(self.path, self._status)


def _plain(number: float) -> float:
    """Return a number as JSON has it: it may be numpy's, or a fraction."""
    value = float(number)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def write_status(path: str, status: Status) -> None:
    """Put ``status`` into the file at ``path``, whole or not at all; OSError."""
    data = json.dumps(status._asdict(), ensure_ascii=False, indent=1).encode("utf-8", "replace") + b"\n"
    directory, name = os.path.split(path)
    beside = os.path.join(directory, f".{name}.{os.getpid()}")
    # Not through a link that somebody left there; with the mode of the file that it replaces, else the one that open() gives.
    try:
        descriptor = os.open(
            beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, os.stat(path).st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def end_for(
    path: str, ended: tuple[int, int], cause: dict[str, Any], progress: dict[str, Any] | None
) -> None:
    """Write the end of a run that has said of itself only that it runs; OSError, StatusError.

    ``ended`` is the pid and the start time of the dead process: a file that speaks of another one is left as it is.
    """
    # A FIFO can bear the name.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        told = parse_status(os.read(descriptor, MAX_FILE_BYTES + 1))
    finally:
        os.close(descriptor)
    if told.state == RUNNING and (told.pid, told.start_ticks) == ended:
        said = progress or told.progress
        end = told._replace(state=end_of(cause), ended_at=_now(), cause=cause, progress=said)
        write_status(path, end)


def end_of(cause: dict[str, Any] | None) -> str:
    """Return the state of a run whose process ended by ``cause`` without a word of its own."""
    kind, code = (cause or {}).get("kind"), (cause or {}).get("code")
    if kind == "exit":  # os._exit()
        return COMPLETED if code == 0 else FAILED
    return INTERRUPTED if kind == "signal" and code in _ASKING else KILLED


def lives(pid: int, start_ticks: int) -> bool:
    """Say whether the process that this was still runs, on this machine and in this boot.

    One that has ended and was not waited for does not (proc(5)).
    """
    try:
        fields = read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return int(fields[19]) == start_ticks and (fields[0] not in "ZX" or int(fields[17]) > 1)
    except (OSError, ValueError, IndexError):
        return False


def read_boot_id() -> str:
    """Return what names this boot of this machine."""
    return read_text(_BOOT_ID)


def _namespace(kind: str) -> int | None:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_text(path: str) -> str:
    """Return what is in a file of the kernel's, without the line's end; OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()
