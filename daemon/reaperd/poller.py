"""One epoll(7) for everything that the core waits for."""

from __future__ import annotations

import select
from collections.abc import Callable

_READABLE = select.EPOLLIN
_WRITABLE = select.EPOLLOUT


class Poller:
    """Calls a function when a descriptor becomes readable (or writable, where asked for)."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}

    def watch(self, descriptor: int, call: Callable[[], None]) -> None:
        """Call ``call`` whenever ``descriptor`` is readable; it stays the caller's to unwatch before it is closed."""
        self._calls[descriptor] = call
        try:
            self._epoll.register(descriptor, _READABLE)
        except OSError:
            del self._calls[descriptor]
            raise

    def watches(self, descriptor: int) -> bool:
        """Say whether ``descriptor`` is watched."""
        return descriptor in self._calls

    def also_writable(self, descriptor: int, *, wanted: bool) -> None:
        """Say whether the call is wanted when ``descriptor`` is writable, too."""
        self._epoll.modify(descriptor, _READABLE | _WRITABLE if wanted else _READABLE)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching: a dead pidfd stays readable for ever."""
        if self._calls.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> None:
        """Wait for something, at most ``timeout_s`` (None: for ever), and make the calls.

        epoll(7) counts whole milliseconds: rounded up, a deadline is past when it is looked at.
        """
        # All that is ready in one go: a session's workers end together.
        ready = self._epoll.poll(-1 if timeout_s is None else max(0.0, timeout_s), max(64, len(self._calls)))
        for descriptor, _ in ready:
            call = self._calls.get(descriptor)  # an earlier call may have unwatched it
            if call is not None:
                call()
