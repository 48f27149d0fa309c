"""One round trip to a daemon. Nothing stays open afterwards."""

from __future__ import annotations

from agent import wire, zmtp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


_MAX_REASON_CHARS = 2000


class Unreachable(Exception):
    """No daemon answered; the text says where it was looked for and why that failed."""


def request(
    path: str,
    message: dict[str, Any],
    *,
    timeout_s: float = 1.0,
    decode: Callable[[bytes], dict[str, Any]] = wire.decode,
) -> dict[str, Any]:
    """Send one request to the daemon on ``path`` and return its reply, which ``decode`` reads.

    Raises Unreachable when none comes within ``timeout_s``, WireError when the daemon refuses or answers nonsense.
    """
    data = wire.encode(message)
    try:
        dealer = zmtp.Dealer(path, timeout_s)
        try:
            answer = dealer.round_trip(data)
        finally:
            dealer.close()
    except (TimeoutError, BlockingIOError):  # BlockingIOError: a full backlog, connect(2) on a Unix socket
        raise Unreachable(f"{path}: no answer within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:  # ValueError: a path that is no text, or has a NUL
        raise Unreachable(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except zmtp.ZmtpError as error:
        raise Unreachable(f"{path}: {error}") from None
    try:
        reply = decode(answer)
    except wire.WireError as error:
        raise wire.WireError("bad-reply", f"{path} answered nonsense: {error}") from None
    if reply.get("ok") is not True:
        raise wire.WireError(
            str(reply.get("kind", "failed")),
            _printable(str(reply.get("message", "the daemon gave no reason"))[:_MAX_REASON_CHARS]),
        )
    return reply


def _printable(text: str) -> str:
    """Return ``text`` fit for a terminal: it ends up in a warning, or behind ``reaperctl:``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
