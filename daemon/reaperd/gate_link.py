"""The core's end of the gate: starts it, replaces it when it dies, and passes requests and replies.

What comes from the gate is checked like anything else: who a request is from, the kernel tells the core itself.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from agent import wire
from reaperd import gate_frames
from reaperd.linux import pidfd
from reaperd.linux.child import Child, inherited, python, start_child
from reaperd.poller import Poller

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_LAST_WORDS_S = 1.0
# Replies that the gate has not taken; whoever has more waiting gets nothing more. One reply may be larger.
_MAX_WAITING_BYTES, MAX_WAITING_BYTES_OF_ONE_UID = 32 * 1024 * 1024, 4 * 1024 * 1024
_TURN_S = 0.002  # for taking messages: then whoever died meanwhile is looked at
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GOOD_LIFE_S = 0.05, 5.0, 60.0


class Peer(NamedTuple):
    """Who sent a request, as the kernel says; whoever is given it closes ``connection`` when the request is answered."""

    uid: int
    gid: int
    pid: int
    connection: socket.socket
    # The pid namespace that it lives in, where that is not ours: root of a container is no root here, and its pids are others'.
    container: str = ""

    def open_pidfd(self) -> int:
        """Return a pidfd of the peer; ProcessGone. Before Linux 6.5 it is the pid's, and the caller compares start times."""
        handle = pidfd.peer_pidfd(self.connection)
        return pidfd.open_pid(self.pid) if handle is None else handle


class Return(NamedTuple):
    """Where a reply goes: a peer of one life of the gate."""

    life: int
    routing_id: bytes
    uid: int


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
        self._child: Child | None = None
        self._waiting: collections.deque[tuple[int, bytes]] = collections.deque()  # uid and part of a reply
        self._waiting_bytes: collections.Counter[int] = collections.Counter()  # by uid
        self._drops = False
        self._is_ready = False
        self._was_up = False
        self._was_away = False  # since may_have_missed() was asked the last time
        self._started_at_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self.restart_at_s: float | None = None
        self.lives_lost = 0
        self.hopeless = ""  # why no gate was ever up, and none will be: it cannot become who it must be
        self.on_up: Callable[[], None] = lambda: None

    def start(self, now_s: float) -> None:
        """Start a gate; the listening socket is handed to it, and stays ours."""
        with contextlib.ExitStack() as stack:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
                stack.enter_context(theirs)
                stack.callback(ours.close)
                ours.setblocking(False)
                descriptors = (self._listener.fileno(), theirs.fileno())
                arguments = [*python("reaperd.gate"), *map(str, descriptors), self._path]
                # A session of its own: Ctrl-C in a terminal is for the core, which ends the gate by hanging up.
                self._child = start_child(arguments, descriptors, _ENVIRONMENT)
                self._poller.watch(ours.fileno(), self._note_ready)
            except OSError as error:  # processes or descriptors have run out
                log.warning("cannot start the gate: %s, trying again", error.strerror)
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                self.restart_at_s = now_s + self._pause_s
                return
            self._channel, self._life, self._started_at_s = ours, self._life + 1, now_s
            self.restart_at_s = None
            stack.pop_all()
            theirs.close()

    def mend(self, now_s: float) -> None:
        """Where an error in the middle of something has left us without a gate, start one."""
        if self._channel is None and self.restart_at_s is None:
            self.restart_at_s = now_s

    def stop(self) -> None:
        """Hang up; the gate passes the last replies on and ends by itself, or is ended."""
        if self._channel is not None:
            self._poller.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._child is not None:
            if self._child.wait(_LAST_WORDS_S) is None:
                self._child.kill()
                self._child.wait()
            self._child = None
        self._waiting.clear()
        self._waiting_bytes.clear()

    def lost(self, now_s: float) -> None:
        """Note that the gate is gone; the next one is started after a pause that grows while they die young."""
        lived_s = now_s - self._started_at_s
        self._pause_s = _FIRST_PAUSE_S if lived_s > _GOOD_LIFE_S else min(2 * self._pause_s, _LONGEST_PAUSE_S)
        child = self._child
        if child is not None:
            child.kill()
        self.stop()
        self.lives_lost += 1
        self._was_away = True
        self.restart_at_s = now_s + self._pause_s
        code = child.returncode if child else None
        log.warning("the gate ended code=%s lived_s=%.1f, restarting in %.2f s", code, lived_s, self._pause_s)

    def may_have_missed(self) -> bool:
        """Say whether since this was last asked somebody may have tried to register in vain: no gate takes who connects."""
        was_away, self._was_away = self._was_away or self._channel is None, False
        # Those who wait to be accepted keep the listening socket readable: a stranger has filled the gate, or held it.
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        return was_away or bool(poller.poll(0))

    # -- messages ----------------------------------------------------------------------------

    def reply(self, to: Return, reply: bytes) -> None:
        """Send a reply; it is lost with the gate whose peer it is for, or when the gate does not keep up."""
        if self._channel is None or to.life != self._life:
            return
        if (
            self._waiting_bytes[to.uid] > MAX_WAITING_BYTES_OF_ONE_UID
            or self._waiting_bytes.total() > _MAX_WAITING_BYTES
        ):
            if not self._drops:
                log.warning(
                    "the gate does not take replies: dropped one for uid=%d, and all that follow", to.uid
                )
            self._drops = True
            return
        for part in gate_frames.pack_reply(to.routing_id, reply):
            self._waiting.append((to.uid, part))
            self._waiting_bytes[to.uid] += len(part)
        self._flush()

    def _note_ready(self) -> None:
        self._is_ready = True

    def exchange(self) -> None:
        """Take the requests that are there, and send the replies that wait; for a few milliseconds.

        Called by the loop after all that is due: what strangers send never goes before it.
        """
        if not self._is_ready:
            return
        self._is_ready = False  # the poller says so again where something is left
        self._flush()
        until_s = time.monotonic() + _TURN_S
        while self._channel is not None and self._receive() and time.monotonic() < until_s:
            pass

    def _flush(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            while self._waiting:
                uid, part = self._waiting[0]
                channel.send(part)
                self._waiting.popleft()
                self._waiting_bytes[uid] -= len(part)
        except BlockingIOError:
            pass
        except OSError:  # the gate died; reading notices
            self._waiting.clear()
        if not self._waiting:
            self._waiting_bytes.clear()
            self._drops = False
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
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            self.lost(time.monotonic())
        elif len(connections) == 1:
            self._take(data, connections.pop())
        elif data == gate_frames.GATE_IS_UP:
            self._was_up = True
            self.on_up()
        elif data.startswith(gate_frames.GATE_CANNOT_BE) and not self._was_up:
            self.hopeless = gate_frames.parse_reason(data)
        for connection in connections:
            connection.close()
        return self._channel is not None

    def _take(self, data: bytes, connection: socket.socket) -> None:
        with contextlib.ExitStack() as ours:
            ours.callback(connection.close)
            try:
                request = gate_frames.parse_request(data)
                message = wire.decode(request.body)
                credentials = read_credentials(connection, self._path)
            except (wire.WireError, ValueError, OSError):
                return  # no gate of ours sends that
            # Others than the gate saw: the descriptor was given to another connection meanwhile.
            if credentials != (request.uid, request.gid, request.pid):
                return
            ours.pop_all()
        peer = Peer(*credentials, connection)
        self._on_request(peer, Return(self._life, request.routing_id, peer.uid), message)


def read_credentials(connection: socket.socket, path: str) -> tuple[int, int, int] | None:
    """Return uid, gid and pid of who connected to our socket at ``path``; None where ``connection`` is no such connection.

    The kernel keeps with a connection who made it, but with the caller's end of it who *listens* (unix(7), SO_PEERCRED): a
    captured gate that calls root, here or elsewhere, and passes its own end would be taken for root. So the end must be one
    that was accepted on our socket, and has its name. That name alone can be forged, by bind(2) in a root directory
    of one's own; but the other end of a forger's connection has a listener's name, while those who call us have none.
    """
    if connection.getpeername() or connection.getsockname() != path:
        return None
    pid, uid, gid = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    # Nor is anybody's request ours: the gate's channel is a pair that we made.
    return None if pid in (0, os.getpid()) else (uid, gid, pid)


def _is_socket(descriptor: int) -> bool:
    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return True
    os.close(descriptor)
    return False


# One heap for libzmq's threads and the gate's own (mallopt(3)): with one for each, what a burst of connections leaves
# behind comes and goes by more than a MiB.
_ENVIRONMENT = {**inherited(), "MALLOC_ARENA_MAX": "1"}
