"""The exporter: what a scrape says, what listens where, and who cannot hold it up. All over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from reaperd import exporter
from reaperd.counters import Counters
from reaperd.exporter import Figures, Listeners, Server
from reaperd.exposition import FAMILIES, PRESSURE, Exposition

ROOT = Path(__file__).resolve().parents[2]
STATE = {
    "version": "1.2.3",
    "mode": "user",
    "started_at_epoch_s": 1000.5,
    "answered_at_epoch_s": 2000.5,
    "dry_run": False,
    "sessions": {"running": 3, "ending": 0, "ended": 1},
    "workers": 12,
    "orphans": 2,
    "stuck": 1,
    "quarantined": 4,
    "companions": {"the gate": [2, None], "the metrics exporter": [1, 5]},
}


def figures(**changed: Any) -> dict[str, Any]:
    counters = Counters()
    counters.scans.add(0.002)
    return {**STATE, **counters.record(), **changed}


@pytest.fixture
def exposition(tmp_path: Path) -> Exposition:
    (tmp_path / "cpu").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n")
    return Exposition(1, str(tmp_path))


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


# -- what a scrape says ---------------------------------------------------------------------------


def test_every_figure_stands_where_it_belongs(exposition: Exposition) -> None:
    exposition.figures = figures(killed=[["signal", 'a "b"\n\\', "SIGKILL", 7]])
    text = exposition.render()[1].decode()
    assert value(text, "reaper_build_info", version="1.2.3", mode="user") == 1
    assert value(text, "reaper_start_time_seconds") == 1000.5
    assert value(text, "reaper_last_answer_timestamp_seconds") == 2000.5
    assert value(text, "reaper_dry_run") == 0
    assert value(text, "reaper_last_reload_successful") == 1
    assert value(text, "reaper_sessions", state="running") == 3
    assert value(text, "reaper_sessions", state="ending") == 0
    assert value(text, "reaper_workers") == 12
    assert value(text, "reaper_orphans") == 2
    assert value(text, "reaper_stuck_processes") == 1
    assert value(text, "reaper_quarantined_processes") == 4
    assert value(text, "reaper_events_total", kind="reaped") == 0
    assert value(text, "reaper_sessions_ended_total", cause="oom", outcome="reaped") == 0
    assert (
        value(text, "reaper_killed_processes_total", cause="signal", framework='a "b"\n\\', signal="SIGKILL")
        == 7
    )
    assert value(text, "reaper_freed_bytes_total", kind="shm") == 0
    assert value(text, "reaper_companion_restarts_total", companion="gate") == 2
    assert value(text, "reaper_companion_dropped_messages_total", companion="metrics-exporter") == 5
    assert value(text, "reaper_companion_dropped_messages_total", companion="gate") is None
    assert value(text, "reaper_host_pressure_seconds_total", resource="cpu", kind="some") == 1.5
    assert value(text, "process_start_time_seconds") is not None


def test_buckets_add_up_and_end_without_a_bound(exposition: Exposition) -> None:
    exposition.figures = figures(latencies={"bounds": [1.0, 2.0], "counts": [3, 0, 2], "sum": 12.5})
    text = exposition.render()[1].decode()
    name = "reaper_reap_latency_seconds"
    assert [value(text, f"{name}_bucket", le=le) for le in ("1.0", "2.0", "+Inf")] == [3, 3, 5]
    assert (value(text, f"{name}_count"), value(text, f"{name}_sum")) == (5, 12.5)


def test_a_series_that_the_core_tells_no_more_is_gone(exposition: Exposition) -> None:
    exposition.figures = figures(killed=[["oom", "loky", "SIGTERM", 1]])
    assert b'cause="oom",framework="loky"' in exposition.render()[1]
    exposition.figures = figures()
    assert b'framework="loky"' not in exposition.render()[1]


def test_names_are_as_prometheus_wants_them(exposition: Exposition) -> None:
    for family in (*FAMILIES, PRESSURE):
        assert re.fullmatch(r"reaper_[a-z]+(_[a-z]+)*", family.name)
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert family.help
        assert not family.help.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_a_scraper_gets_the_form_that_it_asks_for(exposition: Exposition) -> None:
    exposition.figures = figures()
    plain, compressed, modern = (
        exposition.render(),
        exposition.render(accept_encoding="gzip"),
        exposition.render(accept="application/openmetrics-text;version=1.0.0"),
    )
    assert ("Content-Encoding", "gzip") in compressed[0]
    assert len(compressed[1]) < len(plain[1]) / 3
    assert modern[1].endswith(b"# EOF\n")
    assert exposition.render("name[]=reaper_workers")[1].count(b"\n") == 3


def served() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return type and labels of what the exporter serves, by the name that a query has for it."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.labels)
        for family in (*FAMILIES, PRESSURE)
    }


def test_the_document_has_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(reaper_[a-z_]+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE)
    told = {
        name: (kind, tuple(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", labels))))
        for name, kind, labels in rows
    }
    assert told == served()


# -- what comes with it ---------------------------------------------------------------------------

QUERIED = re.compile(r"\b((?:reaper|process)_[a-z_]+)\b")
PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


def names_in(expression: str) -> set[str]:
    return set(QUERIED.findall(expression))


def known_names() -> set[str]:
    suffixes = ("_bucket", "_sum", "_count")
    histograms = {
        name + one for name, (kind, _) in served().items() if kind == "histogram" for one in suffixes
    }
    return served().keys() | histograms | PROCESS


def dashboard() -> dict[str, Any]:
    text = (ROOT / "packaging" / "grafana" / "reaper.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def test_each_panel_shows_only_what_is_served_and_all_that_is_served_is_shown() -> None:
    shown: set[str] = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            names = names_in(target["expr"])
            assert names, target
            assert names <= known_names(), panel["title"]
            shown |= names
    missing = {name for name in served() if not any(one.startswith(name) for one in shown)}
    assert missing == {
        "reaper_build_info",  # of which the machines are listed
        "reaper_dry_run",
        "reaper_events_total",
        "reaper_last_answer_timestamp_seconds",
        "reaper_last_reload_successful",
    }


def test_no_two_panels_have_one_number_or_one_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 15
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_is_what_grafana_imports() -> None:
    found = dashboard()
    assert (found["schemaVersion"], found["id"], found["uid"], found["title"]) == (
        39,
        None,
        "reaper",
        "Reaper",
    )
    variables = {one["name"] for one in found["templating"]["list"]}
    for panel in found["panels"]:
        assert panel["type"] in ("row", "stat", "timeseries")
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            for target in panel["targets"]:
                used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
                assert used <= variables


def test_each_alert_asks_for_what_is_served_and_says_what_to_do() -> None:
    text = (ROOT / "packaging" / "prometheus" / "reaper-alerts.yml").read_text("utf-8")
    rules = text.split("- alert: ")[1:]
    assert len(rules) == 11
    tested = (ROOT / "packaging" / "prometheus" / "reaper-alerts.test.yml").read_text("utf-8")
    for rule in rules:
        name, _, rest = rule.partition("\n")
        expression = rest[rest.index("expr:") : rest.index("labels:")]
        assert names_in(expression) <= known_names(), name
        assert all(word in rest for word in ("severity: ", "summary: ", "description: >-")), name
        # Told of once, and left alone once.
        assert tested.count(f"alertname: {name}\n") >= 1, name


# -- how it is asked and answered -------------------------------------------------------------------


class Rig:
    """A server on a port of its own, and the core that it asks."""

    def __init__(self, exposition: Exposition) -> None:
        self.asked: list[int] = []
        self.answers = True
        self.exposition = exposition
        self.figures = Figures(self._ask, self._take)
        self.server = Server(self.figures, exposition)
        self.port = 0
        self._number = 0

    def _ask(self, number: int) -> None:
        self.asked.append(number)
        if self.answers:
            asyncio.get_running_loop().call_soon(self.answer, number)

    def answer(self, number: int) -> None:
        self._number += 1
        self.figures.answered(number, figures(workers=self._number))

    def _take(self, told: dict[str, Any]) -> None:
        self.exposition.figures = told

    def run(self, work: Callable[[Rig], Awaitable[None]]) -> None:
        async def main() -> None:
            listener = socket.create_server(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
            serving = await asyncio.start_server(
                self.server.serve, sock=listener, limit=exporter._MAX_REQUEST_BYTES
            )
            async with serving:
                await asyncio.wait_for(work(self), 20)

        asyncio.run(main())

    async def raw(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        try:
            return await reader.read()
        finally:
            writer.close()

    async def get(self, path: str = "/metrics", method: str = "GET") -> tuple[str, str]:
        data = await self.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = data.decode().partition("\r\n\r\n")
        return head.partition("\r\n")[0], body


@pytest.fixture
def rig(exposition: Exposition) -> Rig:
    return Rig(exposition)


def test_each_scrape_gets_what_the_core_knew_after_it_was_begun(rig: Rig) -> None:
    async def work(rig: Rig) -> None:
        for number in (1.0, 2.0, 3.0):
            status, body = await rig.get()
            assert status == "HTTP/1.1 200 OK"
            assert value(body, "reaper_workers") == number

    rig.run(work)


def test_many_scrapes_at_a_time_are_few_questions(rig: Rig) -> None:
    async def work(rig: Rig) -> None:
        rig.answers = False
        first = asyncio.create_task(rig.get())
        while not rig.asked:
            await asyncio.sleep(0)
        others = [asyncio.create_task(rig.get()) for _ in range(50)]
        while len(rig.figures._waiting) < 51:
            await asyncio.sleep(0)
        assert rig.asked == [1]
        rig.answer(1)
        assert value((await first)[1], "reaper_workers") == 1
        # What was asked before they came may be old: they get the answer to one more question.
        assert rig.asked == [1, 51]
        rig.answer(51)
        for other in others:
            assert value((await other)[1], "reaper_workers") == 2

    rig.run(work)


def test_a_core_that_is_busy_is_not_waited_for_and_asked_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(rig: Rig) -> None:
        rig.answers = False
        assert (await rig.get())[0] == "HTTP/1.1 503 Service Unavailable"
        rig.answers = True
        assert value((await rig.get())[1], "reaper_workers") == 1
        rig.answers = False
        for _ in range(3):
            assert value((await rig.get())[1], "reaper_workers") == 1  # the last that it told
        assert len(rig.asked) == 5
        assert len(rig.figures._waiting) == 0

    monkeypatch.setattr(Figures.refresh, "__defaults__", (0.05,))
    rig.run(work)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics?name[]=reaper_workers HTTP/1.0\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\xff\xff\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 40_000, b"431"),
        (b"GET /metrics HTTP/1.1\r\nno colon\r\n: \r\nAccept\r\n\r\n", b"200"),
    ],
)
def test_every_request_has_its_answer(rig: Rig, request_: bytes, status: bytes) -> None:
    async def work(rig: Rig) -> None:
        data = await rig.raw(request_)
        assert data.startswith(b"HTTP/1.1 " + status)
        if request_.startswith(b"HEAD"):
            assert data.endswith(b"\r\n\r\n")

    rig.run(work)


def test_those_who_never_ask_keep_nobody_from_asking(rig: Rig) -> None:
    async def work(rig: Rig) -> None:
        silent = [
            await asyncio.open_connection("127.0.0.1", rig.port)
            for _ in range(exporter._MOST_CONNECTIONS + 20)
        ]
        for _, writer in silent:
            writer.write(b"GET /metrics HTT")
        assert (await rig.get())[0] == "HTTP/1.1 200 OK"
        # The oldest had to go: at once, and not when their time was over.
        assert len(rig.server._connections) <= exporter._MOST_CONNECTIONS
        assert await silent[0][0].read() == b""
        for _, writer in silent:
            writer.close()

    rig.run(work)


def test_who_takes_too_long_to_ask_is_sent_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        assert await rig.raw(b"GET /metrics HTTP/1.1\r\n") == b""
        assert not rig.asked

    monkeypatch.setattr(exporter, "_REQUEST_S", 0.05)
    rig.run(work)


def test_who_takes_no_answer_is_sent_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(rig: Rig) -> None:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.connect(("127.0.0.1", rig.port))
            one.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            while not rig.server._connections:
                await asyncio.sleep(0.01)
            while rig.server._connections:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(exporter, "_EXCHANGE_S", 0.2)
    rig.exposition.render = lambda *_: ([], b"x" * 20_000_000)  # type: ignore[method-assign]
    rig.run(work)


# -- where it listens -----------------------------------------------------------------------------


@contextlib.contextmanager
def listeners(host: str, port: int, told: list[tuple[str, str]]) -> Iterator[Listeners]:
    found = Listeners(host, port, lambda level, text: told.append((level, text)))
    try:
        yield found
    finally:
        for one in found._open.values():
            one.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


def test_a_port_that_is_taken_is_told_of_once_and_had_once_it_is_free() -> None:
    told: list[tuple[str, str]] = []
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with listeners("127.0.0.1", port, told) as found:
        assert found.open_more() == ([], False)
        assert found.open_more() == ([], False)
        sentence = f"cannot listen on 127.0.0.1:{port}: Address already in use; trying again every 2 s"
        assert told == [("warning", sentence)]
        taken.close()
        (one,), is_all = found.open_more()
        assert (one.getsockname(), is_all) == (("127.0.0.1", port), True)
        assert told[1:] == [("info", f"listening on 127.0.0.1:{port}")]


def test_only_what_was_asked_for_is_listened_on() -> None:
    port = free_port()
    with listeners("127.0.0.1", port, []) as found:
        found.open_more()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_an_address_that_is_none_of_this_machines_is_told_of() -> None:
    told: list[tuple[str, str]] = []
    with listeners("192.0.2.1", 9478, told) as found:
        assert found.open_more() == ([], False)
    assert told[0][1].startswith("cannot listen on 192.0.2.1:9478: Cannot assign requested address")


def test_a_name_is_listened_on_wherever_this_machine_has_it() -> None:
    with listeners("localhost", free_port(), []) as found:
        new, is_all = found.open_more()
        assert is_all
        assert {one.getsockname()[0] for one in new} <= {"127.0.0.1", "::1"}
        assert new


# -- without what it needs --------------------------------------------------------------------------


def test_where_the_extra_is_missing_the_core_is_told_what_to_install() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None; from reaperd import exporter; exporter.main()"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-c", code, str(theirs.fileno()), str(os.getpid())]
        done = subprocess.run(
            command, pass_fds=[theirs.fileno()], capture_output=True, timeout=30, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
        told = json.loads(ours.recv(4096))
        assert "pip install 'reaperd[metrics]'" in told["hopeless"]
