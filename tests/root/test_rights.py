"""Each capability of the unit is needed: taken away, exactly what it is for fails, and the log and `reaperctl doctor` say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import installed
import pytest
from bootedsystem import BootedSystem
from installed import GONE_WITHIN_S, UNIT, USER, Training, journal, main_pid

from reaperd.rights import RIGHTS

pytestmark = pytest.mark.needs_root

HOME = f"/srv/{USER}"
Train = Callable[..., Training]


@pytest.fixture
def without(settled: BootedSystem) -> Iterator[Callable[[str], BootedSystem]]:
    """The service with one capability less."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def start(name: str) -> BootedSystem:
            stack.enter_context(installed.drop_in(settled, f"CapabilityBoundingSet=~{name}"))
            settled.run("systemctl", "start", UNIT, check=False)
            return settled

        yield start


def assert_told(system: BootedSystem, name: str, since: str, priority: str) -> None:
    lines = [entry for entry in journal(system, since) if name in entry["MESSAGE"]]
    assert [entry["PRIORITY"] for entry in lines] == [priority]
    assert RIGHTS[name].without in lines[0]["MESSAGE"]


def finding(system: BootedSystem) -> dict[str, str]:
    shown = system.run("reaperctl", "doctor", "--json", check=False).stdout
    (found,) = [check for check in json.loads(shown)["checks"] if check["check"] == "daemon's reach"]
    return dict(found)


def assert_doctor_knows(system: BootedSystem, name: str, level: str) -> None:
    found = finding(system)
    assert found["level"] == level
    assert f"without {name} {RIGHTS[name].without}" in found["fact"]


def test_with_all_of_them_nothing_is_said(unit: BootedSystem) -> None:
    assert "CAP_" not in finding(unit)["fact"]  # but that it has pids of its own, as the booted system has


def test_without_cap_kill_nobody_else_is_ended(without: Callable[[str], BootedSystem], train: Train) -> None:
    since = installed.now()
    system = without("CAP_KILL")
    assert_told(system, "CAP_KILL", since, "4")
    assert_doctor_knows(system, "CAP_KILL", "problem")
    session = train()
    session.kill_leader()
    system.until(
        lambda: installed.messages(system, since).count("not permitted") >= len(session.workers),
        "each that cannot be signalled is told of",
    )
    assert session.living() == len(session.workers)


def test_without_cap_sys_ptrace_no_stamp_of_others_is_read(
    without: Callable[[str], BootedSystem], train: Train
) -> None:
    since = installed.now()
    system = without("CAP_SYS_PTRACE")
    assert_told(system, "CAP_SYS_PTRACE", since, "4")
    assert_doctor_knows(system, "CAP_SYS_PTRACE", "limit")
    assert_left_behind(system, train)


def test_without_cap_dac_read_search_what_lies_behind_others_modes_is_not_seen(
    without: Callable[[str], BootedSystem], train: Train
) -> None:
    since = installed.now()
    system = without("CAP_DAC_READ_SEARCH")
    assert_told(system, "CAP_DAC_READ_SEARCH", since, "4")
    assert_doctor_knows(system, "CAP_DAC_READ_SEARCH", "limit")
    assert_left_behind(system, train)


def assert_left_behind(system: BootedSystem, train: Train) -> None:
    """A session that began before the daemon is known by its marks alone, and those cannot be read."""
    system.run("systemctl", "stop", UNIT)
    session = train(words=("late",))
    system.run("systemctl", "start", UNIT)
    assert session.leader not in [one["leader"]["pid"] for one in installed.ask(system, "ps")]
    session.kill_leader()
    assert session.living(within_s=1.0) == len(session.workers)


@pytest.mark.parametrize("name", ["CAP_SETUID", "CAP_SETGID"])
def test_without_those_by_which_the_gate_becomes_nobody_there_is_no_daemon(
    name: str, without: Callable[[str], BootedSystem]
) -> None:
    since = installed.now()
    system = without(name)
    shown = system.show(UNIT, "ActiveState", "NRestarts", "ExecMainStatus")
    assert shown == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": "2"}
    assert_told(system, name, since, "3")


def test_with_all_of_them_the_same_sessions_are_reaped(settled: BootedSystem, train: Train) -> None:
    """So it was the capability that was missing."""
    session = train(words=("late", HOME))
    settled.run("systemctl", "start", UNIT)
    assert main_pid(settled) != "0"
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
