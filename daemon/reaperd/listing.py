"""What ``ps`` and ``status`` tell of the sessions: looked at, and written down, only as often as that is cheap.

Anybody may ask as often as he likes, and looking costs what all sessions cost. So what was made for one answer serves the
next ones: each session's record is kept as text until the session changes, or there has been another look.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from reaperd import pages, report
from reaperd.census import Interrupted
from reaperd.core import Core
from reaperd.ledger import Entry
from reaperd.model import Family, ProcessId, Session, SessionKey

_FRESH_S = 0.1
_SHARE = 10  # what took long is not repeated before ten times as long has passed


class Pace:
    """Says when something may be done again."""

    def __init__(self) -> None:
        self._due_s = 0.0

    def is_due(self) -> bool:
        """Say whether the last time is long enough ago."""
        return time.monotonic() >= self._due_s

    def note(self, began_s: float) -> None:
        """Note that it has just been done, after it began at ``began_s``."""
        now_s = time.monotonic()
        self._due_s = now_s + max(_FRESH_S, _SHARE * (now_s - began_s))


class _Told:
    """A session's record as text, made of ``entry`` and ``progress``; the second for who may see the command line."""

    __slots__ = ("entry", "private", "progress", "public")

    def __init__(self, entry: Entry, progress: pages.Progress | None) -> None:
        self.entry, self.progress = entry, progress
        self.public: bytes | None = None
        self.private: bytes | None = None


class Listing:
    """The sessions as they were when last looked at."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._families: dict[SessionKey, Family] = {}
        self._told: dict[SessionKey, _Told] = {}
        self._cmdlines: dict[ProcessId, list[str] | None] = {}  # None: it cannot be read
        self._progress: dict[SessionKey, pages.Progress | None] = {}
        self._look_pace, self._page_pace = Pace(), Pace()

    def families(self) -> Mapping[SessionKey, Family]:
        """Return who belongs to the sessions whose leaders live."""
        if self._look_pace.is_due():
            began_s = time.monotonic()
            with contextlib.suppress(Interrupted):  # then what was seen last must do
                self._families = self._core.living.look()
                self._told, self._cmdlines = {}, {}
                self._look_pace.note(began_s)
        return {key: family for key, family in self._families.items() if key in self._core.sessions.entries}

    def sessions(self, may_see: Callable[[Session], bool]) -> bytes:
        """Return what ``ps`` says, as the text of a JSON list; ``may_see`` says whose command lines are shown."""
        self.families()
        self._read_pages()
        entries = self._core.sessions.entries.values()
        shown = {entry.session.key for entry in entries if may_see(entry.session)}
        unread = [
            entry.session.leader
            for entry in entries
            if entry.session.key in shown and entry.session.leader not in self._cmdlines
        ]
        if unread:
            found = self._core.observer.cmdlines(unread)
            self._cmdlines.update({id_: found.get(id_.pid) for id_ in unread})
        records = [self._record(entry, with_cmdline=entry.session.key in shown) for entry in entries]
        for key in self._told.keys() - self._core.sessions.entries.keys():
            del self._told[key]
        return b"[" + b",".join(records) + b"]"

    def _read_pages(self) -> None:
        began_s = time.monotonic()
        if afresh := self._page_pace.is_due():
            self._progress = {}
        for key in self._core.sessions.entries.keys() - self._progress.keys():
            page = self._core.leaders.page_of(key)
            self._progress[key] = page.progress if page else None
        if afresh:
            self._page_pace.note(began_s)

    def _record(self, entry: Entry, *, with_cmdline: bool) -> bytes:
        key = entry.session.key
        progress = self._progress.get(key)
        told = self._told.get(key)
        # An entry is never changed, only replaced.
        if told is None or told.entry is not entry or told.progress != progress:
            told = self._told[key] = _Told(entry, progress)
        if with_cmdline:
            if told.private is None:
                told.private = self._write(entry, progress, self._cmdlines.get(entry.session.leader))
            return told.private
        if told.public is None:
            told.public = self._write(entry, progress, None)
        return told.public

    def _write(self, entry: Entry, progress: pages.Progress | None, cmdline: list[str] | None) -> bytes:
        if entry.died_at_s is None:
            family = self._families.get(entry.session.key)
            members = family.members if family is not None else {}
        else:
            members = {id_: t.member for id_, t in entry.targets.items() if t.gone_at_s is None}
        usage = {id_: self._core.observer.usage.of(member.process) for id_, member in members.items()}
        if entry.died_at_s is None and (leader := self._core.observer.usage_of(entry.session.leader)):
            usage[entry.session.leader] = leader
        return encode_part(
            report.session_record(entry, members, usage, leader_cmdline=cmdline, progress=progress)
        )


def encode_part(value: Any) -> bytes:
    """Return the text of a part of a reply, written like the whole (``wire.encode``)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")
