"""Figures for Prometheus: counted here as things happen, and served by the exporter, a process of its own.

The exporter asks when somebody scrapes it, and is answered last in the loop, with all sums as they are: it can be replaced
at any time, and none of its scrapers ever waits on what ends processes, nor that on them. Loaded only where it is on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from reaperd import __version__
from reaperd.companion import Companion
from reaperd.config import Config
from reaperd.config_values import Address
from reaperd.counters import Counters
from reaperd.linux.child import python
from reaperd.poller import Poller
from reaperd.sessions import Sessions
from reaperd.waiters import News

NAME = "the metrics exporter"
_FRESH_S, _SHARE = 0.1, 20  # what took long is not repeated before twenty times as long has passed
_MOST_CHARS = 64


class Metrics:
    """What is counted, and who serves it."""

    def __init__(
        self,
        poller: Poller,
        sessions: Sessions,
        read_state: Callable[[], dict[str, Any]],
        others: Callable[[], Iterable[Companion]] = tuple,
    ) -> None:
        """``read_state`` returns the figures that are as they are now; ``others`` the companions beside the exporter."""
        self.counters = Counters()
        self.companion = Companion(
            NAME,
            python("reaperd.exporter"),
            poller,
            greeting=self._greeting,
            on_message=self._take,
        )
        self._sessions = sessions
        self._read_state = read_state
        self._others = others
        self._listen: Address | None = None
        self._started_at_epoch_s = time.time()
        self._asked: int | None = None  # the number of the question
        self._answer_from_s = 0.0
        sessions.listeners.append(self._note)

    def heed(self, config: Config, now_s: float) -> None:
        """Serve where the settings say; one who serves elsewhere, or could not, is replaced."""
        self.counters.heed(extra.name[:_MOST_CHARS] for extra in config.scan.extra_signatures)
        if config.metrics.listen != self._listen or self.companion.hopeless:
            self.companion.stop(now_s)
            self._listen = config.metrics.listen
        self.companion.start(now_s)

    def stop(self, now_s: float) -> None:
        """Count and serve no longer."""
        self._sessions.listeners.remove(self._note)
        self.companion.stop(now_s)

    def step(self, now_s: float) -> None:
        """Hear the exporter, replace it where it has died, and answer it. Called last in the loop."""
        self.companion.exchange(now_s)
        self.companion.step(now_s)
        if self._asked is not None and self._answer_from_s <= now_s:
            question, self._asked = self._asked, None
            began_s = time.monotonic()
            self.companion.feed({"answer": question, "figures": self._figures()})
            ended_s = time.monotonic()
            self._answer_from_s = ended_s + max(_FRESH_S, _SHARE * (ended_s - began_s))

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = [self.companion.next_deadline(), None if self._asked is None else self._answer_from_s]
        return min((at_s for at_s in due if at_s is not None), default=None)

    def _note(self, news: News) -> None:
        self.counters.note(news.event)

    def _greeting(self) -> list[dict[str, Any]]:
        assert self._listen is not None, "it is started once there are settings"
        self._asked = None  # by one who is no more
        return [{"listen": list(self._listen)}]

    def _take(self, message: dict[str, Any]) -> None:
        if isinstance(number := message.get("ask"), int):
            self._asked = number

    def _figures(self) -> dict[str, Any]:
        state = self._read_state()
        # The gate is no companion, and loses no messages of ours: it is told of in the same way.
        companions: dict[str, list[int | None]] = {"the gate": [state.pop("gate_restarts"), None]}
        for one in (self.companion, *self._others()):
            companions[one.name] = [one.lives_lost, one.dropped]
        return {
            "version": __version__,
            "started_at_epoch_s": self._started_at_epoch_s,
            "companions": companions,
            **state,
            **self.counters.record(),
        }
