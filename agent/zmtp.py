"""ZMTP 3.0 (rfc.zeromq.org/spec/23), as much of it as one DEALER needs for one round trip.

Not libzmq: it needs threads and an epoll, and aborts the whole process where it gets none (a low RLIMIT_NOFILE or
RLIMIT_NPROC, a tight RLIMIT_AS). A training script must never end because it registered.
"""

from __future__ import annotations

import _socket  # socket itself, and all that it imports, takes ten times as long to load
import time

_SIGNATURE_BYTES, _GREETING_BYTES = 10, 64
# Signature, version 3.0, mechanism NULL, as-server 0, filler.
_GREETING = (b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0")).ljust(
    _GREETING_BYTES, b"\0"
)
_MORE, _LONG, _COMMAND = 0x01, 0x02, 0x04
_MAX_REPLY_BYTES = 64 * 1024 * 1024


class ZmtpError(Exception):
    """Whoever is at the other end does not speak ZMTP, or hung up; the text says what was seen."""


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return ``body`` as one frame."""
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | _LONG,)) + len(body).to_bytes(8, "big") + body


def ready_command() -> bytes:
    """Return the command that ends the handshake of a DEALER without an identity of its own."""
    properties = b"".join(
        bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value
        for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", b""))
    )
    return frame(b"\x05READY" + properties, _COMMAND)


class Dealer:
    """One connection to a ROUTER on a Unix socket. Every call ends by the deadline given to the constructor."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """Connect and shake hands; OSError (TimeoutError among them), or ZmtpError."""
        self._until_s = time.monotonic() + timeout_s
        self._unread = b""
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            self._wait()
            self._socket.connect(path)
            self._send(_GREETING + ready_command())
            greeting = self._read(_GREETING_BYTES)
            if (
                greeting[0] != 0xFF
                or greeting[_SIGNATURE_BYTES - 1] != 0x7F
                or greeting[_SIGNATURE_BYTES] < 3
            ):
                raise ZmtpError("it does not speak ZMTP 3")
            flags, body = self._read_frame()
            if not flags & _COMMAND or not body.startswith(b"\x05READY"):
                raise ZmtpError("it refused the handshake")
        except BaseException:
            self._socket.close()
            raise

    def round_trip(self, request: bytes) -> bytes:
        """Send one message and return the last frame of the next one; TimeoutError, OSError, ZmtpError."""
        self._send(frame(request))
        while True:
            flags, body = self._read_frame()
            if not flags & (_COMMAND | _MORE):
                return body

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _wait(self) -> None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)

    def _send(self, data: bytes) -> None:
        self._wait()
        self._socket.sendall(data, _socket.MSG_NOSIGNAL)  # the program may die of SIGPIPE

    def _read_frame(self) -> tuple[int, bytes]:
        self._wait()  # whoever never stops talking does not put the deadline off
        flags = self._read(1)[0]
        size = int.from_bytes(self._read(8 if flags & _LONG else 1), "big")
        if size > _MAX_REPLY_BYTES:
            raise ZmtpError(f"it announced {size} bytes")
        return flags, self._read(size)

    def _read(self, size: int) -> bytes:
        chunks, missing = [self._unread[:size]], size - len(self._unread)
        self._unread = self._unread[size:]
        while missing > 0:
            self._wait()
            chunk = self._socket.recv(min(max(missing, 4096), 1024 * 1024))
            if not chunk:
                raise ZmtpError("it hung up")
            chunks.append(chunk[:missing])
            self._unread = chunk[missing:]
            missing -= len(chunk)
        return b"".join(chunks)
