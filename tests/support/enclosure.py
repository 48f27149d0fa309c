"""A pid namespace in which a daemon that ends whatever it likes sees nobody but a test's own processes.

Its init is a shell, for a Python there might be taken for a pool's parent; /dev/shm is its own too. Pids in
here are those of the namespace, unless they are called outer.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import pytest
from harness import ROOT, Daemon, Scratch, test_environment

ASKER = os.path.join(ROOT, "tests", "support", "asker.py")
CANARY = os.path.join(ROOT, "tests", "support", "zoo", "canary.py")
CLONE_NEWPID = 0x20000000  # sched.h
# A shell that waits collects whoever it has adopted.
INIT = "mount -t tmpfs tmpfs /dev/shm && echo up; sleep infinity & wait"
COMMAND = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", INIT]
UP_WITHIN_S = 60.0
JUDGED_WITHIN_S = 30.0

AGGRESSIVE = """\
[daemon]
log_level = "debug"
[scan]
interval = "0.5s"
orphan_age_limit = "1s"
cpu_threshold = 1
cpu_window = "1s"
memory_threshold = "1MiB"
action = "{action}"
quarantine_for = "{quarantine_for}"
[kill]
grace = "1s"
tracker_grace = "5s"
"""


@functools.cache
def why_not() -> str:
    """Return why no enclosure can be made here, empty where one can."""
    if os.geteuid() != 0:
        return "needs root: it makes a pid namespace"
    done = subprocess.run([*COMMAND[:5], "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


class Enclosure:
    """The namespace, and all that is started in it."""

    def __init__(self) -> None:
        if why_not():
            pytest.skip(why_not())
        self.run = uuid.uuid4().hex[:12]
        self.scratch = Scratch()
        self._libc = ctypes.CDLL(None, use_errno=True)
        with open(self.scratch.file("stderr"), "ab") as errors:
            self._unshare = subprocess.Popen(
                COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=test_environment(self.run),
            )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == b"up\n", self.read_errors()
        (self.init,) = harness.children_of(self._unshare.pid)
        self._namespaces = [
            os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC) for pid in ("self", self.init)
        ]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._daemons: list[Keeper] = []

    # -- starting processes

    @property
    def inside(self) -> list[str]:
        """A command that moves to the namespace's mounts and becomes another one; to be started within ``births``."""
        return ["nsenter", f"--mount=/proc/{self.init}/ns/mnt"]

    @contextlib.contextmanager
    def births(self) -> Iterator[None]:
        """Let every process that is started meanwhile be born in the namespace: our child, whose parent there is 0."""
        own, theirs = self._namespaces
        self._enter(theirs)
        try:
            yield
        finally:
            self._enter(own)

    def _enter(self, namespace: int) -> None:
        if self._libc.setns(namespace, CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), "cannot enter a pid namespace")

    def start(self, command: Sequence[str], **more: str) -> subprocess.Popen[bytes]:
        """Start ``command`` with a pipe for stdin and one for stdout."""
        with self.births(), open(self.scratch.file("stderr"), "ab") as errors:
            process = subprocess.Popen(
                [*self.inside, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=test_environment(self.run, TMPDIR=self.scratch.path, **more),
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def daemon(self, config: str) -> Keeper:
        keeper = Keeper(self, config)
        self._daemons.append(keeper)
        return keeper

    # -- what the kernel says of them

    def path(self, *words: object) -> str:
        """Return where a path of the namespace is for us."""
        return os.path.join(f"/proc/{self.init}/root", *map(str, words))

    def read(self, pid: int, name: str) -> bytes:
        """Return ``/proc/<pid>/<name>``, empty when there is no such process."""
        try:
            with open(self.path("proc", pid, name), "rb") as file:
                return file.read()
        except OSError:
            return b""

    def argv(self, pid: int) -> list[str]:
        return [os.fsdecode(word) for word in self.read(pid, "cmdline").split(b"\0")[:-1]]

    def comm(self, pid: int) -> str:
        return os.fsdecode(self.read(pid, "comm")).rstrip("\n")

    def stat(self, pid: int) -> list[bytes]:
        """Return the fields of its stat file, from the state on; none when there is no such process."""
        return self.read(pid, "stat").rpartition(b")")[2].split()

    def parent_of(self, pid: int) -> int:
        fields = self.stat(pid)
        return int(fields[1]) if fields else -1

    def state_of(self, pid: int) -> str:
        fields = self.stat(pid)
        return fields[0].decode() if fields else ""

    def outer(self, pid: int) -> int | None:
        """Return our pid of a process of the namespace, None when there is none."""
        fields = self.stat(pid)
        for candidate in harness.all_pids() if fields else []:
            if harness.pids_within(candidate)[1:2] == [pid]:
                theirs = harness.read_proc(candidate, "stat").rpartition(b")")[2].split()
                if theirs[19:20] == fields[19:20]:
                    return candidate
        return None

    def pids(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(self.path("proc")) if name.isdigit())

    def shm(self) -> list[str]:
        return sorted(os.listdir(self.path("dev", "shm")))

    def read_errors(self) -> str:
        with contextlib.suppress(FileNotFoundError), open(self.scratch.file("stderr"), errors="replace") as f:
            return f.read()
        return ""

    # -- the end

    def close(self) -> None:
        """End everything in it: with its init the kernel ends all the others."""
        try:
            for keeper in self._daemons:
                keeper.close()
        finally:
            harness.end_process(self.init, within_s=0)
            # An init is dead only once all of its namespace have been waited for, those by us who are our children.
            for process in [*self._processes, self._unshare]:
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        with contextlib.suppress(BrokenPipeError):
                            stream.close()
            for descriptor in self._namespaces:
                os.close(descriptor)
            self.scratch.remove()
        assert harness.marked(harness.RUN_MARK, self.run) == []


class Keeper:
    """A daemon in an enclosure, and who asks it: whom it cannot see, it does not answer."""

    def __init__(self, enclosure: Enclosure, config: str) -> None:
        self.enclosure = enclosure
        self.daemon = Daemon(enclosure.scratch, enclosure.run, config=config, inside=enclosure.inside)
        with enclosure.births():
            self.daemon.launch()
        self.daemon.wait_ready()
        self.canaries: set[int] = set()
        self._asker = enclosure.start([sys.executable, ASKER, self.daemon.socket])

    @property
    def pid(self) -> int:
        return harness.pids_within(self.daemon.pid)[1]

    def restart(self) -> None:
        self.daemon.stop()
        with self.enclosure.births():
            self.daemon.launch()
        self.daemon.wait_ready()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return the daemon's reply, a refusal too: ``ok`` tells."""
        assert self._asker.stdin is not None
        assert self._asker.stdout is not None
        self._asker.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        self._asker.stdin.flush()
        line = self._asker.stdout.readline()
        assert line, f"nobody asks any more:\n{self.enclosure.read_errors()}"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def get(self, op: str, **fields: Any) -> dict[str, Any]:
        reply = self.ask(op, **fields)
        assert reply.get("ok"), f"{op} {fields}: {reply}\n{self.log_tail()}"
        return reply

    def orphans(self) -> dict[int, dict[str, Any]]:
        """Return the records of ``orphans`` by pid."""
        return {record["pid"]: record for record in self.get("orphans")["orphans"]}

    def events(self, after: int = 0, wait_s: int = 0) -> list[dict[str, Any]]:
        """Return all events newer than number ``after``."""
        found: list[dict[str, Any]] = []
        while page := self.get("events", after=after, wait_s=wait_s)["events"]:
            found += page
            after, wait_s = page[-1]["seq"], 0
        return found

    def events_of(self, pid: int) -> list[dict[str, Any]]:
        """Return the events on record that name ``pid``."""
        return [event for event in self.events() if _names(event, pid)]

    def wait_event(self, pid: int, *kinds: str, within_s: float = JUDGED_WITHIN_S) -> dict[str, Any]:
        """Return the part of the first event of ``kinds`` that speaks of ``pid``, with the event as ``event``."""
        end_s, after = time.monotonic() + within_s, 0
        while (left_s := end_s - time.monotonic()) > 0:
            for event in self.events(after, wait_s=min(5, int(left_s) + 1)):
                after = event["seq"]
                if event["kind"] in kinds and (part := _names(event, pid)):
                    return {**part, "event": event}
        raise AssertionError(
            f"no event {' or '.join(kinds)} of {pid} ({self.enclosure.argv(pid)}) within {within_s:g} s; "
            f"explain says {self.ask('explain', pid=pid)}\n{self.log_tail()}"
        )

    def wait_scanned(self, canaries: int = 2) -> None:
        """Return when the daemon has judged that many orphans that came one after the other, each since this call.

        None is judged before orphan_age_limit is over, and meanwhile the daemon looks three times in each cpu_window:
        two of them are six scans.
        """
        for _ in range(canaries):
            process = self.enclosure.start([sys.executable, CANARY])
            assert process.stdout is not None
            word = process.stdout.readline()
            assert word, f"no canary came up:\n{self.enclosure.read_errors()}"
            pid = int(word)
            self.canaries.add(pid)
            self.wait_event(pid, "killed", "quarantined", "orphan")
            outer = self.enclosure.outer(pid)
            if outer is not None:
                harness.end_process(outer)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.daemon.read_log().splitlines()[-lines:])

    def close(self) -> None:
        self.daemon.close()


def _names(event: dict[str, Any], pid: int) -> dict[str, Any]:
    """Return what ``event`` says of ``pid``, empty where it does not name it."""
    return next((part for part in event.get("processes") or [] if part.get("pid") == pid), {})
