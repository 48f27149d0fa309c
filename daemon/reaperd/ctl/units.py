"""Times, sizes and field access: how replies become numbers and numbers become words.

Pure. Replies are JSON that another version of Reaper may have written: a field that is missing or has another type
reads as None, never as an exception.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

from reaperd.times import moment


def number_of(source: Any, key: str) -> float | None:
    """Return the finite number under ``key``, else None (JSON's 1e999 parses as infinity)."""
    value = source.get(key) if isinstance(source, dict) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def text_of(source: Any, key: str) -> str:
    """Return the text under ``key``, else an empty one."""
    value = source.get(key) if isinstance(source, dict) else None
    return value if isinstance(value, str) else ""


def list_of(source: Any, key: str) -> list[Any]:
    """Return the list under ``key``, else an empty one."""
    value = source.get(key) if isinstance(source, dict) else None
    return value if isinstance(value, list) else []


def count_of(source: Any, key: str) -> int:
    """Return the number under ``key``, or how many are listed there; 0 where there is neither."""
    number = number_of(source, key)
    return len(list_of(source, key)) if number is None else int(number)


def plain_number(value: float) -> str:
    """Return 32 for 32.0, and four digits of what is no whole number."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def plural(count: int, word: str) -> str:
    """Return "1 worker" or "2 workers"; ``word`` is the singular."""
    if count == 1:
        return f"1 {word}"
    return f"{count} {word}{'es' if word.endswith('s') else 's'}"


def parse_when(text: str, now: datetime) -> datetime:
    """Return the moment that ``--since`` means; raise ValueError for what is neither a time nor an age.

    A time is a date, or date and time (UTC unless a zone is given). An age is a number with s, min, h, d or w.
    """
    words = text.strip().removesuffix(" ago").strip()
    for unit, length in (("min", 60), ("s", 1), ("m", 60), ("h", 3600), ("d", 86400), ("w", 604800)):
        if words.endswith(unit) and _is_decimal(age := words[: -len(unit)].strip()):
            try:
                return now - timedelta(seconds=float(age) * length)
            except OverflowError:
                raise ValueError("that is before the calendar begins") from None
    found = moment(text.strip())
    if found is None:
        raise ValueError("not a time such as 2026-01-31T12:00:00Z, nor an age such as 10min or 2h")
    return found


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.replace(".", "", 1).isdigit()
