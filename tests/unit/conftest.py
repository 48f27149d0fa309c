"""What several unit tests of reading processes begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from specimens import ME, Mine, count_descriptors

from agent import wire
from agent.page import SessionPage
from reaperd.census import Census
from reaperd.linux.procfs import ProcFS
from reaperd.observer import Observer


@pytest.fixture
def observer() -> Iterator[Observer]:
    """Return an observer, and fail a test that leaves one of its descriptors open."""
    before = count_descriptors()
    one = Observer(Mine())
    yield one
    one.census.handles.release()
    assert count_descriptors() == before


@pytest.fixture
def census(observer: Observer) -> Census:
    return observer.census


@pytest.fixture
def page() -> Iterator[SessionPage]:
    ticks = ProcFS().stat(ME).id.start_ticks
    one = SessionPage(wire.format_session_id(ME, ticks, 11, 12), "grid", ticks, ProcFS().boot_id())
    one.write_record(["/run/reaper/reaper.sock"])
    yield one
    one.close()
