"""Where a daemon keeps its things: the system's paths for root, the user's own for anybody else."""

from __future__ import annotations

import os
from typing import NamedTuple

from agent import sockets


class Paths(NamedTuple):
    """One mode's socket, state directory and configuration file."""

    mode: str  # "system" or "user"
    socket: str
    state: str
    config: str


def default_paths() -> Paths:
    """Return the paths of the mode that the effective uid decides."""
    if os.geteuid() == 0:
        return Paths("system", sockets.SYSTEM_SOCKET, "/var/lib/reaper", "/etc/reaper/reaper.toml")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Paths(
        "user",
        sockets.user_socket(),
        os.path.join(state, "reaper"),
        os.path.join(config, "reaper", "reaper.toml"),
    )
