"""What a companion of the core's does at its start, and how it speaks with the core. Runs in the companion alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from reaperd.linux import prctl
from reaperd.unprivileged import CannotBeNobody, give_up_privileges

_PEEKED_BYTES = 256 * 1024


def begin(name: str, *, memory_bytes: int, tasks: int | None = 0) -> socket.socket:
    """Give up all rights, and return the channel to the core; the process ends with the core from here on.

    ``name`` is what ps shows, of 15 characters at most; the limits are those of ``give_up_privileges``. Everything that is
    needed must have been imported: afterwards the files may be out of reach.
    """
    channel, core_pid = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    prctl.set_name(name)
    try:
        give_up_privileges(name, memory_bytes=memory_bytes, tasks=tasks)
    except CannotBeNobody as error:
        give_up(channel, str(error))
    # After that: the kernel forgets it where a process becomes another user.
    prctl.die_with_parent(signal.SIGKILL)
    if os.getppid() != core_pid:
        sys.exit(0)  # it was gone before we could ask
    return channel


def peek() -> dict[str, Any]:
    """Wait for the first message and return it, before ``begin`` and without taking it: for what must be loaded by then.

    {} where it is so long that it comes in parts, or the core is gone.
    """
    with contextlib.closing(socket.socket(fileno=os.dup(int(sys.argv[1])))) as channel:
        line, end, _ = channel.recv(_PEEKED_BYTES, socket.MSG_PEEK).partition(b"\n")
    found = json.loads(line) if end else {}
    return found if isinstance(found, dict) else {}


def pack(message: dict[str, Any]) -> bytes:
    """Return a message as it goes through the channel."""
    return json.dumps(message).encode() + b"\n"


def say(channel: socket.socket, message: dict[str, Any]) -> None:
    """Tell the core something; where it takes nothing, or is gone, that is lost."""
    with contextlib.suppress(OSError):
        channel.send(pack(message), socket.MSG_DONTWAIT)


def give_up(channel: socket.socket, why: str) -> NoReturn:
    """Tell the core why there is nothing to be done here before somebody changes something, and end."""
    say(channel, {"hopeless": why})
    sys.exit(1)
