"""The session page as a stranger's process offers it: opened without trust, read with pread(2), never mapped.

Mapping it would let its owner end us: a truncated file is a SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat

from agent import wire
from reaperd import pages

_F_GET_SEALS = 1034  # linux/fcntl.h
_SEALS = 0x2 | 0x4  # SHRINK, GROW: what else it is sealed against is its owner's concern
# A FIFO or a terminal can bear the same name.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ATTEMPTS = 16


def open_page(path: str, *, uid: int) -> int:
    """Return a descriptor for the page at ``path``; OSError, or WireError ``bad-page`` for what is no page of ``uid``."""
    # Looked at before it is opened: opening a device or another's FIFO as root does things.
    if not os.readlink(path).startswith("/memfd:" + wire.PAGE_PREFIX) or not stat.S_ISREG(
        os.stat(path).st_mode
    ):
        raise wire.WireError("bad-page", "the session page is no memfd of that name")
    descriptor = os.open(path, _FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink or found.st_size != wire.PAGE_BYTES:
            raise wire.WireError("bad-page", "the session page is no memfd of the right size")
        if found.st_uid != uid:
            raise wire.WireError("bad-page", f"the session page belongs to uid {found.st_uid}")
        if fcntl.fcntl(descriptor, _F_GET_SEALS) & _SEALS != _SEALS:
            raise wire.WireError("bad-page", "the session page is not sealed in its size")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_page(descriptor: int, *, writer_is_dead: bool = False) -> pages.Page:
    """Return what the page says; TornPage when it never holds still, WireError when it is broken.

    A dead writer can have been killed in the middle of a write: its page is taken as it is.
    """
    data = b""
    for _ in range(_ATTEMPTS):
        data = os.pread(descriptor, wire.PAGE_BYTES, 0)
        # The same sequence number before and after: nothing was written while we read.
        if pages.page_sequence(os.pread(descriptor, wire.HEADER_BYTES, 0)) == pages.page_sequence(data):
            with contextlib.suppress(pages.TornPage):
                return pages.parse_page(data)
    if writer_is_dead:
        return pages.parse_page(data, torn=True)
    raise pages.TornPage


class OpenPage:
    """A page that was opened: read again only when it has changed."""

    def __init__(self, descriptor: int) -> None:
        """Own ``descriptor``."""
        self._descriptor = descriptor
        self._last: tuple[bytes, pages.Page] | None = None

    def read(self, *, writer_is_dead: bool = False) -> pages.Page:
        """Return what the page says; as ``read_page()``."""
        header = os.pread(self._descriptor, wire.HEADER_BYTES, 0)
        if self._last is None or header != self._last[0]:
            # Written while we read: the header is another one by then, and the page is read again the next time.
            self._last = header, read_page(self._descriptor, writer_is_dead=writer_is_dead)
        return self._last[1]

    @property
    def inode(self) -> int:
        """What tells this page from every other memfd."""
        return os.fstat(self._descriptor).st_ino

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
