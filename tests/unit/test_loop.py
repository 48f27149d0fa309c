"""The loop where memory or descriptors run out in the middle of a round: nothing that was due may be forgotten."""

from __future__ import annotations

import errno
import logging
import signal
from contextlib import closing
from pathlib import Path

import pytest

from reaperd.config import Config
from reaperd.loop import Daemon
from reaperd.store import Store


class Rounds(Daemon):
    """A daemon whose rounds and mending fail as they are told to: what is done, in order, is in ``done``."""

    def __init__(self, rounds: list[Exception | None], mending: list[Exception | None]) -> None:
        super().__init__(
            mode="user",
            socket_path="/x",
            state_dir="/x",
            config_path="/x",
            config=Config(),
            read_config=Config,
        )
        self.rounds, self.mending = rounds, mending
        self.done: list[str] = []
        self._core = self._poller = self.sessions = self  # type: ignore[assignment]

    def _go_round(self) -> None:
        self.done.append("round")
        error = self.rounds.pop(0)
        if not self.rounds:
            self._signals.add(signal.SIGTERM)
        if error is not None:
            raise error

    def _mend(self) -> None:
        self.done.append("mend")
        if self.mending and (error := self.mending.pop(0)) is not None:
            raise error

    def touch(self) -> None:
        self.done.append("touch")

    def wait(self, timeout_s: float) -> None:
        pass

    def step(self) -> None:
        pass


def test_before_it_goes_on_what_was_left_half_done_is_mended(caplog: pytest.LogCaptureFixture) -> None:
    daemon = Rounds([MemoryError(), OSError(errno.ENFILE, "too many"), None, None], [])
    daemon._serve()
    assert daemon.done == ["round", "mend", "touch", "round", "mend", "touch", "round", "round"]
    assert [one.levelno for one in caplog.records] == [logging.WARNING] * 2


def test_where_mending_fails_too_it_is_done_again_until_it_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    """Else a session that was due when memory ran out would be due no more."""
    daemon = Rounds([MemoryError(), None], [MemoryError(), OSError(errno.EMFILE, "too many"), None])
    daemon._serve()
    assert daemon.done == ["round", "mend", "mend", "mend", "touch", "round"]
    assert len(caplog.records) == 1, "it is one bad time"


def test_what_is_no_lack_of_anything_ends_the_daemon() -> None:
    for error in (OSError(errno.EIO, "a disk"), ValueError()):
        with pytest.raises(type(error)):
            Rounds([error, None], [])._serve()


def test_old_events_are_dropped_a_few_at_a_time_and_then_not_for_hours(tmp_path: Path) -> None:
    daemon = Rounds([], [])
    now = [0.0]
    store = Store(str(tmp_path), "boot", now_epoch_s=lambda: now[0])
    with closing(store):
        daemon._store = store
        for day in range(300):
            store.add_event({"kind": "started", "uid": None, "session": None}, day * 86_400.0)
        now[0] = 91 * 86_400.0  # by the default, 90 days are kept
        daemon._prune(1000.0)
        assert daemon._prune_due_s == 1000.0 + 6 * 3600
        assert store.events()[0]["seq"] == 2, "the first is as old as 91 days"
        now[0] = 400 * 86_400.0
        daemon._prune(2000.0)
        assert daemon._prune_due_s < 2001.0, "there are more"
        daemon._prune(2001.0)
        assert daemon._prune_due_s > 20_000.0
        assert store.events() == []
