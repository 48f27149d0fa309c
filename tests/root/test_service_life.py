"""The service beside everything else that systemd runs: jobs of every kind, logins, other daemons, boot, and what would end it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import installed
import pytest
from bootedsystem import BootedSystem
from installed import (
    CONFIG,
    GONE_WITHIN_S,
    LOGIN,
    UNIT,
    USER,
    Training,
    as_service,
    as_user,
    as_user_service,
    gate_pid,
    is_answering,
    main_pid,
)

pytestmark = pytest.mark.needs_root

Train = Callable[..., Training]
SOCKET = "/run/reaper/reaper.sock"


def has_logins() -> bool:
    """Say whether a login gets a session scope here (libpam-systemd)."""
    folders = (
        "/lib",
        "/usr/lib",
        "/lib64",
        "/usr/lib64",
        *(f"/usr/lib/{arch}-linux-gnu" for arch in ("x86_64", "aarch64")),
    )
    return os.path.exists("/etc/pam.d/login") and any(
        os.path.exists(f"{folder}/security/pam_systemd.so") for folder in folders
    )


needs_logins = pytest.mark.skipif(
    not has_logins(), reason="pam_systemd, which makes logins sessions, is not installed"
)


@pytest.fixture
def jobs(settled: BootedSystem, train: Train) -> Iterator[Callable[..., dict[str, Training]]]:
    """Start a training of every kind that systemd knows; the key is how the path of its cgroup looks."""
    with installed.user_manager(settled):

        def start(*words: str) -> dict[str, Training]:
            scope = ("setsid", "-f", "systemd-run", "--quiet", "--scope", f"--uid={USER}", "--unit=job")
            kinds = {
                "/system.slice/run-": as_service(),
                "/system.slice/job.scope": ("sh", "-c", '"$@" >/dev/null 2>&1', "sh", *scope),
                "/jobs.slice/run-": as_service("--slice=jobs.slice"),
                "/app.slice/run-": as_user_service(settled),
                **({"/session-": LOGIN} if has_logins() else {}),
            }
            started = {kind: train(*how, words=words) for kind, how in kinds.items()}
            assert [kind for kind, one in started.items() if kind not in one.cgroup()] == []
            return started

        yield start


def assert_whole(jobs: dict[str, Training]) -> None:
    assert [kind for kind, one in jobs.items() if not one.is_whole()] == []


def assert_reaped(jobs: dict[str, Training]) -> None:
    for one in jobs.values():
        one.kill_leader()
    left = {kind: one.living(within_s=GONE_WITHIN_S) for kind, one in jobs.items()}
    assert set(left.values()) == {0}, left


def known_leaders(system: BootedSystem, *options: str) -> set[int]:
    shown = system.run("reaperctl", *(options or ("--system",)), "ps", "--json").stdout
    return {session["leader"]["pid"] for session in json.loads(shown)}


# -- other people's jobs --------------------------------------------------------------------------


def test_stop_start_restart_and_upgrade_touch_no_job_of_any_kind(
    unit: BootedSystem, jobs: Callable[..., dict[str, Training]]
) -> None:
    started = jobs()
    leaders = {one.leader for one in started.values()}
    assert leaders <= known_leaders(unit)
    unit.run("systemctl", "stop", UNIT)
    assert_whole(started)
    unit.run("systemctl", "start", UNIT)
    assert leaders <= known_leaders(unit), "nobody is forgotten"
    assert_whole(started)
    unit.run("systemctl", "restart", UNIT)
    assert leaders <= known_leaders(unit)
    # As an upgrade does it: the new tree takes the place of the old one under the running daemon.
    upgrade = "cp -a /opt/reaper /opt/reaper.new && mv /opt/reaper /opt/reaper.old && mv /opt/reaper.new /opt/reaper && rm -r /opt/reaper.old"
    unit.run("sh", "-c", upgrade)
    unit.run("systemctl", "daemon-reload")
    unit.run("systemctl", "restart", UNIT)
    assert leaders <= known_leaders(unit)
    assert_whole(started)
    assert_reaped(started)


def test_jobs_that_began_before_the_daemon_are_its_own_from_its_start_on(
    settled: BootedSystem, jobs: Callable[..., dict[str, Training]]
) -> None:
    started = jobs("late")
    settled.run("systemctl", "start", UNIT)
    assert {one.leader for one in started.values()} <= known_leaders(settled), "before it says READY"
    assert_whole(started)
    assert_reaped(started)


@needs_logins
def test_the_end_of_a_login_ends_what_its_training_left_and_nothing_else(
    unit: BootedSystem, train: Train
) -> None:
    ending, other = train(*LOGIN), train(*LOGIN)
    (session,) = [
        line.split()[0]
        for line in unit.run("loginctl", "list-sessions", "--no-legend").stdout.splitlines()
        if f"/session-{line.split()[0]}.scope" in ending.cgroup()
    ]
    unit.run("kill", "-HUP", str(ending.leader))  # what a terminal that closes sends
    assert ending.living(within_s=GONE_WITHIN_S) == 0
    assert other.is_whole()
    unit.until(
        lambda: unit.run("loginctl", "show-session", session, check=False).returncode != 0,
        "the login is over, for nothing is left in it",
    )


# -- boot, and what an administrator does ---------------------------------------------------------


def times(system: BootedSystem, unit: str, *names: str) -> list[int]:
    shown = system.show(unit, *names)
    return [int(shown[name]) for name in names]


def test_it_is_ready_before_anybody_may_log_in_and_stopped_after_that(settled: BootedSystem) -> None:
    logins = "systemd-user-sessions.service"
    settled.run("systemctl", "stop", logins)
    settled.run(
        "systemctl", "start", UNIT, logins
    )  # in this order: the first is under way when the second comes
    (ready,) = times(settled, UNIT, "ActiveEnterTimestampMonotonic")
    (begun,) = times(settled, logins, "InactiveExitTimestampMonotonic")
    assert 0 < ready <= begun
    settled.run("systemctl", "stop", logins, UNIT)
    (ended,) = times(settled, logins, "InactiveEnterTimestampMonotonic")
    (stopping,) = times(settled, UNIT, "ActiveExitTimestampMonotonic")
    settled.run("systemctl", "start", logins)
    assert ended <= stopping


def test_a_daemon_that_cannot_start_keeps_nobody_from_logging_in(settled: BootedSystem) -> None:
    logins = "systemd-user-sessions.service"
    settled.path(CONFIG).write_text("[kill]\ngrace = -1\n")
    settled.run("systemctl", "stop", logins)
    assert settled.run("systemctl", "start", UNIT, logins, check=False).returncode != 0
    assert settled.show(logins, "ActiveState")["ActiveState"] == "active"


def test_it_outlives_a_new_systemd_and_a_change_of_target(unit: BootedSystem, train: Train) -> None:
    session, before = train(*as_service("--property=IgnoreOnIsolate=yes")), main_pid(unit)
    unit.run("systemctl", "daemon-reexec")
    assert (main_pid(unit), is_answering(unit)) == (before, True)
    unit.run("systemctl", "reload", UNIT)
    unit.until(lambda: unit.show(UNIT, "ActiveState")["ActiveState"] == "active", "it has reloaded")
    unit.run("systemctl", "isolate", "multi-user.target")
    assert (main_pid(unit), is_answering(unit)) == (before, True)
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    unit.run("systemctl", "stop", UNIT)
    assert unit.show(UNIT, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}


def test_its_socket_keeps_its_path_and_its_folder_over_restarts(unit: BootedSystem) -> None:
    folder, lock = unit.path("/run/reaper"), unit.path(f"{SOCKET}.lock")
    before = [(path.stat().st_ino, path.stat().st_mode, path.stat().st_uid) for path in (folder, lock)]
    unit.run("systemctl", "restart", UNIT)
    unit.run("kill", "-KILL", main_pid(unit))
    unit.until(lambda: is_answering(unit), "it comes back")
    assert [
        (path.stat().st_ino, path.stat().st_mode, path.stat().st_uid) for path in (folder, lock)
    ] == before
    assert unit.path(SOCKET).stat().st_mode & 0o777 == 0o666
    assert folder.stat().st_mode & 0o777 == 0o755
    unit.run("reaperctl", "ping", user=USER)
    unit.run("systemctl", "stop", UNIT)
    assert not folder.exists()


def may_be_protected() -> bool:
    """Say whether this machine lets root here have processes spared when memory runs out (CAP_SYS_RESOURCE)."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> 24 & 1)


# -- who would be rid of it -----------------------------------------------------------------------


def test_no_number_of_deaths_uses_up_its_starts(settled: BootedSystem, train: Train) -> None:
    with installed.drop_in(
        settled, "RestartSec=20ms"
    ):  # systemd allows five starts in ten seconds unless told
        settled.run("systemctl", "start", UNIT)
        session = train()
        for _ in range(7):
            before = main_pid(settled)
            settled.run("kill", "-KILL", before)
            settled.until(lambda before=before: main_pid(settled) not in ("0", before), "it is started again")
        settled.until(lambda: is_answering(settled), "it answers")
        assert int(settled.show(UNIT, "NRestarts")["NRestarts"]) == 7
        session.kill_leader()
        assert session.living(within_s=GONE_WITHIN_S) == 0


def test_no_number_of_deaths_of_the_gate_costs_the_core_anything(unit: BootedSystem, train: Train) -> None:
    session, core = train(), main_pid(unit)

    def kill_gate() -> bool:
        gate = gate_pid(unit)
        return bool(gate) and unit.run("kill", "-KILL", *gate.split(), check=False).returncode == 0

    for _ in range(4):
        unit.until(kill_gate, "a gate runs")
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0, "while there is no gate, too"
    unit.until(lambda: is_answering(unit), "the next gate answers")
    assert unit.show(UNIT, "MainPID", "NRestarts") == {"MainPID": core, "NRestarts": "0"}


def test_the_gate_can_start_nothing_and_goes_before_the_core_when_memory_runs_out(unit: BootedSystem) -> None:
    unit.run("reaperctl", "ping")
    gate, core = gate_pid(unit), main_pid(unit)
    limits = unit.path(f"/proc/{gate}/limits").read_text().splitlines()
    (processes,) = [line.split()[2:4] for line in limits if line.startswith("Max processes")]
    assert processes == ["0", "0"]
    scores = [unit.path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in (core, gate)]
    assert scores == ["-900" if may_be_protected() else "0", "0"]


# -- a user's own daemon --------------------------------------------------------------------------


@pytest.fixture
def own(settled: BootedSystem) -> Iterator[Callable[..., str]]:
    """USER's own daemon, running; returns what a command as USER prints."""

    def run(*command: str) -> str:
        return settled.run(*as_user(settled, *command)).stdout

    with installed.user_manager(settled):
        run("systemctl", "--user", "start", UNIT)
        yield run


def test_a_user_runs_one_of_their_own_where_none_is_installed_for_all(
    settled: BootedSystem, own: Callable[..., str], train: Train
) -> None:
    assert json.loads(own("reaperctl", "status", "--json"))["mode"] == "user"
    assert settled.path(f"/srv/{USER}/.local/state/reaper/reaper.db").exists()
    runtime = settled.path(f"/run/user/{installed.uid(settled)}/reaper")
    assert (runtime.stat().st_mode & 0o777, (runtime / "reaper.sock").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    session = train(*as_user_service(settled))
    session.kill_leader()
    assert session.living(within_s=GONE_WITHIN_S) == 0
    own("systemctl", "--user", "stop", UNIT)
    shown = own("systemctl", "--user", "show", UNIT, "--property=Result,ExecMainStatus").splitlines()
    assert set(shown) == {"Result=success", "ExecMainStatus=0"}


def test_a_daemon_for_all_and_one_of_a_user_s_own_each_reap_what_is_theirs(
    unit: BootedSystem, own: Callable[..., str], train: Train
) -> None:
    mine, shared = train(*as_user_service(unit)), train()
    assert known_leaders(unit) & {mine.leader, shared.leader} == {shared.leader}
    unit.run("systemctl", "restart", UNIT)
    own("systemctl", "--user", "restart", UNIT)
    assert known_leaders(unit) & {mine.leader, shared.leader} == {shared.leader}
    owned = {session["leader"]["pid"] for session in json.loads(own("reaperctl", "--user", "ps", "--json"))}
    assert owned & {mine.leader, shared.leader} == {mine.leader}
    for one in (mine, shared):
        one.kill_leader()
        assert one.living(within_s=GONE_WITHIN_S) == 0
    unit.until(lambda: shared.leader in installed.reaped(unit), "the session is over")
    assert (installed.reaped(unit).count(shared.leader), installed.reaped(unit).count(mine.leader)) == (1, 0)
    told = own("reaperctl", "--user", "events", "--json")
    assert installed.events(told, "reaped").count(mine.leader) == 1
    assert shared.leader not in installed.events(told, "reaped")


@needs_logins
def test_a_user_who_logs_out_without_lingering_takes_their_own_daemon_along(settled: BootedSystem) -> None:
    number = installed.uid(settled)
    wants = settled.path(f"/srv/{USER}/.config/systemd/user/default.target.wants")
    settled.run("install", "-d", "-o", USER, "-g", USER, *_parents(wants.relative_to(settled.path("/"))))
    link = wants / UNIT
    link.symlink_to(f"/usr/local/lib/systemd/user/{UNIT}")
    since = installed.now()
    try:
        settled.run(*LOGIN, "--unit=login", "sleep", "600")
        socket = settled.path(f"/run/user/{number}/reaper/reaper.sock")
        settled.until(socket.exists, "their daemon comes with the login")
        settled.run("systemctl", "stop", "login.service")
        settled.until(
            lambda: settled.show(f"user@{number}.service", "ActiveState")["ActiveState"] == "inactive",
            "their manager ends with the last login",
        )
    finally:
        link.unlink()
    assert settled.run("pgrep", "--uid", USER, "--list-full", check=False).stdout == ""
    gone = settled.path(f"/run/user/{number}")
    settled.until(lambda: not gone.exists(), "their run-time directory goes after their manager")
    shown = settled.run("journalctl", "--no-pager", "--output=cat", f"--since={since}", f"_UID={number}")
    told = shown.stdout.splitlines()
    assert len([line for line in told if line.startswith("stopped sessions=")]) == 1
    assert [line for line in told if UNIT in line and ("Failed" in line or "Killing" in line)] == []


def _parents(inside: os.PathLike[str]) -> list[str]:
    parts = os.fspath(inside).split("/")
    return ["/" + "/".join(parts[:end]) for end in range(3, len(parts) + 1)]
