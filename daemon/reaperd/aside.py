"""Sessions and processes that something unforeseen was raised for: they are set aside for a while, and all others go on.

What one of them has us read, decide or do must never end the daemon, least of all at every start. Beside ``server``, which
does the same for a request, this is the one place that catches every exception.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from reaperd.census import Interrupted
from reaperd.linux.exhaustion import is_exhaustion, reason_of
from reaperd.model import SessionKey
from reaperd.pauses import Pauses

log = logging.getLogger(__name__)

T = TypeVar("T")

# Where the system has run out of something: that is nobody's fault, and over soon or never.
_BREATHS_S = 0.05, 5.0


class Aside:
    """Who is not to be touched for a while."""

    def __init__(self) -> None:
        self._pauses = Pauses()

    @contextlib.contextmanager
    def trying(self, who: Hashable, what: str, *, tell_exhaustion: bool = False) -> Iterator[None]:
        """Set ``who`` aside where the block raises anything: for 5, 10, 20 ... 300 s.

        Interrupted is nobody's fault, and raised; so is, where asked for, that the system has run out of something. Else that
        is tried again much sooner.
        """
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            if not is_exhaustion(error):
                log.exception("cannot %s of %s: trying again in %g s", what, who, self._pauses.begin(who))
            elif tell_exhaustion:
                raise
            else:
                pause_s = self._pauses.begin(who, _BREATHS_S)
                log.warning("cannot %s of %s: %s; trying again in %g s", what, who, reason_of(error), pause_s)

    def together(
        self,
        keys: Sequence[SessionKey],
        work: Callable[[Sequence[SessionKey]], dict[SessionKey, T]],
        what: str,
    ) -> dict[SessionKey, T]:
        """Return what ``work`` makes of all sessions in one go; of each by itself, where one spoils it for all.

        Interrupted, and that the system has run out of something, is nobody's fault, and raised.
        """
        try:
            return work(keys)
        except Interrupted:
            raise
        except Exception as error:
            if is_exhaustion(error):
                raise
            log.warning("cannot %s of %d sessions together: %r", what, len(keys), error)
        found: dict[SessionKey, T] = {}
        for key in keys:
            with self.trying(key, what):
                found.update(work([key]))
        return found

    def until_s(self, who: Hashable) -> float | None:
        """Return until when somebody is set aside, None where he is not."""
        return self._pauses.until_s(who)

    def forget(self, who: Hashable) -> None:
        """Whoever it was is no more."""
        self._pauses.forget(who)
