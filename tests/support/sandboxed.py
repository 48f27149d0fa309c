"""Run by a unit with the sandbox of reaperd.service: tries what that must refuse and what it must allow, and prints the outcomes.

Each outcome is "done", or the name of the errno. Arguments: the pid of a process, its uid, its user's home, and a folder for state.
The process is another user's for the service of all, and the user's own for that of one user.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import resource
import select
import signal
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import zmq

from reaperd import gpu
from reaperd.linux import helper, pidfd
from reaperd.linux.child import start_child
from reaperd.linux.procfs import ProcFS

# x86_64 and aarch64 agree on all that came after 2018; of the others the number here is x86_64's.
X86 = os.uname().machine == "x86_64"
NUMBERS = {
    "keyctl": 250 if X86 else 219,
    "io_uring_setup": 425,
    "bpf": 321 if X86 else 280,
    "ptrace": 101 if X86 else 117,
    "process_vm_writev": 311 if X86 else 271,
    "userfaultfd": 323 if X86 else 282,
    "shmget": 29 if X86 else 194,
    "capset": 126 if X86 else 91,
    "personality": 135 if X86 else 92,
    "mlock": 149 if X86 else 228,
    "setns": 308 if X86 else 268,
    "mount": 165 if X86 else 40,
    "clock_settime": 227 if X86 else 112,
    "init_module": 175 if X86 else 105,
    "reboot": 169 if X86 else 142,
    "setpriority": 141 if X86 else 140,
    "unshare": 272 if X86 else 97,
}
OTHER, UID, HOME, STATE = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
CLONE_NEWUSER, CLONE_NEWNS, PER_BSD = 0x10000000, 0x00020000, 0x0006
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Make a system call that Python has no name for; OSError."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    if LIBC.syscall(ctypes.c_long(NUMBERS[name]), *words) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_device(major: int, minor: int) -> None:
    """Open a device; ENXIO or ENODEV where the rules allow it and there is no driver."""
    path = f"/dev/probe-{major}-{minor}"  # made by the test: this unit may make none
    os.close(os.open(path, os.O_RDWR))


def set_uid_bit() -> None:
    with tempfile.NamedTemporaryFile(dir=STATE) as file:
        os.fchmod(file.fileno(), 0o4700)


def write_executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def speak(family: int) -> Callable[[], None]:
    return lambda: socket.socket(family, socket.SOCK_DGRAM).close()


REFUSED: dict[str, Callable[[], object]] = {
    "RestrictAddressFamilies: AF_INET": speak(socket.AF_INET),
    "RestrictAddressFamilies: AF_INET6": speak(socket.AF_INET6),
    "RestrictAddressFamilies: AF_NETLINK": speak(socket.AF_NETLINK),
    "RestrictNamespaces: user": lambda: call("unshare", CLONE_NEWUSER),
    "RestrictNamespaces: mounts": lambda: call("unshare", CLONE_NEWNS),
    "MemoryDenyWriteExecute": write_executable_memory,
    "LockPersonality": lambda: call("personality", PER_BSD),
    "RestrictSUIDSGID": set_uid_bit,
    "RestrictRealtime": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "DevicePolicy": lambda: open_device(10, 229),
    "SystemCallFilter: @aio": lambda: call("io_uring_setup", 1, 0),
    "SystemCallFilter: @chown": lambda: os.chown(STATE, os.geteuid(), -1),
    "SystemCallFilter: @clock": lambda: call("clock_settime", 0, 0),
    "SystemCallFilter: @ipc": lambda: call("shmget", 0, 4096, 0o1600),
    "SystemCallFilter: process_vm_writev": lambda: call("process_vm_writev", os.getpid(), 0, 0, 0, 0, 0),
    "SystemCallFilter: @keyring": lambda: call("keyctl", 0, -3, 0),
    "SystemCallFilter: @memlock": lambda: call("mlock", 4096, 0),
    "SystemCallFilter: @resources": lambda: call("setpriority", 0, 0, 0),
    "SystemCallFilter: @mount": lambda: call("mount", 0, 0, 0, 0, 0),
    "SystemCallFilter: @module": lambda: call("init_module", 0, 0, 0),
    "SystemCallFilter: @reboot": lambda: call("reboot", 0, 0, 0, 0),
    "SystemCallFilter: @debug": lambda: call("ptrace", 9999, 0, 0, 0),
    "SystemCallFilter: bpf": lambda: call("bpf", 0, 0, 0),
    "SystemCallFilter: capset": lambda: call("capset", 0, 0),
    "SystemCallFilter: userfaultfd": lambda: call("userfaultfd", 0),
}


# -- what the daemon does -------------------------------------------------------------------------


def signal_by_pidfd() -> None:
    descriptor = os.pidfd_open(OTHER)
    try:
        signal.pidfd_send_signal(descriptor, 0)
        assert pidfd.info(descriptor) is None or pidfd.info(descriptor)
    finally:
        os.close(descriptor)


def read_process() -> None:
    proc, other = ProcFS(), OTHER
    assert proc.environ(other, other)
    assert proc.argv(other, other)
    for name in ("maps", "status", "stat", "cgroup"):
        with open(f"/proc/{other}/{name}", "rb") as file:
            assert file.read(1)
    names = os.listdir(f"/proc/{other}/fd")
    assert names
    os.readlink(f"/proc/{other}/fd/{names[0]}")
    with open(f"/proc/{other}/fdinfo/{names[0]}", "rb") as file:
        file.read()


def act_as_user() -> None:
    """Make and remove a folder in /dev/shm, and write a file in a home that is open to its owner alone."""

    def work() -> str:
        if os.geteuid() != UID:
            os.setgroups([UID])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
        for parent in ("/dev/shm", "/tmp", HOME):
            folder = tempfile.mkdtemp(dir=parent)
            with open(f"{folder}/array", "wb") as file:
                file.write(bytes(4096))
            os.unlink(f"{folder}/array")
            os.rmdir(folder)
        return "done"

    started = helper.start_helper(work)
    poll = select.poll()
    poll.register(started.pidfd, select.POLLIN)
    assert poll.poll(10_000)
    assert helper.finish_helper(started) == "done"


def ask_helper() -> None:
    answerer = helper.Answerer(lambda number: number + 1)
    assert answerer.ask([1, 2, 3], stall_s=5, most_s=10) == [2, 3, 4]
    answerer.close()


def ask_gpus() -> None:
    answerer = helper.Answerer(gpu._answer)
    count, processes = answerer.ask([-1, 0], stall_s=5, most_s=10) or ([], [])
    answerer.close()
    assert (count, processes) == ([1, None], [[[100, 1000]], None]), (count, processes)


def call_back() -> None:
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
    numbers = (ctypes.c_int * 3)(3, 1, 2)
    LIBC.qsort(numbers, 3, ctypes.sizeof(ctypes.c_int), compare(lambda a, b: a[0] - b[0]))
    assert list(numbers) == [1, 2, 3]


def run_program() -> None:
    assert start_child(["/bin/true"], (), {}).wait(10) == 0


def keep_state() -> None:
    path = f"{STATE}/probe.db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE IF NOT EXISTS t (x)")
    database.execute("INSERT INTO t VALUES (1)")
    database.close()
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.unlink(path + suffix)


def speak_zeromq() -> None:
    place = f"ipc://{STATE}/probe.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.bind(place)
        dealer.connect(place)
        dealer.send(b"x")
        assert router.poll(5000)


def call_bus() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bus:
        bus.connect("/run/dbus/system_bus_socket")


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def write_private() -> None:
    with tempfile.TemporaryDirectory(dir=STATE) as folder:
        path = f"{folder}/x"
        open(path, "w").close()
        assert os.stat(path).st_mode & 0o777 == 0o600


ALLOWED: dict[str, Callable[[], object]] = {
    "signalling a process by its pidfd": signal_by_pidfd,
    "reading environ, maps, descriptors and cgroup of a process": read_process,
    "listing a home of mode 0700": lambda: os.listdir(HOME),
    "working in /dev/shm, /tmp and a home as its user": act_as_user,
    "asking a helper": ask_helper,
    "asking the GPUs through NVIDIA's library": ask_gpus,
    "a callback of ctypes": call_back,
    "running a program": run_program,
    "keeping the state": keep_state,
    "ZeroMQ and its threads": speak_zeromq,
    "calling the system bus": call_bus,
    "raising the limit of descriptors, no core files": raise_limit,
    "files for itself alone": write_private,
    "/dev/null and /dev/urandom": lambda: (open("/dev/null", "w").close(), os.urandom(4)),
}


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    except (AssertionError, RuntimeError, TypeError, sqlite3.Error, zmq.ZMQError) as error:
        return repr(error)
    return "done"


def outcome_in_child(attempt: Callable[[], object]) -> str:
    """As ``outcome``, for what may change the process that gets its way."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, outcome(attempt).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    os.waitpid(pid, 0)
    return said


def main() -> None:
    told = {
        "refused": {name: outcome_in_child(attempt) for name, attempt in REFUSED.items()},
        "allowed": {name: outcome(attempt) for name, attempt in ALLOWED.items()},
        "gpu": outcome(lambda: open_device(195, 0)),
        "network": outcome(
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
        ),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
