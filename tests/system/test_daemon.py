"""The daemon's own life: settings, the gate, quotas, stuck processes, what is freed by name, the background."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from harness import (
    GRACE_S,
    SETTINGS,
    STRANGER,
    Daemon,
    Leader,
    Scratch,
    alive,
    as_user,
    broken_promise,
    end_process,
    list_shm,
    read_proc,
    repeat_until,
    test_environment,
    wait_gone,
)

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

FORKED = ("pools.py", "executor", "--idle", "--method", "fork")
MEMMAP = ("pools.py", "memmap", "--busy")

REGISTERED_AND_WAITING = (
    "import agent, sys; print(agent.register().socket or '-', flush=True); sys.stdin.read()"
)


def register_once(daemon: Daemon, run: str, uid: int | None = None) -> subprocess.CompletedProcess[str]:
    """Register in a process that ends at once, and return what it printed."""
    script = "import agent; agent.register(required=True)"
    return subprocess.run(
        as_user(uid, [sys.executable, "-c", script]),
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        capture_output=True,
        text=True,
        check=False,
    )


# -- settings -------------------------------------------------------------------------------------


def test_every_fault_of_a_configuration_is_told_at_once_and_ends_with_2(scratch: Scratch, run: str) -> None:
    path = scratch.file("bad.toml")
    with open(path, "w", encoding="utf-8") as file:
        file.write('[scan]\ninterval = -1\n[kill]\ngrce = "5s"\n')
    for option in ("--check-config", "--dry-run"):
        ended = subprocess.run(
            [sys.executable, "-m", "reaperd", "--config", path, "--state-dir", scratch.file("s"), option],
            env=test_environment(run, REAPER_SOCKET=scratch.file("sock")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert "[scan] interval: must be more than 0 s, got -1" in ended.stderr
        assert "grace" in ended.stderr, "a typo suggests the key that was meant"
        assert "Traceback" not in ended.stderr


def test_a_reload_applies_a_good_file_and_keeps_the_settings_on_a_bad_one(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with open(daemon.config, "a", encoding="utf-8") as file:
        file.write("[sessions]\nmax_workers = 7\n")
    daemon.reload()
    daemon.wait_event(kind="reload", faults=[])
    assert "max_workers = 7" in daemon.ctl("config", "show").stdout
    with open(daemon.config, "a", encoding="utf-8") as file:
        file.write("[nonsense]\n")
    daemon.reload()
    faults = repeat_until(
        lambda: next((e["faults"] for e in daemon.events(kind="reload") if e["faults"]), None), 10, "a fault"
    )
    assert "nonsense" in faults[0]
    assert "max_workers = 7" in daemon.ctl("config", "show").stdout


def test_a_dry_run_tells_what_it_would_do_and_signals_nobody(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon("--dry-run")
    leader = start_leader(*FORKED, socket=daemon.socket)
    leader.kill9()
    event = daemon.wait_end(leader.session)
    assert event["dry_run"] is True
    assert {process["pid"] for process in event["processes"]} >= set(leader.family.workers)
    assert all(process["result"] == "kept" and not process["signals"] for process in event["processes"])
    assert set(leader.still_alive(leader.family.workers)) == set(leader.family.workers)
    leader.end_family()


# -- the gate -------------------------------------------------------------------------------------


def gate_of(daemon: Daemon) -> int:
    """Return the gate's pid, once there is one."""

    def found() -> int | None:
        gates = [pid for pid in daemon.children() if b"reaperd.gate" in read_proc(pid, "cmdline")]
        return gates[0] if gates and daemon.ctl("ping").returncode == 0 else None

    return repeat_until(found, 10, "a gate that answers")


@pytest.mark.needs_root
def test_the_gate_has_no_privileges(daemon: Daemon) -> None:
    status = read_proc(gate_of(daemon), "status").decode()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert "0" not in fields["Uid"].split()
    assert "0" not in fields["Gid"].split()
    assert fields["Groups"].split() == []
    assert {fields[f"Cap{kind}"].strip() for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    assert fields["NoNewPrivs"].strip() == "1"


def test_a_killed_gate_comes_back_and_nobody_is_lost(
    daemon: Daemon, start_leader: StartLeader, run: str
) -> None:
    leader = start_leader(*FORKED, socket=daemon.socket)
    core = daemon.pid
    end_process(gate_of(daemon))
    leader.kill9()
    assert broken_promise(leader) == ""
    gate_of(daemon)
    assert daemon.pid == core
    assert register_once(daemon, run).returncode == 0
    assert daemon.ask("status")["gate_restarts"] == 1


def test_a_session_whose_message_was_lost_with_the_gate_is_found_by_its_page(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon()
    os.kill(gate_of(daemon), signal.SIGSTOP)  # it takes messages for ever and passes none on
    leader = start_leader(*FORKED, socket=daemon.socket)
    end_process(next(pid for pid in daemon.children() if b"reaperd.gate" in read_proc(pid, "cmdline")))
    gate_of(daemon)
    assert daemon.session_of(leader.pid) is not None
    leader.kill9()
    assert broken_promise(leader) == ""


def test_sessions_of_one_user_are_limited(start_daemon: StartDaemon, run: str) -> None:
    daemon = start_daemon(config=SETTINGS + "[sessions]\nmax_per_uid = 2\n")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", REGISTERED_AND_WAITING],
                env=test_environment(run, REAPER_SOCKET=daemon.socket),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline().decode().strip() == daemon.socket
        refused = register_once(daemon, run)
        assert refused.returncode == 1
        assert "max_per_uid" in refused.stderr


# -- what can't be ended, and what is freed by name -----------------------------------------------


@pytest.mark.needs_root
def test_a_process_that_sigkill_does_not_end_is_stuck_and_holds_up_nobody(
    daemon: Daemon, start_leader: StartLeader, run: str
) -> None:
    freezer = "/sys/fs/cgroup/freezer"
    if not os.path.exists(f"{freezer}/release_agent"):
        pytest.skip("no v1 freezer is mounted here: nothing else makes a process outlive SIGKILL on demand")
    leader = start_leader(*FORKED, socket=daemon.socket)
    frozen, *others = leader.family.workers
    group = f"{freezer}/reaper-test-{run}"
    os.mkdir(group)
    try:
        write(f"{group}/cgroup.procs", str(frozen))
        write(f"{group}/freezer.state", "FROZEN")
        repeat_until(lambda: True if "FROZEN" in read(f"{group}/freezer.state") else None, 5, "frozen")
        leader.kill9()
        assert wait_gone(others, GRACE_S + 1) == []
        stuck = daemon.wait_event(kind="stuck", session=leader.session)
        assert [process["pid"] for process in stuck["processes"]] == [frozen]
        event = daemon.wait_end(leader.session)
        assert {p["pid"]: p["result"] for p in event["processes"]}[frozen] == "stuck"
        assert daemon.ctl("status", "--check").returncode == 1
    finally:
        write(f"{group}/freezer.state", "THAWED")
    assert wait_gone([frozen], 10) == []
    repeat_until(lambda: True if daemon.ask("status")["stuck"] == 0 else None, 10, "nobody is stuck any more")
    repeat_until(lambda: removed(group), 10, "the cgroup is gone")


def test_what_a_killed_tracker_did_not_free_is_freed_by_name(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    before = list_shm()
    leader = start_leader(*MEMMAP, socket=daemon.socket)
    folders = [entry for entry in list_shm() - before if f"folder_{leader.pid}_" in entry]
    assert folders, "the arrays are in shared memory"
    for pid in leader.family.trackers:
        os.kill(pid, signal.SIGSTOP)  # else one of them cleans up after the others
    for pid in leader.family.trackers:
        end_process(pid)
    leader.kill9()
    event = daemon.wait_end(leader.session)
    assert [entry for entry in list_shm() if f"_{leader.pid}_" in entry or f"-{leader.pid}-" in entry] == []
    assert event["freed"]["shm_bytes"] > 20_000_000


# -- the background -------------------------------------------------------------------------------


def test_detached_it_writes_a_pid_file_serves_and_leaves_on_sigterm(scratch: Scratch, run: str) -> None:
    directory = scratch.directory("b", 0o700)
    path, socket_path, log = (os.path.join(directory, name) for name in ("pid", "sock", "log"))
    command = [
        *(sys.executable, "-m", "reaperd", "--detach", "--pidfile", path, "--socket", socket_path),
        *("--state-dir", os.path.join(directory, "state"), "--config", "/dev/null"),
    ]
    environment = test_environment(run, REAPER_SOCKET=socket_path)
    with open(log, "wb") as file:
        started = subprocess.run(command, env=environment, stderr=file, timeout=30, check=False)
    assert started.returncode == 0
    ping = [sys.executable, "-m", "reaperd.ctl.main", "ping", "--json"]

    def answers() -> int | None:
        done = subprocess.run(ping, env=environment, capture_output=True, check=False)
        return json.loads(done.stdout)["pid"] if done.returncode == 0 else None

    pid = repeat_until(answers, 20, "the daemon answers")
    assert read(path).strip() == str(pid)
    assert os.getsid(pid) != os.getsid(0)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert again.returncode == 1
    assert f"pid {pid}" in again.stderr
    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid], 10) == []
    assert not os.path.exists(path)
    assert not os.path.exists(socket_path)


@pytest.mark.needs_root
@pytest.mark.skipif(
    shutil.which("setpriv") is None, reason="setpriv, which takes capabilities away, is not installed"
)
@pytest.mark.parametrize("name", ["setuid", "setgid"])
def test_root_that_could_not_give_up_its_rights_in_the_gate_runs_no_daemon(
    name: str, scratch: Scratch, run: str
) -> None:
    directory = scratch.directory("c", 0o755)
    command = [
        *("setpriv", f"--bounding-set=-{name}", sys.executable, "-m", "reaperd", "--config", "/dev/null"),
        *("--socket", os.path.join(directory, "sock"), "--state-dir", os.path.join(directory, "state")),
    ]
    done = subprocess.run(
        command, env=test_environment(run), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert f"cannot start without CAP_{name.upper()}: the gate cannot give up root's" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_that_cannot_be_used_is_told_in_a_sentence(scratch: Scratch, run: str) -> None:
    plain_file = scratch.file("file")
    write(plain_file, "")
    for options, words in (
        (["--socket", scratch.file("x" * 120), "--state-dir", scratch.file("s")], "107 bytes"),
        (["--socket", scratch.file("sock"), "--state-dir", f"{plain_file}/s"], f"{plain_file}/s"),
        (["--socket", plain_file, "--state-dir", scratch.file("s")], "no socket"),
        (["--pidfile", scratch.file("p")], "--detach"),
    ):
        command = [sys.executable, "-m", "reaperd", "--config", "/dev/null", *options]
        ended = subprocess.run(
            command, env=test_environment(run), capture_output=True, text=True, timeout=30, check=False
        )
        assert ended.returncode in (1, 2)
        assert words in ended.stderr
        assert "Traceback" not in ended.stderr
    assert read(plain_file) == "", "what was in the socket's place is still there"


@pytest.mark.needs_root
def test_a_user_has_a_daemon_of_its_own(start_daemon: StartDaemon, start_leader: StartLeader) -> None:
    daemon = start_daemon(uid=STRANGER)
    assert daemon.ask("status", uid=STRANGER)["mode"] == "user"
    assert os.stat(daemon.socket).st_mode & 0o777 == 0o600
    leader = start_leader(*FORKED, socket=daemon.socket, uid=STRANGER)
    assert alive(leader.pid)
    leader.kill9()
    assert broken_promise(leader) == ""


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def removed(path: str) -> bool | None:
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return True if not os.path.exists(path) else None
