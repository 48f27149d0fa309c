"""What `journalctl -u reaperd` shows of a real run: each line once, with its priority, and journald's time alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import installed
import pytest
from bootedsystem import BootedSystem
from installed import CONFIG, GONE_WITHIN_S, UNIT, Training, gate_pid, is_answering, journal

pytestmark = pytest.mark.needs_root

ERROR, WARNING, INFO = "3", "4", "6"  # syslog(3)
TIME = re.compile(r"\b\d{4}-\d\d-\d\d|\b\d\d:\d\d:\d\d\b")


def saying(entries: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if words in entry["MESSAGE"]]


@pytest.fixture
def since() -> str:
    return installed.now()


def test_a_life_in_which_nothing_goes_wrong_is_told_in_lines_of_info(
    since: str, unit: BootedSystem, train: Callable[..., Training]
) -> None:
    session = train()
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    unit.until(lambda: session.leader in installed.reaped(unit), "the session is over")
    unit.run("systemctl", "stop", UNIT)
    entries = journal(unit, since)
    # A booted system has pids of its own, and says so.
    whole = [
        entry for entry in entries if not entry["MESSAGE"].startswith("limited here: only the processes")
    ]
    assert {entry["PRIORITY"] for entry in whole} == {INFO}
    assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {"reaperd"}
    told = [entry["MESSAGE"].split()[0] for entry in whole]
    assert told == ["started", "registered", *["sent"] * 4, "reaped", "stopped"]
    assert [entry["MESSAGE"] for entry in entries if TIME.search(entry["MESSAGE"])] == []
    for pid in session.workers:
        (line,) = saying(entries, f" pid={pid} ")
        assert re.match(r"sent SIGTERM pid=\d+ session=\S+ name='training' framework=", line["MESSAGE"])
        assert "cause=signal:9" in line["MESSAGE"]


def test_what_somebody_must_see_to_is_an_error_and_what_goes_on_with_less_a_warning(
    since: str, unit: BootedSystem
) -> None:
    unit.run("kill", "-KILL", gate_pid(unit))
    unit.path(CONFIG).write_text('[kill]\ngrace = -1\n[sessions]\nisolate = "x"\n')
    unit.run("systemctl", "reload", UNIT)
    unit.until(
        lambda: len(saying(journal(unit, since), "kept the old settings")) == 2, "both faults are told"
    )
    unit.path(CONFIG).write_text('[protect]\nusers = ["nobody-of-that-name"]\n')
    unit.run("systemctl", "reload", UNIT)
    unit.until(lambda: bool(saying(journal(unit, since), "nobody-of-that-name")), "the name is told")
    entries = journal(unit, since)
    priorities = {
        words: {entry["PRIORITY"] for entry in saying(entries, words)}
        for words in ("started", "the gate ended", "kept the old settings", "there is no user", "reloaded")
    }
    assert priorities == {
        "started": {INFO},
        "the gate ended": {WARNING},
        "kept the old settings": {ERROR},
        "there is no user": {WARNING},
        "reloaded": {INFO},
    }


def test_settings_that_keep_it_from_starting_are_errors(since: str, settled: BootedSystem) -> None:
    settled.path(CONFIG).write_text('[scan]\ninterval = "-1s"\n[kill]\ngrace = -1\n')
    assert settled.run("systemctl", "start", UNIT, check=False).returncode != 0
    entries = journal(settled, since)
    assert [entry["PRIORITY"] for entry in entries] == [ERROR, ERROR]
    assert len(saying(entries, "[scan] interval") + saying(entries, "[kill] grace")) == 2


def test_another_daemon_on_its_socket_is_an_error(since: str, unit: BootedSystem) -> None:
    run = ("systemd-run", "--quiet", "--wait", "--unit=second", "--collect")
    assert unit.run(*run, "/usr/local/bin/reaperd", check=False).returncode != 0
    (entry,) = journal(unit, since, unit="second.service")
    assert entry["PRIORITY"] == ERROR
    assert "already serves /run/reaper/reaper.sock" in entry["MESSAGE"]


def test_the_last_words_of_an_interpreter_that_cannot_begin_are_errors(
    since: str, settled: BootedSystem
) -> None:
    with installed.drop_in(settled, "Environment=PYTHONHOME=/nonexistent\nRestart=no"):
        assert settled.run("systemctl", "start", UNIT, check=False).returncode != 0
        entries = journal(settled, since)
    assert saying(entries, "Fatal Python error")
    assert {entry["PRIORITY"] for entry in entries} == {ERROR}


def test_json_lines_have_their_priorities_too(since: str, settled: BootedSystem) -> None:
    settled.path(CONFIG).write_text(
        '[daemon]\nlog_format = "json"\n[protect]\nusers = ["nobody-of-that-name"]\n'
    )
    settled.run("systemctl", "start", UNIT)
    assert is_answering(settled)
    told = [(json.loads(entry["MESSAGE"]), entry["PRIORITY"]) for entry in journal(settled, since)]
    assert {(line["level"], priority) for line, priority in told} == {("warning", WARNING), ("info", INFO)}


def test_what_is_started_by_hand_from_a_service_of_ones_own_has_times_and_no_marks(
    settled: BootedSystem,
) -> None:
    # A terminal's shell inherits JOURNAL_STREAM from the desktop that started it.
    said = settled.path("/tmp/said-by-hand")
    script = 'exec /usr/local/bin/reaperd --socket /tmp/by-hand/s --state-dir /tmp/by-hand 2>"$1"'
    run = ("systemd-run", "--quiet", "--unit=by-hand")
    settled.run(*run, "sh", "-c", script, "sh", "/tmp/said-by-hand")
    settled.until(lambda: said.exists() and "started" in said.read_text(), "it starts")
    settled.run("systemctl", "stop", "by-hand.service")
    lines = said.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING) ", line) for line in lines), lines
