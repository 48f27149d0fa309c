"""Whether alerts can be sent at all: asks Apprise, in a child, whether it can use the URLs. Knows of Apprise only there."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

from reaperd.config_values import hidden_url
from reaperd.linux.helper import run_as

MISSING = "Apprise is not installed: pip install 'reaperd[alerts]'"
_LONGEST_S = 20


def faults_and_warnings(urls: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is to be put right about ``[alerts] urls``, and what may be: a line each, without the URLs.

    Waits for a child that loads Apprise, half a second and more: not for a daemon that has begun its work.
    """
    if not urls:
        return [], []
    found = run_as(os.geteuid(), os.getegid(), functools.partial(not_understood, urls), longest_s=_LONGEST_S)
    if isinstance(found, list):
        where = "[alerts] urls: entry {}: must be a URL that Apprise can use (`apprise --details` lists them), got {}"
        return [where.format(number, hidden_url(urls[number - 1])) for number in found], []
    why = found if isinstance(found, str) else "whether Apprise can use its URLs could not be found out"
    return [], [f"[alerts] urls: no alert can be sent: {why}"]


def not_understood(urls: Sequence[str]) -> list[int] | str:
    """Return which of ``urls``, counted from 1, Apprise cannot use; in words why it cannot be asked. For a child."""
    be_silent()
    logging.getLogger("apprise").propagate = False
    try:
        import apprise
    except ImportError as error:
        return why_no_apprise(error)
    made = (apprise.Apprise.instantiate(url, suppress_exceptions=True) for url in urls)
    return [number for number, service in enumerate(made, 1) if service is None]


def why_no_apprise(error: ImportError) -> str:
    """Return why Apprise cannot be imported: it is missing, or what it needs is, or is out of reach."""
    missing = (error.name or "").partition(".")[0]
    return (
        MISSING
        if missing == "apprise"
        else f"Apprise cannot be imported, for {missing or 'a part of it'} cannot"
    )


def be_silent() -> None:
    """Let nothing that is written in this process, by whatever library, reach the log: it may quote a URL."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
