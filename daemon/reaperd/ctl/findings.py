"""What one check of ``reaperctl doctor`` found, and how a check is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

OK, LIMIT, PROBLEM = "OK", "LIMIT", "PROBLEM"


class Finding(NamedTuple):
    """LIMIT: Reaper works, with less. PROBLEM: it does not. Both come with what to do."""

    level: str
    fact: str
    advice: str = ""
    subject: str = ""


Check = Callable[[], Finding]


def ok(fact: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(OK, fact)


def limit(fact: str, advice: str) -> Finding:
    """Return a finding that Reaper can live with."""
    return Finding(LIMIT, fact, advice)


def problem(fact: str, advice: str) -> Finding:
    """Return a finding that keeps Reaper from its work."""
    return Finding(PROBLEM, fact, advice)


def run(subject: str, check: Check) -> Finding:
    """Return what ``check`` finds; one that cannot be made is a limit: nothing is known to be wrong."""
    try:
        found = check()
    except ImportError as error:
        found = limit(
            f"could not be checked without the module `{error.name}`", "see what is said of that one"
        )
    except (OSError, AttributeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = limit(f"could not be checked: {reason}", "look at the other findings first")
    return found._replace(subject=subject)
