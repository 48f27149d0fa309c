"""The ``alerts`` commands: have the daemon send a test message to everyone whom it alerts."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from reaperd.ctl import DONE, FAILED
from reaperd.ctl.link import Link
from reaperd.ctl.terminal import put, put_json
from reaperd.ctl.text import field
from reaperd.ctl.units import list_of

_WAIT_S = 50  # a little longer than the daemon takes for its answer


def test(options: Namespace) -> int:
    """Have a message sent to every target, and print what came of each."""
    results = list_of(Link.of(options).ask("alerts", wait_s=_WAIT_S, action="test"), "results")
    if options.json:
        put_json(results)
    else:
        put(map(_line, results))
    return DONE if all(_is_sent(one) for one in results) else FAILED


def _is_sent(one: Any) -> bool:
    return isinstance(one, dict) and one.get("sent") is True


def _line(one: Any) -> str:
    target = field(one, "target") or "?"
    return (
        f"{target}: sent"
        if _is_sent(one)
        else f"{target}: not sent: {field(one, 'reason') or 'no reason given'}"
    )
