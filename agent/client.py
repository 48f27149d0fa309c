"""One round trip to a daemon. Nothing stays open afterwards.

pyzmq is imported at the first request only: ``import agent`` must cost nothing.
"""

from __future__ import annotations

from typing import Any

from agent import wire
from agent.sockets import why_deaf


class Unreachable(Exception):
    """No daemon answered; the text says where it was looked for and why that failed."""


def request(path: str, message: dict[str, Any], *, timeout_s: float = 1.0) -> dict[str, Any]:
    """Send one request to the daemon on ``path`` and return its reply.

    Raises Unreachable when none comes within ``timeout_s``, WireError when the daemon refuses or answers nonsense.
    """
    try:
        import zmq
    except ImportError as error:
        raise Unreachable(f"pyzmq cannot be imported: {error}") from None
    reason = why_deaf(path)
    if reason is not None:
        raise Unreachable(f"{path}: {reason}")
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.linger = 0
        dealer.connect(f"ipc://{path}")
        dealer.send(wire.encode(message))
        if not dealer.poll(int(timeout_s * 1000)):
            raise Unreachable(f"{path}: no answer within {timeout_s:g} s")
        frames = dealer.recv_multipart()
    except (zmq.ZMQError, ValueError) as error:  # ValueError: a path that is no text
        raise Unreachable(f"{path}: {error}") from None
    finally:
        dealer.close()
        context.term()
    try:
        reply = wire.decode(frames[-1])
    except wire.WireError as error:
        raise wire.WireError("bad-reply", f"{path} answered nonsense: {error}") from None
    if reply.get("ok") is not True:
        raise wire.WireError(
            str(reply.get("kind", "failed")), str(reply.get("message", "the daemon gave no reason"))
        )
    return reply
