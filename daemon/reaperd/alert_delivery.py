"""Sends one alert: through Apprise, or to a command. Runs in a helper that ends after it, and never in the daemon's core.

What Apprise and its plugins say, and what they raise, may hold the URL with its passwords: nothing of it leaves the helper.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import select
import signal
import ssl
import subprocess
from collections.abc import Sequence

from reaperd.alert_check import be_silent, not_understood, why_no_apprise
from reaperd.alert_groups import Outcome
from reaperd.alert_words import NO_REASON, reason_in
from reaperd.linux import prctl
from reaperd.linux.helper import end_children
from reaperd.unprivileged import limit_memory

NOT_UNDERSTOOD = "Apprise does not understand this URL: `apprise --details` lists what it knows"
_LATE = ("encodings.idna", "http.cookiejar", "netrc", "smtplib", "stringprep")
_MAX_SAID_CHARS = 64 * 1024
_MEMORY_BYTES = 128 * 1024 * 1024  # beyond what is mapped: a service may answer without end


Result = tuple[str, str]  # an Outcome's value, and the reason in words, "" where it was sent


class _Ear(logging.Handler):
    """Keeps what is logged, within limits."""

    def __init__(self) -> None:
        super().__init__()
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        with contextlib.suppress(ValueError, TypeError):  # a record that is none
            self.said = f"{self.said}{record.getMessage()}\n"[-_MAX_SAID_CHARS:]


def load() -> None:
    """Load Apprise with all its plugins, and what they import late: once we are nobody, the files may be out of reach."""
    for name in _LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        import apprise

        apprise.Apprise.instantiate("json://localhost")


def find_certificates() -> None:
    """Where what requests brings along is out of reach, have it take the system's certificates."""
    with contextlib.suppress(ImportError):
        import certifi

        paths = ssl.get_default_verify_paths()
        usable = [path for path in (paths.openssl_cafile, paths.openssl_capath) if os.access(path, os.R_OK)]
        if not os.access(certifi.where(), os.R_OK) and usable:
            os.environ.setdefault("REQUESTS_CA_BUNDLE", usable[0])


def _begin() -> None:
    """End with whoever started us; and nothing that is written here, by whatever library, may reach the daemon's log."""
    _end_with_parent()
    be_silent()


def send(url: str, title: str, body: str, gravity: str) -> Result:
    """Send a message through Apprise. ``gravity`` is info, warning or failure."""
    _begin()
    ear = _Ear()
    logger = logging.getLogger("apprise")
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        import apprise
    except ImportError as error:
        return Outcome.HOPELESS.value, why_no_apprise(error)
    asset = apprise.AppriseAsset(app_id="Reaper", app_desc="Reaper", app_url="", async_mode=False)
    service = apprise.Apprise.instantiate(url, asset=asset, suppress_exceptions=True)
    if service is None:
        return Outcome.HOPELESS.value, NOT_UNDERSTOOD
    all_of_one = apprise.Apprise(asset=asset)
    all_of_one.add(service)
    limit_memory(_MEMORY_BYTES)
    if all_of_one.notify(
        title=title, body=body, notify_type=apprise.NotifyType(gravity), body_format=apprise.NotifyFormat.TEXT
    ):
        return Outcome.SENT.value, ""
    return Outcome.FAILED.value, reason_in(ear.said)


def check(url: str) -> Result:
    """Say whether Apprise can use a URL; nothing is sent."""
    _begin()
    found = not_understood([url])
    if isinstance(found, str):
        return Outcome.HOPELESS.value, found
    return (Outcome.HOPELESS.value, NOT_UNDERSTOOD) if found else (Outcome.SENT.value, "")


def run_command(command: Sequence[str], event: str, most_s: float) -> Result:
    """Run a command with an event, as JSON, on its stdin, and end it after ``most_s``; what it says is not kept.

    Whatever it has started ends with it.
    """
    _begin()
    prctl.adopt_orphans()
    stdin = os.memfd_create("event")  # not a pipe: nobody has to wait until all of it is read
    with open(stdin, "wb", closefd=False) as file:
        file.write(f"{event}\n".encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  a helper has one thread
        )
    except OSError as error:
        return Outcome.FAILED.value, f"it cannot be run: {(error.strerror or NO_REASON).lower()}"
    poller = select.poll()
    poller.register(os.pidfd_open(process.pid), select.POLLIN)
    code = process.wait() if poller.poll(most_s * 1000) else None
    end_children()
    if code == 0:
        return Outcome.SENT.value, ""
    if code is None:
        return Outcome.FAILED.value, f"it took longer than {most_s:g} s"
    if code < 0:
        return Outcome.FAILED.value, f"it was ended by signal {-code}"
    return Outcome.FAILED.value, f"it left with {code}"


def _end_with_parent() -> None:
    prctl.die_with_parent(signal.SIGKILL)
