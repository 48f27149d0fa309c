"""Every target there is."""

from __future__ import annotations

from fuzzing import messages, proctext, records, replies, requests, sessionpages, settings
from fuzzing.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (messages, proctext, sessionpages, settings, records, replies, requests)
    for target in module.TARGETS
}


def shares(runs: int, targets: list[Target]) -> dict[str, int]:
    """Return how many of ``runs`` inputs each target gets: fewer where one takes longer, and together all of them."""
    weights = {target.name: 1 / target.cost for target in targets}
    total = sum(weights.values())
    found = {name: max(1, int(runs * weight / total)) for name, weight in weights.items()}
    found[targets[0].name] += max(0, runs - sum(found.values()))
    return found
