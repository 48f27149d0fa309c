"""Times as people and programs are told them: RFC 3339, UTC. Only ``now_utc`` asks a clock."""

from __future__ import annotations

from datetime import datetime, timezone


def moment(text: str) -> datetime | None:
    """Return an RFC 3339 time; None for what is none. One without a zone is UTC, as every time here."""
    try:  # Python 3.10 takes neither "Z" nor other than 3 or 6 digits of a second's fraction
        whole, zone = (text[:-1], "+00:00") if text[-1:] in ("Z", "z") else (text, "")
        if whole[-1:] in ("Z", "z"):
            return None
        head, dot, fraction = whole.partition(".")
        if dot:
            digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
            whole = f"{head}.{digits[:6].ljust(6, '0')}{fraction[len(digits) :]}" if digits else whole
        found = datetime.fromisoformat(whole + zone)
        found = found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found
        found.astimezone(timezone.utc)
    except (ValueError, OverflowError):  # OverflowError: east of Greenwich, the year 1 begins in no year
        return None
    return found


def rfc3339(when: datetime) -> str:
    """Return ``when`` as the wire has it: UTC, milliseconds and a Z."""
    return when.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now_utc() -> str:
    """Return the time as the wire has it."""
    return rfc3339(datetime.now(timezone.utc))
