"""This side of ``zygote.py``: a process that forks leaders and bystanders within milliseconds, and what they tell."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from harness import test_environment

ZYGOTE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
_LONGEST_REPORT = 65536


class Report(NamedTuple):
    """What one process told; ``pidfd`` is its own, ours to close, where it told that it is up."""

    facts: dict[str, Any]
    pidfd: int | None


class Factory:
    """One zygote; ``adopts``: it is a subreaper, so that what its leaders leave becomes its own children."""

    def __init__(self, run: str, socket_path: str, *, adopts: bool = False) -> None:
        self.adopts = adopts
        self.reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports.setblocking(False)
        with theirs, control:
            descriptors = (theirs.fileno(), control.fileno())
            self._process = subprocess.Popen(
                # Without site-packages nothing slow is imported: whoever is forked is small.
                [sys.executable, "-S", ZYGOTE, *map(str, descriptors), *(["subreaper"] if adopts else [])],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=test_environment(run, REAPER_SOCKET=socket_path),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def start_leader(self, wish: dict[str, Any]) -> socket.socket:
        """Have a leader forked and return the socket on which it takes orders."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._control, [_encoded(op="leader", **wish)], [theirs.fileno()])
        return ours

    def start_bystander(self, wish: dict[str, Any]) -> None:
        """Have a bystander forked."""
        self._control.send(_encoded(op="bystander", **wish))

    def read(self) -> Iterator[Report]:
        """Yield what was told since the last time."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.reports, _LONGEST_REPORT, 4)
            except BlockingIOError:
                return
            if not data:
                return
            yield Report(json.loads(data), descriptors[0] if descriptors else None)

    def close(self) -> None:
        """End the zygote; whom it forked is for others to end."""
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for report in self.read():
            if report.pidfd is not None:
                os.close(report.pidfd)
        self.reports.close()


def order(control: socket.socket, op: str, **facts: Any) -> bool:
    """Tell a leader what to do; False when it is gone."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.send(_encoded(op=op, **facts))
        return True
    return False


def _encoded(**facts: Any) -> bytes:
    return json.dumps(facts).encode()
