"""What it looks like where the machine, or what this process may take of it, has run out."""

from __future__ import annotations

import errno

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def is_exhaustion(error: BaseException) -> bool:
    """Say whether descriptors or memory have run out: it can be tried again, and nobody in particular is why."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _EXHAUSTED)


def reason_of(error: BaseException) -> str:
    """Return in words what has run out."""
    return (error.strerror if isinstance(error, OSError) else None) or "out of memory"


def tell_exhaustion(error: OSError) -> None:
    """Raise ``error`` where it says that something has run out: that tells nothing of whatever was asked about."""
    if error.errno in _EXHAUSTED:
        raise error
