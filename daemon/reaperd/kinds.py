"""The kinds of event that there are. Pure, and so small that a command line which knows them is still instant."""

from __future__ import annotations

EVENT_KINDS = (
    *("started", "stopped", "reload"),
    *("registered", "ended", "reaped"),
    *("orphan", "quarantined", "released", "killed"),
    *("stuck", "breach"),
)
