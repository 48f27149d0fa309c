"""Text that came from processes and users, made safe for a terminal and cut to its columns.

Pure. ``plain()`` is the only door: a name or command line may hold escape sequences, newlines and bidi controls.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Any, NamedTuple

from reaperd.ctl.units import text_of
from reaperd.words import plain as plain  # noqa: PLC0414 - for those who import it from here

LONGEST_TEXT = 2000  # characters of one field that are looked at at all
_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Look(NamedTuple):
    """What the reader's terminal can show; ``width`` is None where lines may be of any length."""

    width: int | None = None
    colour: bool = False
    unicode: bool = False

    def paint(self, text: str, colour: str) -> str:
        """Return ``text`` in a colour, where there are any. Pad first: escapes take no columns."""
        return f"\033[{_COLOURS[colour]}m{text}\033[0m" if self.colour and text and colour else text

    def choose(self, fancy: str, ascii_only: str) -> str:
        """Return the first where the terminal can show it."""
        return fancy if self.unicode else ascii_only


def columns(text: str) -> int:
    """Return how many columns of a terminal ``text`` (a plain one) takes."""
    return len(text) if text.isascii() else _columns_of_all(text)


@functools.lru_cache(512)  # a screen that is live measures the same bars and branches every second
def _columns_of_all(text: str) -> int:
    return sum(_columns_of(character) for character in text)


def _columns_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def cut(text: str, width: int, look: Look) -> str:
    """Return ``text`` in at most ``width`` columns, with an ellipsis where something was left out."""
    if columns(text) <= width:
        return text
    ellipsis = look.choose("…", "...")[: max(width, 0)]
    return _head(text, width - len(ellipsis)) + ellipsis


def wrapped(text: str, look: Look, first: str = "", rest: str = "") -> list[str]:
    """Return a plain ``text`` in lines as wide as the terminal, the first one after ``first``, the others after ``rest``.

    Nothing is left out: a word that is wider than a line is broken.
    """
    if look.width is None:
        return [first + text]
    room = look.width - max(columns(first), columns(rest))
    lines, line = [], ""
    for word in text.split(" "):
        if line and columns(line) + 1 + columns(word) <= room:
            line += " " + word
            continue
        if line:
            lines.append(line)
        line = word
        while columns(line) > room:
            head = _head(line, room) or line[0]
            lines.append(head)
            line = line[len(head) :]
    first_line, *others = [*lines, line]
    return [first + first_line, *(rest + other for other in others)]


def _head(text: str, width: int) -> str:
    """Return the beginning of ``text`` that takes at most ``width`` columns."""
    for place, character in enumerate(text):
        width -= _columns_of(character)
        if width < 0:
            return text[:place]
    return text


def field(source: Any, key: str) -> str:
    """Return the text under ``key``, safe for a terminal; "" where there is none."""
    return plain(text_of(source, key)[:LONGEST_TEXT])


def command_line(argv: Any) -> str:
    """Return an argv as a person would type it, the program without its directory; "" for one that is not shown."""
    if not isinstance(argv, list) or not argv:
        return ""
    words = [plain(word[:LONGEST_TEXT]) for word in argv[:100] if isinstance(word, str)]
    if words and words[0].startswith("/"):
        words[0] = words[0].rpartition("/")[2] or words[0]
    return " ".join(f"'{word}'" if not word or " " in word else word for word in words)
