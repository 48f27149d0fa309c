"""Kill a real grid search with SIGKILL, without Reaper and then with it, and show what was left each time.

Everything happens in a directory of its own, with a daemon of its own: an installed one is neither used nor disturbed.
Leaves with 0 only when, with Reaper, no process and no shared memory was left.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
MARK = "REAPER_DEMO"  # in the environment of all that a search starts: how the demo itself finds it again
MIB = 2**20
WIDTH = 80
WORKERS = 2
LOOK_S = 3.0  # how long the survivors are watched when there is no Reaper


@dataclass(frozen=True)
class Survivor:
    """A process of the search that is not the script, held by a pidfd."""

    pid: int
    fd: int
    role: str
    cpu_percent: float
    rss_bytes: int


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


# -- what the kernel says -------------------------------------------------------------------------


def marked(mark: str) -> list[int]:
    """Return the pids of all living processes whose environment bears ``mark``; a zombie has none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone, or another user's
            if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def shared_memory(pid: int) -> dict[Path, int]:
    """Return path -> bytes of what joblib made for the script ``pid``: folders in /dev/shm (else the temp dir), semaphores."""
    found = {}
    for folder in {Path("/dev/shm"), Path(tempfile.gettempdir())}:
        for pattern in (f"joblib_memmapping_folder_{pid}_*", f"sem.loky-{pid}-*"):
            for path in folder.glob(pattern):
                with contextlib.suppress(OSError):
                    found[path] = sum(
                        entry.stat().st_size for entry in (path, *path.rglob("*")) if entry.is_file()
                    )
    return found


def role_of(pid: int) -> str:
    return "tracker" if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes() else "worker"


def maps_shared_array(pid: int) -> bool:
    """Say whether ``pid`` has the training data mapped: a worker that is still importing has not."""
    with contextlib.suppress(OSError):
        return "joblib_memmapping_folder" in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace")
    return False


def cpu_s(pid: int) -> float:
    """Return the CPU time that ``pid`` has used: utime and stime, fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def survivors(pids: list[int], window_s: float) -> list[Survivor]:
    """Return those of ``pids`` that live, with the CPU they use during ``window_s``."""
    found: list[tuple[int, int, float]] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found.append((pid, os.pidfd_open(pid), cpu_s(pid)))
    begun = time.monotonic()
    time.sleep(window_s)
    took_s, result = max(time.monotonic() - begun, 1e-3), []
    for pid, fd, before_s in found:
        try:
            percent = 100 * (cpu_s(pid) - before_s) / took_s
            result.append(Survivor(pid, fd, role_of(pid), percent, rss_bytes(pid)))
        except OSError:
            os.close(fd)
    return sorted(result, key=lambda one: (one.role != "worker", one.pid))


def ends(watched: list[Survivor], since: float, timeout_s: float) -> dict[int, float]:
    """Return pid -> seconds from ``since`` to its end, for those that end within ``timeout_s``; the kernel tells."""
    poll = select.poll()
    ended: dict[int, float] = {}
    pids = {one.fd: one.pid for one in watched}
    for fd in pids:
        poll.register(fd, select.POLLIN)
    while len(ended) < len(pids) and (left_s := since + timeout_s - time.monotonic()) > 0:
        for fd, _ in poll.poll(left_s * 1000):
            ended[pids[fd]] = time.monotonic() - since
            poll.unregister(fd)
    return ended


# -- a search, a daemon ---------------------------------------------------------------------------


class Search:
    """The training script, running; ``mark`` is in the environment of all that it starts."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.mark = secrets.token_hex(8)
        self.log = home / f"search-{self.mark}.log"
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith("REAPER_") and k != "JOBLIB_TEMP_FOLDER"
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", HERE / "train_grid_search.py"],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**inherited, **environment, MARK: self.mark},
                start_new_session=True,  # Ctrl-C is for the demo, which then cleans up
            )
        self.pid = self.process.pid

    def wait_until_busy(self) -> None:
        """Return once every worker computes on the shared training data."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"Fitting "):
                break
        deadline = time.monotonic() + 60
        while sum(map(maps_shared_array, set(marked(self.mark)) - {self.pid})) < WORKERS:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the grid search did not get going\n{tail(self.log)}")
            time.sleep(0.05)

    def others(self) -> list[int]:
        return [pid for pid in marked(self.mark) if pid != self.pid]

    def kill(self) -> float:
        """Send SIGKILL to the script, and to nothing else; return the moment (monotonic seconds)."""
        at = time.monotonic()
        self.process.kill()
        self.process.wait()
        return at

    def close(self) -> None:
        """End all that is left of the search: workers first, so that the trackers can tidy up after them."""
        if self.process.poll() is None:
            self.kill()
        for attempt in range(10):
            left = survivors(self.others(), 0.0)
            for one in left:
                if one.role == "worker" or attempt > 5:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(one.fd, signal.SIGKILL)
            ends(left, time.monotonic(), 1.0)
            for one in left:
                os.close(one.fd)
            if not left:
                break
        for path in shared_memory(self.pid):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def searching(home: Path, **environment: str) -> Iterator[Search]:
    search = Search(home, **environment)
    try:
        search.wait_until_busy()
        yield search
    finally:
        search.close()


@contextlib.contextmanager
def daemon(home: Path) -> Iterator[dict[str, str]]:
    """Run a daemon in ``home`` that minds only who registers; yield the environment that leads to it."""
    config, log = home / "reaper.toml", home / "reaperd.log"
    config.write_text("[scan]\nenabled = false  # unregistered processes are none of the demo's business\n")
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(home / "notify"))
    options = ("--config", config, "--socket", home / "sock", "--state-dir", home / "state")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "reaperd", *map(str, options)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, "NOTIFY_SOCKET": str(home / "notify")},
            start_new_session=True,
        )
    try:
        notify.settimeout(0.2)
        deadline = time.monotonic() + 15
        while b"READY=1" not in receive(notify):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the daemon did not start\n{tail(log)}")
        yield {"REAPER_SOCKET": str(home / "sock")}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        notify.close()


def receive(notify: socket.socket) -> bytes:
    try:
        return notify.recv(4096)
    except TimeoutError:
        return b""


def reaped_event(environment: dict[str, str], timeout_s: float = 15) -> dict[str, Any]:
    """Return what the daemon wrote down about the one session that it reaped."""
    command = [sys.executable, "-m", "reaperd.ctl.main", "events", "--json"]
    deadline = time.monotonic() + timeout_s
    while True:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        for event in map(json.loads, done.stdout.splitlines()):
            if event["kind"] == "reaped":
                return dict(event)
        if time.monotonic() > deadline:
            raise DemoError(f"reaperctl events names no reaped session\n{done.stderr}")
        time.sleep(0.1)


def tail(log: Path) -> str:
    return textwrap.indent("\n".join(log.read_text("utf-8", "replace").splitlines()[-8:]), "  | ")


# -- what is shown --------------------------------------------------------------------------------


def say(text: str = "") -> None:
    print(text, flush=True)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def size(count: int) -> str:
    return f"{count / MIB:.0f} MiB" if count >= MIB or not count else f"{count} bytes"


def show_left(left: list[Survivor], memory: dict[Path, int]) -> None:
    for one in left:
        say(f"     {one.role:<8}{one.pid:>8}  {one.cpu_percent:4.0f} % CPU  {size(one.rss_bytes):>8} RSS")
    where = " and ".join(sorted({str(path.parent) for path in memory})) or "/dev/shm"
    say(f"     {where}: {size(sum(memory.values()))} in {len(memory)} entries")


def show_cause(cause: dict[str, Any] | None) -> str:
    if cause and cause["kind"] == "signal":
        return f"signal {cause['code']} ({signal.Signals(cause['code']).name})"
    return "unknown" if cause is None else f"{cause['kind']} {cause['code']}"


def show_event(event: dict[str, Any]) -> None:
    """Print what the daemon did: processes that were treated alike for the same reason share a line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for process in event["processes"]:
        evidence = process["evidence"]
        reason = evidence if isinstance(evidence, str) else "; ".join(map(str, evidence))
        alike.setdefault((process["signal"] or "nothing", reason), []).append(str(process["pid"]))
    say(f"   Reaper (reaperctl events): the script died of {show_cause(event['cause'])}, so it sent")
    for (sent, reason), pids in alike.items():
        text = f"{sent:<8} to {' '.join(pids)}: {reason}"
        say(textwrap.fill(text, WIDTH, initial_indent=" " * 5, subsequent_indent=" " * 17))
    freed = event["freed"]
    memory = f"{size(freed['rss_bytes'])} of memory and {size(freed['shm_bytes'])} of shared memory"
    say(f"     took {milliseconds(event['latency_s'])}, and freed {memory}.")


def without_reaper(home: Path) -> None:
    with searching(home, REAPER_DISABLE="1") as search:
        say(f"1. Without Reaper. The script (pid {search.pid}) gets SIGKILL.")
        say(f"   What is still there {LOOK_S:.0f} s later:")
        search.kill()
        left = survivors(search.others(), LOOK_S)
        show_left(left, shared_memory(search.pid))
        for one in left:
            os.close(one.fd)
    say("   Such workers finish what is queued, then stay for 5 minutes more.")
    say("   (The demo has now ended them itself.)")
    say()


def with_reaper(home: Path) -> bool:
    with daemon(home) as environment, searching(home, **environment) as search:
        before = survivors(search.others(), 1.0)
        say(f'2. With Reaper: agent.register(name="grid-search"). The script (pid {search.pid})')
        say("   gets SIGKILL. What it leaves behind at that moment:")
        show_left(before, shared_memory(search.pid))
        killed_at = search.kill()
        ended = ends(before, killed_at, 30)
        for one in before:
            os.close(one.fd)
        event = reaped_event(environment)
        show_event(event)
        return show_check(search, before, ended)


def show_check(search: Search, before: list[Survivor], ended: dict[int, float]) -> bool:
    workers = [ended.get(one.pid) for one in before if one.role == "worker"]
    times = [known for known in workers if known is not None]
    if len(times) == len(workers):
        say(f"   By the kernel's word the last worker was gone {milliseconds(max(times))} after the kill,")
        say(f"   the last process of all {milliseconds(max(ended.values()))} after it.")
    processes, memory = marked(search.mark), shared_memory(search.pid)
    say()
    say(f"3. Left: {len(processes)} processes, and {size(sum(memory.values()))} in {len(memory)} entries.")
    return not processes and not memory and len(times) == len(workers)


def stop(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # through the finally clauses, which clean up


def main() -> int:
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, stop)
    begun = time.monotonic()
    say("A scikit-learn GridSearchCV on 2 joblib workers is killed with SIGKILL, twice.\n")
    # A socket path may have 107 characters, and some temporary directories use most of them up.
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="reaper-demo-", dir=place) as home:
        try:
            without_reaper(Path(home))
            clean = with_reaper(Path(home))
        except DemoError as failure:
            say(f"The demo failed: {failure}")
            return 1
        except KeyboardInterrupt:
            say("\nInterrupted; nothing is left.")
            return 130
    verdict = "Nothing is left." if clean else "SOMETHING IS LEFT, WHICH IS A FAULT."
    say(f"   {verdict} (This took {time.monotonic() - begun:.0f} s.)")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
