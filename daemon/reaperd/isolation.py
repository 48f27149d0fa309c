"""Control groups of sessions' own: what they are called, and which leaders may be moved into one. Pure.

Whoever is moved leaves the control group that he is in, and the limits that were set for it. So only he is moved who stays
below the same slice of his user's, and who belongs to nothing that his leaving would break: a service, a container.
"""

from __future__ import annotations

from typing import NamedTuple

from agent import wire
from reaperd.model import SessionKey

_PREFIX, _SUFFIX = "reaper-", ".scope"
_USERS = "user.slice"


class NotIsolated(Exception):
    """A session stays where it is; the text says why."""


class Place(NamedTuple):
    """Where systemd is to make a scope."""

    slice: str  # a unit
    above: str  # the control group that this slice is, which the leader does not leave
    part_of: str  # the unit with which it is to be stopped: what the leader belonged to


def scope_name(key: SessionKey, socket: str) -> str:
    """Return the name of a session's own control group, which is a systemd unit's as well.

    It tells whose daemon made it, by a checksum of its socket's path: each goes by its own alone.
    """
    return f"{_PREFIX}{key.uid}-{key.id}-{wire.crc32(socket.encode('utf-8', 'surrogateescape')):08x}{_SUFFIX}"


def is_scope_of_user(uid: int, cgroup: str | None) -> bool:
    """Say whether a control group is one of Reaper's for a session of ``uid``, or below such a one."""
    prefix = f"{_PREFIX}{uid}-"
    return cgroup is not None and any(
        part.startswith(prefix) and part.endswith(_SUFFIX) for part in cgroup.split("/")
    )


def is_within(cgroup: str | None, scope: str) -> bool:
    """Say whether a control group is ``scope``, or below it."""
    return cgroup is not None and (cgroup == scope or cgroup.startswith(f"{scope}/"))


def path_of_scope(key: SessionKey, cgroup: str, socket: str) -> str | None:
    """Return the session's own control group as part of ``cgroup``, None where that is not below it."""
    name = scope_name(key, socket)
    above, found, _ = f"{cgroup}/".partition(f"/{name}/")
    return f"{above}/{name}" if found else None


def place_by_systemd(cgroup: str, uid: int, *, system: bool) -> Place:
    """Return where the scope of a leader in ``cgroup`` belongs; NotIsolated.

    ``system`` says whether the system's manager makes it, or the user's own.
    """
    slice_, manager = f"user-{uid}.slice", f"user@{uid}.service"
    parts = cgroup.strip("/").split("/")
    unit = parts[-1]
    if parts[:2] != [_USERS, slice_]:
        raise NotIsolated(
            f"it runs in {cgroup}, which is not below /{_USERS}/{slice_}: whoever put it there counts on it to stay"
        )
    if not unit.endswith(_SUFFIX) or unit == "init.scope":
        raise NotIsolated(f"it runs in {cgroup}, and is a part of that: only who runs in a scope is moved")
    managed = parts[2] == manager
    if not managed and len(parts) != 3:
        raise NotIsolated(f"it runs in {cgroup}, which somebody else than systemd has made")
    if system:
        return Place(slice_, f"/{_USERS}/{slice_}", manager if managed else unit)
    if not managed:
        raise NotIsolated(f"it runs in {cgroup}, which is not the user's own systemd's")
    return Place("app.slice", f"/{_USERS}/{slice_}/{manager}", unit)


def place_below(own: str, cgroup: str, residents: set[int], ours: set[int]) -> str:
    """Return the control group below which sessions' own are made where there is no systemd: the daemon's; NotIsolated.

    It must have been made for the daemon: nobody else is in it, and it is not all there is. ``residents`` are its pids.
    """
    if own == "/":
        raise NotIsolated(
            "there is no systemd here, and the daemon has no control group of its own in the unified hierarchy"
        )
    if not residents <= ours:
        raise NotIsolated(f"there is no systemd here, and {own}, where the daemon runs, has others in it")
    if not is_within(own, cgroup if cgroup != "/" else ""):
        raise NotIsolated(
            f"it runs in {cgroup}, which is not above {own}: it would leave the limits that are set there"
        )
    return own
