"""The core's end of the gate: starts it, replaces it when it dies, and passes requests and replies.

What comes from the gate is checked like anything else: who a request is from, the kernel tells the core itself.
"""

from __future__ import annotations

import collections
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from agent import wire
from reaperd import gate_frames
from reaperd.linux import pidfd
from reaperd.poller import Poller

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_LAST_WORDS_S = 1.0
_MAX_WAITING = 2000  # parts of replies that the gate has not taken
_MESSAGES_A_TURN = 64  # then whoever died meanwhile is looked at
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GOOD_LIFE_S = 0.05, 5.0, 60.0


class Peer(NamedTuple):
    """Who sent a request, as the kernel says; ``connection`` is closed when the request is answered."""

    uid: int
    gid: int
    pid: int
    connection: socket.socket

    def open_pidfd(self) -> int:
        """Return a pidfd of the peer; ProcessGone. Before Linux 6.5 it is the pid's, and the caller compares start times."""
        handle = pidfd.peer_pidfd(self.connection)
        return pidfd.open_pid(self.pid) if handle is None else handle


class Return(NamedTuple):
    """Where a reply goes: a peer of one life of the gate."""

    life: int
    routing_id: bytes


class GateLink:
    """Keeps one gate running."""

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        poller: Poller,
        on_request: Callable[[Peer, Return, dict[str, Any]], None],
    ) -> None:
        self._listener = listener
        self._path = path
        self._poller = poller
        self._on_request = on_request
        self._life = 0
        self._channel: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._waiting: collections.deque[bytes] = collections.deque()
        self._started_at_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self.restart_at_s: float | None = None
        self.lives_lost = 0
        self.on_up: Callable[[], None] = lambda: None

    def start(self, now_s: float) -> None:
        """Start a gate; the listening socket is handed to it, and stays ours."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        descriptors = (self._listener.fileno(), theirs.fileno())
        arguments = [sys.executable, "-I", "-m", "reaperd.gate", *map(str, descriptors), self._path]
        try:
            # A session of its own: Ctrl-C in a terminal is for the core, which ends the gate by hanging up.
            self._child = subprocess.Popen(
                arguments,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:  # processes have run out
            log.warning("cannot start the gate: %s, trying again", error.strerror)
            ours.close()
            theirs.close()
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self.restart_at_s = now_s + self._pause_s
            return
        theirs.close()
        self._channel, self._life, self._started_at_s = ours, self._life + 1, now_s
        self.restart_at_s = None
        self._poller.watch(ours.fileno(), self._exchange)

    def stop(self) -> None:
        """Hang up; the gate passes the last replies on and ends by itself, or is ended."""
        if self._channel is not None:
            self._poller.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._child is not None:
            try:
                self._child.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None
        self._waiting.clear()

    def lost(self, now_s: float) -> None:
        """Note that the gate is gone; the next one is started after a pause that grows while they die young."""
        lived_s = now_s - self._started_at_s
        self._pause_s = _FIRST_PAUSE_S if lived_s > _GOOD_LIFE_S else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        child = self._child
        if child is not None:
            child.kill()
        self.stop()
        self.lives_lost += 1
        self.restart_at_s = now_s + self._pause_s
        code = child.returncode if child else None
        log.warning("the gate ended code=%s lived_s=%.1f, restarting in %.2f s", code, lived_s, self._pause_s)

    # -- messages ----------------------------------------------------------------------------

    def reply(self, to: Return, message: dict[str, Any]) -> None:
        """Send a reply; it is lost with the gate whose peer it is for, or when the gate does not keep up."""
        if self._channel is None or to.life != self._life:
            return
        parts = list(gate_frames.pack_reply(to.routing_id, wire.encode(message)))
        if len(self._waiting) + len(parts) > _MAX_WAITING:
            log.warning("the gate does not take replies: dropped one of %d parts", len(parts))
            return
        self._waiting.extend(parts)
        self._flush()

    def _exchange(self) -> None:
        self._flush()
        for _ in range(_MESSAGES_A_TURN):
            if self._channel is None or not self._receive():
                return

    def _flush(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            while self._waiting:
                channel.send(self._waiting[0])
                self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the gate died; reading notices
            self._waiting.clear()
        self._poller.also_writable(channel.fileno(), wanted=bool(self._waiting))

    def _receive(self) -> bool:
        """Take one message; False when there is none now."""
        assert self._channel is not None, "only called while there is a gate"
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._channel, gate_frames.MAX_REQUEST_BYTES, 4)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors, flags = b"", [], 0
        connections = [
            socket.socket(fileno=descriptor) for descriptor in descriptors if _is_socket(descriptor)
        ]
        try:
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self.lost(time.monotonic())
                return False
            if len(connections) == 1:
                self._take(data, connections[0])
            elif data == gate_frames.GATE_IS_UP:
                self.on_up()
        finally:
            for connection in connections:
                connection.close()
        return True

    def _take(self, data: bytes, connection: socket.socket) -> None:
        try:
            request = gate_frames.parse_request(data)
            message = wire.decode(request.body)
            pid, uid, gid = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
        except (wire.WireError, ValueError, OSError):
            return  # no gate of ours sends that
        # Another pid or uid than the gate saw: the descriptor was given to another connection meanwhile.
        if (uid, gid, pid) == (request.uid, request.gid, request.pid) and pid > 0:
            self._on_request(Peer(uid, gid, pid, connection), Return(self._life, request.routing_id), message)


def _is_socket(descriptor: int) -> bool:
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return True
    os.close(descriptor)
    return False


_ENVIRONMENT = {
    name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
}
