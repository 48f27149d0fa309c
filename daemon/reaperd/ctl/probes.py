"""What this kernel and this machine really do: each probe makes the call and says what came of it.

Nothing is judged here, that is for ``doctor``. A probe raises OSError where the kernel refuses, and leaves nothing
behind: no process, no file, no descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reaperd.linux.pidfd import exit_status
from reaperd.linux.procfs import ProcFS

_F_ADD_SEALS = 1033  # linux/fcntl.h
_SEALS = 0x1 | 0x2 | 0x4 | 0x10  # SEAL, SHRINK, GROW, FUTURE_WRITE
_NOBODY = 65534
_CHILD_CODE = 3


# -- children of our own --------------------------------------------------------------------------


@contextmanager
def _child(become: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Yield the pid of a child that has run ``become`` and waits; it ends with ``_CHILD_CODE`` when the block does."""
    ready_read, ready_write = os.pipe()
    hold_read, hold_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _wait_as_child(become, ready_write, hold_read, hold_write)
    os.close(hold_read)
    os.close(ready_write)
    try:
        if os.read(ready_read, 1) != b".":
            raise PermissionError(errno.EPERM, "a child could not become another user")
        yield pid
    finally:
        os.close(ready_read)
        os.close(hold_write)
        os.waitpid(pid, 0)


def _wait_as_child(become: Callable[[], None], ready: int, hold: int, hold_write: int) -> None:
    code = 1
    try:
        os.close(hold_write)
        become()
        os.write(ready, b".")
        os.read(hold, 1)
        code = _CHILD_CODE
    finally:
        os._exit(code)


def send_by_pidfd() -> None:
    """Open a pidfd of a child and send it signal 0 (pidfd_open(2), pidfd_send_signal(2))."""
    with _child() as pid:
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, 0)
        finally:
            os.close(descriptor)


def reads_exit_code() -> bool:
    """Say whether a pidfd still tells how a child ended once it was waited for, as the daemon would ask it."""
    with _child() as pid:
        descriptor = os.pidfd_open(pid)
    try:
        status = exit_status(descriptor)
    finally:
        os.close(descriptor)
    return status is not None and os.waitstatus_to_exitcode(status) == _CHILD_CODE


def lists_children() -> bool:
    """Say whether /proc/PID/task/TID/children names a child (CONFIG_PROC_CHILDREN)."""
    with _child() as pid:
        return pid in ProcFS().children(os.getpid())


def reads_environ(*, of_another_user: bool) -> bool:
    """Say whether the environment of a child can be read, also (for root) of one that became another user."""
    with _child(_become_nobody if of_another_user else lambda: None) as pid:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                file.read(1)
        except PermissionError:
            return False
    return True


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


# -- memory ---------------------------------------------------------------------------------------


def seal_memfd() -> bool:
    """Do with a memfd what the agent does; say whether writing is refused while the older map still works."""
    descriptor = os.memfd_create("reaper-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 4096)
        with mmap.mmap(descriptor, 4096) as page:
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
            page[0:1] = b"x"
        try:
            os.pwrite(descriptor, b"y", 0)
        except PermissionError:
            return os.pread(descriptor, 1, 0) == b"x"
        return False
    finally:
        os.close(descriptor)


def write_in(directory: str) -> None:
    """Make, write and drop a file in ``directory``; raise OSError when it cannot be done."""
    import tempfile

    with tempfile.TemporaryFile(dir=directory, prefix="reaper-doctor-") as file:
        file.write(b"reaper")
        file.flush()


# -- files ----------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """Return a small file's text, whatever bytes are in it."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()


# -- ZeroMQ ---------------------------------------------------------------------------------------


def peer_address() -> str:
    """Return what libzmq says of a peer on an ipc socket that was handed to it: ``localhost:UID:GID:PID``.

    The socket lies in the abstract namespace, so that no file can be left behind.
    """
    import socket

    import zmq

    name = f"reaper-doctor-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(1)
    context = zmq.Context()
    try:
        with context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
            router.linger = dealer.linger = 0
            router.setsockopt(zmq.USE_FD, listener.detach())
            router.bind(f"ipc://@{name}")
            dealer.connect(f"ipc://@{name}")
            dealer.send(b"?")
            if not router.poll(2000):
                raise TimeoutError(errno.ETIMEDOUT, "no message came through within 2 s")
            return str(router.recv_multipart(copy=False)[-1].get("Peer-Address"))
    finally:
        context.term()
