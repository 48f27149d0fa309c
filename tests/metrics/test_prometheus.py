"""A real Prometheus scrapes a real daemon and goes by the alert rules that come with it: make test-metrics."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SETTINGS, Daemon, Leader, repeat_until

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "packaging" / "prometheus" / "reaper-alerts.yml"
DASHBOARD = ROOT / "packaging" / "grafana" / "reaper.json"
SOON_S = 60.0

needed = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(needed), reason=f"there is no {' and no '.join(needed)} here")

CONFIG = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: reaper
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


class Prometheus:
    """One that runs, and what it is asked."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1/"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, what: str, **arguments: str) -> Any:
        """Return the data of an answer, None where there is none."""
        query = f"?{urllib.parse.urlencode(arguments)}" if arguments else ""
        with (
            contextlib.suppress(OSError),
            self._opener.open(f"{self._base}{what}{query}", timeout=10) as reply,
        ):
            return json.load(reply)["data"]
        return None

    def values(self, expression: str) -> dict[tuple[str, ...], float]:
        found = (self.ask("query", query=expression) or {"result": []})["result"]
        return {
            tuple(
                v for k, v in sorted(one["metric"].items()) if k not in ("__name__", "instance", "job")
            ): float(one["value"][1])
            for one in found
        }


@contextlib.contextmanager
def prometheus(folder: Path, config: str) -> Iterator[Prometheus]:
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(config)
    subprocess.run(["promtool", "check", "config", str(file)], check=True, capture_output=True)
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield Prometheus(port)
        finally:
            process.kill()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def measured(start_daemon: Callable[..., Daemon], port: int) -> Daemon:
    return start_daemon(config=f'{SETTINGS}[metrics]\nenabled = true\nlisten = "127.0.0.1:{port}"\n')


def test_what_is_served_is_as_prometheus_wants_it(
    measured: Daemon, port: int, start_leader: Callable[..., Leader]
) -> None:
    leader = start_leader("pools.py", "executor", "--idle", socket=measured.socket)
    leader.kill9()
    measured.wait_end(leader.session)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def scrape() -> bytes | None:
        with (
            contextlib.suppress(OSError),
            opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply,
        ):
            text: bytes = reply.read()
            return text
        return None

    text = repeat_until(scrape, SOON_S, "nobody serves figures")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_prometheus_has_what_was_done_and_alerts_once_the_daemon_is_gone(
    measured: Daemon, port: int, start_leader: Callable[..., Leader], tmp_path: Path
) -> None:
    # As the rules are, but for the time that somebody has to put it right.
    rules = tmp_path / "rules.yml"
    rules.write_text(RULES.read_text().replace("for: 5m", "for: 0s"))
    with prometheus(tmp_path, CONFIG.format(rules=rules, port=port)) as server:
        repeat_until(lambda: server.values("up").get(()) == 1 or None, SOON_S, "it scrapes nothing")
        leader = start_leader("pools.py", "executor", "--idle", socket=measured.socket)
        leader.signal(signal.SIGKILL)
        event = measured.wait_end(leader.session)
        killed = sum(one["result"] == "killed" for one in event["processes"])
        assert killed == len(leader.family.workers) == 2
        repeat_until(
            lambda: sum(server.values("reaper_killed_processes_total").values()) == killed or None,
            SOON_S,
            "it never learned who was killed",
        )
        assert server.values("reaper_freed_bytes_total")["rss",] == event["freed"]["rss_bytes"]
        assert server.values("reaper_reap_latency_seconds_count") == {(): 1}
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
                assert server.ask("query", query=expression) is not None, expression
        assert [one for one in server.ask("alerts")["alerts"] if one["state"] == "firing"] == []
        measured.kill9()

        def firing() -> bool | None:
            return (
                "ReaperDown"
                in {
                    one["labels"]["alertname"]
                    for one in server.ask("alerts")["alerts"]
                    if one["state"] == "firing"
                }
                or None
            )

        repeat_until(firing, SOON_S, "nobody is alerted")
