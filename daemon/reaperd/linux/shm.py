"""What dead workers leave in /dev/shm and in temporary directories: known names only, through directory descriptors.

Names: joblib/_memmapping_reducer.py (``joblib_memmapping_folder_<pid>_...``), loky/backend/synchronize.py
(``/loky-<pid>-...``, which sem_open(3) makes ``sem.loky-...``), multiprocessing/shared_memory.py (``psm_``),
multiprocessing/synchronize.py (``mp-``), torch/csrc/.../StorageSharing.cpp (``torch_<pid>_...``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import time
from collections.abc import Iterator

SHM = "/dev/shm"  # noqa: S108
_MAPPED_PREFIXES = ("psm_", "torch_", "sem.mp-")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_SYMLINK_NOFOLLOW, _STATX_BTIME = 0x100, 0x800  # linux/fcntl.h, linux/stat.h
_STATX_BYTES, _BTIME_AT = 256, 80  # struct statx


def prefixes_of(pid: int) -> tuple[str, ...]:
    """Return how the names begin that belong to the leader ``pid`` wherever they are found."""
    return (f"joblib_memmapping_folder_{pid}_", f"sem.loky-{pid}-")


def shared_names(uid: int) -> frozenset[str]:
    """Return the names in /dev/shm that carry no pid to tell whose they are: only who has them mapped tells."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(SHM) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it is gone by now
                if (
                    entry.name.startswith(_MAPPED_PREFIXES)
                    and entry.stat(follow_symlinks=False).st_uid == uid
                ):
                    found.add(entry.name)
    return frozenset(found)


def mapped_names(paths: list[str], names: frozenset[str]) -> frozenset[str]:
    """Return those of ``names`` in /dev/shm that are among mapped ``paths``."""
    return frozenset(path[len(SHM) + 1 :] for path in paths if path.startswith(SHM + "/")) & names


def held_bytes(pid: int, names: frozenset[str], uid: int) -> int:
    """Return what the leader ``pid`` holds in /dev/shm by names of its own and by ``names``, in bytes."""
    total = 0
    with contextlib.suppress(OSError), open_directory(SHM) as shm:
        for name in candidates(shm, pid, names):
            total += _used_bytes(shm, name, uid)
    return total


def candidates(directory: int, pid: int, names: frozenset[str]) -> list[str]:
    """Return the entries of an open directory that are the leader's by name, or among ``names``."""
    prefixes = prefixes_of(pid)
    return [name for name in os.listdir(directory) if name.startswith(prefixes) or name in names]


def made_at_epoch_s(directory: int, name: str) -> float | None:
    """Return when an entry was made, in seconds since 1970; None where the file system can't tell."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(directory, os.fsencode(name), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer) != 0:
        return None
    if not int.from_bytes(buffer.raw[:4], "little") & _STATX_BTIME:
        return None
    seconds = int.from_bytes(buffer.raw[_BTIME_AT : _BTIME_AT + 8], "little", signed=True)
    return seconds + int.from_bytes(buffer.raw[_BTIME_AT + 8 : _BTIME_AT + 12], "little") / 1e9


def started_at_epoch_s(start_ticks: int) -> float:
    """Return when a process started, in seconds since 1970, one second early: clocks are set now and then."""
    boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot_s + start_ticks / os.sysconf("SC_CLK_TCK") - 1


def remove(directory: int, name: str, uid: int) -> int:
    """Remove one entry, a folder with all that is in it, and return the bytes freed.

    Nothing is followed, nothing of another uid or on another device is touched: it stays, and so does its folder.
    """
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if found.st_uid != uid or found.st_dev != os.fstat(directory).st_dev:
        return 0
    freed = 0
    if stat.S_ISDIR(found.st_mode):
        with open_directory(name, directory) as inner:
            for entry in os.listdir(inner):
                with contextlib.suppress(OSError):  # one that cannot be removed does not save the others
                    freed += remove(inner, entry, uid)
        with contextlib.suppress(OSError):  # something of somebody else's is still in it
            os.rmdir(name, dir_fd=directory)
        return freed
    os.unlink(name, dir_fd=directory)
    return found.st_blocks * 512 if found.st_nlink == 1 else 0


def _used_bytes(directory: int, name: str, uid: int) -> int:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if found.st_uid != uid:
            return 0
        if not stat.S_ISDIR(found.st_mode):
            return found.st_blocks * 512
        with open_directory(name, directory) as inner:
            return sum(_used_bytes(inner, entry, uid) for entry in os.listdir(inner))
    except OSError:
        return 0


@contextlib.contextmanager
def open_directory(name: str, directory: int | None = None) -> Iterator[int]:
    """Open a directory, not through a link, for as long as the block lasts."""
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
