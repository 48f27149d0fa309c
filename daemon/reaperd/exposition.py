"""The figures as Prometheus reads them: what each is called, its type, labels and meaning. Runs in the exporter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from reaperd.linux import psi

Sample = tuple[tuple[str, ...], float]  # the values of the labels, and the value


class Family(NamedTuple):
    """One metric: what it is called without a suffix of its type, and how its samples are had from the figures."""

    name: str
    type: str  # gauge, counter or histogram
    help: str
    labels: tuple[str, ...]
    samples: Callable[[Mapping[str, Any]], Iterable[Sample]] = lambda _: ()
    field: str = ""  # of a histogram


def _one(field: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    """Return the sample of what has no label and stands under ``field``."""
    return lambda figures: [((), figures[field])]


def _by(field: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    """Return samples of what has one label and stands under ``field``."""
    return lambda figures: [((label,), value) for label, value in figures[field].items()]


def _rows(field: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    """Return samples of what stands under ``field`` as labels with the value after them."""
    return lambda figures: [(tuple(labels), value) for *labels, value in figures[field]]


def _companions(place: int) -> Callable[[Mapping[str, Any]], list[Sample]]:
    return lambda figures: [
        ((_short(name),), told[place])
        for name, told in figures["companions"].items()
        if told[place] is not None
    ]


def _short(name: str) -> str:
    """Return "metrics-exporter" for "the metrics exporter"."""
    return name.removeprefix("the ").replace(" ", "-")


FAMILIES = (
    Family(
        "reaper_build_info", "gauge", "The daemon that is running; always 1", ("version", "mode"),
        lambda figures: [((figures["version"], figures["mode"]), 1)],
    ),
    Family(
        "reaper_start_time_seconds", "gauge",
        "When counting began, in seconds since 1970: the daemon's start, or when [metrics] was enabled by a reload", (),
        _one("started_at_epoch_s"),
    ),
    Family(
        "reaper_last_answer_timestamp_seconds", "gauge",
        "When the daemon last told the exporter these figures, in seconds since 1970", (),
        _one("answered_at_epoch_s"),
    ),
    Family(
        "reaper_dry_run", "gauge", "1 where the daemon only says what it would do, else 0", (),
        _one("dry_run"),
    ),
    Family(
        "reaper_last_reload_successful", "gauge", "0 where the last reload found faults and kept the old settings", (),
        _one("reload_was_good"),
    ),
    Family("reaper_sessions", "gauge", "Sessions on record by state", ("state",), _by("sessions")),
    Family(
        "reaper_workers", "gauge", "Workers of the sessions whose leaders live, trackers not counted", (),
        _one("workers"),
    ),
    Family(
        "reaper_orphans", "gauge", "Workers that outlived their leader or pool, and that no rule spares", (),
        _one("orphans"),
    ),
    Family(
        "reaper_stuck_processes", "gauge", "Processes that SIGKILL did not end", (),
        _one("stuck"),
    ),
    Family(
        "reaper_quarantined_processes", "gauge", "Orphans that are stopped and wait for a decision", (),
        _one("quarantined"),
    ),
    Family("reaper_events", "counter", "Events of the history by kind", ("kind",), _by("events")),
    Family(
        "reaper_sessions_ended", "counter",
        "Sessions that ended, by how their leader ended and by what was to be done", ("cause", "outcome"), _rows("ended"),
    ),
    Family(
        "reaper_killed_processes", "counter",
        "Processes that ended after a signal of the daemon's; cause is how their leader ended, orphan or cleanup",
        ("cause", "framework", "signal"), _rows("killed"),
    ),
    Family(
        "reaper_freed_bytes", "counter", "Memory that was given back by those who were ended", ("kind",), _by("freed_bytes")
    ),
    Family(
        "reaper_reap_latency_seconds", "histogram",
        "From the death of a leader to that of the last of its workers, exit_grace included", (), field="latencies",
    ),
    Family("reaper_scan_duration_seconds", "histogram", "How long each scan took", (), field="scans"),
    Family(
        "reaper_companion_restarts", "counter", "How often a process beside the core has died and was replaced",
        ("companion",), _companions(0),
    ),
    Family(
        "reaper_companion_dropped_messages", "counter", "Messages to a process beside the core that it did not take",
        ("companion",), _companions(1),
    ),
)  # fmt: skip
PRESSURE = Family(
    "reaper_host_pressure_seconds", "counter",
    "How long some, or all, tasks of the machine have waited for a resource since it booted", ("resource", "kind"),
    lambda stalls: [
        ((resource, kind), total_us / 1e6) for resource, kinds in stalls.items() for kind, total_us in kinds.items()
    ],
)  # fmt: skip


class Exposition(Collector):
    """The figures that the core told last, ready to be scraped."""

    def __init__(self, core_pid: int, pressure: str = psi.PRESSURE) -> None:
        self.figures: Mapping[str, Any] | None = None
        self._pressure = pressure
        registry = CollectorRegistry()
        registry.register(self)
        # Of the core, under the names that every Prometheus client gives them.
        ProcessCollector(pid=lambda: core_pid, registry=registry)
        self._app = make_wsgi_app(registry)

    def describe(self) -> Iterator[Metric]:
        """Yield every metric without its samples: a scraper may ask for some by name."""
        for family in (*FAMILIES, PRESSURE):
            yield Metric(family.name, family.help, family.type)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; what the core does not tell any more is gone with its last answer."""
        if self.figures is not None:
            for family in FAMILIES:
                yield _metric(family, self.figures)
        yield _metric(PRESSURE, psi.read_stalls(self._pressure))

    def render(
        self, query: str = "", accept: str = "", accept_encoding: str = ""
    ) -> tuple[list[tuple[str, str]], bytes]:
        """Return headers and body of an answer to ``GET /metrics``; the arguments are those of the request."""
        headers: list[tuple[str, str]] = []
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": query,
            "HTTP_ACCEPT": accept,
            "HTTP_ACCEPT_ENCODING": accept_encoding,
        }
        body = b"".join(self._app(environment, lambda _, told: headers.extend(told)))
        return headers, body


def _metric(family: Family, figures: Mapping[str, Any]) -> Metric:
    if family.type == "histogram":
        return _histogram(family, figures[family.field])
    kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
    metric: CounterMetricFamily | GaugeMetricFamily = kind(family.name, family.help, labels=family.labels)
    for labels, value in family.samples(figures):
        metric.add_metric(labels, value)
    return metric


def _histogram(family: Family, told: Mapping[str, Any]) -> HistogramMetricFamily:
    buckets, so_far = [], 0
    for bound, count in zip((*told["bounds"], float("inf")), told["counts"], strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), so_far))
    metric = HistogramMetricFamily(family.name, family.help)
    metric.add_metric((), buckets, told["sum"])
    return metric
