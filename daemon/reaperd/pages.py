"""What a session page says: the reading half of the format that ``agent.wire`` writes. Pure.

A page belongs to a stranger, who can write it at any time: everything that is parsed is taken to come from an enemy.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from agent import wire
from agent.wire import SessionId, WireError

_HEADER = struct.Struct("<8sIIH")
_PROGRESS = struct.Struct(wire.PROGRESS_FORMAT)
_SPARED_ONE = struct.Struct("<IQ")


class Progress(NamedTuple):
    """How far a session says it is; ``total`` is None where it is not known."""

    done: float
    total: float | None
    message: str


class Page(NamedTuple):
    """What a session page says. Its holders can write it: nothing here is true because it stands here."""

    id: str
    name: str
    pid: int  # in the leader's own pid namespace
    start_ticks: int  # in the leader's own time namespace
    boot_id: str
    page_fd: int
    sockets: tuple[str, ...]  # the daemon that accepted the session, else all that were tried
    flags: int
    progress: Progress | None
    spared: tuple[tuple[int, int], ...]  # (pid, start ticks) of what was started under spared()
    status_file: str = ""  # that is to say how the leader ended
    # Seconds and percent of a core from which on workers without a pool are to be reported.
    stray: tuple[float, float] | None = None
    attempt: tuple[int, int] | None = None  # which of how many, under `reaperctl run`
    realm: str = ""  # in which its pids and start times mean what they say (``wire.realm_of()``)


class TornPage(WireError):
    """The page was read in the middle of a write: read it again."""

    def __init__(self) -> None:
        super().__init__("bad-page", "the session page was being written and never held still")


def page_sequence(data: bytes) -> int:
    """Return the sequence number of a page: two equal even ones around a read mean that it is whole."""
    return int.from_bytes(data[wire.SEQUENCE_SLICE], "little")


def parse_page(data: bytes, *, torn: bool = False) -> Page:
    """Return what a page says; raise TornPage in the middle of a write, WireError ``bad-page`` for a broken one.

    ``torn`` takes it as it is: its writer was killed in the middle, and will never end the write.
    """
    if len(data) != wire.PAGE_BYTES:
        raise WireError("bad-page", f"the page has {len(data)} bytes instead of {wire.PAGE_BYTES}")
    magic, sequence, flags, record_bytes = _HEADER.unpack_from(data)
    if magic != wire.MAGIC:
        raise WireError("bad-page", "the page does not begin as a session page does")
    if sequence % 2 and not torn:
        raise TornPage
    if record_bytes > wire.PROGRESS_AT - wire.RECORD_AT:
        raise WireError("bad-page", "the record is longer than its place")
    record = wire.decode(data[wire.RECORD_AT : wire.RECORD_AT + record_bytes])
    session = wire.text_field(record, "id", limit=64)
    sockets = record.get("sockets")
    if (
        not isinstance(sockets, list)
        or len(sockets) > wire.MAX_SOCKETS
        or not all(isinstance(s, str) for s in sockets)
    ):
        raise WireError("bad-page", "sockets: must be a short list of texts")
    name = record.get("name")
    if not isinstance(name, str) or len(name) > wire.MAX_NAME_CHARS:
        raise WireError("bad-page", "name: must be a short text")
    return Page(
        id=session,
        name=name,
        pid=SessionId.parse(session).pid,
        start_ticks=wire.integer_field(record, "start_ticks"),
        boot_id=wire.text_field(record, "boot_id", limit=64),
        page_fd=wire.integer_field(record, "fd"),
        sockets=tuple(sockets),
        flags=flags,
        progress=_parse_progress(data),
        spared=_parse_spared(data),
        status_file=_parse_path(record.get("status_file")),
        stray=_parse_thresholds(record.get("stray")),
        attempt=wire.attempt_field(record),
        realm=_parse_realm(record.get("realm")),
    )


def _parse_path(told: object) -> str:
    """Return an absolute path, "" for anything else: what only concerns its own writer must not make a page a broken one."""
    return told if isinstance(told, str) and told.startswith("/") and "\0" not in told else ""


def _parse_realm(told: object) -> str:
    """Return a realm, "" where none is told, and for anything else what is nobody's."""
    return "" if told is None else told if isinstance(told, str) and told else "?"


def _parse_thresholds(told: object) -> tuple[float, float] | None:
    """Return two numbers, None for anything else."""
    if not isinstance(told, list) or len(told) != 2 or not all(type(one) in (int, float) for one in told):
        return None
    return float(told[0]), float(told[1])


def _parse_spared(data: bytes) -> tuple[tuple[int, int], ...]:
    count = min(int.from_bytes(data[wire.SPARED_AT : wire.SPARED_AT + 2], "little"), wire.MAX_SPARED)
    end = wire.SPARED_AT + 2 + count * _SPARED_ONE.size
    return tuple((pid, ticks) for pid, ticks in _SPARED_ONE.iter_unpack(data[wire.SPARED_AT + 2 : end]))


def _parse_progress(data: bytes) -> Progress | None:
    done, total, length = _PROGRESS.unpack_from(data, wire.PROGRESS_AT)
    # Never written: all zero. NaN and infinity are no progress either; only `total` may be unknown.
    if (done == 0 and total == 0 and length == 0) or done - done != 0 or length > wire.MAX_MESSAGE_BYTES:
        return None
    message = data[wire.MESSAGE_AT : wire.MESSAGE_AT + length].decode("utf-8", "ignore")
    return Progress(done, None if total - total != 0 else total, message)
