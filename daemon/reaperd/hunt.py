"""Orphans that are being ended, and how far that has come. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from reaperd.ledger import Target
from reaperd.model import ProcessId


class Hunt(NamedTuple):
    """Orphans of one user that are ended together."""

    uid: int
    rule: str  # by which they are: the first one's
    waived: bool  # somebody asked for it, and no threshold matters
    began_s: float  # monotonic
    targets: dict[ProcessId, Target]
    asked_by_uid: int | None = None
    container: str = ""  # in which somebody asked for it; then all of them are in that
    told_stuck: bool = False
    gpu_bytes: Mapping[ProcessId, int] = MappingProxyType({})  # that they held, where that was asked for

    @property
    def is_over(self) -> bool:
        """Whether nothing more is awaited of any of them."""
        return all(target.done for target in self.targets.values())
