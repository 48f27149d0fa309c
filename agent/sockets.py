"""Where a daemon listens. Nothing here needs more than the standard library."""

from __future__ import annotations

import _socket  # as in zmtp.py
import os
import stat

SYSTEM_SOCKET = "/run/reaper/reaper.sock"


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
        return [_real(chosen)]
    if os.geteuid() == 0 or not is_private(user_runtime_directory()):
        return [SYSTEM_SOCKET]
    return [_real(user_socket()), SYSTEM_SOCKET]


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a working directory that was removed, a NUL
        return path


def why_deaf(path: str) -> str | None:
    """Return why nobody listens on ``path``, None when somebody does.

    One plain connect(2) knows at once.
    """
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(0.2)
        probe.connect(path)
    except (TimeoutError, BlockingIOError):
        return None  # a full backlog: somebody listens, if slowly
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return getattr(error, "strerror", None) or str(error)
    finally:
        probe.close()
    return None
