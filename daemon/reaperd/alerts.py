"""The core's end of the alerts: which events are told, and what the companion that sends them is given of each.

Nothing here waits, and nothing is imported or started while no target is set.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agent import wire
from reaperd.companion import Companion
from reaperd.config import AlertsConfig
from reaperd.linux.child import python
from reaperd.poller import Poller
from reaperd.times import now_utc
from reaperd.waiters import News

TEST_WITHIN_S = 45.0  # a little longer than the companion takes to tell what it knows by then
_MAX_TESTS = 4
_MAX_PROCESSES = 256  # of one event that are told
_LAST_WORDS_S = 2.5  # a little more than it takes for them
_AGAIN_S = 1.0
# What a session bus, a proxy and certificates are found by.
_ENVIRONMENT = (
    *("HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
# For a message's line; what a process was ended on is for the command alone, and for `reaperctl events`.
_OF_A_PROCESS = ("pid", "framework", "signal", "result")

Answer = Callable[[list[dict[str, Any]] | None], None]


class Alerts:
    """Keeps the companion running while there is somebody to alert."""

    def __init__(
        self, poller: Poller, config: AlertsConfig, sender: Sequence[str] = python("reaperd.alert_sender")
    ) -> None:
        self._config = AlertsConfig()
        self.companion = Companion(
            "alerts",
            sender,
            poller,
            greeting=self._greeting,
            on_message=self._take,
            last_words_s=_LAST_WORDS_S,
            environment=_ENVIRONMENT,
        )
        # Events that it could not be given, by kind.
        self._lost: collections.Counter[str] = collections.Counter()
        self._tell_lost_at_s: float | None = None
        self._tests: dict[int, tuple[Answer, float]] = {}
        self._numbers = itertools.count(1)
        self.heed(config)

    def heed(self, config: AlertsConfig) -> None:
        """Go by other settings from now on."""
        before, self._config = self._config, config
        now_s = time.monotonic()
        if not self.has_targets:
            self._lost.clear()
            self._tell_lost_at_s = None
            self.companion.stop(now_s)
        elif self.companion.pid is None:
            if self.companion.hopeless:  # what kept it from its work may have been put right
                self.companion.stop(now_s)
            self.companion.start(now_s)
        elif bool(before.urls) != bool(config.urls):
            # It has Apprise loaded where there are some, and only then.
            self.companion.stop(now_s)
            self.companion.start(now_s)
        elif before != config:
            self.companion.feed(self._settings())

    @property
    def has_targets(self) -> bool:
        """Whether there is somebody to alert."""
        return bool(self._config.urls or self._config.command)

    def _settings(self) -> dict[str, Any]:
        settings = self._config
        return {
            "settings": {
                "urls": settings.urls,
                "command": settings.command,
                "group_within_s": settings.group_within_s,
                "host": os.uname().nodename,
            }
        }

    def _greeting(self) -> Iterator[dict[str, Any]]:
        for number in list(self._tests):  # whoever was to make them is no more
            self._answer(number, None)
        yield self._settings()

    # -- events ------------------------------------------------------------------------------

    def note(self, news: News) -> None:
        """Have an event told, where it is of a kind that is to be."""
        event = news.event
        if not self.has_targets or self.companion.hopeless or event["kind"] not in self._config.on:
            return
        if self._lost and not self._tell_lost():
            self._lost[event["kind"]] += 1
        elif not self.companion.feed({"event": {"seq": news.seq, **self._shortened(event)}}):
            self._lost[event["kind"]] += 1
            self._tell_lost_at_s = time.monotonic() + _AGAIN_S

    def _shortened(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return an event without what nobody will be shown of it: for the companion, and for its pipe."""
        processes = event["processes"][:_MAX_PROCESSES]
        if not self._config.command:
            processes = [{key: one.get(key) for key in _OF_A_PROCESS} for one in processes]
        left_out = len(event["processes"]) - len(processes)
        return {**event, "processes": processes, **({"processes_left_out": left_out} if left_out else {})}

    def _tell_lost(self) -> bool:
        """Tell how many events could not be given, and say whether there is room for that."""
        if self.companion.feed({"lost": dict(self._lost), "at": now_utc()}):
            self._lost.clear()
            self._tell_lost_at_s = None
            return True
        self._tell_lost_at_s = time.monotonic() + _AGAIN_S
        return False

    # -- a test ------------------------------------------------------------------------------

    def test(self, answer: Answer) -> None:
        """Have a message sent to every target; ``answer`` is given what came of each, None where that cannot be told.

        WireError where there is none, or nobody to do it.
        """
        if not self.has_targets:
            empty = "[alerts] urls and command were empty when the settings were last loaded"
            raise wire.WireError("no-alerts", f"nobody is to be alerted: {empty}")
        if self.companion.hopeless:
            raise wire.WireError("no-alerts", f"no alert can be sent: {self.companion.hopeless}")
        number = next(self._numbers)
        if len(self._tests) >= _MAX_TESTS or not self.companion.feed({"test": number}):
            raise wire.WireError("busy", "alerts cannot be tested just now: try again in a few seconds")
        self._tests[number] = (answer, time.monotonic() + TEST_WITHIN_S)

    def _answer(self, number: int, results: list[dict[str, Any]] | None) -> None:
        if number in self._tests:
            self._tests.pop(number)[0](results)

    def _take(self, message: dict[str, Any]) -> None:
        number, results = message.get("tested"), message.get("results")
        if isinstance(number, int) and isinstance(results, list):
            self._answer(number, results)

    # -- the loop ----------------------------------------------------------------------------

    def step(self, now_s: float) -> None:
        """Do what is due."""
        self.companion.step(now_s)
        if self._tell_lost_at_s is not None and self._tell_lost_at_s <= now_s:
            self._tell_lost()
        for number, (_, until_s) in list(self._tests.items()):
            if until_s <= now_s:
                self._answer(number, None)

    def exchange(self, now_s: float) -> None:
        """Take a little of what the companion says."""
        self.companion.exchange(now_s)

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = (
            self.companion.next_deadline(),
            self._tell_lost_at_s,
            *(until_s for _, until_s in self._tests.values()),
        )
        return min((at_s for at_s in due if at_s is not None), default=None)

    def close(self, now_s: float) -> None:
        """End the companion, which is given a moment to send what waits."""
        self.companion.close(now_s)
