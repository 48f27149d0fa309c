"""Figures for Prometheus: a real daemon, real deaths, and a scrape that is compared with them number by number."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from harness import SETTINGS, Daemon, Leader, repeat_until, wait_gone

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

SOON_S = 20.0
EXPORTER = "reaperd-metrics"


class Figures(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """What a scrape says."""

    def of(self, name: str, **labels: str) -> float:
        return self.get((name, frozenset(labels.items())), 0.0)

    def sums(self, name: str) -> dict[tuple[str, ...], float]:
        """Return what is more than 0, by the values of the labels in their order by name."""
        return {
            tuple(value for _, value in sorted(labels)): value
            for (one, labels), value in self.items()
            if one == name and value
        }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


def settings(port: int, *, enabled: bool = True) -> str:
    on = "true" if enabled else "false"
    return f'{SETTINGS}[metrics]\nenabled = {on}\nlisten = "127.0.0.1:{port}"\n'


def scrape(port: int) -> Figures | None:
    """Return the figures, None where nobody serves any."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
    found = Figures()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def wait_scrape(port: int) -> Figures:
    return repeat_until(lambda: scrape(port), SOON_S, f"nobody serves figures on port {port}")


def exporters(daemon: Daemon) -> list[int]:
    found = []
    for pid in daemon.children():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
            if file.read().strip() == EXPORTER:
                found.append(pid)
    return found


def exporter_of(daemon: Daemon) -> int:
    return repeat_until(lambda: next(iter(exporters(daemon)), None), SOON_S, "there is no exporter")


def set_config(daemon: Daemon, text: str) -> None:
    with open(daemon.config, "w", encoding="utf-8") as file:
        file.write(text)
    seen = len(daemon.events(kind="reload"))
    daemon.reload()
    repeat_until(lambda: len(daemon.events(kind="reload")) > seen or None, SOON_S, "it was not reloaded")


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def measured(start_daemon: Callable[..., Daemon], port: int) -> Daemon:
    return start_daemon(config=settings(port))


def reap(daemon: Daemon, start_leader: Callable[..., Leader], method: str, number: int) -> dict[str, Any]:
    """Have a training die, and return the event that tells of its end."""
    leader = start_leader("pools.py", "executor", "--idle", "--method", method, socket=daemon.socket)
    leader.signal(number)
    event = daemon.wait_end(leader.session)
    assert leader.wait_all_gone(SOON_S) == []
    return event


def expected(events: list[dict[str, Any]], orphaned: set[int]) -> Counter[tuple[str, ...]]:
    """Return who was killed by cause, framework and signal; all of ``orphaned`` and nobody else must be among them."""
    killed = [
        (event["cause"]["kind"], one["framework"], one["signal"], one["pid"])
        for event in events
        for one in event["processes"]
        if one["result"] == "killed"
    ]
    assert {pid for *_, pid in killed} >= orphaned
    return Counter((cause, framework, number) for cause, framework, number, _ in killed)


def test_a_scrape_says_exactly_what_was_done_and_goes_on_saying_so_after_the_exporter_was_killed(
    measured: Daemon, port: int, start_leader: Callable[..., Leader]
) -> None:
    assert wait_scrape(port).sums("reaper_killed_processes_total") == {}
    living = start_leader(
        "pools.py", "executor", "--idle", "--method", "fork", "--workers", "3", socket=measured.socket
    )
    measured.wait_listed(living.pid, living.family.workers)
    events, orphaned = [], set()
    for method, number in (("fork", signal.SIGKILL), ("fork", signal.SIGTERM), ("spawn", signal.SIGKILL)):
        leader = start_leader("pools.py", "executor", "--idle", "--method", method, socket=measured.socket)
        leader.signal(number)
        events.append(measured.wait_end(leader.session))
        orphaned |= set(leader.family.workers)
    assert len(orphaned) == 6

    def check(found: Figures) -> None:
        assert found.sums("reaper_killed_processes_total") == expected(events, orphaned)
        for kind in ("rss", "shm", "gpu"):
            freed = sum(event["freed"][f"{kind}_bytes"] for event in events)
            assert found.of("reaper_freed_bytes_total", kind=kind) == freed
        assert found.of("reaper_freed_bytes_total", kind="rss") > 0
        assert found.sums("reaper_sessions_ended_total") == {("signal", "reaped"): 3}
        assert found.of("reaper_reap_latency_seconds_count") == 3
        latency_s = sum(event["latency_s"] for event in events)
        assert found.of("reaper_reap_latency_seconds_sum") == pytest.approx(latency_s)
        kinds = Counter((event["kind"],) for event in measured.events())
        assert found.sums("reaper_events_total") == kinds
        status = measured.ask("status")
        assert found.of("reaper_sessions", state="running") == status["sessions"] == 1
        assert found.of("reaper_workers") == status["workers"] == 3
        for name, field in (
            ("reaper_orphans", "orphans"),
            ("reaper_stuck_processes", "stuck"),
            ("reaper_quarantined_processes", "quarantined"),
        ):
            assert found.of(name) == status[field] == 0
        assert found.of("process_resident_memory_bytes") > 2**20

    before = wait_scrape(port)
    check(before)
    assert before.of("reaper_companion_restarts_total", companion="metrics-exporter") == 0
    first = exporter_of(measured)
    os.kill(first, signal.SIGKILL)
    assert wait_gone([first], SOON_S) == []
    after = wait_scrape(port)
    check(after)
    assert after.of("reaper_companion_restarts_total", companion="metrics-exporter") == 1
    assert after.of("reaper_start_time_seconds") == before.of("reaper_start_time_seconds")
    assert (
        after.of("reaper_scan_duration_seconds_count") >= before.of("reaper_scan_duration_seconds_count") > 0
    )


def test_an_exporter_that_stands_still_holds_up_no_reap_and_ends_with_the_daemon(
    measured: Daemon, port: int, start_leader: Callable[..., Leader]
) -> None:
    wait_scrape(port)
    exporter = exporter_of(measured)
    os.kill(exporter, signal.SIGSTOP)
    assert reap(measured, start_leader, "fork", signal.SIGKILL)["kind"] == "reaped"
    with open(f"/proc/{exporter}/stat") as file:
        assert file.read().rpartition(") ")[2].startswith("T")
    set_config(measured, settings(port, enabled=False))  # nor is it waited for then
    assert wait_gone([exporter], SOON_S) == []
    set_config(measured, settings(port))
    wait_scrape(port)
    exporter = exporter_of(measured)
    os.kill(exporter, signal.SIGSTOP)
    measured.kill9()
    assert wait_gone([exporter], SOON_S) == []


def test_a_port_that_is_taken_is_a_warning_and_had_once_it_is_free_and_a_reload_takes_another(
    start_daemon: Callable[..., Daemon], start_leader: Callable[..., Leader]
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port, other = taken.getsockname()[1], free_port()
    daemon = start_daemon(config=settings(port))
    sentence = f"the metrics exporter: cannot listen on 127.0.0.1:{port}: Address already in use"
    repeat_until(lambda: sentence in daemon.read_log() or None, SOON_S, "nothing is said of the port")
    assert reap(daemon, start_leader, "fork", signal.SIGKILL)["kind"] == "reaped"
    taken.close()
    killed = wait_scrape(port).sums("reaper_killed_processes_total")
    assert sum(killed.values()) == 2
    set_config(daemon, settings(other))
    found = wait_scrape(other)
    assert found.sums("reaper_killed_processes_total") == killed
    assert found.of("reaper_companion_restarts_total", companion="metrics-exporter") == 0
    assert scrape(port) is None
    assert len(exporters(daemon)) == 1


def test_where_it_is_off_there_is_no_exporter_and_a_reload_starts_and_ends_one_without_rights(
    start_daemon: Callable[..., Daemon], port: int
) -> None:
    daemon = start_daemon(config=settings(port, enabled=False))
    assert exporters(daemon) == []
    set_config(daemon, settings(port))
    found = wait_scrape(port)
    assert found.sums("reaper_events_total") == {("reload",): 1}
    exporter = exporter_of(daemon)
    with open(f"/proc/{exporter}/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) != {"0"}
        assert status["Groups"].split() == []
    set_config(daemon, settings(port, enabled=False))
    assert wait_gone([exporter], SOON_S) == []
    assert scrape(port) is None
    assert exporters(daemon) == []
