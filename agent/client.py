"""Where a daemon listens, and one round trip to it. Nothing stays open afterwards.

pyzmq is imported at the first request only: ``import agent`` must cost nothing.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

from agent import wire

SYSTEM_SOCKET = "/run/reaper/reaper.sock"


class Unreachable(Exception):
    """No daemon answered; the text says where it was looked for and why that failed."""


def user_runtime_directory() -> str:
    """Return where this user's own daemon keeps its socket; it need not exist.

    That is ``$XDG_RUNTIME_DIR/reaper``, else ``reaper-$UID`` in the temporary directory.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return os.path.join(runtime, "reaper")
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"reaper-{os.geteuid()}")  # noqa: S108


def user_socket() -> str:
    """Return the path of this user's own socket."""
    return os.path.join(user_runtime_directory(), "reaper.sock")


def is_private(directory: str) -> bool:
    """Say whether ``directory`` is this user's alone: anyone may plant one in the shared temporary directory."""
    try:
        found = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def candidate_sockets(explicit: str | None = None) -> list[str]:
    """Return the sockets to try, in order: the one asked for, ``REAPER_SOCKET``, else the user's own and the system's.

    Root has no socket of its own: its daemon is the system's.
    """
    chosen = explicit or os.environ.get("REAPER_SOCKET")
    if chosen:
        return [os.path.realpath(chosen)]
    if os.geteuid() == 0 or not is_private(user_runtime_directory()):
        return [SYSTEM_SOCKET]
    return [os.path.realpath(user_socket()), SYSTEM_SOCKET]


def why_deaf(path: str) -> str | None:
    """Return why nobody listens on ``path``, None when somebody does.

    libzmq would keep on connecting to a missing or dead socket until the deadline; one plain connect(2) knows at once.
    """
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(0.2)
        probe.connect(path)
    except TimeoutError:
        return None  # a full backlog: somebody listens, if slowly
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return getattr(error, "strerror", None) or str(error)
    finally:
        probe.close()
    return None


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
