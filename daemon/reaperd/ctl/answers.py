"""What there is, as a daemon answers it: its state, the sessions and the orphans, asked for together."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from typing import Any, NamedTuple

from reaperd.ctl.link import Link
from reaperd.ctl.units import list_of

QUESTIONS = ("status", "ps", "orphans")
_LEAST_S = 0.01  # that a question may take


class Answers(NamedTuple):
    """What a daemon has said of one moment."""

    at: datetime
    status: Any
    sessions: list[Any]
    orphans: list[Any]


def ask_all(link: Link, end_s: float = math.inf) -> Answers:
    """Return what there is; NoDaemonError, CommandError. No answer is waited for beyond ``end_s`` (monotonic)."""
    replies = {}
    for op in QUESTIONS:
        replies[op] = link.ask(op, within_s=max(_LEAST_S, end_s - time.monotonic()))
    return Answers(
        datetime.now(timezone.utc),
        replies["status"].get("status"),
        list_of(replies["ps"], "sessions"),
        list_of(replies["orphans"], "orphans"),
    )
