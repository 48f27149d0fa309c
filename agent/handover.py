"""A session that outlives execve(2): its page's descriptor is inherited, and the program that is run maps the page anew."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from agent import wire
from agent.page import SessionPage


class HandedOver(NamedTuple):
    """A session that this process led before it exec'ed."""

    page: SessionPage
    sockets: list[str]  # of the daemon that accepted it, else all that were tried
    name: str


def take_over(session_id: str) -> HandedOver | None:
    """Return what there is of a session that this process led before it exec'ed, None without its page. OSError, WireError."""
    descriptor = _find(session_id)
    if descriptor < 0:
        return None
    record = _read_record(descriptor)
    name, boot_id = (wire.text_field(record, key) for key in ("name", "boot_id"))
    sockets = record.get("sockets")
    if not isinstance(sockets, list) or not all(isinstance(path, str) for path in sockets):
        raise wire.WireError("bad-page", "sockets: must be a list of texts")
    page = SessionPage(
        session_id,
        name,
        wire.SessionId.parse(session_id).start_ticks,
        boot_id,
        realm=wire.text_field(record, "realm") if "realm" in record else "",
        attempt=wire.attempt_field(record),
        status_file=wire.text_field(record, "status_file") if "status_file" in record else None,
        inherited_fd=descriptor,
    )
    return HandedOver(page, sockets, name)


def _find(session_id: str) -> int:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            size = os.fstat(int(name)).st_size
        except OSError:  # the descriptor of the listing itself
            continue
        if target.startswith(f"/memfd:{wire.PAGE_PREFIX}{session_id} ") and size == wire.PAGE_BYTES:
            return int(name)
    return -1


def _read_record(descriptor: int) -> dict[str, Any]:
    header = os.pread(descriptor, wire.HEADER_BYTES, 0)
    return wire.decode(os.pread(descriptor, int.from_bytes(header[-2:], "little"), wire.RECORD_AT))
