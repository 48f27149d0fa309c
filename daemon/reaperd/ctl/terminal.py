"""The terminal: what it can show, and the one way out for text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from reaperd.ctl.text import Look, plain

_BOX = "├─└█░…"
_LEAST_WIDTH = 40


def look_of_stdout() -> Look:
    """Return what standard output can show; into a pipe or a file lines are whole and without colours."""
    stream = sys.stdout
    tty = stream is not None and stream.isatty()
    return Look(
        width=_width() if tty else _columns_variable(),
        colour=tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
        unicode=_can_encode(getattr(stream, "encoding", None) or "ascii"),
    )


def _width() -> int:
    asked = _columns_variable()
    if asked:
        return asked
    try:
        found = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        found = 0
    return max(found, _LEAST_WIDTH) if found else 80  # 0: a terminal that never learned its size


def _columns_variable() -> int | None:
    text = os.environ.get("COLUMNS", "")
    return max(int(text), _LEAST_WIDTH) if text.isascii() and text.isdigit() and 0 < len(text) < 6 else None


def _can_encode(encoding: str) -> bool:
    try:
        _BOX.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def put(lines: str | Iterable[str]) -> None:
    """Print lines that were rendered; a character that the encoding lacks is written out instead of raising."""
    for line in [lines] if isinstance(lines, str) else lines:
        print(line)


def put_json(document: Any) -> None:
    """Print one document. ASCII only: JSON's own escapes keep control and bidi characters off the terminal."""
    put(json.dumps(document, indent=2))


def put_now(line: str) -> None:
    """Print one line that someone is waiting for, also at the other end of a pipe."""
    print(line, flush=True)


def tell(text: str) -> None:
    """Print one sentence on standard error, safe for a terminal whatever is in it."""
    if sys.stderr is not None:  # closed; print() would take stdout instead
        print(f"reaperctl: {plain(text)}", file=sys.stderr, flush=True)
