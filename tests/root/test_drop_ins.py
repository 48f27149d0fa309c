"""The unit's drop-ins for alerts and figures: with them both leave the sandbox, and without them it is said what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import installed
import pytest
from bootedsystem import BootedSystem
from installed import CONFIG, PYTHON, UNIT, messages
from staged import ROOT

pytestmark = pytest.mark.needs_root

ELSEWHERE = "192.0.2.7"  # an address of the system's that is not its loopback's: TEST-NET-1, RFC 5737
FIGURES = "http://127.0.0.1:9478/metrics"
SETTINGS = f"""
[metrics]
enabled = true
[alerts]
on = ["reaped"]
urls = ["json://{ELSEWHERE}:8099/hunter2"]
command = ["/srv/hook"]
"""
SINK = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        with open("/srv/posts", "ab") as posts:
            posts.write(body + b"\\n")
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((sys.argv[1], 8099), Handler).serve_forever()
"""


@pytest.fixture
def sending(settled: BootedSystem) -> Iterator[BootedSystem]:
    """The system with both set up, a server to post to, and a hook; the daemon is not started."""
    installed.lend(settled, "apprise", "prometheus_client")
    hook, sink = settled.path("/srv/hook"), settled.path("/srv/sink.py")
    hook.write_text("#!/bin/sh\nid -un >> /tmp/heard; cat >> /tmp/heard\n")
    hook.chmod(0o755)
    sink.write_text(SINK)
    settings = settled.path(f"{CONFIG}.d/sending.toml")
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(SETTINGS)
    settings.chmod(0o600)
    settled.run("ip", "address", "add", f"{ELSEWHERE}/32", "dev", "lo")
    settled.run("systemd-run", "--quiet", "--unit=sink", PYTHON, "/srv/sink.py", ELSEWHERE)
    yield settled
    settled.run("systemctl", "stop", "sink.service")
    settled.run("ip", "address", "del", f"{ELSEWHERE}/32", "dev", "lo")
    settings.unlink()
    for name in ("/srv/posts", "/srv/sink.py", "/srv/hook", "/tmp/heard"):
        settled.path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def running_with(system: BootedSystem, *names: str) -> Iterator[None]:
    """Run the unit with drop-ins that come with Reaper."""
    text = "\n".join((ROOT / "packaging/systemd" / name).read_text() for name in names)
    with installed.drop_in(system, text):
        system.run("systemctl", "start", UNIT)
        yield


def alerted(system: BootedSystem) -> list[str]:
    return system.run("reaperctl", "alerts", "test", check=False).stdout.splitlines()


def is_scraped(system: BootedSystem) -> bool:
    return "reaper_sessions" in system.run("curl", "--silent", "--max-time", "5", FIGURES, check=False).stdout


def test_alerts_and_figures_leave_the_unit_with_their_drop_ins_and_without_it_is_said_why_not(
    sending: BootedSystem,
) -> None:
    since, url = installed.now(), "json://*** (entry 1 of urls)"
    with running_with(sending):
        assert alerted(sending) == [
            f"{url}: not sent: no network may be used here (docs/alerts.md: what to add to the unit)",
            "/srv/hook: sent",
        ]
        refused = "cannot listen on 127.0.0.1:9478: Address family not supported by protocol (the service's unit may"
        sending.until(lambda: refused in messages(sending, since), "the log says why there are no figures")
    with running_with(sending, "metrics.conf"):
        sending.until(lambda: is_scraped(sending), "the figures are served")
    with running_with(sending, "alerts.conf"):
        assert alerted(sending) == [f"{url}: sent", "/srv/hook: sent"]
    heard = sending.path("/tmp/heard").read_text().splitlines()
    assert {line for line in heard if not line.startswith("{")} == {"reaper-gate"}
    assert {json.loads(line)["kind"] for line in heard if line.startswith("{")} == {"test"}
    assert "hunter2" not in messages(sending, since)
