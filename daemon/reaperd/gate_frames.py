"""What the core and the gate say to each other, one SEQPACKET message each. Pure; it must never import zmq."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from agent import wire

_REQUEST = struct.Struct("=IIIB")  # uid, gid, pid, length of the routing id
_REPLY = struct.Struct("=BB")  # 1 for the last part of a reply, length of the routing id
_PART_BYTES = 60_000  # a message must fit into the socket's buffer, 208 KiB by default
_MAX_ROUTING_ID_BYTES = 255

MAX_REQUEST_BYTES = _REQUEST.size + _MAX_ROUTING_ID_BYTES + wire.MAX_REQUEST_BYTES
MAX_REPLY_BYTES = _REPLY.size + _MAX_ROUTING_ID_BYTES + _PART_BYTES

GATE_IS_UP = _REQUEST.pack(0, 0, 0, 0)
GATE_CANNOT_BE = _REQUEST.pack(0, 0, 0, 1)  # before the reason


def pack_reason(reason: str) -> bytes:
    """Return what a gate says that cannot give up its privileges."""
    return GATE_CANNOT_BE + reason.encode("utf-8", "replace")[:1000]


def parse_reason(data: bytes) -> str:
    """Return the reason in what ``pack_reason()`` returned."""
    return data[len(GATE_CANNOT_BE) :].decode("utf-8", "replace")


class Request(NamedTuple):
    """A stranger's request on its way to the core."""

    uid: int
    gid: int
    pid: int
    routing_id: bytes
    body: bytes


def pack_request(request: Request) -> bytes:
    """Return the message that carries ``request``."""
    header = _REQUEST.pack(request.uid, request.gid, request.pid, len(request.routing_id))
    return header + request.routing_id + request.body


def parse_request(data: bytes) -> Request:
    """Return the request in a message; ValueError when there is none."""
    if len(data) < _REQUEST.size:
        raise ValueError("the message is too short")
    uid, gid, pid, length = _REQUEST.unpack_from(data)
    at = _REQUEST.size + length
    if len(data) < at:
        raise ValueError("the routing id is cut short")
    return Request(uid, gid, pid, data[_REQUEST.size : at], data[at:])


def pack_reply(routing_id: bytes, body: bytes) -> Iterator[bytes]:
    """Yield the messages that carry one reply."""
    for at in range(0, len(body), _PART_BYTES):
        last = at + _PART_BYTES >= len(body)
        yield _REPLY.pack(last, len(routing_id)) + routing_id + body[at : at + _PART_BYTES]


def parse_reply(data: bytes) -> tuple[bytes, bytes, bool]:
    """Return the routing id, a part of the reply, and whether it is the last; ValueError when there is none."""
    if len(data) < _REPLY.size:
        raise ValueError("the message is too short")
    last, length = _REPLY.unpack_from(data)
    at = _REPLY.size + length
    if len(data) < at:
        raise ValueError("the routing id is cut short")
    return data[_REPLY.size : at], data[at:], bool(last)
