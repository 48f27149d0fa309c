"""When ``reaperctl run`` starts its command again, after how long, and with how many workers. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple

# Who sends one of these wants an end: the list of systemd.service(5) for Restart=on-failure, and the quit key.
_ASKED_TO_END = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM))
QUICK_S = 10.0  # a command that fails sooner has hardly begun
LOOP = 3  # as many times in a row, in the same way: it will not do better
LONGEST_PAUSE_S = 300.0
FORGIVEN_AFTER_S = 600.0  # a command that ran for longer failed for another reason than the one before


class Rules(NamedTuple):
    """What was asked for on the command line."""

    restarts: int  # at most; 0: none
    pause_s: float  # before the first; doubled for each that follows


class Ended(NamedTuple):
    """How one attempt came to its end."""

    status: int  # as wait(2) has it
    lasted_s: float
    out_of_memory: bool = False  # the OOM killer ended the command, or one of its processes
    asked: bool = False  # somebody asked us, or the daemon, to end it
    workers: int | None = None  # that it was allowed, None where we set no limit

    @property
    def signal(self) -> int | None:
        """The signal that killed it, None where it exited."""
        return self.status & 0x7F or None

    @property
    def code(self) -> int:
        """Its exit code as a shell has it: 128 and the signal, where one killed it."""
        return 128 + self.signal if self.signal else self.status >> 8 & 0xFF

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well, and than it was asked to."""
        if self.asked or self.code == 0:
            return False
        # 143 and the like: what a script exits with that ends in good order at SIGTERM.
        return self.out_of_memory or self.code - 128 not in _ASKED_TO_END

    def is_like(self, other: Ended) -> bool:
        """Say whether both failed as quickly, in the same way, with as many workers."""
        quick = self.lasted_s < QUICK_S and other.lasted_s < QUICK_S
        return quick and (self.status, self.workers) == (other.status, other.workers)


class Next(NamedTuple):
    """What is to be done: another attempt, or none and why not."""

    again: bool
    after_s: float = 0.0
    reason: str = ""  # "" where nobody expects another


def decide(rules: Rules, ended: Sequence[Ended]) -> Next:
    """Return what comes after the attempts so far, the last of them being over."""
    last = ended[-1]
    if not last.failed or not rules.restarts:
        return Next(again=False)
    if len(ended) > rules.restarts:
        return Next(again=False, reason=f"that was the last of {rules.restarts + 1} attempts")
    if len(ended) >= LOOP and all(one.is_like(last) for one in ended[-LOOP:]):
        return Next(
            again=False,
            reason=f"it failed in the same way {LOOP} times in a row within {QUICK_S:g} s, and will not do better",
        )
    in_a_row = 0
    for one in reversed(ended):
        if one.lasted_s >= FORGIVEN_AFTER_S:
            break
        in_a_row += 1
    return Next(again=True, after_s=min(rules.pause_s * 2 ** max(0, in_a_row - 1), LONGEST_PAUSE_S))


def halve(workers: int) -> int:
    """Return how many workers there may be once so many were too much for the memory."""
    return max(1, workers // 2)
