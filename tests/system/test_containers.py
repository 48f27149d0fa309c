"""Daemons and leaders that see other namespaces, less of /proc, or have fewer rights: what works, and what is refused, and why.

Above all: whoever lives where a pid or a start time means somebody else is never taken for the dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from harness import (
    READY_WITHIN_S,
    RUN_MARK,
    STOPPED_WITHIN_S,
    STRANGER,
    WORKERS_GONE_S,
    Daemon,
    Descriptor,
    Leader,
    Scratch,
    alive,
    broken_promise,
    children_of,
    end_process,
    has_ended,
    marked,
    open_pidfd,
    pids_within,
    repeat_until,
    test_environment,
)

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]
StartProcess = Callable[..., "subprocess.Popen[bytes]"]

pytestmark = pytest.mark.needs_root

SIGKILLED = {"kind": "signal", "code": 9}
HOLDER = "import signal; print('up', flush=True); signal.pause()"
# Becomes the command that follows, in a user namespace that has the same users as this one.
MAPPED = """
import ctypes, os, sys
ready, written = os.pipe(), os.pipe()
if os.fork() == 0:
    os.read(ready[0], 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{os.getppid()}/{name}", "w") as file:
            file.write("0 0 65536")
    os._exit(0)
assert ctypes.CDLL(None).unshare(0x10000000) == 0, "CLONE_NEWUSER"
os.write(ready[1], b".")
os.wait()
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Becomes the command that follows, to which one system call answers EPERM (seccomp(2)): the bytecode is that of struct sock_filter.
FORBIDDING = """
import ctypes, os, struct, sys
load, equal, give = 0x20, 0x15, 0x06
code = [(load, 0, 0, 0), (equal, 0, 1, int(sys.argv[1])), (give, 0, 0, 0x50001), (give, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program, 0, 0) == 0, f"PR_SET_SECCOMP: {os.strerror(ctypes.get_errno())}"
os.execvp(sys.argv[2], sys.argv[2:])
"""
PIDFD_OPEN = 434  # everywhere
MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
# What has a pid namespace of its own has a /proc of it, too: but for this one.
FOREIGN_PROC = ["unshare", "--pid", "--fork", "--kill-child"]
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
OTHER_TIME = ["unshare", "--time", "--boottime", "1000000", "--fork", "--kill-child=SIGTERM"]
EARLIER_TIME = ["unshare", "--time", "--boottime", "-5", "--fork"]


def forbidding(call: int) -> list[str]:
    """Return a command that runs another one to which a system call is refused, as by a container's seccomp profile."""
    return [sys.executable, "-c", FORBIDDING, str(call)]


def hiding(options: str) -> list[str]:
    """Return a command that runs another one where /proc is mounted with ``options``."""
    mount = 'mount -t proc -o "$0" proc /proc && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, options]


def without(*capabilities: str) -> list[str]:
    """Return a command that runs another one without ``capabilities``."""
    dropped = ",".join(f"-{name.lower()}" for name in capabilities)
    return ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped]


@pytest.fixture(autouse=True)
def namespaces_can_be_made() -> None:
    for command in (PID_NAMESPACE, OTHER_TIME, hiding("hidepid=2")):
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


def refusal(daemon: Daemon, *, code: int = 1) -> str:
    """Return what is in the log of a daemon that cannot start, which leaves with ``code``."""
    daemon.launch()
    try:
        assert daemon.process.wait(READY_WITHIN_S) == code
    finally:
        daemon.kill9()
    log = daemon.read_log()
    assert "Traceback" not in log
    return log


def healthy_log(daemon: Daemon) -> str:
    log = daemon.read_log()
    assert "Traceback" not in log
    return log


# -- a /proc that shows somebody else -------------------------------------------------------------


def test_a_daemon_whose_proc_is_of_another_pid_namespace_refuses_to_start(start_daemon: StartDaemon) -> None:
    """To it, a pid in /proc would be one process, and the pidfd that is opened under it another's."""
    log = refusal(start_daemon(started=False, inside=FOREIGN_PROC))
    assert "shows another pid namespace than this process's own" in log


def test_a_daemon_without_the_boot_in_its_proc_refuses_to_start(start_daemon: StartDaemon) -> None:
    assert "mount it without subset=pid" in refusal(start_daemon(started=False, inside=hiding("subset=pid")))


@pytest.mark.parametrize("command", ["orphans --local", "cleanup --yes --local", "doctor"])
def test_reaperctl_looks_at_nobody_through_a_proc_of_another_pid_namespace(command: str, run: str) -> None:
    words = [*FOREIGN_PROC, sys.executable, "-m", "reaperd.ctl.main", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=test_environment(run))
    assert done.returncode == 1
    told = done.stdout if command == "doctor" else done.stderr
    assert "shows another pid namespace" in told
    assert len(told.splitlines()) < 6
    assert "Traceback" not in done.stderr


TRAINING = """
import json, multiprocessing, subprocess, sys, agent
with agent.training_session("alone", status_file=sys.argv[1]) as session:
    pool = multiprocessing.get_context("fork").Pool(2)
    with agent.spared():
        spared = subprocess.Popen(["sleep", "60"])
    print("up", flush=True)
    sys.stdin.readline()
    told = [session.workers(), session.cleanup(), agent.read_status(sys.argv[1]).state]
    print(json.dumps([*told, spared.poll(), pool._state]), flush=True)
spared.kill()
"""


def test_a_training_whose_proc_is_of_another_pid_namespace_ends_its_pools_and_touches_nobody_else(
    daemon: Daemon, scratch: Scratch, run: str
) -> None:
    """It is process 1 where it lives: below process 1 of the machine stands everybody."""
    words = [*FOREIGN_PROC, sys.executable, "-c", TRAINING, scratch.file("status.json")]
    env = test_environment(run, REAPER_SOCKET=daemon.socket)
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=env, text=True, **streams) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "up\n"
        # Somebody begins a job in the background meanwhile.
        script = "sleep 60 >/dev/null & echo $!"
        stranger = int(
            subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True, env=env).stdout
        )
        told, said = training.communicate("go on\n", timeout=60)
    assert json.loads(told) == [[], [], "unknown", None, "TERMINATE"]
    assert "/proc is of another pid namespace" in said
    assert alive(stranger)
    end_process(stranger)
    (event,) = daemon.events(kind="registered")
    daemon.wait_end(event["session"])


# -- a /proc that hides processes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "uid"),
    [
        ("hidepid=1", None),
        ("hidepid=1", STRANGER),
        ("hidepid=2", STRANGER),
        ("hidepid=2,gid=0", STRANGER),
        ("hidepid=4", STRANGER),
    ],
)
def test_a_daemon_to_which_proc_shows_its_own_user_alone_reaps_that_users_sessions(
    options: str, uid: int | None, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """hidepid=1 says of each process that it may not be asked about, 2 and 4 that there is none."""
    daemon = start_daemon(inside=hiding(options), uid=uid)
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, uid=STRANGER)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    assert broken_promise(leader) == ""
    assert daemon.wait_end(leader.session)["cause"] == SIGKILLED
    healthy_log(daemon)


def test_a_leader_to_which_proc_shows_its_own_user_alone_is_reaped(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader(
        "kin.py", "everything-left", socket=daemon.socket, uid=STRANGER, inside=hiding("hidepid=2")
    )
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


@pytest.mark.parametrize(
    ("options", "state"), [("hidepid=1", "kept"), ("hidepid=2", "kept"), ("hidepid=2", "lost")]
)
def test_a_leader_that_proc_hides_is_not_taken_for_dead(
    options: str, state: str, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """One whose memory is nobody's to read (PR_SET_DUMPABLE) is hidden from its own user, too."""
    daemon = start_daemon(inside=hiding(options), uid=STRANGER)
    leader = start_leader("odd.py", "worker", socket=daemon.socket, uid=STRANGER)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.ask("hide")
    daemon.stop()
    if state == "lost":
        os.unlink(os.path.join(daemon.state, "reaper.db"))
    daemon.start()
    other = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    other.kill9()
    daemon.wait_end(other.session)
    assert leader.still_alive([leader.pid, *leader.family.workers]) == [leader.pid, *leader.family.workers]
    assert daemon.events(session=leader.session, kind="reaped") == []
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S + 1.0) == []
    daemon.wait_end(leader.session)
    if state == "kept":
        assert "cannot tell whether the leader lives" in healthy_log(daemon)


# -- pids and start times of elsewhere ------------------------------------------------------------


@contextlib.contextmanager
def a_namespace(start_process: StartProcess) -> Iterator[int]:
    """Start the init of a pid namespace, and return its pid."""
    holder = start_process([*PID_NAMESPACE, sys.executable, "-c", HOLDER])
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"up\n"
    yield children_of(holder.pid)[0]


def entering(namespace: int) -> list[str]:
    """Return a command that runs another one in the pid namespace of a process, until nsenter(1) ends."""
    return ["nsenter", f"--target={namespace}", "--pid", "--mount", "setpriv", "--pdeathsig", "TERM"]


def stop_forked(daemon: Daemon) -> None:
    """Stop a daemon that is the child of what was started, and return when it has ended."""
    (core,) = children_of(daemon.pid)
    handle = open_pidfd(core)
    assert handle is not None
    with contextlib.closing(Descriptor(handle)):
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        assert has_ended(handle, within_s=STOPPED_WITHIN_S)
    daemon.process.wait(STOPPED_WITHIN_S)


def successor(daemon: Daemon, start_daemon: StartDaemon) -> Daemon:
    """Return a daemon, not started, in our own namespaces, with the socket and the state of another one."""
    found = start_daemon(started=False)
    found.socket, found.state = daemon.socket, daemon.state
    return found


def assert_lives_until_its_leader_dies(daemon: Daemon, leader: Leader) -> None:
    everyone = [leader.pid, *leader.family.workers]
    daemon.wait_listed(leader.pid, leader.family.workers)
    assert leader.still_alive(everyone) == everyone
    assert daemon.events(session=leader.session, kind="reaped") == []
    leader.kill9()
    assert leader.wait_all_gone(WORKERS_GONE_S, besides=leader.container) == []
    assert daemon.wait_end(leader.session)["cause"] == SIGKILLED


def test_what_a_daemon_put_on_record_in_its_own_pid_namespace_is_dead_nowhere_else(
    start_daemon: StartDaemon, start_leader: StartLeader, start_process: StartProcess
) -> None:
    """A container with the daemon is made anew with --pid=host: there, the leader's pid is another process's, or nobody's."""
    with a_namespace(start_process) as namespace:
        inner = start_daemon(inside=entering(namespace))
        leader = start_leader(
            "kin.py",
            "everything-left",
            socket=inner.socket,
            inside=["nsenter", f"--target={namespace}", "-p", "-m"],
        )
        assert f" session={leader.session} " in inner.read_log()
        outer = successor(inner, start_daemon)
        stop_forked(inner)
        assert_lives_until_its_leader_dies(outer.start(), leader)


def test_what_a_daemon_put_on_record_in_another_time_namespace_is_dead_nowhere_else(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """There, all processes have other start times, and the leader would be a process whose pid is another's by now."""
    elsewhere = start_daemon(inside=OTHER_TIME)
    leader = start_leader("kin.py", "everything-left", socket=elsewhere.socket)
    elsewhere.wait_listed(leader.pid, leader.family.workers)
    here = successor(elsewhere, start_daemon)
    stop_forked(elsewhere)
    assert_lives_until_its_leader_dies(here.start(), leader)


READER = """
import os, sys
sys.stdout.write("up\\n"); sys.stdout.flush()
pid = sys.stdin.readline().strip()
links = {n: os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")}
number = next(n for n, link in links.items() if link.startswith("/memfd:reaper:"))
page = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY)
sys.stdout.write("reads\\n"); sys.stdout.flush()
sys.stdin.read()
"""


def test_who_reads_the_page_of_a_leader_with_earlier_start_times_is_no_orphan_of_it(
    start_daemon: StartDaemon, start_leader: StartLeader, run: str
) -> None:
    """It is older than the leader, and younger than what the leader says: from here, that one seems to be dead."""
    daemon = start_daemon(started=False)
    with subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=test_environment(run),
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"up\n"
        leader = start_leader("kin.py", "everything-left", socket=daemon.socket, inside=EARLIER_TIME)
        reader.stdin.write(f"{leader.pid}\n".encode())
        reader.stdin.flush()
        assert reader.stdout.readline() == b"reads\n"
        assert reader.pid < leader.pid, "the daemon would meet the leader first"
        daemon.start()
        everyone = [leader.pid, *leader.family.workers]
        daemon.wait_listed(leader.pid, leader.family.workers)
        assert leader.still_alive(everyone) == everyone
        assert reader.poll() is None
        assert daemon.events(kind="reaped") == []
        reader.stdin.close()


# A leader, and a fork of it that has its pid in a pid namespace of its own, below theirs.
NAMESAKE = """
import ctypes, os, time
import agent
agent.register("leader")
pid = os.getpid()
assert ctypes.CDLL(None).unshare(0x20000000) == 0, "CLONE_NEWPID"
if os.fork() == 0:
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(pid - 1))
    if os.fork() == 0:
        print(pid, os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def test_a_worker_that_has_its_leaders_pid_in_a_namespace_of_its_own_leads_nothing(
    start_daemon: StartDaemon, run: str
) -> None:
    """Start times cannot be compared with those in another time namespace: there, the pid alone seems to tell."""
    daemon = start_daemon(started=False)
    outlive = ["sh", "-c", '"$@" & wait; exec sleep 60', "-"]  # or all others would end with their init
    words = [
        *OTHER_TIME[:-1],
        "--kill-child",
        *PID_NAMESPACE,
        *outlive,
        sys.executable,
        "-W",
        "ignore",
        "-c",
        NAMESAKE,
    ]
    env = test_environment(run, REAPER_SOCKET=daemon.socket)
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE) as there:
        assert there.stdout is not None
        pid, same = map(int, there.stdout.readline().split())
        assert pid == same
        found = {len(within): one for one in marked(RUN_MARK, run) if (within := pids_within(one))[-1] == pid}
        leader, namesake = found[2], found[3]
        end_process(leader)
        daemon.start()
        assert daemon.sessions() == []
        assert alive(namesake)
        there.kill()


@pytest.mark.parametrize("elsewhere", ["time", "mounts", "pids"])
def test_who_was_spared_in_other_namespaces_lives_on(
    elsewhere: str, daemon: Daemon, start_leader: StartLeader
) -> None:
    """The page alone says so, in the leader's own pids and start times."""
    inside = {
        "time": OTHER_TIME,
        "mounts": ["unshare", "--mount"],
        "pids": [
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "sh",
            "-c",
            'exec 3<&0; "$@" <&3 & wait; exec sleep 60',
            "-",
        ],
    }[elsewhere]
    leader = start_leader("kin.py", "spared-bare", socket=daemon.socket, inside=inside)
    daemon.wait_listed(leader.pid, leader.family.workers)  # below it, and so is who was spared
    leader.kill9()
    daemon.wait_end(leader.session)
    assert leader.still_alive(leader.family.workers) == []
    assert leader.still_alive(leader.spared) == leader.spared
    leader.end_spared()


def test_a_training_in_another_time_namespace_reads_as_unknown_and_not_as_killed(
    scratch: Scratch, run: str
) -> None:
    path = scratch.file("status.json")
    script = f"import sys, agent\nwith agent.training_session(status_file={path!r}):\n    print('up', flush=True); sys.stdin.read()"
    read = f"import agent; print(agent.read_status({path!r}).state)"
    env = test_environment(run, REAPER_SOCKET="/nonexistent")
    with subprocess.Popen(
        [*OTHER_TIME, sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
    ) as training:
        assert training.stdin is not None
        assert training.stdout is not None
        assert training.stdout.readline() == b"up\n"
        told = subprocess.run(
            [sys.executable, "-c", read], capture_output=True, text=True, check=True, env=env
        )
        assert told.stdout == "unknown\n"
        training.stdin.close()


@pytest.mark.parametrize("whose", ["of-both", "daemons-own", "leaders-own"])
def test_what_is_left_in_shared_memory_is_freed_where_the_daemon_has_the_very_same(
    whose: str, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    """The daemon has mounts of its own, as in a container. In another /dev/shm, the leader's pid in a name is another's."""
    own_shm = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "-"]
    daemon = start_daemon(inside=own_shm if whose == "daemons-own" else ["unshare", "--mount"])
    inside = own_shm if whose == "leaders-own" else []
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, inside=inside)
    folder = f"/dev/shm/joblib_memmapping_folder_{leader.pid}_left"
    os.mkdir(folder)
    try:
        leader.kill9()
        daemon.wait_end(leader.session)
        assert os.path.isdir(folder) == (whose != "of-both")
        if whose == "daemons-own":
            assert "limited here: /dev/shm is not the machine's" in healthy_log(daemon)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- a daemon in a container ----------------------------------------------------------------------


def test_a_daemon_in_a_pid_namespace_looks_after_its_own_and_tells_all_others_why_not(
    start_daemon: StartDaemon, start_leader: StartLeader, start_process: StartProcess
) -> None:
    with a_namespace(start_process) as namespace:
        daemon = start_daemon(inside=entering(namespace))
        own = start_leader(
            "kin.py",
            "everything-left",
            socket=daemon.socket,
            inside=["nsenter", f"--target={namespace}", "-p", "-m"],
        )
        outside = start_leader("kin.py", "subprocess", socket=daemon.socket)
        assert "refused: your user or process has no number where the daemon runs" in outside.read_log()
        for leader in (own, outside):
            leader.kill9()
        assert own.wait_all_gone(WORKERS_GONE_S, besides=own.container) == []
        # Nobody looks after these.
        assert outside.still_alive(outside.family.workers) == outside.family.workers
        outside.end_family()
        assert "only the processes of this pid namespace are seen" in healthy_log(daemon)
        stop_forked(daemon)


def test_root_of_a_container_is_no_root_of_the_machine(
    daemon: Daemon, start_leader: StartLeader, start_process: StartProcess, run: str
) -> None:
    """The kernel says uid 0 of it, as of the machine's own, and its pids are other processes' here."""
    outside = start_leader("kin.py", "subprocess", socket=daemon.socket)
    with a_namespace(start_process) as namespace:
        inside = ["nsenter", f"--target={namespace}", "-p", "-m"]
        own = start_leader("kin.py", "subprocess", socket=daemon.socket, inside=inside)

        def ctl(*words: str) -> subprocess.CompletedProcess[str]:
            command = [*inside, sys.executable, "-m", "reaperd.ctl.main", *words]
            env = test_environment(run, REAPER_SOCKET=daemon.socket)
            return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=30)

        done = ctl("stop", outside.session)
        assert (done.returncode, outside.still_alive([outside.pid])) == (4, [outside.pid]), done.stderr
        for command in ("protect", "explain", "release"):
            done = ctl(command, str(outside.pid))
            assert done.returncode == 4
            assert "in a container, a pid is another process's" in done.stderr
        shown = {one["id"]: one["leader"]["cmdline"] for one in json.loads(ctl("ps", "--json").stdout)}
        assert shown[outside.session] is None
        assert shown[own.session]
        told = {one["session"] for one in map(json.loads, ctl("events", "--json").stdout.splitlines())}
        assert (outside.session in told, own.session in told) == (False, True)
        assert ctl("stop", own.session).returncode == 0
        assert own.wait_all_gone(WORKERS_GONE_S, besides=own.container) == []
    assert daemon.ctl("stop", outside.session).returncode == 0


@pytest.mark.parametrize(
    ("capability", "fact"),
    [
        ("KILL", "other users' processes cannot be signalled"),
        ("SYS_PTRACE", "environments, maps and descriptors cannot be read"),
        ("DAC_READ_SEARCH", "those who come late are not recognised"),
    ],
)
def test_a_daemon_that_lacks_a_capability_says_which_and_what_that_costs(
    capability: str, fact: str, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(inside=without(capability))
    wanted = re.compile(f"limited here: without CAP_{capability} .*{fact}.*--cap-add {capability}")
    assert wanted.search(healthy_log(daemon))
    (told,) = [one for one in daemon.ask("status")["limits"] if f"CAP_{capability}" in one["fact"]]
    assert fact in told["fact"]
    assert f"--cap-add {capability}" in told["advice"]
    found = {one["check"]: one for one in json.loads(daemon.ctl("doctor", "--json").stdout)["checks"]}
    assert found["daemon's reach"]["level"] == ("problem" if capability == "KILL" else "limit")
    assert fact in found["daemon's reach"]["fact"]


def test_what_a_daemon_without_the_right_to_signal_leaves_is_told_as_denied(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(inside=without("KILL"))
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    told = "cannot send SIGTERM pid={}".format
    repeat_until(
        lambda: (
            True
            if all(told(pid) in daemon.read_log() for pid in leader.family.workers)
            else daemon.ask("ping") and None
        ),
        10.0,
        "the log does not say that signals were refused",
    )
    leader.end_family()


def test_a_daemon_whose_gate_cannot_give_up_its_privileges_refuses_to_start(
    start_daemon: StartDaemon,
) -> None:
    log = refusal(start_daemon(started=False, inside=["unshare", "--user", "--map-root-user"]), code=2)
    assert re.search("cannot serve anybody: the gate cannot become uid .*--cap-add SETUID", log)


@pytest.mark.parametrize("uid", [None, STRANGER], ids=["root", "user"])
def test_a_daemon_in_a_user_namespace_reaps_the_sessions_in_it(
    uid: int | None, start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(uid=uid, inside=[sys.executable, "-c", MAPPED])
    same = ["nsenter", f"--target={daemon.pid}", "--user"]
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, uid=STRANGER, inside=same)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
    outside = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    assert "refused: the daemon may not look at your descriptors" in outside.read_log()
    outside.kill9()
    assert outside.still_alive(outside.family.workers) == outside.family.workers
    outside.end_family()
    limits = "capabilities reach no process outside of this user namespace"
    assert (limits in healthy_log(daemon)) == (uid is None)


def test_a_daemon_that_may_hold_no_process_refuses_to_start(start_daemon: StartDaemon) -> None:
    log = refusal(start_daemon(started=False, inside=forbidding(PIDFD_OPEN)))
    assert "processes cannot be held by a pidfd: Operation not permitted" in log
    assert "seccomp profile must allow pidfd_open" in log


# -- leaders with fewer rights --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["no-new-privileges", "own-tmp-and-shm"])
def test_a_leader_that_is_confined_is_reaped(place: str, daemon: Daemon, start_leader: StartLeader) -> None:
    mounts = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    inside = {
        "no-new-privileges": ["setpriv", "--no-new-privs"],
        "own-tmp-and-shm": ["unshare", "--mount", "sh", "-c", mounts, "-"],
    }[place]
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, uid=STRANGER, inside=inside)
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)


def test_a_leader_that_may_make_no_page_goes_on_and_is_told_why(daemon: Daemon, run: str) -> None:
    call = MEMFD_CREATE.get(platform.machine())
    if call is None:
        pytest.skip(f"the number of memfd_create on {platform.machine()} is not known to this test")
    script = "import agent\nprint(repr(agent.register().id))\nagent.register(required=True)"
    words = [*forbidding(call), sys.executable, "-c", script]
    env = test_environment(run, REAPER_SOCKET=daemon.socket)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=30)
    assert (done.returncode, done.stdout) == (1, "''\n")
    reason = "the session cannot be marked: [Errno 1] Operation not permitted"
    assert (
        f"RuntimeWarning: no Reaper daemon watches this session, training goes on without one: {reason}"
        in done.stderr
    )
    assert f"RegistrationError: no Reaper daemon watches this session: {reason}" in done.stderr
