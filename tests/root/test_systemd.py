"""The unit under a real systemd: its sandbox lets the daemon do all of its work, and its restarts lose nobody."""

from __future__ import annotations

import os
from collections.abc import Callable

import installed
import pytest
from bootedsystem import BootedSystem
from installed import CONFIG, GONE_WITHIN_S, USER, Training, is_answering, main_pid, messages

pytestmark = pytest.mark.needs_root


def test_started_means_ready_and_every_user_gets_an_answer(unit: BootedSystem) -> None:
    shown = unit.show("reaperd.service", "ActiveState", "StatusText", "NRestarts")
    assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
    assert shown["StatusText"]
    unit.run("reaperctl", "ping")
    unit.run("reaperctl", "ping", user=USER)


def test_the_core_holds_five_capabilities_and_the_gate_none(unit: BootedSystem) -> None:
    core = dict(
        line.split(":\t", 1) for line in unit.path(f"/proc/{main_pid(unit)}/status").read_text().splitlines()
    )
    # capability.h: CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE
    assert int(core["CapEff"], 16) == sum(1 << number for number in (2, 5, 6, 7, 19))
    assert (core["NoNewPrivs"], core["Seccomp"]) == ("1", "2")
    # Answered by a gate that has given up its privileges: it does that before it reads.
    unit.run("reaperctl", "ping")
    child = installed.gate_pid(unit)
    gate = dict(line.split(":\t", 1) for line in unit.path(f"/proc/{child}/status").read_text().splitlines())
    uid = unit.run("id", "-u", "reaper-gate").stdout.strip()
    assert gate["Uid"].split() == [uid] * 4
    assert {int(gate[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}


def test_the_daemon_sees_the_same_mounts_as_everybody_else(unit: BootedSystem) -> None:
    # Else it could reclaim nothing: it only touches what a session saw on these very mounts.
    assert os.readlink(unit.path(f"/proc/{main_pid(unit)}/ns/mnt")) == os.readlink(
        unit.path("/proc/1/ns/mnt")
    )


def test_another_users_workers_and_shared_memory_go_with_their_leader(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    assert session.folder().exists()
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    unit.until(lambda: not session.folder().exists(), "the array is taken out of /dev/shm")


def test_killed_with_sigkill_it_comes_back_and_knows_its_sessions(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session, before = train(), main_pid(unit)
    unit.run("kill", "-KILL", before)
    unit.until(lambda: main_pid(unit) not in ("0", before), "systemd starts it again")
    unit.until(lambda: is_answering(unit), "it answers again")
    assert session.living() == 4
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0


def test_a_leader_that_dies_while_no_daemon_runs_is_reaped_by_the_next(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    unit.run("systemctl", "stop", "reaperd.service")
    session.kill_leader()
    assert session.living() == 4
    unit.run("systemctl", "start", "reaperd.service")
    assert session.living(within_s=GONE_WITHIN_S) == 0


def test_a_daemon_that_hangs_is_replaced_by_the_watchdog(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    with installed.drop_in(unit, "WatchdogSec=1"):
        unit.run("systemctl", "start", "reaperd.service")
        session, before = train(), main_pid(unit)
        unit.run("kill", "-STOP", before)
        unit.until(
            lambda: main_pid(unit) not in ("0", before) and is_answering(unit), "the watchdog replaces it"
        )
        session.kill_leader()
        assert session.living(within_s=GONE_WITHIN_S) == 0


def test_a_daemon_with_nothing_to_do_feeds_the_watchdog(unit: BootedSystem) -> None:
    unit.run("systemctl", "stop", "reaperd.service")
    run = ("systemd-run", "--quiet", "--unit=idle", "--property=Type=notify", "--property=WatchdogSec=500ms")
    unit.run(*run, "/usr/local/bin/reaperd")
    fed = unit.show("idle.service", "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"]
    seen = {fed}
    unit.until(
        lambda: (
            seen.add(unit.show("idle.service", "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"])
            or len(seen) > 4
        ),
        "it feeds the watchdog",
    )
    assert unit.show("idle.service", "ActiveState", "NRestarts") == {
        "ActiveState": "active",
        "NRestarts": "0",
    }
    unit.run("systemctl", "stop", "idle.service")


def test_reloading_applies_a_good_file_and_keeps_the_old_settings_on_a_bad_one(unit: BootedSystem) -> None:
    config, before = unit.path(CONFIG), main_pid(unit)
    config.write_text("[kill]\ngrace = 7\n")
    unit.run("systemctl", "reload", "reaperd.service")
    unit.until(lambda: "grace = 7" in shown_config(unit), "the new setting holds")
    config.write_text("[kill]\ngrace = -1\n")
    unit.run("systemctl", "reload", "reaperd.service")
    unit.until(lambda: "[kill] grace" in messages(unit), "the fault is named in the journal")
    assert "grace = 7" in shown_config(unit)
    assert (main_pid(unit), unit.show("reaperd.service", "ActiveState")["ActiveState"]) == (before, "active")


def shown_config(system: BootedSystem) -> str:
    text = system.run("reaperctl", "config", "show").stdout
    return text.replace('grace = "7s"', "grace = 7").replace("grace = 7.0", "grace = 7")


def test_a_bad_configuration_fails_the_start_once_with_its_fault_in_the_journal(unit: BootedSystem) -> None:
    unit.run("systemctl", "stop", "reaperd.service")
    unit.path(CONFIG).write_text('[scan]\ninterval = "-1s"\n')
    assert unit.run("systemctl", "start", "reaperd.service", check=False).returncode != 0
    shown = unit.show("reaperd.service", "ActiveState", "SubState", "NRestarts", "ExecMainStatus")
    assert shown == {"ActiveState": "failed", "SubState": "failed", "NRestarts": "0", "ExecMainStatus": "2"}
    assert "[scan] interval" in messages(unit)


def test_stopping_it_ends_no_training_and_takes_the_gate_along(
    unit: BootedSystem, train: Callable[[], Training]
) -> None:
    session = train()
    unit.run("systemctl", "stop", "reaperd.service")
    shown = unit.show("reaperd.service", "ActiveState", "Result", "ExecMainStatus")
    assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert session.living(within_s=0.5) == 4
    assert unit.run("pgrep", "--full", "reaperd.gate", check=False).stdout == ""
    assert unit.run("reaperctl", "ping", check=False).returncode == 3
