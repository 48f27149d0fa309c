"""The daemon that takes part: its lives, its settings, what it answers, logs and holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from typing import Any

import harness
from chaos.kin import Violation
from chaos.life import Life
from harness import Cgroup, Daemon, Scratch

from agent import client

GRACE_S = 0.5
EXIT_GRACE_S = 0.5
TRACKER_GRACE_S = 2.0
INTERVAL_S = 0.2
SETTINGS = f"""\
[daemon]
log_level = "info"
[scan]
interval = "{{interval}}"
[kill]
grace = "{GRACE_S}s"
exit_grace = "{EXIT_GRACE_S}s"
tracker_grace = "{TRACKER_GRACE_S}s"
"""
ANSWERS_WITHIN_S = 60.0  # the gate's longest pause is 5 s; busy machines start slowly
_REPLY_WITHIN_S = 3.0
DISK_BYTES = 16 * 1024 * 1024
_BALLAST = "ballast"


class Watched:
    """One daemon through all its lives. It may end when it is made to, and not otherwise."""

    def __init__(
        self, scratch: Scratch, run: str, count: Callable[[str], None], settings: str = SETTINGS
    ) -> None:
        self._settings = settings
        self.daemon = Daemon(scratch, run, config=settings.format(interval=f"{INTERVAL_S}s"))
        self.life = Life()
        self.starting = False
        self.baseline: dict[str, int] | None = None  # what it held before the first session
        self._count = count
        self._log_at = 0
        self._go_on_at_s: float | None = None
        self._silent_since_s: float | None = None
        self._readies = 0
        self._held_gates: list[int] = []  # pidfds
        self._gates_go_on_at_s = 0.0
        self._freezer = _make_freezer(run)
        self._frozen = False
        self.has_disk = _mount(self.daemon.state)
        self.is_full = self.is_read_only = False

    # -- its lives

    def launch(self) -> None:
        """Start it and go on: it counts as there when it says that it is ready."""
        self._readies = self.daemon.drain_notifications().count("READY=1")
        self.daemon.launch()
        self.starting = True

    def look_after(self) -> bool:
        """Let it go on where it is time; say whether a life has begun since; Violation where one has ended by itself."""
        if self._go_on_at_s is not None and self._go_on_at_s <= time.monotonic():
            self.let_go_on()
        if self._held_gates and self._gates_go_on_at_s <= time.monotonic():
            self._let_gates_go_on()
        began = self.starting and self.daemon.drain_notifications().count("READY=1") > self._readies
        if began:
            self.starting = False
            self.life.begin(self.daemon.pid)
            if self.baseline is None:
                self.baseline = self.descriptors()
        if (self.starting or self.life.ready) and self.daemon.process.poll() is not None:
            raise Violation(f"the daemon ended by itself with {self.daemon.process.returncode}")
        return began

    def kill(self) -> None:
        """SIGKILL it, whatever it does."""
        self._go_on_at_s = None
        self.life.end()
        self.starting = False
        self.daemon.kill9()  # what is frozen, too
        self._thaw()
        self._let_gates_go_on()

    def stop(self) -> None:
        """SIGTERM it and return when it is gone."""
        self.let_go_on()
        self._let_gates_go_on()
        self.life.end()
        code = self.daemon.stop()
        if code != 0:
            raise Violation(f"the daemon left with {code} after SIGTERM")

    def hold(self, for_s: float) -> None:
        """SIGSTOP it, and let it go on after that time."""
        if self.life.running:
            self.life.stop()
            self.daemon.process.send_signal(signal.SIGSTOP)
            self._go_on_at_s = time.monotonic() + for_s

    @property
    def can_freeze(self) -> bool:
        return self._freezer is not None

    def freeze(self, for_s: float) -> None:
        """Freeze it and all its children (cgroup.freeze), and thaw them after that time."""
        if self.life.running and self._freezer is not None:
            self.life.stop()
            for pid in (self.daemon.pid, *harness.children_of(self.daemon.pid)):
                with contextlib.suppress(ProcessLookupError):  # a helper that is done
                    _write(self._freezer, "cgroup.procs", str(pid))
            _write(self._freezer, "cgroup.freeze", "1")
            self._frozen = True
            self._go_on_at_s = time.monotonic() + for_s
            self._count("frozen")

    def hold_gate(self, for_s: float) -> None:
        """SIGSTOP its gate alone, and let it go on after that time: what is sent meanwhile waits, or is given up."""
        if self.life.running and not self._held_gates:
            for pid in self.gates():
                handle = harness.open_pidfd(pid)
                if handle is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, signal.SIGSTOP)
                    self._held_gates.append(handle)
            self._gates_go_on_at_s = time.monotonic() + for_s
            self._count("gates held")

    def _let_gates_go_on(self) -> None:
        for handle in self._held_gates:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)
            os.close(handle)
        self._held_gates.clear()

    def let_go_on(self) -> None:
        if self._go_on_at_s is not None:
            self._go_on_at_s = None
            if self._frozen:
                self._thaw()
            else:
                self.daemon.process.send_signal(signal.SIGCONT)
            self.life.go_on()

    def _thaw(self) -> None:
        if self._frozen and self._freezer is not None:
            self._frozen = False
            _write(self._freezer, "cgroup.freeze", "0")

    # -- its disk

    def forget(self) -> None:
        """Delete what it remembers, while it is away."""
        shutil.rmtree(self.daemon.state, ignore_errors=True)

    def fill_disk(self) -> None:
        """Leave no room on the disk that its state is on, not even in what the database has set aside for its log."""
        with contextlib.closing(sqlite3.connect(os.path.join(self.daemon.state, "reaper.db"))) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with (
            open(os.path.join(self.daemon.state, _BALLAST), "wb", buffering=0) as file,
            contextlib.suppress(OSError),
        ):
            while file.write(bytes(4096)):
                pass
        self.is_full = True
        self._count("disks filled")

    def last_written(self) -> int:
        """Return the number of the last event on its disk, while it is away: numbers beyond that are given again."""
        path = os.path.join(self.daemon.state, "reaper.db")
        if not os.path.exists(path):
            return 0
        with contextlib.closing(sqlite3.connect(path)) as database:
            return int(database.execute("SELECT max(seq) FROM events").fetchone()[0] or 0)

    def free_disk(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.daemon.state, _BALLAST))
        self.is_full = False

    def let_write(self, allowed: bool) -> None:
        """Have its disk take what is written, or refuse it, while the daemon is away."""
        if self.is_read_only == allowed:
            # A helper that outlived the daemon by a moment may have the database open yet.
            remounted = ("mount", "-o", f"remount,{'rw' if allowed else 'ro'}", self.daemon.state)
            harness.repeat_until(lambda: _succeeds(*remounted) or None, 20, "the disk cannot be remounted")
            self.is_read_only = not allowed
            self._count("disks read-only" if self.is_read_only else "disks written again")

    # -- its settings

    def reload(self, *, good: bool) -> None:
        """Give it other settings, or such as it must refuse."""
        if self.life.ready:
            with open(self.daemon.config, "w", encoding="utf-8") as file:
                file.write(self._settings.format(interval="210ms" if good else "never"))
            self.daemon.reload()

    def settings_are_good(self) -> None:
        """Put good settings back: no daemon starts with bad ones."""
        with open(self.daemon.config, "w", encoding="utf-8") as file:
            file.write(self._settings.format(interval=f"{INTERVAL_S}s"))

    # -- its gate, and what it says and holds

    def gates(self) -> list[int]:
        return [pid for pid in harness.children_of(self.daemon.pid) if "reaperd.gate" in harness.cmdline(pid)]

    def kill_gate(self) -> None:
        if self.life.running:
            for pid in self.gates():
                harness.end_process(pid)

    def ask(self, op: str, **fields: Any) -> dict[str, Any] | None:
        """Return the daemon's answer, None when there is none now; WireError where it refuses."""
        if not self.life.running:
            return None
        asked_s = self.life.now_s()
        try:
            answer = client.request(self.daemon.socket, {"op": op, **fields}, timeout_s=_REPLY_WITHIN_S)
        except client.Unreachable as error:
            if self._silent_since_s is None:
                self._silent_since_s = asked_s
            elif self.life.now_s() > self._silent_since_s + ANSWERS_WITHIN_S:
                raise Violation(f"the daemon has not answered for {ANSWERS_WITHIN_S:g} s: {error}") from None
            return None
        self._silent_since_s = None
        return answer

    def more_descriptors(self) -> dict[str, int]:
        """Return what the core has open beyond what it had before the first session, by kind."""
        assert self.baseline is not None, "a daemon was ready"
        more = {kind: count - self.baseline.get(kind, 0) for kind, count in self.descriptors().items()}
        return {kind: count for kind, count in more.items() if count > 0}

    def descriptors(self) -> dict[str, int]:
        """Return what the core has open, by kind, and how many of each."""
        found: dict[str, int] = {}
        directory = f"/proc/{self.daemon.pid}/fd"
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                kind = os.readlink(f"{directory}/{name}").partition(":[")[0]
                found[kind] = found.get(kind, 0) + 1
        return found

    def read_log(self) -> None:
        """Raise Violation where the daemon's log has a traceback or an error."""
        with open(self.daemon.log, "rb") as file:
            file.seek(self._log_at)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._log_at += len(data)
        for line in data.decode("utf-8", "replace").splitlines():
            words = line.split(None, 2)
            level = words[1] if len(words) > 2 else ""
            if level == "WARNING":
                self._count("warning: " + " ".join(words[2].split()[:5]))
            refused = level == "ERROR" and "kept the old settings" in line
            if line.startswith("Traceback") or (level in ("ERROR", "CRITICAL") and not refused):
                raise Violation(f"the daemon's log says: {line}")

    def close(self) -> None:
        """Stop it, whatever state it is in."""
        self.life.pauses.close()
        self.let_go_on()
        self._thaw()
        self._let_gates_go_on()
        try:
            self.daemon.close()
        finally:
            if self.has_disk:
                subprocess.run(["umount", self.daemon.state], check=True)
            if self._freezer is not None:
                self._freezer.remove()


def _make_freezer(run: str) -> Cgroup | None:
    root = next((path for path in harness.CGROUP_ROOTS if os.path.exists(f"{path}/cgroup.controllers")), None)
    if root is None or not os.access(root, os.W_OK):
        return None
    group = Cgroup(root, f"{run}-daemon")
    if os.path.exists(os.path.join(group.path, "cgroup.freeze")):  # Linux 5.2
        return group
    group.remove()
    return None


def _write(group: Cgroup, name: str, text: str) -> None:
    with open(os.path.join(group.path, name), "w", encoding="ascii") as file:
        file.write(text)


def _mount(directory: str) -> bool:
    """Put the state on a small disk of its own; False where that may not be done."""
    if os.geteuid() != 0:
        return False
    os.mkdir(directory, 0o700)
    command = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", directory)
    return _succeeds(*command)


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
