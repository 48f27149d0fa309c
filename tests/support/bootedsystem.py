"""A real systemd as pid 1, booted in namespaces of its own on a copy-on-write view of this machine.

For tests of what only systemd can show: the unit, its sandbox, its restarts. Needs root; leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

SYSTEMD = next(
    (path for path in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if os.path.exists(path)), None
)
CGROUP_PREFIX = "reaper-boot-"
BOOTED_WITHIN_S = 30.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs in the new namespaces, as pid 1 of its own. The mounts are private and vanish with their namespace.
BOOT = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=/,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/root"
cd "$WORK/root"
cp -a "$STAGE/." .
chmod 0755 .
# What this machine starts at boot is no part of a test.
rm -rf etc/systemd/system/*.wants etc/fstab
for unit in systemd-modules-load systemd-udevd systemd-timesyncd systemd-networkd; do
    ln -sf /dev/null "etc/systemd/system/$unit.service"
done
mount -t proc proc proc
# systemd-sysctl would write settings that hold for the whole machine.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs dev
mkdir dev/pts dev/shm
for node in null zero full random urandom tty; do touch "dev/$node"; mount --bind "/dev/$node" "dev/$node"; done
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=0755 tmpfs run
mkdir -m 0700 run/upper
mount --bind "$WORK/upper" run/upper
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p .old
pivot_root . .old
umount -l /.old
mount --make-rshared /
exec env -i container=test "$SYSTEMD" --log-level=warning --show-status=no systemd.mask=timers.target </dev/null
"""


class BootError(Exception):
    """This machine lacks something that a booted system needs; the text says what."""


def unified_hierarchy() -> Path:
    """Return where the unified control group hierarchy is mounted; raise BootError where it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(where, os.W_OK):
            return Path(where)
    raise BootError("no writable cgroup2 hierarchy is mounted")


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def end_group(group: Path) -> None:
    """Kill all that is in ``group`` and remove it with what is below it."""
    deadline = time.monotonic() + 10
    (group / "cgroup.kill").write_text("1")
    while "populated 1" in (group / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise AssertionError(f"{group} cannot be emptied")
        # The kernel is at it; poll(2) on cgroup.events misses a change before the first read.
        time.sleep(0.01)
    for directory, _, _ in os.walk(group, topdown=False):
        os.rmdir(directory)


def work_of(group: Path) -> Path:
    """Return where the system in ``group`` has its mounts: an empty directory, as seen from outside."""
    return Path(tempfile.gettempdir()) / group.name


def end_stale_groups() -> None:
    """Remove what a test run that was itself killed has left; a group bears its maker's pid and start ticks."""
    for group in unified_hierarchy().glob(f"{CGROUP_PREFIX}*"):
        pid, ticks = group.name.removeprefix(CGROUP_PREFIX).split("-")[:2]
        try:
            is_alive = start_ticks(int(pid)) == int(ticks)
        except (FileNotFoundError, ProcessLookupError):
            is_alive = False
        if not is_alive:
            end_group(group)
            work_of(group).rmdir()


class BootedSystem:
    """A running systemd; ``run`` executes in it. ``boot`` makes one and takes it down."""

    def __init__(self, pid: int, group: Path) -> None:
        self.pid = pid  # of its pid 1, as this machine sees it
        self.group = group

    def run(
        self, *command: str, check: bool = True, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` in the system; it stays in this process's cgroup: ``systemctl`` is what one runs so."""
        prefix = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C"]
        become = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"] if user else []
        done = subprocess.run(
            [*prefix, "--", "env", "-i", f"PATH={PATH}", "LC_ALL=C.UTF-8", *become, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} left with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of ``unit``, as `systemctl show` has them."""
        text = self.run("systemctl", "show", unit, f"--property={','.join(properties)}").stdout
        return dict(line.split("=", 1) for line in text.splitlines())

    def until(self, holds: Callable[[], bool], what: str, within_s: float = 15.0) -> None:
        """Ask again and again; ``holds`` itself asks another process each time."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline:
                journal = self.run("journalctl", "--no-pager", "--lines=40", check=False).stdout
                raise AssertionError(f"{what}: not within {within_s:g} s\n{journal}")
            time.sleep(0.02)

    def path(self, inside: str) -> Path:
        """Return how this machine reaches the file ``inside``."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def made(self) -> set[str]:
        """Return the paths that this machine has not, the tmpfs on /run, /tmp and /dev/shm apart."""
        upper = str(self.path("/run/upper"))
        found = (os.path.join(top, name) for top, *lists in os.walk(upper) for name in (*lists[0], *lists[1]))
        paths = {path.removeprefix(upper) for path in found if not _is_whiteout(path)}
        return {path for path in paths if not os.path.lexists(path)}

    def pid_here(self, pid_inside: int) -> int | None:
        """Return this machine's number of a process of the system, None when it has gone."""
        found = None
        tries = 5  # whoever is moved to another group meanwhile is in none of those that are read
        while found is None and tries and self.path(f"/proc/{pid_inside}").exists():
            found, tries = self._pid_in_groups(pid_inside), tries - 1
        return found

    def _pid_in_groups(self, pid_inside: int) -> int | None:
        for procs in self.group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in procs.read_text().split():
                    status = Path(f"/proc/{pid}/status").read_text()
                    names = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                    if names[-1] == str(pid_inside):
                        return int(pid)
        return None


def _is_whiteout(path: str) -> bool:
    """Say whether a file of an overlay's upper layer stands for one that was removed."""
    found = os.lstat(path)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


@contextlib.contextmanager
def boot(stage: Path) -> Iterator[BootedSystem]:
    """Boot a system whose root is this machine's, with the files below ``stage`` laid over it."""
    if os.geteuid() != 0:
        raise BootError("only root can boot a system")
    missing = [
        tool
        for tool in ("unshare", "nsenter", "setpriv", "pivot_root", "mount")
        if shutil.which(tool) is None
    ]
    if missing or SYSTEMD is None:
        raise BootError(f"not installed here: {', '.join(missing) or 'systemd'}")
    end_stale_groups()
    group = (
        unified_hierarchy() / f"{CGROUP_PREFIX}{os.getpid()}-{start_ticks(os.getpid())}-{time.monotonic_ns()}"
    )
    group.mkdir()
    work = work_of(group)
    work.mkdir(mode=0o700)
    enter = f'echo $$ >"{group}/cgroup.procs"; exec unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup'
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                ["sh", "-c", f'{enter} sh -c "$BOOT"'],
                env={
                    "PATH": PATH,
                    "BOOT": BOOT,
                    "WORK": str(work),
                    "STAGE": str(stage),
                    "SYSTEMD": str(SYSTEMD),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                yield _wait_booted(process, group, log)
            finally:
                end_group(group)
                process.wait(10)
        finally:
            with contextlib.suppress(FileNotFoundError):
                group.rmdir()
            work.rmdir()


def _wait_booted(process: subprocess.Popen[bytes], group: Path, log: IO[bytes]) -> BootedSystem:
    deadline = time.monotonic() + BOOTED_WITHIN_S
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):  # the first child is on its way up, or out
            first = children.read_text().split()
            if first and Path(f"/proc/{first[0]}/comm").read_text() == "systemd\n":
                system = BootedSystem(int(first[0]), group)
                state = system.run("systemctl", "is-system-running", check=False).stdout.strip()
                if state in ("running", "degraded"):
                    return system
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    log.seek(0)
    raise BootError(f"systemd did not come up:\n{log.read().decode('utf-8', 'replace')[-2000:]}")
