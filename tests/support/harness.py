"""Real daemons, real leaders and the kernel's word on who is alive, for the tests of the whole.

Everything here waits on a descriptor with a deadline; nothing sleeps, and nothing is ended by its name.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import pytest

T = TypeVar("T")

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ZOO = os.path.join(ROOT, "tests", "support", "zoo")
PARENT = os.path.join(ROOT, "tests", "support", "parent.py")
IMPORT_PATH = os.pathsep.join([ROOT, os.path.join(ROOT, "daemon")])
SITE_PACKAGES = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
# Other users, who need no account. Not 65534: that uid stands for all who have none in this namespace.
STRANGER = 61234
NEIGHBOUR = 61235
OVERFLOW = 65534

# A process that a test started bears the first in its environment, one that a leader started bears both:
# the scripts of the zoo keep them even where they scrub everything else.
RUN_MARK = "REAPER_TEST_RUN"
FAMILY_MARK = "REAPER_TEST_FAMILY"

READY_WITHIN_S = 20.0
UP_WITHIN_S = 90.0
STOPPED_WITHIN_S = 15.0
REPLY_WITHIN_S = 30.0

GRACE_S = 1.0
EXIT_GRACE_S = 1.0
TRACKER_GRACE_S = 5.0
# The promises of a reap, counted from the leader's death.
WORKERS_GONE_S = GRACE_S + 1.0
TRACKERS_GONE_S = WORKERS_GONE_S + TRACKER_GRACE_S

CONFIG = """\
[daemon]
log_level = "debug"
[scan]
interval = "200ms"
[kill]
grace = "{grace:g}s"
exit_grace = "{exit_grace:g}s"
tracker_grace = "{tracker_grace:g}s"
"""
SETTINGS = CONFIG.format(grace=GRACE_S, exit_grace=EXIT_GRACE_S, tracker_grace=TRACKER_GRACE_S)


# -- the kernel's word ----------------------------------------------------------------------------


def open_pidfd(pid: int) -> int | None:
    """Return a pidfd, or None when ``pid`` has been waited for already."""
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, FileNotFoundError):
        return None  # the second since Linux 6.16, while it is being waited for


def has_ended(pidfd: int, *, within_s: float = 0.0) -> bool:
    """Say whether the process behind ``pidfd`` is dead; a zombie is."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, within_s) * 1000))


def alive(pid: int) -> bool:
    """Say whether ``pid`` is a process that is not a zombie."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return False
    try:
        return not has_ended(pidfd)
    finally:
        os.close(pidfd)


def wait_gone(pids: Iterable[int], deadline_s: float) -> list[int]:
    """Return those of ``pids`` that are still alive ``deadline_s`` from now: an empty list is what one hopes for."""
    end_s = time.monotonic() + deadline_s
    left = []
    for pid in pids:
        pidfd = open_pidfd(pid)
        if pidfd is None:
            continue
        with contextlib.closing(Descriptor(pidfd)):
            if not has_ended(pidfd, within_s=end_s - time.monotonic()):
                left.append(pid)
    return left


@dataclass
class Descriptor:
    """Something that ``contextlib.closing`` can close."""

    number: int

    def close(self) -> None:
        os.close(self.number)


def end_process(pid: int, within_s: float = 10.0) -> bool:
    """SIGKILL ``pid`` and say whether it is dead then."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return True
    with contextlib.closing(Descriptor(pidfd)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return has_ended(pidfd, within_s=within_s)


def end_leftovers(pids: Iterable[int], run: str | None = None) -> None:
    """SIGKILL ``pids`` (with ``run``: if they bear its mark still), but let their resource trackers clean up first."""
    trackers = [pid for pid in pids if "resource_tracker" in " ".join(cmdline(pid))]
    for pid in pids:
        if pid not in trackers:
            _end_marked(pid, run)
    for pid in wait_gone(trackers, 2.0):
        _end_marked(pid, run)


def _end_marked(pid: int, run: str | None) -> None:
    """SIGKILL ``pid``, unless it is somebody else's by now: what forks all the time uses up all pids in seconds."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return
    with contextlib.closing(Descriptor(pidfd)):
        if run is None or f"{RUN_MARK}={run}".encode() in read_environment(pid).split(b"\0"):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            has_ended(pidfd, within_s=10.0)


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_proc(pid: int, name: str) -> bytes:
    """Return ``/proc/<pid>/<name>``, empty when the process has gone or is another user's."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def cmdline(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in read_proc(pid, "cmdline").split(b"\0")[:-1]]


def parent_of(pid: int) -> int:
    """Return the parent of ``pid``, 0 when it has gone."""
    tail = read_proc(pid, "stat").rpartition(b")")[2].split()
    return int(tail[1]) if tail else 0


def children_of(pid: int) -> list[int]:
    """Return the children of ``pid``, of all its threads, zombies included."""
    return [
        int(word)
        for task in os.listdir(f"/proc/{pid}/task")
        for word in read_proc(pid, f"task/{task}/children").split()
    ]


def pids_within(pid: int) -> list[int]:
    """Return the pids of ``pid`` in its pid namespaces, outermost (ours) first."""
    for line in read_proc(pid, "status").splitlines():
        if line.startswith(b"NSpid:"):
            return list(map(int, line.split()[1:]))
    return []


def marked(name: str, value: str) -> list[int]:
    """Return the living processes with ``name=value`` in their environment, in order of pid."""
    entry = f"{name}={value}".encode()
    return [pid for pid in all_pids() if entry in read_environment(pid).split(b"\0") and alive(pid)]


def read_environment(pid: int) -> bytes:
    """Return the environment of ``pid``, of another thread where the main one has ended."""
    found = read_proc(pid, "environ")
    if found or b"Threads:\t1\n" in read_proc(pid, "status"):
        return found
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:  # it has ended
        tasks = []
    return next(filter(None, (read_proc(pid, f"task/{task}/environ") for task in tasks)), b"")


def describe(pids: Iterable[int]) -> str:
    """Return one line for each of ``pids``, for the message of a failed assertion."""
    return "\n".join(f"  {pid} (parent {parent_of(pid)}): {' '.join(cmdline(pid))[:150]!r}" for pid in pids)


def repeat_until(attempt: Callable[[], T | None], within_s: float, what: str) -> T:
    """Ask again and again until there is an answer: ``attempt`` must itself wait for a reply from elsewhere."""
    end_s = time.monotonic() + within_s
    while (answer := attempt()) is None:
        if time.monotonic() > end_s:
            raise AssertionError(f"{what}: not within {within_s:g} s")
    return answer


# -- what a test may leave behind -----------------------------------------------------------------

CGROUP_ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/systemd")
CGROUP_PREFIX = "reaper-test-"
_IN_DELETE = 0x200  # sys/inotify.h


def list_cgroups(run: str) -> set[str]:
    """Return the control groups that bear the mark of a test, wherever they are."""
    found: set[str] = set()
    for root in CGROUP_ROOTS:
        for directory, names, _ in os.walk(root):
            found.update(os.path.join(directory, name) for name in names if run in name)
    return found


def list_mounts() -> list[bytes]:
    with open("/proc/self/mountinfo", "rb") as file:
        return sorted(file.read().splitlines())


def list_shm() -> set[str]:
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


def shm_left(before: set[str], ours: set[str], run: str, within_s: float) -> list[str]:
    """Return what is new in /dev/shm since ``before``, and stays for ``within_s``.

    ``ours`` are names that are known to be of the test's own; of others it counts what can be no stranger's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    end_s = time.monotonic() + within_s
    with contextlib.closing(Descriptor(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))) as watch:
        if libc.inotify_add_watch(watch.number, b"/dev/shm", _IN_DELETE) < 0:
            return []
        poll = select.poll()
        poll.register(watch.number, select.POLLIN)
        while new := list_shm() - before:
            if not poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
                return sorted(new - (_strangers(new, run) - ours))
            with contextlib.suppress(BlockingIOError):
                os.read(watch.number, 65536)
    return []


def _strangers(entries: set[str], run: str) -> set[str]:
    """Return those of ``entries`` that may be somebody else's: a living process has or names them, or tests run there."""
    family = {os.getpid(), os.getppid(), *marked(RUN_MARK, run)}
    others = [pid for pid in all_pids() if pid not in family]
    if any("pytest" in " ".join(cmdline(pid)) for pid in others):
        return entries
    return entries & shm_of(others)


def shm_of(pids: Iterable[int]) -> set[str]:
    """Return the entries of /dev/shm that ``pids`` have mapped, or that are named after one of them."""
    found = set()
    entries = list_shm()
    for pid in pids:
        for line in read_proc(pid, "maps").splitlines():
            _, _, path = line.partition(b"/dev/shm/")
            if path:
                found.add(os.fsdecode(path.removesuffix(b" (deleted)").partition(b"/")[0]))
        found.update(entry for entry in entries if f"_{pid}_" in entry or f"-{pid}-" in entry)
    return found


# -- a place for one test -------------------------------------------------------------------------


class Scratch:
    """A directory with a short path: a Unix socket's may have no more than 107 bytes."""

    def __init__(self, within: str = "/tmp") -> None:
        self.path = tempfile.mkdtemp(prefix="rp-", dir=within)
        os.chmod(self.path, 0o755)
        self._count = 0

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def directory(self, stem: str, mode: int = 0o755) -> str:
        """Make and return a directory whose name begins with ``stem``."""
        self._count += 1
        path = self.file(f"{stem}{self._count}")
        os.mkdir(path)
        os.chmod(path, mode)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Cgroup:
    """A control group of a test's own, removed with all that is in it."""

    def __init__(self, root: str, name: str) -> None:
        self.name = f"{CGROUP_PREFIX}{name}"
        self.path = os.path.join(root, self.name)
        os.mkdir(self.path)

    def write(self, name: str, text: str) -> None:
        with open(os.path.join(self.path, name), "w", encoding="ascii") as file:
            file.write(text)

    def read(self, name: str) -> str:
        with open(os.path.join(self.path, name), encoding="ascii") as file:
            return file.read()

    def limit_memory(self, size_bytes: int) -> None:
        """Set the limit, in either version of the controller; swap would only put off the end."""
        try:
            self.write("memory.limit_in_bytes", str(size_bytes))
            self.write("memory.memsw.limit_in_bytes", str(size_bytes))
        except FileNotFoundError:
            self.write("memory.max", str(size_bytes))
            self.write("memory.swap.max", "0")

    def pids(self) -> list[int]:
        return [int(word) for word in self.read("cgroup.procs").split()]

    def below(self, name: str) -> Cgroup:
        return Cgroup(self.path, name)

    def remove(self) -> None:
        """End whoever is inside, then remove the directories, innermost first."""
        for directory, names, _ in os.walk(self.path, topdown=False):
            del names
            group = os.path.join(directory, "cgroup.procs")
            with open(group, encoding="ascii") as file:
                for word in file.read().split():
                    end_process(int(word))
            # The kernel counts a killed process as inside until somebody has waited for it.
            repeat_until(lambda path=directory: _rmdir(path), 10, f"cannot remove {directory}")  # type: ignore[misc]


def _rmdir(path: str) -> bool | None:
    try:
        os.rmdir(path)
    except OSError:
        return None
    return True


def entering(groups: Iterable[Cgroup], command: Sequence[str]) -> list[str]:
    """Return a command that puts itself into ``groups``, then becomes ``command``."""
    words = [os.path.join(group.path, "cgroup.procs") for group in groups]
    if not words:
        return list(command)
    script = "".join(f'echo $$ > "${number}" && ' for number in range(1, len(words) + 1))
    return ["sh", "-c", f'{script}shift {len(words)} && exec "$@"', "enter", *words, *command]


@functools.cache
def interpreter_for(uid: int | None) -> str | None:
    """Return a Python of this version that ``uid`` may execute and that imports the tree; None where there is none."""
    if uid is None or _may_execute(uid, sys.executable):
        return sys.executable
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for directory in ("/usr/bin", "/usr/local/bin"):
        if _may_execute(uid, os.path.join(directory, name)):
            return _virtual_environment(directory, name)
    return None


def _may_execute(uid: int, path: str) -> bool:
    # Through a shell: setpriv keeps its capabilities until its exec, so that says nothing.
    probe = as_user(uid, ["sh", "-c", '"$0" -I -c "import os"', path])
    return subprocess.run(probe, stderr=subprocess.DEVNULL, check=False).returncode == 0


@functools.cache
def _virtual_environment(home: str, name: str) -> str:
    """Make an environment that everyone can read, with this tree and this interpreter's packages in it."""
    root = tempfile.mkdtemp(prefix="rp-python-", dir="/tmp")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    os.chmod(root, 0o755)
    return make_environment(root, os.path.join(home, name), IMPORT_PATH)


def make_environment(root: str, interpreter: str, import_path: str) -> str:
    """Make a virtual environment in ``root``, with ``import_path`` and this interpreter's packages; return its Python.

    For what is started with -I, as the gate is: it takes no PYTHONPATH.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages, binaries = os.path.join(root, "lib", name, "site-packages"), os.path.join(root, "bin")
    os.makedirs(packages)
    os.mkdir(binaries)
    os.symlink(interpreter, os.path.join(binaries, "python"))
    for path, text in (
        (os.path.join(root, "pyvenv.cfg"), f"home = {os.path.dirname(interpreter)}\n"),
        (os.path.join(packages, "tree.pth"), "\n".join([*import_path.split(os.pathsep), *SITE_PACKAGES])),
    ):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    return os.path.join(binaries, "python")


def needed_interpreter(uid: int | None) -> str:
    """Return ``interpreter_for(uid)``; where there is none, the test is skipped."""
    path = interpreter_for(uid)
    if path is None:
        pytest.skip(f"uid {uid} may not execute any Python of this version")
    return path


def as_user(uid: int | None, command: Sequence[str]) -> list[str]:
    """Return a command that becomes ``uid`` (None: stays who it is), then ``command``."""
    if uid is None:
        return list(command)
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]


# -- the daemon -----------------------------------------------------------------------------------


class Daemon:
    """A real ``reaperd`` on a socket and in a state directory of its own; with ``uid``, that user's own.

    ``inside`` is a command that becomes another one, such as nsenter(1) where it need not fork.
    """

    def __init__(
        self,
        scratch: Scratch,
        run: str,
        *,
        config: str | None = None,
        uid: int | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        directory = scratch.directory("d")
        self.run = run
        self.uid = uid
        self.inside = list(inside)
        self.state = os.path.join(directory, "state")
        self.socket = os.path.join(directory, "run", "reaper.sock")
        self.log = os.path.join(directory, "log")
        self.config = os.path.join(directory, "reaper.toml")
        system = os.geteuid() == 0 and uid is None
        os.mkdir(os.path.dirname(self.socket), 0o755 if system else 0o700)
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(SETTINGS if config is None else config)
        self._notify_path = os.path.join(directory, "notify")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(self._notify_path)
        if uid is not None:
            for path in (directory, os.path.dirname(self.socket), self.config, self._notify_path):
                os.chown(path, uid, uid)
        self.notified: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    # -- its life

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the daemon was not started"
        return self._process

    def interpreter(self) -> str:
        return needed_interpreter(self.uid)

    def environment(self) -> dict[str, str]:
        return test_environment(self.run, NOTIFY_SOCKET=self._notify_path)

    def start(self, *options: str) -> Daemon:
        """Start it and return when it says READY."""
        self.launch(*options)
        self.wait_ready()
        return self

    def launch(self, *options: str) -> None:
        """Start it without waiting for anything."""
        command = [self.interpreter(), "-m", "reaperd"]
        command = as_user(self.uid, [*command, "--socket", self.socket, "--state-dir", self.state])
        with open(self.log, "ab") as log:
            log.write(f"--- {' '.join(command)} {' '.join(options)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [*self.inside, *command, "--config", self.config, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        self.wait_notified("READY=1", READY_WITHIN_S)

    def wait_notified(self, line: str, within_s: float) -> None:
        """Return when the daemon has sent ``line`` to its service manager; fail as soon as it is dead."""
        end_s = time.monotonic() + within_s
        pidfd = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(self._notify, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        with contextlib.closing(Descriptor(pidfd)):
            while True:
                events = dict(poll.poll(max(0.0, end_s - time.monotonic()) * 1000))
                if self._notify.fileno() in events:
                    lines = self._notify.recv(65536).decode().splitlines()
                    self.notified += lines
                    if line in lines:
                        return
                elif pidfd in events:
                    raise AssertionError(f"the daemon ended with {self.process.wait()}:\n{self.read_log()}")
                else:
                    raise AssertionError(
                        f"the daemon did not say {line} within {within_s:g} s:\n{self.read_log()}"
                    )

    def stop(self) -> int:
        """SIGTERM it and return its exit code; SIGKILL and fail when that takes too long."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise AssertionError(
                f"the daemon did not stop within {STOPPED_WITHIN_S:g} s:\n{self.read_log()}"
            ) from None

    def kill9(self) -> None:
        """SIGKILL the daemon alone; its gate must notice by itself."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Stop it in good order and start it again."""
        self.stop()
        self.start()

    def reload(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def beside(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run another daemon with this one's socket and configuration, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "reaperd", "--socket", self.socket, "--config", self.config, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=READY_WITHIN_S,
            check=False,
            env=test_environment(self.run),
        )

    def children(self) -> list[int]:
        """Return the children of the daemon: its gate, and helpers at work."""
        return children_of(self.pid)

    def drain_notifications(self) -> list[str]:
        """Return everything that the service manager was told, up to now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.notified += self._notify.recv(65536, socket.MSG_DONTWAIT).decode().splitlines()
        return self.notified

    def close(self) -> None:
        """End it and forget its sockets; the log stays until the scratch directory goes."""
        try:
            if self._process is not None:
                self.stop()
        finally:
            self._notify.close()

    def read_log(self) -> str:
        with (
            contextlib.suppress(FileNotFoundError),
            open(self.log, encoding="utf-8", errors="replace") as file,
        ):
            return file.read()
        return ""

    # -- its control command

    def ctl(self, *arguments: str, uid: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``reaperctl`` to its end."""
        return subprocess.run(
            as_user(uid, [needed_interpreter(uid), "-m", "reaperd.ctl.main", *arguments]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=REPLY_WITHIN_S,
            check=False,
            env=test_environment(self.run, REAPER_SOCKET=self.socket),
        )

    def ask(self, *arguments: str, uid: int | None = None) -> Any:
        """Return what ``reaperctl ... --json`` says: its document, or a list of its lines for ``events``."""
        done = self.ctl(*arguments, "--json", uid=uid)
        assert done.returncode == 0, f"reaperctl {arguments} left with {done.returncode}: {done.stderr}"
        if arguments[0] == "events":
            return [json.loads(line) for line in done.stdout.splitlines()]
        return json.loads(done.stdout)

    def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("ps")
        return found

    def session_of(self, leader: int) -> dict[str, Any] | None:
        """Return what ``ps`` says of the session that ``leader`` leads, None when it says nothing."""
        return next((s for s in self.sessions() if s["leader"]["pid"] == leader), None)

    def wait_listed(self, leader: int, pids: Iterable[int], within_s: float = 10.0) -> None:
        """Return when ``ps`` lists all of ``pids`` as workers of ``leader``'s session."""
        wanted = set(pids)

        def listed() -> bool | None:
            session = self.session_of(leader)
            return True if session and wanted <= {w["pid"] for w in session["workers"]} else None

        repeat_until(listed, within_s, f"reaperctl ps does not list all of {sorted(wanted)} below {leader}")

    def events(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the events on record whose fields are as ``wanted``."""
        return [e for e in self.ask("events") if all(e.get(key) == value for key, value in wanted.items())]

    def wait_event(self, within_s: float = 10.0, **wanted: Any) -> dict[str, Any]:
        """Return the first event whose fields are as ``wanted``, once there is one."""
        return repeat_until(
            lambda: next(iter(self.events(**wanted)), None),
            within_s,
            f"reaperctl events has none with {wanted}",
        )

    def wait_end(self, session: str, within_s: float = 20.0) -> dict[str, Any]:
        """Return the event that closes ``session``: ``reaped``, or ``ended`` where nothing had to be ended."""

        def closed() -> dict[str, Any] | None:
            return next((e for e in self.events(session=session) if e["kind"] in ("reaped", "ended")), None)

        return repeat_until(closed, within_s, f"no event says how session {session} ended")


def test_environment(run: str, **more: str) -> dict[str, str]:
    """Return this process's environment, without anything of Reaper's but ``more``, and with the test's mark."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REAPER_")}
    return {**kept, "PYTHONPATH": IMPORT_PATH, "PYTHONUNBUFFERED": "1", RUN_MARK: run, **more}


test_environment.__test__ = False  # type: ignore[attr-defined]


# -- leaders --------------------------------------------------------------------------------------


@dataclass
class Family:
    """What a leader said once all it starts was up."""

    leader: int
    workers: list[int]
    trackers: list[int]
    lineage: str | None
    facts: dict[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Family:
        roles: dict[str, list[int]] = line["pids"]
        spared = line.get("spared", [])
        workers = [
            pid for role, pids in roles.items() if role != "tracker" for pid in pids if pid not in spared
        ]
        return cls(line["leader"], workers, roles.get("tracker", []), line["lineage"], line)

    @property
    def session(self) -> str:
        """The id of the leader's own session: the last one of its stamp."""
        assert self.lineage, "the leader has no stamp"
        return self.lineage.rpartition(":")[2]

    @property
    def everyone(self) -> list[int]:
        return [*self.workers, *self.trackers]

    @property
    def shm(self) -> list[str]:
        return list(self.facts.get("shm", []))


class Leader:
    """A training script that runs as a process of its own, and every process it started.

    ``parent``: ``pytest`` (it never waits: the dead leader stays a zombie), or one of the modes of
    ``parent.py``: ``waits``, ``leaves``, ``subreaper``. ``inside`` is a command that runs another one,
    such as unshare(1); pids that the script reports from another namespace are translated.
    """

    def __init__(
        self,
        scratch: Scratch,
        run: str,
        script: str,
        *arguments: str,
        socket: str | None = None,
        parent: str = "pytest",
        uid: int | None = None,
        groups: Iterable[Cgroup] = (),
        env: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        directory = scratch.directory("l", 0o777 if uid is not None else 0o755)
        self.mark = f"{run}.{os.path.basename(directory)}"
        self.log = os.path.join(directory, "stderr")
        interpreter = interpreter_for(uid)
        assert interpreter, f"no Python of this version can be executed by uid {uid}"
        command = [interpreter, os.path.join(ZOO, script), *arguments]
        command = entering(groups, as_user(uid, command))
        if parent != "pytest":
            command = [sys.executable, PARENT, parent, *command]
        command = [*inside, *command]
        more = {FAMILY_MARK: self.mark, "REAPER_TEST_DIR": directory, "TMPDIR": directory, **(env or {})}
        if socket:
            more["REAPER_SOCKET"] = socket
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=test_environment(run, **more),
                start_new_session=True,
            )
        self._parent = parent
        self._inside = bool(inside)
        self._unread = b""
        self._pidfds: dict[int, int] = {}
        self._family: Family | None = None
        self.shm: set[str] = set()  # what the family had in /dev/shm when it was up
        # Between the test and the leader when it was up, where it runs inside another command: unshare, an init.
        self.container: list[int] = []

    # -- what it says

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def read_line(self, within_s: float = UP_WITHIN_S) -> dict[str, Any]:
        """Return the next line of JSON it prints; fail as soon as it is dead."""
        end_s = time.monotonic() + within_s
        pidfd = os.pidfd_open(self._process.pid)
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        if self._parent != "leaves":
            poll.register(pidfd, select.POLLIN)
        with contextlib.closing(Descriptor(pidfd)):
            while b"\n" not in self._unread:
                events = dict(poll.poll(max(0.0, end_s - time.monotonic()) * 1000))
                data = os.read(self.stdout.fileno(), 65536) if self.stdout.fileno() in events else b""
                if not data:
                    why = "ended" if events else f"said nothing for {within_s:g} s"
                    raise AssertionError(f"the training script {why}:\n{self.read_log()}")
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def up(self) -> Leader:
        """Return when all it starts is up, and hold every one of those processes by a pidfd."""
        self._family = Family.parse(self._translated(self.read_line()))
        inner = self._family.facts.get("inner")
        for pid in [self._family.leader, *self._family.everyone, *(self.spared or [])]:
            self.hold(pid)
        if inner:
            for pid in Family.parse(inner).everyone:
                self.hold(pid)
        self.shm = shm_of(self._pidfds)
        if self._inside:  # now: an init that goes on to another program shows no mark for a moment
            self.container = self._not_held()
        return self

    def _translated(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what the leader said with its pids as they are in our namespace."""
        names = self._names()
        if line["leader"] not in names:
            return line
        told = {pid for found in (*line["pids"].values(), line.get("spared", [])) for pid in found}
        end_s = time.monotonic() + UP_WITHIN_S
        # One in the middle of execve(2) shows no mark.
        while told - names.keys() and time.monotonic() < end_s:
            names |= self._names()
        pids = {role: [names.get(pid, pid) for pid in found] for role, found in line["pids"].items()}
        spared = [names.get(pid, pid) for pid in line.get("spared", [])]
        return {**line, "leader": names[line["leader"]], "pids": pids, "spared": spared}

    def _names(self) -> dict[int, int]:
        """Return the family's pids by what they are in namespaces of their own."""
        return {
            within[-1]: pid for pid in marked(FAMILY_MARK, self.mark) if len(within := pids_within(pid)) > 1
        }

    def hold(self, pid: int) -> None:
        if pid not in self._pidfds and (pidfd := open_pidfd(pid)) is not None:
            self._pidfds[pid] = pidfd

    @property
    def family(self) -> Family:
        assert self._family is not None, "the leader is not up"
        return self._family

    @property
    def pid(self) -> int:
        return self.family.leader

    @property
    def session(self) -> str:
        return self.family.session

    @property
    def spared(self) -> list[int]:
        return list(self.family.facts.get("spared", []))

    def tell(self, words: str) -> None:
        """Send a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n".encode())
        self._process.stdin.flush()

    def ask(self, words: str) -> dict[str, Any]:
        """Send a line to its stdin and return the answer; new pids in it are held as well."""
        self.tell(words)
        answer = self.read_line()
        for pid in answer.get("pids", []):
            self.hold(pid)
        return answer

    def read_log(self) -> str:
        with (
            contextlib.suppress(FileNotFoundError),
            open(self.log, encoding="utf-8", errors="replace") as file,
        ):
            return file.read()
        return ""

    # -- its end, and theirs

    def signal(self, number: int) -> None:
        """Send ``number`` to the leader alone."""
        signal.pidfd_send_signal(self._pidfds[self.pid], number)

    def kill9(self) -> None:
        """SIGKILL the leader and return when it is dead."""
        self.signal(signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self, within_s: float = 20.0) -> None:
        assert has_ended(self._pidfds[self.pid], within_s=within_s), (
            f"the leader lives on:\n{self.read_log()}"
        )

    def wait(self) -> int:
        """Wait for the process that this test started, the leader or its parent, and return its code."""
        return self._process.wait(STOPPED_WITHIN_S)

    def wait_released(self, within_s: float) -> bool:
        """Say whether every process that inherited the leader's stdout is gone within that time: the pipe is at its end.

        That sees also processes which no listing of /proc can catch.
        """
        end_s = time.monotonic() + within_s
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        while poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
            if not os.read(self.stdout.fileno(), 65536):
                return True
        return False

    def still_alive(self, pids: Iterable[int]) -> list[int]:
        """Return those of ``pids``, held since they came up, that live."""
        return [pid for pid in pids if pid in self._pidfds and not has_ended(self._pidfds[pid])]

    def living(self) -> list[int]:
        """Return every living process of the family but the spared, the leader and the leader's parent."""
        inner = self.family.facts.get("inner", {}).get("leader")
        apart = {self._process.pid, self.pid, *self.spared}
        found = set(self.still_alive([*self.family.everyone, *([inner] if inner else [])]))
        return sorted((found | set(marked(FAMILY_MARK, self.mark))) - apart)

    def wait_all_gone(self, within_s: float, *, besides: Iterable[int] = ()) -> list[int]:
        """Return who of the family, ``besides`` apart, lives ``within_s`` from now: nobody, one hopes.

        Looks again until nobody is found, for a process may have been started since.
        """
        end_s = time.monotonic() + within_s
        excepted = set(besides)
        while left := [pid for pid in self.living() if pid not in excepted]:
            if wait_gone(left, end_s - time.monotonic()):
                return [pid for pid in self.living() if pid not in excepted]
        return []

    def _not_held(self) -> list[int]:
        return [pid for pid in marked(FAMILY_MARK, self.mark) if pid not in self._pidfds]

    def end_spared(self) -> None:
        """SIGKILL the spared processes, and what they started."""
        for pid in {*self.spared, *marked(FAMILY_MARK, self.mark)} - {self._process.pid, self.pid}:
            end_process(pid)

    def end_family(self) -> None:
        """SIGKILL everything it started, where Reaper must not."""
        for pid in self.living():
            end_process(pid)

    def close(self) -> None:
        """End the leader and the parent it may have; what it left behind is for others to find."""
        if self._family is not None and self.pid in self._pidfds and not has_ended(self._pidfds[self.pid]):
            self.signal(signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        for pid in self._not_held() if self._inside else ():
            end_process(pid)
        try:
            self._process.wait(0 if self._parent == "pytest" and self._family is None else 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()


def broken_promise(leader: Leader) -> str:
    """Return what of the family outlived the leader for longer than promised, by name; empty when nothing did."""
    trackers = leader.family.trackers
    if left := leader.wait_all_gone(WORKERS_GONE_S, besides=trackers):
        return f"alive {WORKERS_GONE_S:g} s after the leader's death:\n{describe(left)}"
    if left := leader.wait_all_gone(TRACKERS_GONE_S - WORKERS_GONE_S):
        return f"trackers alive {TRACKERS_GONE_S:g} s after the leader's death:\n{describe(left)}"
    return ""
