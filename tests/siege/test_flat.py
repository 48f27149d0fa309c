"""Sessions that came and went leave nothing in the daemon: no descriptor, no thread, no memory. ``make soak`` is the long run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos.flat import TELLING, Measured, come_and_go, grew
from chaos.stage import Stage
from harness import Scratch

WARM_UP, MEASURED = 400, 200
# What one session takes at least where it is not forgotten: a core's Session, libzmq's buffer for a connection. Fresh pages
# of the allocator and of SQLite are less than that in all, and the gate's heap takes some 1,000 sessions to find its size.
LEAK_BYTES = {"core": 3 * 1024, "gate": 8 * 1024}


@pytest.fixture
def measured(scratch: Scratch, run: str) -> Iterator[list[Measured]]:
    """What core and gate took after the warm-up, and at every batch of sessions from then on."""
    stage = Stage(scratch, run, TELLING)
    try:
        stage.start_daemon()
        found = list(come_and_go(stage, WARM_UP + MEASURED))
        yield [one for one in found if one.sessions >= WARM_UP]
    finally:
        stage.close()


def test_core_and_gate_are_flat_however_many_sessions_come_and_go(measured: list[Measured]) -> None:
    first, last = measured[0], measured[-1]
    for who, leak in LEAK_BYTES.items():
        before, after = getattr(first, who), getattr(last, who)
        story = [getattr(one, who) for one in measured]
        assert not grew([footing.descriptors for footing in story]), f"descriptors of the {who}: {story}"
        assert not grew([footing.threads for footing in story]), f"threads of the {who}: {story}"
        growth = min(after.pss_bytes - before.pss_bytes, after.rss_bytes - before.rss_bytes)
        assert growth <= leak * MEASURED, f"memory of the {who}: {story}"
