"""Second ways to what the parsers return: slower and plainer, written from the formats' descriptions alone."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_NESTING = 100  # beyond which it is the interpreter's stack that decides


def strict_message(data: bytes) -> dict[str, Any] | None:
    """Return the message in a frame, None where docs/protocol.md would have it refused."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not _is_strict(value):
        return None
    version = value.get("v")
    return value if version == 1 and type(version) is int else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def _no_constant(word: str) -> Any:
    raise ValueError(word)


def _is_strict(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_strict, value)) and all(map(_is_strict, value.values()))
    if isinstance(value, list):
        return all(map(_is_strict, value))
    if isinstance(value, str):
        return not re.search("[\ud800-\udfff]", value)
    if isinstance(value, float):
        return value not in (float("inf"), float("-inf"))
    return not isinstance(value, int) or -(2**63) < value < 2**63


def is_nested_deeply(data: bytes) -> bool:
    """Say whether reading may come to the end of the stack."""
    return data.count(b"[") + data.count(b"{") > MAX_NESTING


_SESSION_ID = re.compile(r"([1-9][0-9]*)-([0-9a-f]+)-([0-9a-f]{8})-([0-9a-f]{8})")


def session_id(text: str) -> tuple[int, int, int] | None:
    """Return pid, start ticks and place of a session id, None for what is none."""
    match = _SESSION_ID.fullmatch(text)
    if match is None or len(text) > 64:
        return None
    pid, ticks, place = int(match[1]), int(match[2], 16), int(match[3], 16)
    return (pid, ticks, place) if pid < 2**31 and ticks < 2**63 else None


def cgroup_paths(text: str) -> dict[str, str]:
    """Return path by controllers ("" is v2) in the text of /proc/PID/cgroup; of two lines for the same the last (cgroups(7))."""
    pattern = re.compile(r"^[^:\n]*:([^:\n]*):([^\n]*)$", re.MULTILINE)
    return {match[1]: match[2] for match in pattern.finditer(text)}


_STAT = re.compile(rb"(?s)(.*?) \((.*)\) (.*)")


def stat_fields(line: bytes) -> tuple[int, bytes, list[bytes]] | None:
    """Return pid, name and what follows in the text of /proc/PID/stat (proc_pid_stat(5))."""
    match = _STAT.fullmatch(line)
    return None if match is None else (int(match[1]), match[2], match[3].split())


def environment(environ: bytes, variable: str) -> str:
    """Return the first value of ``variable`` in the text of /proc/PID/environ."""
    for entry in environ.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if equals and name == variable.encode():
            return value.decode("utf-8", "surrogateescape")
    return ""


def peer_address(text: str, overflow_uid: int) -> tuple[int, int, int] | None:
    """Return uid, gid and pid of ``<host>:<uid>:<gid>:<pid>``, None where it must be refused."""
    words = text.split(":")
    if len(words) != 4 or not all(0 < len(w) <= 10 and set(w) <= set("0123456789") for w in words[1:]):
        return None
    uid, gid, pid = map(int, words[1:])
    return None if pid == 0 or uid == overflow_uid or max(uid, gid, pid) > 0xFFFFFFFF else (uid, gid, pid)


def zmtp_message(data: bytes) -> bytes | None:
    """Return the last frame of the first message that a ROUTER sent, None where it sent none (ZMTP 3.0, NULL)."""
    if len(data) < 64 or data[0] != 0xFF or data[9] != 0x7F or data[10] < 3:
        return None
    at, shaken = 64, False
    while at < len(data):
        flags = data[at]
        length = 8 if flags & 2 else 1
        size = int.from_bytes(data[at + 1 : at + 1 + length], "big")
        body = data[at + 1 + length : at + 1 + length + size]
        if len(data) < at + 1 + length + size or size > 64 * 1024 * 1024:
            return None
        at += 1 + length + size
        if not shaken:
            if not flags & 4 or not body.startswith(b"\x05READY"):
                return None
            shaken = True
        elif not flags & 5:
            return body
    return None


def kernel_escaped(text: str, characters: str) -> str:
    r"""Return ``text`` as the kernel writes a path: some characters in octal (seq_escape_str(), mangle_path())."""
    return "".join(f"\\{ord(c):03o}" if c in characters else c for c in text)
