"""The formats that agent, daemon and control command share: requests and replies, session ids, the session page.

Pure: bytes in, values out. No file, socket or clock is ever touched here, and everything that is
parsed is taken to come from an enemy.
"""

from __future__ import annotations

import binascii
import json
import struct
from typing import Any, NamedTuple

VERSION = 1
MAX_REQUEST_BYTES = 16 * 1024
MAX_NAME_CHARS = 200
MAX_MESSAGE_BYTES = 1000  # of progress, after UTF-8 encoding
MAX_SOCKETS = 8
MAX_LINEAGE = 16
_MAX_INTEGER = 2**63

LINEAGE_VARIABLE = "REAPER_LINEAGE"
SPARED_VARIABLE = "REAPER_SPARED"
PAGE_PREFIX = "reaper:"
SPARED_PREFIX = "reaper-spared:"


class WireError(Exception):
    """A message or page that breaks the format; ``kind`` is a stable kebab-case word, the text is for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# -- requests and replies: one frame of UTF-8 JSON each ------------------------------------------


def encode(message: dict[str, Any]) -> bytes:
    """Return ``message`` as one frame; the version is added here. What is no Unicode (file names) becomes "?"."""
    text = json.dumps({"v": VERSION, **message}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def decode(data: bytes) -> dict[str, Any]:
    """Return the message in one frame; raise WireError ``bad-request`` for anything but one strict JSON object.

    Strict means: UTF-8, no lone surrogates, no duplicate keys, no NaN or Infinity, no integer beyond 64 bits, and
    nesting that the parser can take.
    """
    try:
        message = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError:
        raise WireError("bad-request", "the message is not UTF-8") from None
    except RecursionError:
        raise WireError("bad-request", "the message is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and what the hooks below raise
        raise WireError("bad-request", f"the message is not strict JSON: {error}") from None
    if not isinstance(message, dict):
        raise WireError("bad-request", "the message must be a JSON object")
    if b"\\u" in data and _has_lone_surrogate(message):
        raise WireError("bad-request", "a text has half of a surrogate pair")
    version = message.get("v")
    if type(version) is not int or version != VERSION:
        raise WireError("bad-version", f"v: must be {VERSION}, got {version!r:.40}")
    return message


def _has_lone_surrogate(message: dict[str, Any]) -> bool:
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except RecursionError:  # writing takes less nesting than reading
        raise WireError("bad-request", "the message is nested too deeply") from None
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not allowed")


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= _MAX_INTEGER:
        raise ValueError("an integer needs more than 64 bits")
    return value


def _parse_float(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise ValueError("a number is too large")
    return value


def ok(**fields: Any) -> dict[str, Any]:
    """Return a reply that grants a request."""
    return {"ok": True, **fields}


def refusal(error: WireError) -> dict[str, Any]:
    """Return a reply that refuses a request, with its kind and a sentence."""
    return {"ok": False, "kind": error.kind, "message": str(error)}


def text_field(message: dict[str, Any], key: str, *, limit: int = 4096) -> str:
    """Return the text under ``key``; raise WireError ``bad-request`` when it is missing, empty or too long."""
    value = message.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= limit or "\0" in value:
        raise WireError("bad-request", f"{key}: must be a text of 1 to {limit} characters, got {value!r:.60}")
    return value


def integer_field(message: dict[str, Any], key: str, *, default: int | None = None, least: int = 0) -> int:
    """Return the integer under ``key`` (``default`` where it is absent); raise WireError ``bad-request`` otherwise."""
    value = message.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WireError("bad-request", f"{key}: must be an integer of at least {least}, got {value!r:.60}")
    return value


# -- session ids ----------------------------------------------------------------------------------


class SessionId(NamedTuple):
    """What a session id says: ``<pid>-<start ticks, hex>-<place, 8 hex>-<random, 8 hex>``.

    A process whose environment alone survives (an exec'ed worker of a leader that nobody remembers)
    still names its leader. ``place`` is a checksum of the daemon's socket and of the leader's cgroup and uid: a stamp
    that was carried into another cgroup or to another user, or that is another daemon's, does not match.
    """

    pid: int  # in the leader's own pid namespace
    start_ticks: int
    place: int

    @classmethod
    def parse(cls, text: str) -> SessionId:
        """Return the parts of ``text``; raise WireError ``bad-session`` when it is no session id."""
        parts = text.split("-")
        if len(text) <= 64 and len(parts) == 4 and _is_decimal(parts[0]) and all(map(_is_hex, parts[1:])):
            pid, ticks = int(parts[0]), int(parts[1], 16)
            if 0 < pid < 2**31 and 0 <= ticks < _MAX_INTEGER and len(parts[2]) == len(parts[3]) == 8:
                return cls(pid, ticks, int(parts[2], 16))
        raise WireError("bad-session", f"not a session id: {text!r:.80}")


def format_session_id(pid: int, start_ticks: int, place: int, nonce: int) -> str:
    """Return the id of a new session; ``nonce`` is 32 random bits, for a process may register twice in a tick."""
    return f"{pid}-{start_ticks:x}-{place:08x}-{nonce:08x}"


def place_of(socket: str, cgroup: str, uid: int) -> int:
    """Return the checksum (CRC-32: no secret, no trust) of a daemon's socket path and a leader's cgroup path and uid."""
    return binascii.crc32(f"{socket}\0{cgroup}\0{uid}".encode("utf-8", "surrogateescape"))


def parse_lineage(text: str) -> tuple[str, ...]:
    """Return the session ids in an environment stamp, outermost first; words that are no id are left out.

    Of more than ``MAX_LINEAGE`` the innermost count: nobody nests so deep, and each costs the daemon work.
    """
    return tuple(word for word in text.split(":")[-MAX_LINEAGE:] if _is_session_id(word))


def _is_session_id(text: str) -> bool:
    try:
        SessionId.parse(text)
    except WireError:
        return False
    return True


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdigit() and text[0] != "0"


def _is_hex(text: str) -> bool:
    return bool(text) and all(character in "0123456789abcdef" for character in text)


# -- the session page -----------------------------------------------------------------------------
#
#      0  8s   magic
#      8  u32  sequence: odd while the leader writes, then one higher
#     12  u32  flags
#     16  u16  length of the record
#     64  the record: strict JSON, who the leader is and which daemon it spoke to
#   2048  f64  progress: done, then f64 total (NaN: unknown), then u16 length of the message
#   2080  the message: UTF-8
#   3200  u16   how many processes the leader started under spared(), then for each
#   3202  u32   its pid, u64 its start ticks

PAGE_BYTES = 4096
_MAGIC = b"reaper\x00\x01"
_SEQUENCE_AT = 8
_HEADER = struct.Struct("<8sIIH")
HEADER_BYTES = _HEADER.size
RECORD_AT, PROGRESS_AT, _MESSAGE_AT, SPARED_AT = 64, 2048, 2080, 3200
_PROGRESS = struct.Struct("<ddH")
_SPARED_ONE = struct.Struct("<IQ")
MAX_SPARED = 64

CLOSING = 1  # the leader's interpreter is exiting in good order
ENDED = 2  # the leader called unregister() and no daemon took note


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


class TornPage(WireError):
    """The page was read in the middle of a write: read it again."""

    def __init__(self) -> None:
        super().__init__("bad-page", "the session page was being written and never held still")


def pack_record(
    session: str, name: str, start_ticks: int, boot_id: str, page_fd: int, sockets: list[str]
) -> bytes:
    """Return the record of a page; raise WireError when it would not fit."""
    record = {
        "id": session,
        "name": name,
        "start_ticks": start_ticks,
        "boot_id": boot_id,
        "fd": page_fd,
        "sockets": sockets[:MAX_SOCKETS],
    }
    data = encode(record)
    if len(data) > PROGRESS_AT - RECORD_AT:
        raise WireError("bad-request", "the session's name and socket paths are too long for its page")
    return data


def pack_header(sequence: int, flags: int, record_bytes: int) -> bytes:
    """Return the first bytes of a page."""
    return _HEADER.pack(_MAGIC, sequence, flags, record_bytes)


def pack_progress(done: float, total: float | None, message: str) -> bytes:
    """Return the progress block; a message too long for it is cut at a character."""
    text = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    return (
        _PROGRESS.pack(done, float("nan") if total is None else total, len(text)).ljust(
            _MESSAGE_AT - PROGRESS_AT, b"\0"
        )
        + text
    )


def pack_spared(processes: list[tuple[int, int]]) -> bytes:
    """Return the block that names the processes started under ``spared()``: the last ``MAX_SPARED`` of them."""
    last = processes[-MAX_SPARED:]
    return len(last).to_bytes(2, "little") + b"".join(_SPARED_ONE.pack(pid, ticks) for pid, ticks in last)


SEQUENCE_SLICE = slice(_SEQUENCE_AT, _SEQUENCE_AT + 4)


def page_sequence(data: bytes) -> int:
    """Return the sequence number of a page: two equal even ones around a read mean that it is whole."""
    return int.from_bytes(data[SEQUENCE_SLICE], "little")


def parse_page(data: bytes, *, torn: bool = False) -> Page:
    """Return what a page says; raise TornPage in the middle of a write, WireError ``bad-page`` for a broken one.

    ``torn`` takes it as it is: its writer was killed in the middle, and will never end the write.
    """
    if len(data) != PAGE_BYTES:
        raise WireError("bad-page", f"the page has {len(data)} bytes instead of {PAGE_BYTES}")
    magic, sequence, flags, record_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise WireError("bad-page", "the page does not begin as a session page does")
    if sequence % 2 and not torn:
        raise TornPage
    if record_bytes > PROGRESS_AT - RECORD_AT:
        raise WireError("bad-page", "the record is longer than its place")
    record = decode(data[RECORD_AT : RECORD_AT + record_bytes])
    session = text_field(record, "id", limit=64)
    sockets = record.get("sockets")
    if (
        not isinstance(sockets, list)
        or len(sockets) > MAX_SOCKETS
        or not all(isinstance(s, str) for s in sockets)
    ):
        raise WireError("bad-page", "sockets: must be a short list of texts")
    name = record.get("name")
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
        raise WireError("bad-page", "name: must be a short text")
    return Page(
        id=session,
        name=name,
        pid=SessionId.parse(session).pid,
        start_ticks=integer_field(record, "start_ticks"),
        boot_id=text_field(record, "boot_id", limit=64),
        page_fd=integer_field(record, "fd"),
        sockets=tuple(sockets),
        flags=flags,
        progress=_parse_progress(data),
        spared=_parse_spared(data),
    )


def _parse_spared(data: bytes) -> tuple[tuple[int, int], ...]:
    count = min(int.from_bytes(data[SPARED_AT : SPARED_AT + 2], "little"), MAX_SPARED)
    end = SPARED_AT + 2 + count * _SPARED_ONE.size
    return tuple((pid, ticks) for pid, ticks in _SPARED_ONE.iter_unpack(data[SPARED_AT + 2 : end]))


def _parse_progress(data: bytes) -> Progress | None:
    done, total, length = _PROGRESS.unpack_from(data, PROGRESS_AT)
    # Never written: all zero. NaN and infinity are no progress either; only `total` may be unknown.
    if (done == 0 and total == 0 and length == 0) or done - done != 0 or length > MAX_MESSAGE_BYTES:
        return None
    message = data[_MESSAGE_AT : _MESSAGE_AT + length].decode("utf-8", "ignore")
    return Progress(done, None if total - total != 0 else total, message)


# -- the leader's cgroup --------------------------------------------------------------------------


def parse_cgroup(text: str) -> str:
    """Return the path that tells sessions apart in the text of ``/proc/PID/cgroup`` (cgroups(7)).

    That is the unified hierarchy's, else, where everything sits in its root, that of ``name=systemd``.
    "/" tells nothing.
    """
    unified = named = "/"
    for line in text.split("\n"):  # splitlines() would split at a form feed in a name
        _, colon, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if colon and controllers == "":
            unified = path
        elif controllers == "name=systemd":
            named = path
    return unified if unified != "/" else named
