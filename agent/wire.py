"""The formats that agent, daemon and control command share: requests and replies, session ids, the session page.

Pure: bytes in, values out. No file, socket or clock is ever touched here, and everything that is
parsed is taken to come from an enemy. How a page is read stands in the daemon's ``reaperd.pages``: nobody else does.

Training scripts load this when they register, and wait for it: json, struct or typing, with all that they import, would
take longer than the rest of ``register()``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VERSION = 1
MAX_REQUEST_BYTES = 16 * 1024
MAX_NAME_CHARS = 200
MAX_MESSAGE_BYTES = 1000  # of progress, after UTF-8 encoding
MAX_SOCKETS = 8
MAX_LINEAGE = 16
MAX_ATTEMPTS = 1001
_MAX_INTEGER = 2**63

LINEAGE_VARIABLE = "REAPER_LINEAGE"
SPARED_VARIABLE = "REAPER_SPARED"
TEMP_VARIABLES = ("JOBLIB_TEMP_FOLDER", "TMPDIR")  # where joblib puts memory-mapped arrays, /dev/shm apart
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
    return _write_json({"v": VERSION, **message}).encode("utf-8", "replace")


def decode(data: bytes) -> dict[str, Any]:
    """Return the message in one frame; raise WireError ``bad-request`` for anything but one strict JSON object.

    Strict means: UTF-8, no lone surrogates, no duplicate keys, no NaN or Infinity, no integer beyond 64 bits, and
    nesting that the parser can take.
    """
    try:
        message = _parse_json(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise WireError("bad-request", "the message is not UTF-8") from None
    except RecursionError:
        raise WireError("bad-request", "the message is nested too deeply") from None
    except ValueError as error:  # what the scanner raises, and the hooks below
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
        _write_json(message).encode()
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


class _Strict:
    """How the scanner reads: json.JSONDecoder has these attributes, too."""

    strict = True
    object_hook = array_hook = None
    object_pairs_hook = _unique
    parse_constant = _refuse_constant
    parse_int = _parse_int
    parse_float = _parse_float


def _refuse_object(value: object) -> Any:
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


_BLANKS = " \t\n\r"


def _json_halves() -> tuple[Callable[[object], str], Callable[[str, int], tuple[Any, int]]]:
    """Return what writes and what reads a value: what json is made of, where this Python has that in the known shape.

    json itself compiles patterns to find the blanks between two words, which takes longer than all else in ``register()``.
    """
    try:
        from _json import encode_basestring, make_encoder, make_scanner

        def write(value: object) -> str:
            # As json.JSONEncoder does, and one each time: the first argument is what it is in the middle of.
            encoder = make_encoder({}, _refuse_object, encode_basestring, None, ":", ",", False, False, False)
            return "".join(encoder(value, 0))

        scan: Callable[[str, int], tuple[Any, int]] = make_scanner(_Strict)  # type: ignore[arg-type]
        if write({"a": [1, None]}) == '{"a":[1,null]}' and scan('{"a": [1]}', 0) == ({"a": [1]}, 10):
            return write, scan
    except (ImportError, AttributeError, TypeError, ValueError):  # they are private, and may change
        pass
    return _json_itself()


def _json_itself() -> tuple[Callable[[object], str], Callable[[str, int], tuple[Any, int]]]:
    import json

    def write(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    hooks = _Strict
    decoder = json.JSONDecoder(
        object_pairs_hook=hooks.object_pairs_hook,
        parse_constant=hooks.parse_constant,
        parse_int=hooks.parse_int,
        parse_float=hooks.parse_float,
    )
    return write, decoder.scan_once  # type: ignore[attr-defined]


_write_json, _scan = _json_halves()


def _parse_json(text: str) -> Any:
    """Return the one value in ``text``; ValueError, RecursionError."""
    text = text.strip(_BLANKS)
    try:
        value, end = _scan(text, 0)
    except StopIteration as stop:
        raise ValueError(f"a value is missing at character {stop.value}") from None
    if end != len(text):
        raise ValueError(f"there is more than one value: the first ends at character {end}")
    return value


def ok(**fields: Any) -> dict[str, Any]:
    """Return a reply that grants a request."""
    return {"ok": True, **fields}


def refusal(error: WireError) -> dict[str, Any]:
    """Return a reply that refuses a request, with its kind and a sentence."""
    return {"ok": False, "kind": error.kind, "message": str(error)}


def attempt_field(message: dict[str, Any]) -> tuple[int, int] | None:
    """Return the ``attempt``, (which, of how many at most), that a run with restarts tells; WireError ``bad-request``."""
    value = message.get("attempt")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(number) is int for number in value):
        raise WireError("bad-request", f"attempt: must be a list of two whole numbers, got {value!r:.60}")
    number, most = value
    if not 1 <= number <= most <= MAX_ATTEMPTS:
        raise WireError(
            "bad-request", f"attempt: must be 1 to {MAX_ATTEMPTS} of at least as many, got {value!r:.60}"
        )
    return number, most


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


class SessionId(tuple[int, int, int]):
    """What a session id says: ``<pid>-<start ticks, hex>-<place, 8 hex>-<random, 8 hex>``.

    A process whose environment alone survives (an exec'ed worker of a leader that nobody remembers)
    still names its leader. ``place`` is a checksum of the daemon's socket and of the leader's cgroup and uid: a stamp
    that was carried into another cgroup or to another user, or that is another daemon's, does not match.
    """

    __slots__ = ()

    @property
    def pid(self) -> int:
        """In the leader's own pid namespace."""
        return self[0]

    @property
    def start_ticks(self) -> int:
        """In the leader's own time namespace."""
        return self[1]

    @property
    def place(self) -> int:
        """What ``place_of()`` returned."""
        return self[2]

    @classmethod
    def parse(cls, text: str) -> SessionId:
        """Return the parts of ``text``; raise WireError ``bad-session`` when it is no session id."""
        parts = text.split("-")
        if len(text) <= 64 and len(parts) == 4 and _is_decimal(parts[0]) and all(map(_is_hex, parts[1:])):
            pid, ticks = int(parts[0]), int(parts[1], 16)
            if 0 < pid < 2**31 and 0 <= ticks < _MAX_INTEGER and len(parts[2]) == len(parts[3]) == 8:
                return cls((pid, ticks, int(parts[2], 16)))
        raise WireError("bad-session", f"not a session id: {text!r:.80}")


# linux/proc_ns.h: PROC_PID_INIT_INO, PROC_TIME_INIT_INO.
PID_NAMESPACE_OF_MACHINE, TIME_NAMESPACE_OF_MACHINE = 0xEFFFFFFC, 0xEFFFFFFA


def format_session_id(pid: int, start_ticks: int, place: int, nonce: int) -> str:
    """Return the id of a new session; ``nonce`` is 32 random bits, for a process may register twice in a tick."""
    return f"{pid}-{start_ticks:x}-{place:08x}-{nonce:08x}"


def place_of(socket: str, cgroup: str, uid: int, realm: str = "") -> int:
    """Return the checksum (CRC-32: no secret, no trust) of a daemon's socket path and a leader's cgroup path, uid and realm."""
    words = (socket, cgroup, str(uid), *([realm] if realm else []))
    return crc32("\0".join(words).encode("utf-8", "surrogateescape"))


def realm_of(pid_namespace: int, time_namespace: int) -> str:
    """Return in which namespaces, given by their inodes, a pid and a start time mean what they say; "" for the machine's own.

    0 stands for a time namespace on a kernel that has none. A realm that could not be told is nobody's.
    """
    machines_own = (PID_NAMESPACE_OF_MACHINE, TIME_NAMESPACE_OF_MACHINE)
    found = (pid_namespace, time_namespace or TIME_NAMESPACE_OF_MACHINE)
    return "" if found == machines_own else f"{found[0]}:{found[1]}"


# Of four bits each. binascii has the same, but to load it takes longer than to do without.
_CRC_TABLE = (
    *(0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158, 0x5005713C),
    *(0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C),
)


def crc32(data: bytes) -> int:
    """Return the CRC-32 of some bytes, as zlib has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        crc = crc >> 4 ^ _CRC_TABLE[crc & 15]
        crc = crc >> 4 ^ _CRC_TABLE[crc & 15]
    return crc ^ 0xFFFFFFFF


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
MAGIC = b"reaper\x00\x01"
SEQUENCE_SLICE = slice(8, 12)
HEADER_BYTES = 18
RECORD_AT, PROGRESS_AT, MESSAGE_AT, SPARED_AT = 64, 2048, 2080, 3200
PROGRESS_FORMAT = "<ddH"  # of struct
MAX_SPARED = 64

CLOSING = 1  # the leader's interpreter is exiting in good order
ENDED = 2  # the leader called unregister(): a daemon that starts later learns it from here


def pack_record(
    session: str,
    name: str,
    start_ticks: int,
    boot_id: str,
    page_fd: int,
    sockets: list[str],
    **optional: object,
) -> bytes:
    """Return the record of a page; raise WireError when it would not fit.

    ``optional`` are ``status_file`` (a path), ``attempt`` (which, and the most there can be), ``stray`` (seconds, percent of
    a core) and ``realm`` (``realm_of()``); those that say nothing are left out.
    """
    record = {
        "id": session,
        "name": name,
        "start_ticks": start_ticks,
        "boot_id": boot_id,
        "fd": page_fd,
        "sockets": sockets[:MAX_SOCKETS],
        **{key: value for key, value in optional.items() if value},
    }
    data = encode(record)
    if len(data) > PROGRESS_AT - RECORD_AT:
        raise WireError("bad-request", "the session's name and socket paths are too long for its page")
    return data


def pack_header(sequence: int, flags: int, record_bytes: int) -> bytes:
    """Return the first bytes of a page."""
    numbers = (
        sequence.to_bytes(4, "little") + flags.to_bytes(4, "little") + record_bytes.to_bytes(2, "little")
    )
    return MAGIC + numbers


def pack_progress(done: float, total: float | None, message: str) -> bytes:
    """Return the progress block; a message too long for it is cut at a character. TypeError, OverflowError."""
    from struct import error, pack  # most sessions never tell

    text = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    try:
        numbers = pack(PROGRESS_FORMAT, done, float("nan") if total is None else total, len(text))
    except error as reason:
        raise TypeError(str(reason)) from None
    return numbers.ljust(MESSAGE_AT - PROGRESS_AT, b"\0") + text


def pack_spared(processes: list[tuple[int, int]]) -> bytes:
    """Return the block that names the processes started under ``spared()``: the last ``MAX_SPARED`` of them."""
    last = processes[-MAX_SPARED:]
    block = len(last).to_bytes(2, "little")
    for pid, ticks in last:
        block += pid.to_bytes(4, "little") + ticks.to_bytes(8, "little")
    return block


# -- the leader's cgroup --------------------------------------------------------------------------


def parse_cgroup(text: str) -> str:
    """Return the path that tells sessions apart in the text of ``/proc/PID/cgroup`` (cgroups(7)).

    That is the unified hierarchy's, else, where everything sits in its root, that of ``name=systemd``.
    "/" tells nothing.
    """
    unified = named = "/"
    for line in text.split("\n"):  # splitlines() would split at a form feed in a name
        controllers, colon, path = line.partition(":")[2].partition(":")
        if colon and controllers == "":
            unified = path
        elif colon and controllers == "name=systemd":
            named = path
    return unified if unified != "/" else named
