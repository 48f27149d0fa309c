"""What alerts say: enough to act on, nothing that a chat would act on, and never a part of a URL."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reaperd import report
from reaperd.alert_groups import Group
from reaperd.alert_words import (
    NO_NETWORK,
    NO_REASON,
    body_of,
    gravity_of,
    harmless,
    line_of,
    reason_in,
    title_of,
)
from reaperd.config_values import hidden_url

AT = "2026-01-31T12:00:07.123Z"


def event(kind: str = "reaped", **fields: Any) -> dict[str, Any]:
    return {"at": AT, **report.event(kind, **fields)}


def reaped(**more: Any) -> dict[str, Any]:
    processes = [{"pid": pid, "framework": "loky", "signal": "SIGTERM", "result": "killed"} for pid in (1, 2)]
    facts = {"session": "12-ab", "name": "risk", "uid": 1000, "cause": {"kind": "signal", "code": 9}}
    return event(**{**facts, "processes": processes, "latency_s": 0.25, **more})


def test_a_line_says_when_who_and_what() -> None:
    line = line_of(reaped(freed={"rss_bytes": 3 << 30, "shm_bytes": 0, "gpu_bytes": 0}))
    assert line.startswith("12:00:07 risk, uid 1000, ")
    for part in ("SIGKILL", "2 processes (2 SIGTERM)", "gone in 250 ms", "freed 3.0 GiB of memory"):
        assert part in line


def test_a_session_without_a_name_is_known_by_its_id_and_an_orphan_by_its_pid() -> None:
    assert line_of(event(session="12-ab", uid=5)).startswith("12:00:07 12-ab, uid 5")
    process = {"pid": 4711, "framework": "loky", "signal": "SIGSTOP", "result": "stopped"}
    line = line_of(event("quarantined", uid=5, rule="memory", processes=[process]))
    assert "pid 4711 (loky), uid 5, stopped" in line


def test_a_dry_run_is_said_to_be_one() -> None:
    assert "dry run" in line_of(reaped(dry_run=True))


def test_processes_that_were_left_out_are_counted() -> None:
    assert "and 44 more" in line_of(reaped(processes_left_out=44))


@pytest.mark.parametrize(
    "name",
    [
        "<!channel>",
        "@everyone",
        "&commat;everyone",
        "<@U123>",
        "[click](http://evil/)",
        "<http://evil|bank>",
        "`x`",
        "*x*",
        "a\nb\x1b[2J",
        "\u202e",
    ],
)
def test_a_name_rings_no_channel_hides_no_link_and_breaks_no_line(name: str) -> None:
    line = line_of(reaped(name=name))
    assert not set(line) & set("<>@&[]`*|")
    assert "://" not in line
    assert line.isprintable()


@given(st.text(max_size=400))
def test_every_text_is_one_harmless_line_of_limited_length(name: str) -> None:
    line = line_of(reaped(name=name))
    assert line.isprintable()
    assert len(line) < 320
    assert harmless(line) == line


def test_a_message_counts_each_kind_and_names_the_host() -> None:
    message = (
        Group("reaped", 12, AT, "2026-01-31T12:01:00.000Z", ("a", "b")),
        Group("stuck", 1, AT, AT, ("c",)),
        Group("killed", 3, AT, AT, ()),
    )
    assert title_of(message, "node7") == "Reaper on node7: 12 reaped, 1 stuck, 3 killed"
    assert body_of(message) == (
        "12 reaped:\n- a\n- b\n- and 10 more, the last at 12:01:00\n\n"
        "1 stuck:\n- c\n\n3 killed:\n- 3, without details\n\n"
        f"Times are UTC. More: reaperctl events --since {AT}"
    )


@pytest.mark.parametrize(
    ("kinds", "gravity"),
    [
        (["started", "ended"], "info"),
        (["reaped"], "warning"),
        (["quarantined", "started"], "warning"),
        (["reaped", "stuck"], "failure"),
        (["breach"], "failure"),
    ],
)
def test_a_message_is_as_grave_as_the_gravest_of_it(kinds: list[str], gravity: str) -> None:
    assert gravity_of(kinds) == gravity


# -- secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("HTTPConnectionPool(host='h', port=1): ... [Errno 111] Connection refused", os.strerror(errno.ECONNREFUSED).lower()),
        ("NewConnectionError(... [Errno 97] Address family not supported by protocol", NO_NETWORK),
        ("[Errno 1] Operation not permitted", NO_NETWORK),
        ("Failed to send JSON notification: Forbidden., error=403.", "the service answered HTTP 403"),
        ("Socket Exception: (535, b'5.7.8 hunter2 not accepted')", "the mail server answered 535"),
        ("Read timed out. (read timeout=4.0)", "it did not answer in time"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "the server's TLS certificate is not to be trusted"),
        ("[Errno -2] Name or service not known", "the host's name cannot be resolved"),
        ("[Errno 9999] what is this", NO_REASON),
        ("", NO_REASON),
    ],
)  # fmt: skip
def test_a_reason_is_told_in_words_of_ours(said: str, reason: str) -> None:
    assert reason_in(said) == reason


WORDS = {*range(1000)}
KNOWN = {
    *(os.strerror(number).lower() for number in errno.errorcode),
    *(f"the service answered HTTP {number:03}" for number in WORDS),
    *(f"the mail server answered {number:03}" for number in WORDS),
    *(
        "it did not answer in time",
        "TLS failed",
        "the host's name cannot be resolved",
        "the connection failed",
    ),
    *(
        "the server's TLS certificate is not to be trusted",
        "the credentials were refused",
        NO_NETWORK,
        NO_REASON,
    ),
}


@given(
    st.text()
    | st.from_regex(r"(\[Errno -?\d+\]|error=\d+|\(\d+, b'|SSL|Timeout|[Cc]onnection error|hunter2| )+")
)
@example("error=403hunter2 [Errno 111]hunter2")
def test_whatever_a_library_says_nothing_of_it_is_quoted(said: str) -> None:
    assert reason_in(said) in KNOWN


@given(st.text())
@example("slack://hunter2/B/C")
@example("hunter2://hunter2 x")
def test_of_a_url_only_its_service_is_shown(url: str) -> None:
    shown = hidden_url(url)
    assert shown.endswith("***")
    service = shown[: -len("***")].removesuffix("://")
    assert service == "" or url.lower().startswith(f"{service}://")
    assert service.isascii()
