"""The gate: an unprivileged process that owns the ZeroMQ socket and hands what strangers send to the core.

It checks size and shape and takes the peer's identity from the kernel. Whatever a stranger can do to libzmq
happens here: a local user can make it abort or bloat it, so this process has nothing worth having, and is replaced.
"""

from __future__ import annotations

import array
import contextlib
import re
import socket
import sys
import time

# Everything is imported before the privileges go: afterwards the files may be out of reach.
import zmq

from agent import wire
from reaperd import gate_frames
from reaperd.linux import prctl
from reaperd.unprivileged import CannotBeNobody, give_up_privileges

_PEER_ADDRESS = re.compile(r"[^:]*:([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})")
_REQUESTS_PER_S, _BURST = 2000.0, 4000.0


class Quota:
    """A token bucket for each uid."""

    def __init__(self) -> None:
        self._buckets: dict[int, tuple[float, float]] = {}

    def allows(self, uid: int, now_s: float) -> bool:
        """Take a token of ``uid``'s; False when none is left."""
        tokens, since_s = self._buckets.get(uid, (_BURST, now_s))
        tokens = min(_BURST, tokens + (now_s - since_s) * _REQUESTS_PER_S)
        self._buckets[uid] = (max(tokens - 1, 0.0), now_s)
        if len(self._buckets) > 10_000:  # uids are the kernel's, but there are four billion of them
            self._buckets.clear()
        return tokens >= 1


def parse_peer_address(text: str, overflow_uid: int) -> tuple[int, int, int]:
    """Return uid, gid and pid in libzmq's ``Peer-Address``, which has them from SO_PEERCRED.

    Refused with a WireError: anything of another form (a peer can send a property of that name, which counts only where
    the kernel gave no answer), pid 0 (a peer in a pid namespace that we can't see into) and the overflow uid.
    """
    match = _PEER_ADDRESS.fullmatch(text)
    if match is None:
        raise wire.WireError("not-allowed", "the kernel does not tell who you are")
    uid, gid, pid = (int(group) for group in match.groups())
    if pid == 0 or uid == overflow_uid or max(uid, gid, pid) >= 2**32:
        raise wire.WireError(
            "not-allowed",
            "your user or process has no number where the daemon runs: one of you is in a container that the other cannot see"
            " into (a daemon for all containers needs the machine's pid namespace: docker run --pid=host)",
        )
    return uid, gid, pid


def _metadata(request: zmq.Frame) -> tuple[str, int]:
    """Return the address of who sent ``request`` and the descriptor of the connection; WireError where libzmq has none."""
    try:
        address, descriptor = request.get("Peer-Address"), int(request.get(zmq.SRCFD))
    except zmq.ZMQError:  # ZMTP 1 and 2 have no metadata
        raise wire.WireError("not-allowed", "speak ZMTP 3: before that nobody tells who you are") from None
    return (address if isinstance(address, str) else ""), descriptor


class Gate:
    """The ROUTER on one side, the core on the other."""

    def __init__(self, router: zmq.Socket[bytes], core: socket.socket, overflow_uid: int) -> None:
        self._router = router
        self._core = core
        self._overflow_uid = overflow_uid
        self._quota = Quota()
        self._parts: dict[bytes, list[bytes]] = {}

    def run(self) -> None:
        """Say that the gate is up, then pass messages until the core goes away."""
        try:
            self._core.send(gate_frames.GATE_IS_UP)
        except (BrokenPipeError, ConnectionResetError):
            return
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._core, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._core.fileno() in ready and not self._pass_reply():
                return
            if self._router in ready:
                self._pass_request()

    def _pass_request(self) -> None:
        frames = self._router.recv_multipart(copy=False)
        routing_id = frames[0].bytes
        try:
            self._check_and_pass(routing_id, frames[1:])
        except wire.WireError as error:
            with contextlib.suppress(zmq.ZMQError):  # it has hung up
                self._router.send_multipart([routing_id, wire.encode(wire.refusal(error))])

    def _check_and_pass(self, routing_id: bytes, frames: list[zmq.Frame]) -> None:
        if len(frames) != 1:
            raise wire.WireError("bad-request", f"a request is one frame, got {len(frames)}")
        request = frames[0]
        address, descriptor = _metadata(request)
        uid, gid, pid = parse_peer_address(address, self._overflow_uid)
        if not self._quota.allows(uid, time.monotonic()):
            raise wire.WireError("busy", "too many requests: try again in a second")
        body = request.bytes
        if len(body) > wire.MAX_REQUEST_BYTES:
            raise wire.WireError("bad-request", f"a request has at most {wire.MAX_REQUEST_BYTES} bytes")
        wire.decode(body)
        message = gate_frames.pack_request(gate_frames.Request(uid, gid, pid, routing_id, body))
        # The connection itself goes along: the core asks the kernel once more who is at its other end.
        connection = array.array("i", [descriptor])
        try:
            self._core.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, connection)])
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)  # the core is gone
        except OSError:
            return  # EBADF: the peer has hung up, nobody waits for an answer

    def _pass_reply(self) -> bool:
        """Pass one part of a reply on; False when the core is gone."""
        try:
            data = self._core.recv(gate_frames.MAX_REPLY_BYTES)
        except ConnectionResetError:  # it was killed before it had read all that we passed on
            data = b""
        if not data:
            return False
        routing_id, part, last = gate_frames.parse_reply(data)
        parts = self._parts.setdefault(routing_id, [])
        parts.append(part)
        if last:
            del self._parts[routing_id]
            # A peer that does not read its replies loses them: a ROUTER drops what it cannot queue.
            self._router.send_multipart([routing_id, b"".join(parts)])
        return True


def open_router(context: zmq.Context[zmq.Socket[bytes]], listener: int, path: str) -> zmq.Socket[bytes]:
    """Return a ROUTER that takes connections from the core's listening socket."""
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.setsockopt(zmq.USE_FD, listener)
    router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REQUEST_BYTES)
    router.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    router.setsockopt(zmq.RCVHWM, 100)
    router.setsockopt(zmq.SNDHWM, 100)
    router.bind(f"ipc://{path}")
    return router


def main() -> None:
    """Run the gate: ``python -m reaperd.gate LISTENER_FD CORE_FD SOCKET_PATH``."""
    listener, core_fd, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    prctl.set_name("reaperd-gate")
    with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        overflow_uid = int(file.read())
    core = socket.socket(fileno=core_fd)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = open_router(context, listener, path)
    try:
        give_up_privileges("the gate")
    except CannotBeNobody as error:
        with contextlib.suppress(OSError):  # the core is gone
            core.send(gate_frames.pack_reason(str(error)))
        sys.exit(1)
    Gate(router, core, overflow_uid).run()
    router.close(linger=200)  # milliseconds for the last replies; the socket's file is the core's and stays
    context.term()


if __name__ == "__main__":
    main()
