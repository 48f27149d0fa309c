"""What an argument of ``reaperctl`` may be: each function takes its text and returns its value, or says what is allowed.

They raise argparse.ArgumentTypeError, whose text argparse puts behind the name of the argument.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from reaperd.kinds import EVENT_KINDS

if TYPE_CHECKING:
    from datetime import datetime

_LONGEST_S = 1_000_000
_SHORTEST_INTERVAL_S = 0.1
_HIGHEST_PID = 2**31 - 1
_HIGHEST_PORT = 65535
_RESTARTS, _MOST_RESTARTS = 3, 1000  # one less than agent.wire.MAX_ATTEMPTS
_LONGEST_NAME = 200  # agent.wire.MAX_NAME_CHARS, without importing it


def parse_seconds(text: str, instead: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"must be {instead}a number of seconds, more than 0 and at most {_LONGEST_S}, got {text!r:.40}"
        )
    return value


def parse_duration(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else parse_seconds(text, instead="0, for no end, or ")


def parse_interval(text: str) -> float:
    value = parse_seconds(text)
    if value < _SHORTEST_INTERVAL_S:
        raise argparse.ArgumentTypeError(f"must be at least {_SHORTEST_INTERVAL_S} s, got {text!r:.40}")
    return value


def parse_pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 10 and 0 < int(text) <= _HIGHEST_PID):
        raise argparse.ArgumentTypeError(f"must be a pid, a whole number of at least 1, got {text!r:.40}")
    return int(text)


def parse_uid(text: str) -> int:
    import pwd

    if text.isascii() and text.isdigit() and len(text) <= 10:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"must be a user's name or uid, and there is no {text!r:.40}"
        ) from None


def parse_event_kinds(text: str) -> list[str]:
    found = text.split(",")
    for kind in found:
        if kind not in EVENT_KINDS:
            raise argparse.ArgumentTypeError(
                f"there is no kind of event {kind!r:.40}; there are {', '.join(EVENT_KINDS)}"
            )
    return found


def parse_grouping(text: str) -> str:
    if text not in ("framework", "user", "cause"):  # reaperd.ctl.tally.GROUPINGS, without importing it
        raise argparse.ArgumentTypeError(f"must be framework, user or cause, got {text!r:.40}")
    return text


def parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 6 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r:.40}")
    return int(text)


def parse_port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 5 and int(text) <= _HIGHEST_PORT):
        raise argparse.ArgumentTypeError(
            f"must be a port, a whole number of at most {_HIGHEST_PORT}, got {text!r:.40}"
        )
    return int(text)


def parse_restarts(text: str) -> int:
    word, colon, count = text.partition(":")
    if word == "no" and not colon:
        return 0
    if word != "on-failure":
        raise argparse.ArgumentTypeError(f"must be on-failure, on-failure:N or no, got {text!r:.40}")
    found = parse_count(count) if colon else _RESTARTS
    if found > _MOST_RESTARTS:
        raise argparse.ArgumentTypeError(f"must be at most on-failure:{_MOST_RESTARTS}, got {text!r:.40}")
    return found


def parse_name(text: str) -> str:
    if not 0 < len(text) <= _LONGEST_NAME or "\0" in text:
        raise argparse.ArgumentTypeError(f"must have 1 to {_LONGEST_NAME} characters")
    return text


def parse_path(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be a path")
    return text


def parse_some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse_when(text: str) -> datetime:
    from datetime import datetime, timezone

    from reaperd.ctl.units import parse_when

    try:
        return parse_when(text, datetime.now(timezone.utc))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {error}") from None
