"""/proc/PID: what one process is, has and started (proc(5)). ``parse_*`` is pure; ``ProcFS`` asks the kernel.

A process that ends while it is read is an outcome (ProcessGone), and so is one that may not be read (None).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

from reaperd.linux.exhaustion import tell_exhaustion
from reaperd.model import Namespaces, ProcessId

PF_EXITING, PF_FORKNOEXEC, PF_KTHREAD = 0x4, 0x40, 0x200000  # linux/sched.h
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# linux/proc_ns.h: PROC_PID_INIT_INO, PROC_USER_INIT_INO. Not the agent's: doctor asks before it knows whose `agent` is found.
MACHINES_PID_NAMESPACE, MACHINES_USER_NAMESPACE = f"pid:[{0xEFFFFFFC}]", f"user:[{0xEFFFFFFD}]"
_GONE = (FileNotFoundError, ProcessLookupError)  # gone before open(2), or before read(2)
_MAX_ARGV_BYTES = 64 * 1024
_MAX_BYTES = 8 * 1024 * 1024  # beyond what execve(2) takes as arguments and environment by default
_CHUNK_BYTES = 65536


class ProcessGone(Exception):
    """The process has exited."""


class ProcessHidden(ProcessGone):
    """/proc does not let itself be asked about the process (hidepid=1, proc(5)); of hidepid=2, ProcessGone is all that is told."""


class Stat(NamedTuple):
    """What /proc/PID/stat says."""

    id: ProcessId
    comm: str
    state: str
    ppid: int
    flags: int
    cpu_ticks: int
    threads: int
    rss_bytes: int
    exit_status: int  # as wait(2) gives it; 0 for who may not see it
    posix_pgid: int
    posix_sid: int
    # Changes with every execve(2), which puts code, stack, arguments and environment elsewhere; 0 for who may not see it.
    image: int

    @property
    def forked(self) -> bool:
        """Whether the process has not exec'ed since it was forked."""
        return bool(self.flags & PF_FORKNOEXEC)

    @property
    def exiting(self) -> bool:
        """Whether the process is on its way out."""
        return bool(self.flags & PF_EXITING)

    @property
    def dead(self) -> bool:
        """Whether no thread runs any more: a zombie main thread alone is not the end."""
        return self.state in "ZX" and self.threads <= 1


def parse_stat(data: bytes) -> Stat:
    """Return the fields of /proc/PID/stat; ValueError when it is none.

    The name stands in brackets and may hold anything, brackets and newlines included: the last ") " ends it.
    """
    head, bracket, tail = data.rpartition(b") ")
    pid, opening, comm = head.partition(b" (")
    fields = tail.split()
    if not bracket or not opening or len(fields) < 50:
        raise ValueError(f"not a stat line: {data[:80]!r}")
    return Stat(
        id=ProcessId(int(pid), int(fields[19])),
        comm=comm.decode("utf-8", "replace"),
        state=fields[0].decode("ascii"),
        ppid=int(fields[1]),
        flags=int(fields[6]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        threads=int(fields[17]),
        rss_bytes=int(fields[21]) * PAGE_BYTES,
        exit_status=int(fields[49]),
        posix_pgid=int(fields[2]),
        posix_sid=int(fields[3]),
        image=hash((*fields[23:26], fields[45], fields[47])) if fields[25] != b"0" else 0,
    )


def parse_parent(data: bytes) -> tuple[ProcessId, int]:
    """Return who it is and its parent's pid, of all that ``parse_stat()`` returns; ValueError."""
    head, bracket, tail = data.rpartition(b") ")
    fields = tail.split(None, 20)
    if not bracket or len(fields) < 21:
        raise ValueError(f"not a stat line: {data[:80]!r}")
    return ProcessId(int(head.partition(b" (")[0]), int(fields[19])), int(fields[1])


def parse_uid(status: bytes) -> int | None:
    """Return the uid in the text of /proc/PID/status when real, effective and saved uid are one, else None."""
    at = status.find(b"\nUid:")
    uids = status[at + 5 :].split(b"\n", 1)[0].split()[:3] if at >= 0 else []
    return int(uids[0]) if len(uids) == 3 and uids[0] == uids[1] == uids[2] else None


def parse_uids(status: bytes) -> frozenset[int]:
    """Return the real, effective, saved and file system uid in the text of /proc/PID/status."""
    at = status.find(b"\nUid:")
    return frozenset(map(int, status[at + 5 :].split(b"\n", 1)[0].split())) if at >= 0 else frozenset()


def parse_gid(status: bytes) -> int | None:
    """Return the real gid in the text of /proc/PID/status."""
    at = status.find(b"\nGid:")
    gids = status[at + 5 :].split(b"\n", 1)[0].split() if at >= 0 else []
    return int(gids[0]) if gids else None


def parse_groups(status: bytes) -> tuple[int, ...]:
    """Return the supplementary groups in the text of /proc/PID/status."""
    at = status.find(b"\nGroups:")
    return tuple(map(int, status[at + 8 :].split(b"\n", 1)[0].split())) if at >= 0 else ()


def has_pending_sigkill(status: bytes) -> bool:
    """Say whether the text of /proc/PID/status has SIGKILL among the pending signals."""
    for name in (b"\nSigPnd:", b"\nShdPnd:"):
        at = status.find(name)
        if at >= 0 and int(status[at + len(name) :].split(b"\n", 1)[0], 16) & 1 << 8:
            return True
    return False


def parse_pids(status: bytes) -> tuple[int, ...]:
    """Return ``NSpid:`` in the text of /proc/PID/status: the pid in the namespace of that /proc, and in each below it."""
    at = status.find(b"\nNSpid:")
    return tuple(map(int, status[at + 7 :].split(b"\n", 1)[0].split())) if at >= 0 else ()


def parse_innermost_pid(status: bytes) -> int | None:
    """Return the last pid in ``NSpid:`` in the text of /proc/PID/status."""
    pids = parse_pids(status)
    return pids[-1] if pids else None


def environment_value(environ: bytes, variable: str) -> str:
    """Return what ``variable`` is in the text of /proc/PID/environ; "" where it is not set."""
    needle = variable.encode() + b"="
    if not environ.startswith(needle):
        at = environ.find(b"\0" + needle)
        if at < 0:
            return ""
        environ = environ[at + 1 :]
    return environ[len(needle) :].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def parse_memfd_link(link: str) -> str:
    """Return the name of the memfd that a link in /proc/PID/fd or a path in maps names; "" for anything else."""
    if link.startswith("/memfd:"):
        return link[7:].removesuffix(" (deleted)")
    return ""


def parse_unix_sockets(text: bytes) -> Iterator[str]:
    """Yield the paths that sockets are bound to in the text of /proc/net/unix."""
    for line in text.split(b"\n"):
        fields = line.split(None, 7)
        if len(fields) == 8 and fields[7].startswith(b"/"):
            yield fields[7].decode("utf-8", "surrogateescape")


class Mapping(NamedTuple):
    """A line of /proc/PID/maps that names a file."""

    addresses: str
    device: str  # major:minor, hexadecimal
    inode: int
    path: str


def parse_maps(maps: bytes) -> Iterator[Mapping]:
    """Yield the mapped files in the text of /proc/PID/maps."""
    for line in maps.split(b"\n"):
        parts = line.split(None, 5)
        if len(parts) == 6 and parts[4].isdigit():
            addresses, device = parts[0].decode("ascii"), parts[3].decode("ascii")
            yield Mapping(addresses, device, int(parts[4]), parts[5].decode("utf-8", "surrogateescape"))


def parse_fdinfo(text: bytes) -> tuple[int | None, int | None]:
    """Return mnt_id and ino in the text of /proc/PID/fdinfo/N, None for what is not there (ino: Linux < 5.14)."""

    def field(name: bytes) -> int | None:
        at = text.find(b"\n" + name + b":")
        value = text[at + len(name) + 2 :].split(b"\n", 1)[0].strip() if at >= 0 else b""
        return int(value) if value.isdigit() else None

    return field(b"mnt_id"), field(b"ino")


def parse_mount_kinds(mountinfo: bytes) -> dict[int, str]:
    """Return the kind of file system by mount id, in the text of /proc/PID/mountinfo (proc_pid_mountinfo(5))."""
    found = {}
    for line in mountinfo.split(b"\n"):
        number, _, rest = line.partition(b" ")
        _, dash, source = rest.partition(b" - ")
        if dash and number.isdigit():
            found[int(number)] = source.partition(b" ")[0].decode("utf-8", "replace")
    return found


def parse_mounted_at(mountinfo: bytes, point: str) -> str:
    """Return which file system is mounted at ``point`` (major:minor), "" for none or only a part of one (proc_pid_mountinfo(5))."""
    found = ""
    for line in mountinfo.split(b"\n"):  # the last of several at one point is the one that is seen
        fields = line.split(b" ")
        if len(fields) > 6 and fields[4] == os.fsencode(point):
            found = fields[2].decode("ascii", "replace") if fields[3] == b"/" else ""
    return found


class ProcFS:
    """One mount of /proc."""

    def __init__(self, root: str = "/proc") -> None:
        self.root = root
        self._memfds: tuple[int, str] | None = None

    def listing(self) -> dict[int, int]:
        """Return the inode of /proc/PID of every process, by pid; another process with the same pid has another."""
        with os.scandir(self.root) as entries:
            return {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}

    def stat(self, pid: int) -> Stat:
        """Return what ``pid`` is; ProcessGone when there is no such process."""
        return parse_stat(self._read(f"{pid}/stat"))

    def is_alive(self, process_id: ProcessId) -> bool:
        """Say whether ``process_id`` still runs."""
        try:
            stat = self.stat(process_id.pid)
        except ProcessGone:
            return False
        return stat.id == process_id and not stat.dead

    def parent(self, pid: int) -> tuple[ProcessId, int]:
        """Return who ``pid`` is and its parent's pid, at half of what ``stat()`` costs; ProcessGone."""
        return parse_parent(self._read(f"{pid}/stat"))

    def status(self, pid: int) -> bytes:
        """Return the text of /proc/PID/status."""
        return self._read(f"{pid}/status")

    def environ(self, pid: int, task: int) -> bytes | None:
        """Return the environment that ``pid`` was exec'ed with (a fork keeps its parent's), None if unreadable.

        ``task`` is a living thread: what a zombie main thread had is still to be read below the others.
        """
        return self._read_permitted(f"{pid}/task/{task}/environ")

    def argv(self, pid: int, task: int) -> tuple[str, ...]:
        """Return the command line; empty for a kernel thread, a zombie or one that may not be read.

        Of one that fills megabytes, the beginning tells enough.
        """
        text = (self._read_permitted(f"{pid}/task/{task}/cmdline") or b"")[:_MAX_ARGV_BYTES]
        return (
            tuple(word.decode("utf-8", "replace") for word in text.rstrip(b"\0").split(b"\0")) if text else ()
        )

    def cgroup(self, pid: int) -> str:
        """Return the text of /proc/PID/cgroup.

        Who has put himself so deep that the kernel cannot write that (cgroup.c, proc_cgroup_show()) is hidden, and nobody's fault.
        """
        try:
            return self._read(f"{pid}/cgroup").decode("utf-8", "surrogateescape")
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise ProcessHidden(f"{pid}/cgroup") from None

    def children(self, pid: int) -> list[int]:
        """Return the pids of the children of every thread of ``pid`` (needs CONFIG_PROC_CHILDREN)."""
        found: list[int] = []
        for task in self.tasks(pid):
            try:
                found += map(int, self._read(f"{pid}/task/{task}/children", records=True).split())
            except ProcessGone:
                continue
        return found

    def last_pid(self) -> int:
        """Return the id that was given away last, to a process or to a thread: while it stays, nobody has forked."""
        return int(self._read("loadavg").rsplit(None, 1)[1])

    def tasks(self, pid: int) -> list[int]:
        """Return the thread ids of ``pid``; empty when it is gone."""
        try:
            return [int(name) for name in os.listdir(f"{self.root}/{pid}/task")]
        except _GONE:
            return []

    def living_task(self, stat: Stat) -> int:
        """Return a thread whose memory can be read: the main one, else another that has not exited."""
        pid = stat.id.pid
        if stat.state not in "ZX":
            return pid
        for task in self.tasks(pid):
            try:
                if parse_stat(self._read(f"{pid}/task/{task}/stat")).state not in "ZX":
                    return task
            except ProcessGone:
                continue
        return pid

    def descriptor(self, pid: int, task: int, number: int) -> str:
        """Return what descriptor ``number`` of ``pid`` links to; "" when it has none or may not be read."""
        try:
            return os.readlink(f"{self.root}/{pid}/task/{task}/fd/{number}")
        except OSError as error:
            tell_exhaustion(error)
            return ""

    def descriptors(self, pid: int, task: int, *, most: int | None = None) -> dict[int, str]:
        """Return what the first ``most`` descriptors of ``pid`` link to; empty when it may not be read."""
        try:
            with os.scandir(f"{self.root}/{pid}/task/{task}/fd") as entries:
                numbers = [int(entry.name) for entry in itertools.islice(entries, most)]
        except OSError as error:
            tell_exhaustion(error)
            return {}
        return {number: self.descriptor(pid, task, number) for number in numbers}

    def may_read_descriptors(self, pid: int, task: int) -> bool:
        """Say whether it may be asked which descriptors ``pid`` has."""
        return os.access(f"{self.root}/{pid}/task/{task}/fd", os.R_OK, effective_ids=True)

    def may_follow_descriptor(self, pid: int, task: int, number: int) -> bool:
        """Say whether it may be asked what descriptor ``number`` of ``pid`` is; its own user may not always (ptrace(2))."""
        try:
            os.readlink(f"{self.root}/{pid}/task/{task}/fd/{number}")
        except OSError as error:
            return not isinstance(error, PermissionError)
        return True

    def network_namespace(self, pid: int) -> str:
        """Return the network namespace that ``pid`` lives in; "" where that is not told."""
        return self._namespace(pid, "net")

    def unix_sockets(self, pid: int) -> bytes | None:
        """Return the text of /proc/PID/net/unix, the sockets in its network namespace; None where there is too much."""
        text = self._read(f"{pid}/net/unix", records=True)
        return text if len(text) < _MAX_BYTES else None

    def memfd_inode(self, pid: int, task: int, number: int) -> int | None:
        """Return the inode of the memfd that descriptor ``number`` of ``pid`` is, None when it is none.

        Asks no file system but the kernel's own for shared memory: any other may belong to a user, or be dead.
        """
        try:
            mount, inode = parse_fdinfo(self._read(f"{pid}/task/{task}/fdinfo/{number}"))
            if mount is None or mount != self._memfd_mount():
                return None
            return os.stat(f"{self.root}/{pid}/task/{task}/fd/{number}").st_ino if inode is None else inode
        except ProcessGone:
            return None
        except OSError as error:
            tell_exhaustion(error)
            return None

    def memfd_device(self) -> str:
        """Return the device of every memfd, as /proc/PID/maps has it."""
        return self._place_of_memfds()[1]

    def _memfd_mount(self) -> int:
        """Return the id of the mount that holds every memfd, and nothing that a user could open by a path."""
        return self._place_of_memfds()[0]

    def _place_of_memfds(self) -> tuple[int, str]:
        if self._memfds is None:
            ours = os.memfd_create("reaperd", os.MFD_CLOEXEC)
            try:
                mount, _ = parse_fdinfo(self._read(f"self/fdinfo/{ours}"))
                device = os.fstat(ours).st_dev
            finally:
                os.close(ours)
            self._memfds = -1 if mount is None else mount, f"{os.major(device):02x}:{os.minor(device):02x}"
        return self._memfds

    def maps(self, pid: int, task: int) -> bytes:
        """Return the text of /proc/PID/maps; empty when it may not be read."""
        try:
            return self._read(f"{pid}/task/{task}/maps", records=True)
        except PermissionError:
            return b""

    def descriptor_path(self, pid: int, task: int, number: int) -> str:
        """Return the path through which descriptor ``number`` of ``pid`` can be opened anew."""
        return f"{self.root}/{pid}/task/{task}/fd/{number}"

    def owner_of(self, path: str) -> int | None:
        """Return the uid of the file at such a path, None where that may not be asked."""
        try:
            return os.stat(path).st_uid
        except OSError as error:
            tell_exhaustion(error)
            return None

    def mapping_path(self, pid: int, addresses: str) -> str:
        """Return the path through which what is mapped at ``addresses`` can be opened anew (CAP_CHECKPOINT_RESTORE)."""
        return f"{self.root}/{pid}/map_files/{addresses}"

    def namespaces(self, pid: int) -> Namespaces:
        """Return where ``pid`` lives."""
        return Namespaces(*(self._namespace(pid, kind) for kind in ("pid", "mnt", "time")))

    def cgroup_namespace(self, pid: int) -> str:
        """Return the cgroup namespace that ``pid`` lives in; "" where that is not told."""
        return self._namespace(pid, "cgroup")

    def pid_namespace(self, pid: int) -> str:
        """Return the pid namespace that ``pid`` lives in; "" where that is not told."""
        return self._namespace(pid, "pid")

    def user_namespace(self) -> str:
        """Return the user namespace that the caller lives in; "" on a kernel that has none."""
        return self._namespace("self", "user")

    def clock_offsets(self) -> str:
        """Return by how much the clocks of the caller's time namespace go ahead of the machine's; "" on a kernel that has none."""
        try:
            words = self._read("self/timens_offsets").decode("ascii").split()
        except ProcessGone:
            return ""
        return " ".join(words)

    def own_pid_namespace(self) -> str:
        """Return the pid namespace that the caller lives in; "" where this /proc does not know the caller."""
        return self._namespace("self", "pid")

    def _namespace(self, pid: int | str, kind: str) -> str:
        """Return a namespace that ``pid`` lives in (namespaces(7)); "" where that is not told."""
        try:
            return os.readlink(f"{self.root}/{pid}/ns/{kind}")
        except OSError as error:
            tell_exhaustion(error)
            return ""

    def is_of_our_pid_namespace(self) -> bool:
        """Say whether a pid in this /proc is whom pidfd_open(2) opens under it: in another pid namespace that is somebody else."""
        try:
            pids = parse_pids(self._read("self/status"))
            # NSpid begins with the namespace of this /proc, and ends with the caller's own.
            return pids == (os.getpid(),) if pids else os.readlink(f"{self.root}/self") == str(os.getpid())
        except (ProcessGone, OSError):  # it does not know the caller
            return False

    def fdinfo(self, descriptor: int) -> bytes:
        """Return what is told of one of the caller's open files (proc_pid_fdinfo(5))."""
        return self._read(f"self/fdinfo/{descriptor}")

    def file_system(self, descriptor: int) -> str:
        """Return the kind of file system that one of the caller's open files is on; "" where that is not told."""
        try:
            mount, _ = parse_fdinfo(self._read(f"self/fdinfo/{descriptor}"))
            return parse_mount_kinds(self._read("self/mountinfo", records=True)).get(mount or 0, "")
        except ProcessGone:  # this /proc does not know the caller
            return ""

    def own_mounts(self) -> str:
        """Return the mount table of the caller (proc_pid_mounts(5))."""
        return self._read("self/mounts", records=True).decode("utf-8", "surrogateescape")

    def mounted_at(self, pid: int, point: str) -> str:
        """Return which file system ``pid`` has mounted at ``point`` (major:minor); "" for none, or where that is not told."""
        try:
            return parse_mounted_at(self._read(f"{pid}/mountinfo", records=True), point)
        except (ProcessGone, OSError):
            return ""

    def boot_id(self) -> str:
        """Return the id of this boot (random(4))."""
        return self._read("sys/kernel/random/boot_id").decode().strip()

    def _read_permitted(self, name: str) -> bytes | None:
        try:
            return self._read(name)
        except PermissionError:
            return None

    def _read(self, name: str, *, records: bool = False) -> bytes:
        """Return a file; of one with many ``records`` the kernel hands out as many at a time as it likes.

        Everything else comes whole, as far as there is room: seq_file.c's only record, or a process's memory.
        """
        try:
            descriptor = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except _GONE:
            raise ProcessGone(name) from None
        except PermissionError as error:
            if error.errno == errno.EPERM:  # fs/proc/base.c, proc_pid_permission(); for all else it is EACCES
                raise ProcessHidden(name) from None
            raise
        try:
            chunks = [os.read(descriptor, _CHUNK_BYTES)]
            size = len(chunks[0])
            if size == _CHUNK_BYTES or records:
                while size < _MAX_BYTES and (chunk := os.read(descriptor, _CHUNK_BYTES)):
                    size += len(chunk)
                    chunks.append(chunk)
            return b"".join(chunks)
        except _GONE:
            raise ProcessGone(name) from None
        finally:
            os.close(descriptor)
