"""``reaperctl ui``: starts the server of the page, says under which address it is there, and ends it.

The page acts with the rights of who runs it, and everybody on this machine reaches a loopback address: the address that is
printed holds a secret, without which nothing is shown or done.
"""

from __future__ import annotations

import errno
import http.client
import importlib.util
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from argparse import Namespace

from agent.isolated import run_module
from reaperd.ctl import DONE, FAILED, USAGE, CommandError
from reaperd.ctl.link import sockets_of
from reaperd.ctl.terminal import put_now, tell
from reaperd.linux import prctl

VARIABLE = "REAPER_UI"  # in the environment of the server: what it is to do, as JSON
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_UP_WITHIN_S = 60.0
_ENDED_WITHIN_S = 10.0
_LOOK_S = 0.1
_USUAL_PORT = 8501


def ui(options: Namespace) -> int:
    """Serve the page until somebody ends it."""
    address = loopback(options.address, options.port)
    if importlib.util.find_spec("streamlit") is None:
        raise CommandError("ui: the page needs Streamlit: pip install 'reaperd[ui]'")
    port = _free_port(address, options.port)
    token = secrets.token_urlsafe(24)
    signals = (*_ENDING, signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def as_ours() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        prctl.die_with_parent(signal.SIGTERM)

    server = subprocess.Popen(
        _command(address, port),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # it prints an address that lacks the secret
        env=_environment(options, token),
        preexec_fn=as_ours,  # noqa: PLW1509 - there is one thread
    )
    ended = _wait_up(server, address, port)
    if ended == 0:
        put_now(f"{_url(address, port)}/?token={token}")
        tell(f"this page acts as uid {os.geteuid()}; Ctrl-C ends it")
        ended = signal.sigwaitinfo(signals).si_signo
    if ended != signal.SIGCHLD:
        _end(server)
        return DONE
    code = server.wait()
    raise CommandError(f"ui: Streamlit ended with {code}; what it said is above", FAILED)


def loopback(address: str, port: int) -> str:
    """Return an address of this machine that no other machine reaches; CommandError for any other.

    ``port`` is the one that was asked for: its forwarding is what the refusal advises.
    """
    try:
        found = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        raise CommandError(
            f"ui: --address must be an IP address or localhost, got {address!r:.60}", USAGE
        ) from None
    if not found.is_loopback:
        port = port or _USUAL_PORT  # any that is free is known too late
        raise CommandError(
            f"ui: will not listen on {found}: the page acts as you, and is for this machine alone. Listen on 127.0.0.1, "
            f"as `reaperctl ui --port {port}` does, and reach it from elsewhere through ssh: "
            f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}",
            USAGE,
        )
    return str(found)


def _free_port(address: str, asked: int) -> int:
    """Return the port that was asked for, for 0 a free one; CommandError where it is taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, asked))
        except OSError as error:
            advice = ": choose another, or 0 for any" if error.errno == errno.EADDRINUSE else ""
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise CommandError(f"ui: port {asked} of {address} {reason}{advice} (--port)") from None
        port: int = probe.getsockname()[1]
        return port


def _url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _command(address: str, port: int) -> list[str]:
    settings = {
        "server.address": address,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.enableCORS": "true",
        "server.enableXsrfProtection": "true",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "global.developmentMode": "false",
        "logger.level": "warning",
        # Streamlit's own may be the red of an error. One for both themes would be the light one's, in the dark as well.
        "theme.light.primaryColor": "#2f6fb5",
        "theme.dark.primaryColor": "#3f80c8",
    }
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.py")
    options = [f"--{name}={value}" for name, value in settings.items()]
    return run_module("streamlit", "run", page, *options)


def _environment(options: Namespace, token: str) -> dict[str, str]:
    # Not on the command line, which everybody may read (proc(5)).
    told = {"token": token, "sockets": sockets_of(options), "timeout_s": options.timeout}
    return {**os.environ, VARIABLE: json.dumps(told)}


def _wait_up(server: subprocess.Popen[bytes], address: str, port: int) -> int:
    """Return 0 once the server answers, else the number of the signal that came before."""
    until_s = time.monotonic() + _UP_WITHIN_S
    while not _answers(address, port):
        told = signal.sigtimedwait((*_ENDING, signal.SIGCHLD), _LOOK_S)
        if told is not None:
            return told.si_signo
        if time.monotonic() > until_s:
            _end(server)
            raise CommandError(f"ui: Streamlit did not answer within {_UP_WITHIN_S:g} s")
    return 0


def _answers(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=1)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_ENDED_WITHIN_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
