"""What dead workers leave in /dev/shm and in temporary directories: known names only, through directory descriptors.

Names: joblib/_memmapping_reducer.py (``joblib_memmapping_folder_<pid>_...``), loky/backend/synchronize.py
(``/loky-<pid>-...``, which sem_open(3) makes ``sem.loky-...``), multiprocessing/shared_memory.py (``psm_``),
multiprocessing/synchronize.py (``mp-``), torch/csrc/.../StorageSharing.cpp (``torch_<pid>_...``).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import math
import os
import stat
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ctypes

SHM = "/dev/shm"  # noqa: S108
_MAPPED_PREFIXES = ("psm_", "torch_", "sem.mp-")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What a session holds is measured between its leader's death and the first signal: that must not take long.
MAX_NAMES = 5000  # in /dev/shm
MAX_MEASURED = 1000
MAX_LEVELS = 3
_MAX_FOLDERS_OPEN, _MAX_IN_A_FOLDER = 100, 100_000

# linux/fcntl.h, linux/stat.h, linux/openat2.h
_STATX_FLAGS = 0x100 | 0x800 | 0x1000 | 0x4000  # SYMLINK_NOFOLLOW, NO_AUTOMOUNT, EMPTY_PATH, STATX_DONT_SYNC
_STATX_BTIME = 0x800
_STATX_MASK = 0x7FF | _STATX_BTIME
# mask, nlink, uid, mode, inode, blocks, btime, ctime, device
_STATX = struct.Struct("=I12xII4xH2xQ8xQ24xqI4xqI28x8s112x")
_SYS_OPENAT2 = 437  # on every architecture
_OPEN_HOW = struct.Struct("=QQQ")
_RESOLVE_NO_XDEV, _RESOLVE_NO_SYMLINKS = 0x01, 0x04


def prefixes_of(pid: int) -> tuple[str, ...]:
    """Return how the names begin that belong to the leader ``pid`` wherever they are found."""
    return (f"joblib_memmapping_folder_{pid}_", f"sem.loky-{pid}-")


def may_have_segments(uid: int) -> bool:
    """Say whether ``uid`` has names in /dev/shm that carry no pid to tell whose they are: only who maps them tells.

    Also where there are more names than can be looked at.
    """
    with contextlib.suppress(OSError), open_directory(SHM) as shm:
        names, complete = names_in(shm, MAX_NAMES)
        unclear = [name for name in names if name.startswith(_MAPPED_PREFIXES)]
        if not complete or len(unclear) > MAX_MEASURED:
            return True
        return any(_uid_of(shm, name) == uid for name in unclear)
    return False


def segments_among(paths: list[str], uid: int) -> frozenset[str]:
    """Return the names in /dev/shm that ``uid`` has there without a pid in them, of those among mapped ``paths``."""
    names = {path[len(SHM) + 1 :] for path in paths if path.startswith(SHM + "/")}
    unclear = [name for name in names if name.startswith(_MAPPED_PREFIXES) and "/" not in name]
    with contextlib.suppress(OSError), open_directory(SHM) as shm:
        return frozenset(name for name in unclear[:MAX_NAMES] if _uid_of(shm, name) == uid)
    return frozenset()


def held_bytes(pid: int, names: frozenset[str], uid: int) -> int:
    """Return what the leader ``pid`` holds in /dev/shm by names of its own and by ``names``, in bytes.

    It is asked while a session is to be ended, and a user can have any number of names, as deep as he likes: what is beyond
    ``MAX_NAMES``, ``MAX_MEASURED`` or ``MAX_LEVELS`` is not counted. Nothing here waits for a file system of a user's.
    """
    total = 0
    with contextlib.suppress(OSError), open_directory(SHM) as shm:
        total = bytes_of(shm, candidates(shm, pid, names, most=MAX_NAMES), uid)
    return total


def has_names_of(pid: int, uid: int) -> bool:
    """Say whether a name in /dev/shm carries ``pid`` and is of ``uid``; of very many names only some are looked at."""
    with contextlib.suppress(OSError), open_directory(SHM) as shm:
        return any(_uid_of(shm, name) == uid for name in candidates(shm, pid, frozenset(), most=MAX_NAMES))
    return False


def bytes_of(directory: int, names: list[str], uid: int) -> int:
    """Return what ``names`` in an open directory take on the disk with all that is in them, as far as ``uid`` owns it.

    What is beyond ``MAX_MEASURED`` or ``MAX_LEVELS`` is not counted, so that it does not take long.
    """
    total = 0
    for _, _, found in itertools.islice(_walk(directory, names, uid, levels=MAX_LEVELS), MAX_MEASURED):
        total += 0 if stat.S_ISDIR(found.mode) else found.blocks * 512
    return total


def candidates(directory: int, pid: int, names: frozenset[str], *, most: int | None = None) -> list[str]:
    """Return the entries of an open directory, of the first ``most``, that are the leader's by name, or among ``names``."""
    prefixes = prefixes_of(pid)
    there, _ = names_in(directory, most)
    return [name for name in there if name.startswith(prefixes) or name in names]


def names_in(directory: int, most: int | None) -> tuple[list[str], bool]:
    """Return at most so many of the names in a directory, and whether that is all."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in itertools.islice(entries, most)]
        return names, most is None or len(names) < most


class Found(NamedTuple):
    """An entry as it is itself, no link followed."""

    mode: int
    uid: int
    blocks: int  # of 512 bytes
    links: int
    born_epoch_s: float | None  # None where the file system can't tell
    changed_epoch_s: float  # its owner can make that later, and never earlier
    inode: int


def stat_here(directory: int, path: str) -> Found | None:
    """Return what ``path`` below an open directory is; None where it is gone, or not on the directory's own file system.

    What a user has mounted there can let everybody wait who asks it anything: it is not asked.
    """
    found, place = _statx(directory, path), _statx(directory, "")
    return None if found is None or place is None or found[1] != place[1] else found[0]


class _Level(NamedTuple):
    """A folder in the middle of a walk."""

    directory: int
    left: list[str]
    itself: tuple[int, str, Found] | None  # None for the one that the walk began in


def _walk(directory: int, names: list[str], uid: int, *, levels: int) -> Iterator[tuple[int, str, Found]]:
    """Yield (open directory, name, what it is) of ``names`` and all that is in them, folders after what they hold.

    Only what is of ``uid`` and on one file system, and folders no deeper than ``levels``: each is kept open meanwhile, for a
    path could lead elsewhere a moment later. No recursion: how deep a user's folders are is for the user to say.
    """
    stack = [_Level(directory, names[::-1], None)]
    try:
        while stack:
            level = stack[-1]
            if not level.left:
                stack.pop()
                if level.itself is not None:
                    os.close(level.directory)
                    yield level.itself
                continue
            name = level.left.pop()
            found = stat_here(level.directory, name)
            if found is None or found.uid != uid:
                continue
            if not stat.S_ISDIR(found.mode):
                yield level.directory, name, found
            elif len(stack) <= levels:
                with contextlib.suppress(OSError):  # it is gone, or cannot be read
                    inner = _open_here(level.directory, name)
                    stack.append(_Level(inner, [], (level.directory, name, found)))
                    stack[-1].left.extend(names_in(inner, _MAX_IN_A_FOLDER)[0])
    finally:
        for level in stack:
            if level.itself is not None:
                os.close(level.directory)


def _open_here(directory: int, name: str) -> int:
    """Open a folder on the file system of ``directory``; OSError where another one is mounted there by now.

    Before Linux 5.6, which brought openat2(2), nothing can promise that.
    """
    how = _OPEN_HOW.pack(_DIRECTORY, 0, _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS)
    import ctypes

    descriptor: int = _libc().syscall(_SYS_OPENAT2, directory, os.fsencode(name), how, len(how))
    if descriptor >= 0:
        return descriptor
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EPERM):  # EPERM: an old filter of system calls that does not know it
        return os.open(name, _DIRECTORY, dir_fd=directory)
    raise OSError(error, os.strerror(error), name)


def _uid_of(directory: int, name: str) -> int | None:
    found = stat_here(directory, name)
    return None if found is None else found.uid


def _statx(directory: int, path: str) -> tuple[Found, bytes] | None:
    """Return what the kernel has in memory of an entry (statx(2), AT_STATX_DONT_SYNC), and its device."""
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc().statx(directory, os.fsencode(path), _STATX_FLAGS, _STATX_MASK, buffer) != 0:
        return None
    mask, links, uid, mode, inode, blocks, *times, device = _STATX.unpack(buffer.raw)
    born_epoch_s, changed_epoch_s = times[0] + times[1] / 1e9, times[2] + times[3] / 1e9
    return (
        Found(
            mode, uid, blocks, links, born_epoch_s if mask & _STATX_BTIME else None, changed_epoch_s, inode
        ),
        device,
    )


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes  # 0.4 MiB, and on many hosts nobody ever asks

    return ctypes.CDLL(None, use_errno=True)


def started_at_epoch_s(start_ticks: int) -> float:
    """Return when a process started, in seconds since 1970, one second early: clocks are set now and then."""
    boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot_s + start_ticks / os.sysconf("SC_CLK_TCK") - 1


def device_of(descriptor: int) -> str:
    """Return the device of an open file, as /proc/PID/maps has it."""
    device = os.fstat(descriptor).st_dev
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def remove(directory: int, name: str, uid: int, *, until_s: float = math.inf) -> int:
    """Remove one entry, a folder with all that is in it, and return the bytes freed.

    Nothing is followed, nothing of another uid or on another device is touched: it stays, and so does its folder. So does
    what lies very deep, and what is left at the monotonic ``until_s``. OSError where there is no such entry.
    """
    if stat_here(directory, name) is None:
        os.stat(name, dir_fd=directory, follow_symlinks=False)  # raises, unless it is on another device
        return 0
    freed = 0
    for folder, entry, found in _walk(directory, [name], uid, levels=_MAX_FOLDERS_OPEN):
        if time.monotonic() >= until_s:
            break
        with contextlib.suppress(OSError):  # one that cannot be removed does not save the others
            if stat.S_ISDIR(found.mode):
                os.rmdir(entry, dir_fd=folder)
            else:
                os.unlink(entry, dir_fd=folder)
                freed += found.blocks * 512 if found.links == 1 else 0
    return freed


@contextlib.contextmanager
def open_directory(name: str, directory: int | None = None) -> Iterator[int]:
    """Open a directory, not through a link, for as long as the block lasts."""
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
