"""sd_notify(3) and the watchdog (sd_watchdog_enabled(3)), without a library: one datagram."""

from __future__ import annotations

import socket
from collections.abc import Mapping


class Notifier:
    """The service manager's socket; without one, every message is dropped."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        # Made when it is needed: going into the background closes all.
        self._sender: socket.socket | None = None
        owner = environment.get("WATCHDOG_PID", "")
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched = microseconds.isdigit() and int(microseconds) > 0 and owner in ("", str(pid))
        # Half of the time allowed, as sd_watchdog_enabled(3) recommends.
        self.watchdog_s: float | None = int(microseconds) / 2e6 if watched else None

    def send(self, message: str) -> None:
        """Send ``READY=1``, ``STATUS=...`` and the like; a manager that does not listen changes nothing."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            # Kept: a watchdog that is not fed because descriptors have run out ends us in the middle of a reap.
            if self._sender is None:
                self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._sender.setblocking(False)
            self._sender.sendto(message.encode("utf-8", "replace"), address)
        except OSError:
            return
