"""Sessions with a control group of their own where there is no systemd: below the daemon's, which was made for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    SETTINGS,
    WORKERS_GONE_S,
    Cgroup,
    Daemon,
    Leader,
    Scratch,
    alive,
    broken_promise,
    entering,
    repeat_until,
    test_environment,
)

from reaperd.isolation import scope_name
from reaperd.model import SessionKey

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs here, and would be asked"),
]

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

ISOLATING = f"{SETTINGS}\n[sessions]\nisolate = true\n"
SOMEBODY = 61233


@pytest.fixture
def home(unified_cgroup: Callable[[str], Cgroup]) -> Cgroup:
    return unified_cgroup("daemon")


@pytest.fixture
def daemon(home: Cgroup, start_daemon: StartDaemon) -> Daemon:
    return start_daemon(config=ISOLATING, inside=entering([home], []))


def scopes(home: Cgroup) -> list[str]:
    return [name for name in os.listdir(home.path) if name.startswith("reaper-")]


def is_isolated(daemon: Daemon, leader: Leader) -> bool:
    session = daemon.session_of(leader.pid)
    return session is not None and bool(session["isolated"])


@pytest.mark.parametrize("uid", [None, SOMEBODY])
def test_a_worker_without_any_mark_ends_with_its_leader_and_the_group_is_removed(
    daemon: Daemon, home: Cgroup, start_leader: StartLeader, uid: int | None
) -> None:
    leader = start_leader("kin.py", "escapes", socket=daemon.socket, uid=uid)
    assert is_isolated(daemon, leader)
    (scope,) = scopes(home)
    assert scope.startswith(f"reaper-{uid or 0}-{leader.session}-")
    leader.kill9()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    evidence = [process["evidence"] for process in event["processes"]]
    assert ["runs in the control group that was made for the session"] in evidence
    repeat_until(lambda: scopes(home) == [] or None, 10, "the group is not removed")


def test_shells_without_a_mark_that_start_each_other_are_caught(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "escapes-and-hops", socket=daemon.socket)
    assert is_isolated(daemon, leader)
    leader.kill9()
    assert leader.wait_released(WORKERS_GONE_S), "they go on"
    daemon.wait_end(leader.session)


@pytest.mark.parametrize(
    "kind",
    ["hops", "keeps-forking", "stubborn", "everything-left", "deep", "nested", "stopped", "forks-on-term"],
)
def test_whatever_a_leader_has_started_ends_with_it_in_a_group_too(
    daemon: Daemon, start_leader: StartLeader, kind: str
) -> None:
    leader = start_leader("kin.py", kind, socket=daemon.socket)
    assert is_isolated(daemon, leader)
    leader.kill9()
    assert leader.wait_released(WORKERS_GONE_S), "somebody goes on"
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize("kind", ["loky"])
def test_trackers_go_last_in_a_group_too(daemon: Daemon, start_leader: StartLeader, kind: str) -> None:
    leader = start_leader("pools.py", kind, socket=daemon.socket)
    assert is_isolated(daemon, leader)
    leader.kill9()
    assert broken_promise(leader) == ""
    event = daemon.wait_end(leader.session)
    trackers = {process["pid"] for process in event["processes"] if process["signals"] == []}
    assert leader.family.trackers
    assert trackers >= set(leader.family.trackers)


def test_what_was_spared_lives_on_in_the_group_which_stays_with_it(
    daemon: Daemon, home: Cgroup, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "spared", socket=daemon.socket)
    spared = leader.spared
    assert spared
    leader.kill9()
    daemon.wait_end(leader.session)
    assert all(map(alive, spared))
    (scope,) = scopes(home)
    assert Path(home.path, scope, "cgroup.freeze").read_text() == "0\n"


def test_a_daemon_that_was_killed_goes_on_by_the_group_and_leaves_nobody_frozen(
    daemon: Daemon, home: Cgroup, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "spared", socket=daemon.socket)
    (scope,) = scopes(home)
    daemon.kill9()
    Path(home.path, scope, "cgroup.freeze").write_text("1")  # as if it had been in the middle of a kill
    leader.kill9()
    daemon.start()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
    assert all(map(alive, leader.spared))
    assert Path(home.path, scope, "cgroup.freeze").read_text() == "0\n"


def test_a_group_that_a_user_named_like_ours_is_his_own_affair(
    start_daemon: StartDaemon, start_leader: StartLeader, unified_cgroup: Callable[[str], Cgroup]
) -> None:
    """The daemon has what its unit gives it: into the files of a group that is not root's it cannot write."""
    rights = "-all,+kill,+sys_ptrace,+dac_read_search,+setuid,+setgid"
    daemon = start_daemon(inside=["setpriv", f"--bounding-set={rights}"])
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=SOMEBODY)
    forged = unified_cgroup("users").path
    name = scope_name(SessionKey(SOMEBODY, leader.session), daemon.socket)
    os.mkdir(f"{forged}/{name}")
    for entry in ("", "cgroup.procs", "cgroup.freeze", "cgroup.kill"):
        os.chown(f"{forged}/{name}/{entry}", SOMEBODY, SOMEBODY)
    daemon.kill9()
    shutil.rmtree(daemon.state)
    for pid in (leader.pid, *leader.family.workers):
        Path(forged, name, "cgroup.procs").write_text(str(pid))
    daemon.start()
    assert not is_isolated(daemon, leader)
    leader.kill9()
    daemon.wait_end(leader.session)
    assert broken_promise(leader) == ""
    assert daemon.process.poll() is None


def test_nobody_is_moved_into_a_group_that_others_are_in(
    home: Cgroup, start_daemon: StartDaemon, start_leader: StartLeader, start_process: Callable[..., object]
) -> None:
    start_process(entering([home], ["sleep", "600"]))
    daemon = start_daemon(config=ISOLATING, inside=entering([home], []))
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    assert not is_isolated(daemon, leader)
    assert f"not isolated session={leader.session}" in daemon.read_log()
    assert "has others in it" in daemon.read_log()
    leader.kill9()
    assert broken_promise(leader) == ""


def test_nobody_is_moved_out_of_a_group_of_its_own(
    daemon: Daemon, start_leader: StartLeader, unified_cgroup: Callable[[str], Cgroup]
) -> None:
    job = unified_cgroup("job")
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, groups=[job])
    assert not is_isolated(daemon, leader)
    assert leader.pid in job.pids()
    assert "would leave the limits that are set there" in daemon.read_log()


def test_where_nothing_can_be_had_the_session_goes_by_its_marks(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(config=ISOLATING)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket)
    assert not is_isolated(daemon, leader)
    assert "no systemd here, and the daemon has no control group of its own" in daemon.read_log()
    leader.kill9()
    assert broken_promise(leader) == ""


ASK = """
import json, warnings
import agent
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one = agent.register(isolate=True)
    again = agent.register(isolate=True)
told = [(str(told.message), told.filename, told.lineno) for told in caught]
with open("/proc/self/cgroup") as file:
    print(json.dumps([one.isolated, one.not_isolated, told, again is one, file.read()]))
"""


def ask_for_a_group(daemon: Daemon, scratch: Scratch, run: str) -> list[Any]:
    """Run a script that asks for a group of its own, and return what it was told and where it is then."""
    path = scratch.file("ask.py")
    Path(path).write_text(ASK)
    environment = test_environment(run, REAPER_SOCKET=daemon.socket)
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=True)
    answer: list[Any] = json.loads(done.stdout)
    return answer


def test_a_script_may_ask_for_a_group_whatever_the_settings_say(
    home: Cgroup, start_daemon: StartDaemon, scratch: Scratch, run: str
) -> None:
    daemon = start_daemon(inside=entering([home], []))
    isolated, why, told, same, groups = ask_for_a_group(daemon, scratch, run)
    assert (isolated, why, told, same) == (True, "", [], True)
    assert f"0::/{home.name}/reaper-0-" in groups


def test_a_script_that_asked_in_vain_is_told_why_where_it_asked(
    daemon: Daemon, start_daemon: StartDaemon, scratch: Scratch, run: str
) -> None:
    isolated, why, told, same, groups = ask_for_a_group(start_daemon(), scratch, run)
    assert (isolated, same) == (False, True)
    assert why.startswith("there is no systemd here")
    ((message, filename, line),) = told
    assert message == f"the session has no control group of its own, its marks must do: {why}"
    assert (os.path.basename(filename), line) == ("ask.py", 6)
    assert "reaper-0-" not in groups


def test_a_command_can_be_run_in_a_group_of_its_own(
    home: Cgroup, start_daemon: StartDaemon, run: str
) -> None:
    command = [sys.executable, "-m", "reaperd.ctl.main", "run", "--isolate", "--", "cat", "/proc/self/cgroup"]
    daemon = start_daemon(inside=entering([home], []))
    environment = test_environment(run, REAPER_SOCKET=daemon.socket)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"0::/{home.name}/reaper-0-" in done.stdout
    assert done.stderr == ""
    daemon = start_daemon()
    environment = test_environment(run, REAPER_SOCKET=daemon.socket)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "reaper-0-" not in done.stdout
    assert "it has no control group of its own, its marks must do: there is no systemd here" in done.stderr
