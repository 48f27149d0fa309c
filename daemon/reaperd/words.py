"""Figures as people read them, and text of others made safe to show. Pure."""

from __future__ import annotations

_SIZES = ("KiB", "MiB", "GiB", "TiB", "PiB")


def size(value_bytes: float | None) -> str:
    """Return "1.2 GiB"; "-" for what is not known."""
    if value_bytes is None or value_bytes < 0:
        return "-"
    if value_bytes < 1024:
        return f"{int(value_bytes)} B"
    value = float(value_bytes)
    for unit in _SIZES:
        value /= 1024
        if value < 1023.95 or unit == _SIZES[-1]:
            break
    return f"{value:.1f} {unit}"


def duration(value_s: float | None) -> str:
    """Return "0.8 ms", "2.4 s" or "3 h 5 min": two units at most; "-" for what is not known."""
    if value_s is None or value_s < 0:
        return "-"
    if value_s < 0.9995:
        return f"{value_s * 1000:.1f} ms" if value_s < 0.00995 else f"{value_s * 1000:.0f} ms"
    if value_s < 9.95:
        return f"{value_s:.1f} s"
    left = round(value_s)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or parts:
            parts.append(f"{left // length} {unit}")
            left %= length
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 "))


def plain(text: str) -> str:
    """Return ``text`` with all that could move a cursor, colour, hide, reorder or break a line written out.

    That is whatever Unicode calls control, format (bidi controls among them), surrogate, private, unassigned,
    or a separator other than the space: ``str.isprintable``.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _written_out(c) for c in text)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8, as os.fsdecode() carries it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
