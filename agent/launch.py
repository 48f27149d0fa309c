"""Starts a training for a server (a Streamlit app, a back end) as a leader of its own, and stops it again.

The server is then neither the leader, which would be ended with the training, nor in the training's POSIX session. All that
is known of a training lies in files beside its status file, so that it is found again after a restart of the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent import session, status, wire
from agent.isolated import run_module
from agent.status import Status, StatusError

# A file's name is at most 255 bytes (path_resolution(7)), and this gets endings.
_LONGEST_STEM = 100
_TAIL_BYTES = 64 * 1024
_MAX_LAUNCH_BYTES = 16 * 1024 * 1024  # of a command line, execve(2) takes no more than 6 MiB
_LOOK_S = 0.05
_ENDED_WITHIN_S = 10.0
_MOST_WORKERS = 999_999  # as `reaperctl run` has it
_INTERPRETERS = ("python", "pypy")  # how the names of their files begin


class LaunchError(RuntimeError):
    """A training could not be started; the text says why."""


class Training(NamedTuple):
    """A training that was started: a few texts and numbers, to be kept in ``st.session_state``.

    It stays true when the server is restarted; ``find_training()`` has it again then.
    """

    name: str
    status_file: str  # read by agent.read_status()
    log_file: str  # what the training and its supervisor print
    command: tuple[str, ...]
    pid: int  # of its supervisor, `reaperctl run`, which ends with it
    start_ticks: int  # as in /proc/PID/stat: with pid and boot id, it names one process for good
    boot_id: str
    socket: str | None = None  # of the daemon that was asked for; None: the usual one
    restarts: int = 0  # how often it may be started again

    @property
    def supervised(self) -> bool:
        """Whether its supervisor lives: it outlives the training until all that was left is ended."""
        return self.boot_id == status.read_boot_id() and status.lives(self.pid, self.start_ticks)

    def status(self) -> Status | None:
        """Return what its status file says; None where it has not begun, or never did. StatusError."""
        try:
            return status.read_status(self.status_file)
        except FileNotFoundError:
            return None

    def log(self, lines: int = 20) -> str:
        """Return the last lines of what it has printed, control characters aside."""
        return tail(self.log_file, lines)


def start_training(
    command: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    status_file: str | os.PathLike[str] | None = None,
    log_file: str | os.PathLike[str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    max_workers: int | None = None,
    restarts: int = 0,
    isolate: bool = False,
    socket: str | None = None,
) -> Training:
    """Start ``command``, a list of words, under ``reaperctl run``, detached from this process; return at once.

    ``name`` is what people see, the script's by default. ``status_file`` is by default one for that name in this user's state
    directory, ``log_file`` the same with ``.log``; both begin anew. ``env`` is added to this process's environment.
    ``max_workers`` (1 or more), ``restarts`` (on failure, at most so often) and ``isolate`` are as for ``reaperctl run``;
    ``socket`` as for ``register()``. LaunchError where it cannot be started, or where the one before still runs; TypeError,
    ValueError where an argument is none.
    """
    words = _words(command)
    _check("max_workers", 1 if max_workers is None else max_workers, 1, _MOST_WORKERS)
    _check("restarts", restarts, 0, wire.MAX_ATTEMPTS - 1)
    name = name or _name_of(words)
    if not 0 < len(name) <= wire.MAX_NAME_CHARS or "\0" in name:
        raise ValueError(f"name: must have 1 to {wire.MAX_NAME_CHARS} characters and no NUL")
    path = os.path.abspath(status_file) if status_file is not None else default_status_file(name)
    log_path = os.path.abspath(log_file) if log_file is not None else f"{path}.log"
    options = [
        *([f"--max-workers={max_workers}"] if max_workers is not None else []),
        *([f"--restart=on-failure:{restarts}"] if restarts else []),
        *(["--isolate"] if isolate else []),
    ]
    where = [f"--socket={socket}"] if socket else []
    options = [*where, "run", f"--name={name}", f"--status-file={path}", *options, "--", *words]
    run = run_module("reaperd.ctl.main", *options, python=_interpreter())
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with _alone(os.path.dirname(path)):
            _refuse_second(path, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # what it says is of the run before
            with _spawned(run, log_path, cwd, env) as started:
                boot_id = status.read_boot_id()
                found = Training(name, path, log_path, tuple(words), *started, boot_id, socket, restarts)
                _save(found)
            return found
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise LaunchError(f"{name} cannot be started: {place}: {error.strerror}") from None


def find_training(
    name: str | None = None, *, status_file: str | os.PathLike[str] | None = None
) -> Training | None:
    """Return the last training that was started under that name, or with that status file; None where there was none."""
    if (name is None) == (status_file is None):
        raise ValueError("say either the name or the status file of the training")
    path = os.path.abspath(status_file) if status_file is not None else default_status_file(str(name))
    try:
        with open(_launch_file(path), "rb") as file:
            told = json.loads(file.read(_MAX_LAUNCH_BYTES))
        return Training(**{**told, "command": tuple(told["command"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def wait_begun(training: Training, within_s: float = 10.0) -> Status | None:
    """Return the first word of a training that has just been started; None where there is none in time, or it has failed."""
    until_s = time.monotonic() + within_s
    while (told := training.status()) is None and training.supervised and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
    return told or training.status()


def default_status_file(name: str) -> str:
    """Return where the status of a training of that name lies unless one says otherwise."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    if plain != name or plain.startswith(".") or len(plain.encode()) > _LONGEST_STEM:
        # Two names must not share a file.
        cut = plain.lstrip(".").encode()[:_LONGEST_STEM].decode("utf-8", "ignore")
        plain = f"{cut}-{wire.crc32(name.encode('utf-8', 'replace')):08x}"
    return os.path.join(state, "reaper", "trainings", f"{plain}.json")


def tail(path: str, lines: int) -> str:
    """Return the last ``lines`` of a text file, what no terminal would print left out; "" where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            file.seek(max(0, os.fstat(descriptor).st_size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    # A progress bar draws over itself: what stands is what follows the last carriage return.
    found = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    while found and not found[-1]:
        found.pop()
    shown = found[len(found) - lines :] if 0 < lines < len(found) else found
    return "\n".join("".join(c for c in line if c.isprintable() or c == "\t") for line in shown)


# -- how it is started ----------------------------------------------------------------------------


def _words(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(command, (str, bytes)):
        raise TypeError(
            'the command must be a list of words, as in [sys.executable, "train.py"], got one text'
        )
    words = [os.fspath(word) for word in command]
    if not words or any("\0" in word for word in words):
        raise ValueError("the command must have at least one word, and no NUL in any")
    return words


def _check(what: str, number: object, least: int, most: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{what}: must be a whole number, got {number!r:.60}")
    if not least <= number <= most:
        raise ValueError(f"{what}: must be {least} to {most}, got {number}")


def _name_of(words: list[str]) -> str:
    script = next((word for word in words if word.endswith(".py")), words[0])
    return os.path.basename(script)[: wire.MAX_NAME_CHARS] or "training"


def _interpreter() -> str:
    executable = sys.executable or ""
    if getattr(sys, "frozen", False) or not os.path.basename(executable).startswith(_INTERPRETERS):
        raise LaunchError(f"{executable or 'sys.executable'} is no Python interpreter: use `reaperctl run`")
    return executable


def _refuse_second(path: str, name: str) -> None:
    before = find_training(status_file=path)
    if before is not None and before.supervised:
        raise LaunchError(f"{name} runs already, under pid {before.pid}: stop it first")
    with contextlib.suppress(OSError, StatusError):
        running = status.read_status(path)
        if running.state == status.RUNNING:
            raise LaunchError(f"{name} runs already, as pid {running.pid}: stop it first")


@contextlib.contextmanager
def _spawned(
    run: list[str], log_path: str, cwd: str | os.PathLike[str] | None, env: Mapping[str, str] | None
) -> Iterator[tuple[int, int]]:
    """Start the supervisor, give its pid and start time, and end it again where those cannot be kept: nobody would find it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    # The server may be of a session itself: the training must be no worker of that one.
    with session.Spared(), open(os.open(log_path, flags, 0o600), "wb") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        environment.pop(wire.LINEAGE_VARIABLE, None)
        process = subprocess.Popen(
            run,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process.pid, session.read_start_ticks(process.pid)
    except BaseException:
        _end(process)
        raise
    finally:
        # A dead child stays in the table until somebody has waited for it; until then, its pid is nobody else's.
        threading.Thread(target=process.wait, name="reaper-wait", daemon=True).start()


def _end(supervisor: subprocess.Popen[bytes]) -> None:
    """End a supervisor that was just started, with what it may have started by now."""
    supervisor.terminate()  # it passes that on, and ends what is left
    try:
        supervisor.wait(_ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()  # the command is sent SIGTERM then


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Keep others from starting one in the same directory meanwhile: who clicks twice starts once."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _launch_file(status_file: str) -> str:
    return f"{status_file}.launch"


def _save(training: Training) -> None:
    path = _launch_file(training.status_file)
    beside = f"{path}.{os.getpid()}"
    told: dict[str, Any] = training._asdict()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(beside, flags, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(told).encode())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
