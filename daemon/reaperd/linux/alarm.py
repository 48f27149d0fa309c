"""A set of pidfds that is asked, in the middle of other work, whether any of them has become readable."""

from __future__ import annotations

import contextlib
import select


class Alarm:
    """Rings while a process is dead of whose end nobody has taken note."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Return a descriptor that is readable while the alarm rings."""
        return self._epoll.fileno()

    def watch(self, pidfd: int) -> None:
        """Ring when the process behind ``pidfd`` has died; once is enough."""
        with contextlib.suppress(FileExistsError):
            self._epoll.register(pidfd, select.EPOLLIN)

    def silence(self, pidfd: int) -> None:
        """Take note of that; once is enough."""
        with contextlib.suppress(FileNotFoundError):
            self._epoll.unregister(pidfd)

    def rings(self) -> bool:
        """Say whether it rings."""
        return bool(self._epoll.poll(0, 1))
