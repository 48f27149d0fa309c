"""A session that outlives execve(2): its page's descriptor is inherited, and the program that is run maps the page anew."""

from __future__ import annotations

import os
from typing import Any

from agent import wire
from agent.page import SessionPage


def take_over(session_id: str) -> tuple[SessionPage | None, list[str], str]:
    """Return the page of a session that this process led before it exec'ed, the sockets in it, and the session's name.

    None where there is no such page. OSError, WireError.
    """
    descriptor = _find(session_id)
    if descriptor < 0:
        return None, [], ""
    record = _read_record(descriptor)
    name, boot_id = (wire.text_field(record, key) for key in ("name", "boot_id"))
    page = SessionPage(
        session_id,
        name,
        wire.SessionId.parse(session_id).start_ticks,
        boot_id,
        attempt=wire.attempt_field(record),
        inherited_fd=descriptor,
    )
    return page, [path for path in record["sockets"] if isinstance(path, str)], name


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
