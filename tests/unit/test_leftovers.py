"""What the dead left is found and removed: what nobody alive uses, guards or could come back to, and nothing else.

Everything belongs to a uid that nobody else has, so what else runs on the machine plays no part.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import pytest
from specimens import mapping

from reaperd import leftovers
from reaperd.leftovers import Leftover, leftovers_work, remove_leftovers, survey
from reaperd.linux import helper, shm
from reaperd.linux.procfs import PF_EXITING, TICKS_PER_S, ProcFS, Stat
from reaperd.model import ProcessId
from reaperd.names import Removal, remove_as_owner

pytestmark = pytest.mark.needs_root

OWNER = 60_000 + random.SystemRandom().randrange(100_000)
SHM = Path(shm.SHM)
PAGE = mmap.PAGESIZE
GONE = 4194305  # one more than any pid can be
MEMMAPS = f"joblib_memmapping_folder_{GONE}_{'a' * 32}_{'b' * 32}"
SEMAPHORE = f"sem.loky-{GONE}-abc_1234"
NAMELESS = ("psm_0123abcd", "sem.mp-abc_1234")  # in /dev/shm
SOON_S = 30.0  # a deadline, not a wait


class Estate:
    """What ``OWNER`` left: in /dev/shm, and in a temporary folder of his."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def left(self, name: str, *, within: Path = SHM, files: int = 1, uid: int = OWNER) -> Path:
        """Leave what the framework of that name makes: a folder with ``files`` of one page each, or one such file."""
        path = within / name
        if name.startswith(("joblib", "pymp-", "torch-shm-dir-")):
            path.mkdir()
            for number in range(files):
                (path / f"{number}.pkl").write_bytes(b"x" * PAGE)
        else:
            path.write_bytes(b"x" * PAGE)
        self.give(path, uid)
        return path

    def give(self, path: Path, uid: int = OWNER) -> None:
        for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
            os.chown(one, uid, uid, follow_symlinks=False)

    def find(self, **settings: Any) -> list[Leftover]:
        asked: dict[str, Any] = {"uid": OWNER, "folders": [str(self.folder)], **settings}
        before = set(os.listdir("/proc/self/fd"))
        found = survey(asked.pop("proc", ProcFS()), **asked).leftovers
        assert (
            set(os.listdir("/proc/self/fd")) <= before
        )  # what others have left to the collector may be closed meanwhile
        return found

    def names(self, **settings: Any) -> set[str]:
        return {os.path.basename(one.path) for one in self.find(**settings)}

    def clear(self) -> None:
        """Remove all of /dev/shm that is his, or of the stranger that some tests have beside him."""
        for path in (path for path in SHM.iterdir() if path.lstat().st_uid in (OWNER, OWNER + 1)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@pytest.fixture
def estate() -> Iterator[Estate]:
    folder = Path(tempfile.mkdtemp(prefix="rp-left-", dir="/tmp"))
    os.chown(folder, OWNER, OWNER)
    folder.chmod(0o755)
    one = Estate(folder)
    yield one
    one.clear()
    shutil.rmtree(folder)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made just now counts as long unused: nobody can set back when something changed."""
    monkeypatch.setattr(leftovers, "UNUSED_S", 0.0)


@contextlib.contextmanager
def running(
    command: Sequence[str], *, uid: int | None = OWNER, silent: bool = False, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a command as ``uid``, in a process group of its own; yield it and the line that it writes once it is up."""
    process = subprocess.Popen(
        harness.as_user(uid, command),
        env=harness.test_environment(os.environ[harness.RUN_MARK], **environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        if silent:
            # It is not before its exec that it is who it will be.
            harness.repeat_until(
                lambda: True if harness.cmdline(process.pid)[:1] == [command[0]] else None,
                SOON_S,
                "the command runs",
            )
        yield process, "" if silent else process.stdout.readline().decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def python(code: str) -> list[str]:
    return [harness.needed_interpreter(OWNER), "-c", code]


def family(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the pids of what a script has started."""
    marked = harness.marked(harness.RUN_MARK, os.environ[harness.RUN_MARK])
    return [pid for pid in marked if pid != process.pid and os.getpgid(pid) == process.pid]


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a script and all that it started, trackers included, as an administrator in a hurry does."""
    started = family(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not harness.wait_gone(started, SOON_S)


# -- left by real scripts ---------------------------------------------------------------------------

JOBLIB = """
import os, time, numpy
from joblib import Parallel, delayed
def work(array, number):
    if number == 3:
        print(os.getppid(), flush=True)
        time.sleep(600)
Parallel(n_jobs=2)(delayed(work)(numpy.zeros(1_000_000), number) for number in range(4))
"""

SEGMENTS = """
import multiprocessing, multiprocessing.util, time
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=1_000_000)
segment.buf[:] = bytes(1_000_000)
lock = multiprocessing.get_context("spawn").Lock()
folder = multiprocessing.util.get_temp_dir()
print(segment.name, lock._semlock.name.lstrip("/"), folder, flush=True)
time.sleep(600)
"""


def test_what_a_killed_joblib_script_left_is_found_and_removed(estate: Estate) -> None:
    with running(python(JOBLIB)) as (script, line):
        assert int(line) == script.pid
        there = {name for name in os.listdir(SHM) if f"_{script.pid}_" in name or f"-{script.pid}-" in name}
        assert len(there) > 2
        assert estate.find() == [], "its maker lives"
        kill_all(script)
    found = estate.find()
    assert {os.path.basename(one.path) for one in found} == there
    memmaps = found[0]
    assert memmaps.kind == "joblib memmaps"
    assert {one.kind for one in found} == {"joblib memmaps", "loky semaphore"}
    assert memmaps.size_bytes >= 8_000_000
    assert {(one.owner_pid, one.uid) for one in found} == {(script.pid, OWNER)}
    assert memmaps.evidence[0] == f"named after pid {script.pid}, which no process has"
    assert remove_leftovers(ProcFS(), found) == [(one, True) for one in found]
    assert not there & set(os.listdir(SHM))


def test_what_joblib_put_into_a_temporary_folder_is_found_there(estate: Estate) -> None:
    with running(python(JOBLIB), JOBLIB_TEMP_FOLDER=str(estate.folder)) as (script, _):
        kill_all(script)
    assert {os.path.dirname(one.path) for one in estate.find()} == {shm.SHM, str(estate.folder)}
    assert {os.path.dirname(one.path) for one in estate.find(folders=())} == {shm.SHM}
    answer = leftovers_work(
        "/proc",
        uid=OWNER,
        folders=[str(estate.folder)],
        remove=[one.path for one in estate.find() if one.path.startswith(str(estate.folder))],
    )()
    assert [one["result"] for one in answer["leftovers"]] == ["removed"]
    assert os.listdir(estate.folder) == []


def test_what_multiprocessing_left_is_found_once_it_has_not_been_used_for_long(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(python(SEGMENTS), TMPDIR=str(estate.folder)) as (script, line):
        segment, semaphore, folder = line.split()
        names = {segment, f"sem.{semaphore}", os.path.basename(folder)}
        kill_all(script)
        assert estate.find() == []
        monkeypatch.setattr(leftovers, "UNUSED_S", 0.0)
        found = estate.find()
    assert {os.path.basename(one.path) for one in found} == names
    assert {one.kind for one in found} == {"shared memory", "semaphore", "multiprocessing folder"}
    assert {one.owner_pid for one in found} == {None}
    assert remove_leftovers(ProcFS(), found) == [(one, True) for one in found]
    assert not names & {*os.listdir(SHM), *os.listdir(estate.folder)}


def test_nothing_of_a_living_multiprocessing_script_is_found_in_use_or_not(estate: Estate, old: None) -> None:
    code = SEGMENTS.replace("time.sleep", "segment.close(); print(flush=True); time.sleep")
    with running(python(code), TMPDIR=str(estate.folder)) as (script, _):
        assert script.stdout is not None
        script.stdout.readline()
        assert estate.find() == []
        kill_all(script)
    assert len(estate.find()) == 3


# -- guarded ----------------------------------------------------------------------------------------


def test_what_the_dead_scripts_own_tracker_will_remove_is_left_to_it(estate: Estate) -> None:
    with running(python(JOBLIB)) as (script, _):
        started = {pid: harness.cmdline(pid) for pid in family(script)}
        # loky's own and multiprocessing's, for the locks of its queues
        trackers = [pid for pid, words in started.items() if "resource_tracker" in " ".join(words)]
        for tracker in trackers:
            os.kill(tracker, signal.SIGSTOP)
        script.kill()
        script.wait()
        workers = [pid for pid in started if pid not in trackers]
        harness.end_leftovers(workers)
        assert not harness.wait_gone(workers, SOON_S)
        assert estate.find() == []
        for tracker in trackers:
            os.kill(tracker, signal.SIGKILL)
        assert not harness.wait_gone(trackers, SOON_S)
        assert len(estate.find()) > 2


def test_a_tracker_of_a_living_script_guards_what_it_may_know_of(
    estate: Estate, old: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(python(SEGMENTS), TMPDIR=str(estate.folder)) as (script, _):
        estate.left(MEMMAPS)
        estate.left(NAMELESS[0])
        assert estate.names() == {MEMMAPS}, (
            "whoever made that is dead, and the living script's tracker is not its own"
        )
        monkeypatch.setattr(leftovers, "_TRACKER_LATE_S", -3600.0)
        assert estate.names() == {MEMMAPS, NAMELESS[0]}, "made long before that tracker was started"
        assert script.poll() is None


def test_a_living_manager_of_torchs_guards_like_a_tracker(estate: Estate, old: None) -> None:
    """A stand-in: a program that is called as torch's manager is."""
    manager = estate.folder / "torch_shm_manager"
    shutil.copy("/bin/sleep", manager)
    for name in (f"torch_{GONE}_123_0", *NAMELESS):
        estate.left(name)
    with running([str(manager), "600"], silent=True):
        assert estate.names() == set()
    assert estate.names() == {f"torch_{GONE}_123_0", *NAMELESS}
    with running(["sh", "-c", f"{manager} 600 & echo; wait"]) as (shell, _):

        def has_execed() -> bool | None:
            """It is not before its exec that it is who it will be."""
            names = [harness.cmdline(pid)[:1] for pid in harness.children_of(shell.pid)]
            return True if [str(manager)] in names else None

        harness.repeat_until(has_execed, SOON_S, "the manager runs")
        assert estate.names() == set(), "its parent lives, and is no interpreter: another than started it"


def test_a_tracker_guards_its_own_users_things_alone(estate: Estate, old: None) -> None:
    manager = estate.folder / "torch_shm_manager"
    shutil.copy("/bin/sleep", manager)
    for name in (SEMAPHORE, NAMELESS[0]):
        estate.left(name)
    for name in (f"{SEMAPHORE}x", NAMELESS[1]):
        estate.left(name, uid=OWNER + 1)
    theirs = {OWNER: {SEMAPHORE, NAMELESS[0]}, OWNER + 1: {f"{SEMAPHORE}x", NAMELESS[1]}}
    with running([str(manager), "600"], silent=True):
        assert estate.names(uid=None) & (theirs[OWNER] | theirs[OWNER + 1]) == theirs[OWNER + 1]
    assert estate.names(uid=None) >= theirs[OWNER] | theirs[OWNER + 1]


def test_a_folder_that_an_interpreter_may_remember_stays(estate: Estate, old: None) -> None:
    with running(python("import time; print(flush=True); time.sleep(600)")) as (script, _):
        estate.left("pymp-abcd1234", within=estate.folder)
        estate.left(NAMELESS[0])
        assert estate.names() == {NAMELESS[0]}
        assert estate.names(ours=[script.pid]) == {NAMELESS[0], "pymp-abcd1234"}, "Reaper's own makes none"
        kill_all(script)
    with running(["sleep", "600"], silent=True):
        assert estate.names() == {NAMELESS[0], "pymp-abcd1234"}, "no interpreter"


def later(pid: int, by_s: float) -> ProcFS:
    """Return a /proc in which ``pid`` has started ``by_s`` later than it has."""

    class Later(ProcFS):
        def stat(self, one: int) -> Stat:
            stat = super().stat(one)
            ticks = stat.id.start_ticks + int(by_s * TICKS_PER_S) * (one == pid)
            return stat._replace(id=stat.id._replace(start_ticks=ticks))

        def is_alive(self, process_id: ProcessId) -> bool:
            return True

    return Later()


def test_of_interpreters_started_later_only_the_forked_and_the_spawned_may_remember(
    estate: Estate, old: None
) -> None:
    estate.left("pymp-abcd1234", within=estate.folder)
    code = "import os, time; pid = os.fork(); pid and print(pid, flush=True); time.sleep(600)"
    with running(python(code)) as (script, line):
        forked = int(line)
        assert estate.names(ours=[script.pid]) == {"pymp-abcd1234"}, "Reaper's helpers are Reaper's"
        assert estate.names(proc=later(script.pid, 3600)) == set(), "the forked one"
        os.kill(forked, signal.SIGKILL)
        assert not harness.wait_gone([forked], SOON_S)
        assert estate.names(proc=later(script.pid, 3600)) == {"pymp-abcd1234"}
    spawned = "from multiprocessing.spawn import spawn_main; import time; print(flush=True); time.sleep(600)"
    with running(python(spawned)) as (script, _):
        assert estate.names(proc=later(script.pid, 3600)) == set()


# -- whose ------------------------------------------------------------------------------------------


def test_only_the_names_and_shapes_of_the_frameworks_count(estate: Estate, old: None) -> None:
    theirs = {MEMMAPS, SEMAPHORE, *NAMELESS, f"torch_{GONE}_1_0", f"torch_{GONE}_12345"}
    for name in theirs:
        estate.left(name)
    others = [
        "psm_mine",
        "psm_0123abcde",
        "psm_0123ABCD",
        f"xsem.loky-{GONE}-x",
        f"sem.loky-{GONE}-",
        "sem.mp-abc",
    ]
    others += [
        f"torch_{GONE}",
        f"torch_{GONE}_x",
        "torch__1",
        "sem.loky-x-y",
        "pymp-abcd1234",
        f"sem.loky-{GONE}-a\n",
    ]
    for name in others:
        estate.left(name)
    assert estate.names() == theirs
    here = {f"{MEMMAPS}1", "pymp-abcd1234", "torch-shm-dir-aB3dE6"}
    for name in here:
        estate.left(name, within=estate.folder)
    for name in (
        *NAMELESS,
        SEMAPHORE,
        f"torch_{GONE}_1_0",
        "pymp-abcd12345",
        "pymp-ABCD1234",
        "torch-shm-dir-a",
    ):
        estate.left(name, within=estate.folder)
    assert estate.names() == theirs | here


def test_what_is_no_framework_shape_is_no_frameworks(estate: Estate, old: None) -> None:
    outside = estate.folder / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    for number, name in enumerate((SEMAPHORE, *NAMELESS, MEMMAPS)):
        (estate.folder / str(number)).touch()
        (SHM / name).symlink_to(outside if name == MEMMAPS else estate.folder / str(number))
        estate.give(SHM / name)
    os.mkfifo(estate.folder / MEMMAPS)
    estate.give(estate.folder / MEMMAPS)
    (estate.folder / "pymp-abcd1234").symlink_to(outside)
    os.mkfifo(SHM / f"torch_{GONE}_1_0")
    estate.give(SHM / f"torch_{GONE}_1_0")
    (SHM / f"sem.loky-{GONE}-folder").mkdir()
    estate.give(SHM / f"sem.loky-{GONE}-folder")
    for path in (estate.folder / "pymp-abcd1234", outside):
        estate.give(path)
    assert estate.names() == set()


def test_each_is_told_its_own_unless_everybody_is_asked_about(estate: Estate) -> None:
    estate.left(SEMAPHORE)
    estate.left(f"{SEMAPHORE}x", uid=OWNER + 1)
    assert estate.names() == {SEMAPHORE}
    assert estate.names(uid=OWNER + 1) == {f"{SEMAPHORE}x"}
    assert {(SEMAPHORE, OWNER), (f"{SEMAPHORE}x", OWNER + 1)} <= {
        (os.path.basename(one.path), one.uid) for one in estate.find(uid=None)
    }


def test_a_zombie_is_no_living_maker(estate: Estate) -> None:
    with running(["true"], silent=False) as (script, _):
        os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOWAIT)
        estate.left(f"sem.loky-{script.pid}-x")
        assert estate.names() == {f"sem.loky-{script.pid}-x"}


@pytest.mark.parametrize("uid", [None, OWNER])
def test_a_pid_that_is_another_process_s_by_now_is_its_makers_no_more(
    estate: Estate, uid: int | None
) -> None:
    with running(["sleep", "600"], uid=uid, silent=True) as (script, _):
        name = f"sem.loky-{script.pid}-x"
        estate.left(name)
        assert estate.names() == set()
        assert estate.names(proc=later(script.pid, -3600)) == set()
        assert estate.names(proc=later(script.pid, 1)) == set(), "clocks are set"
        (found,) = estate.find(proc=later(script.pid, 3600))
    assert found.evidence[0].startswith(
        f"named after pid {script.pid}, which is that of a process started later, at 2"
    )


def test_no_clock_takes_a_name_from_an_interpreter_of_its_owners(estate: Estate) -> None:
    """A machine that is put to sleep and woken finds its clock hours later, and its processes started hours later."""
    with running(python("import time; print(flush=True); time.sleep(600)")) as (script, _):
        estate.left(f"sem.loky-{script.pid}-x")
        assert estate.names(proc=later(script.pid, 3600)) == set()
    assert estate.names() == {f"sem.loky-{script.pid}-x"}


def test_a_pid_counts_in_every_namespace_that_we_see(estate: Estate) -> None:
    """A container that shares /dev/shm names things after pids of its own."""
    # Far from where this machine gives out pids now: it must stay free until the end.
    with open("/proc/loadavg") as file:
        last = int(file.read().split()[-1])
    free = next(
        pid for pid in range(20_000 if last < 10_000 else 2_000, 32_000) if not os.path.exists(f"/proc/{pid}")
    )
    inner = f"echo {free - 1} >/proc/sys/kernel/ns_last_pid; sleep 600 & echo $!; wait"
    command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", inner]
    estate.left(f"sem.loky-{free}-x")
    with running(command, uid=None) as (_, line):
        assert int(line) == free
        assert estate.names() == set()
    assert estate.names() == {f"sem.loky-{free}-x"}


def test_who_cannot_see_the_whole_machine_finds_nothing_in_what_others_may_share(estate: Estate) -> None:
    estate.left(SEMAPHORE)
    code = (
        "from reaperd.leftovers import *; import sys\n"
        "for alone in (False, True):\n"
        f"    found, withheld = survey(ProcFS(), uid={OWNER}, folders=(), alone=alone)\n"
        "    print(len(found), *withheld)"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", code]
    environment = harness.test_environment(os.environ[harness.RUN_MARK])
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=SOON_S
    )
    within, alone = done.stdout.splitlines()
    assert within.startswith("0 1 name left alone: this is a container")
    assert alone == "1"


class Elsewhere(ProcFS):
    """A /proc that says of every file system that other machines share it."""

    def file_system(self, descriptor: int) -> str:
        return "nfs4"


def test_pids_on_a_file_system_of_other_machines_are_other_machines_too(estate: Estate) -> None:
    estate.left(SEMAPHORE)
    assert estate.names(proc=Elsewhere()) == set()
    assert estate.names() == {SEMAPHORE}


# -- in use -----------------------------------------------------------------------------------------


def test_what_somebody_has_mapped_or_open_stays(estate: Estate, old: None) -> None:
    opened, mapped = estate.left(NAMELESS[0]), estate.left(NAMELESS[1])
    inner, held = estate.left(MEMMAPS, within=estate.folder), estate.left(f"{MEMMAPS}1")
    with open(opened, "rb"), mapping(mapped), mapping(inner / "0.pkl"):
        with shm.open_directory(str(held)):
            assert estate.names() == set(), "by a process of another uid's"
        assert estate.names() == {held.name}
    assert len(estate.names()) == 4


def test_what_is_mapped_by_another_name_of_it_is_in_use(estate: Estate, old: None) -> None:
    """So its maker has a semaphore: sem_open(3) makes it by another name, then links it, and unlinks the first."""
    first = estate.left("sem.Ab12Cd")
    with mapping(first):
        (SHM / SEMAPHORE).hardlink_to(first)
        first.unlink()
        assert estate.names() == set()
    assert estate.names() == {SEMAPHORE}


def test_what_is_seen_elsewhere_in_a_container_is_in_use(estate: Estate) -> None:
    path = estate.left(SEMAPHORE)
    script = f"mount --bind /dev/shm {estate.folder}; exec 3<{estate.folder}/{path.name}; echo; sleep 600"
    with running(["unshare", "--mount", "sh", "-c", script], uid=None):
        assert estate.names() == set()
    assert estate.names() == {SEMAPHORE}


def test_a_folder_that_a_socket_is_bound_in_is_in_use(estate: Estate, old: None) -> None:
    torchs = estate.left("torch-shm-dir-aB3dE6", within=estate.folder)
    estate.left("pymp-abcd1234", within=estate.folder)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(f"{torchs}/manager.sock")
        assert estate.names() == {"pymp-abcd1234"}
    assert estate.names() == {"pymp-abcd1234", torchs.name}


def test_so_is_one_with_a_socket_in_another_network_namespace(estate: Estate, old: None) -> None:
    torchs = estate.left("torch-shm-dir-aB3dE6", within=estate.folder)
    code = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('{torchs}/x'); print(); time.sleep(600)"
    with running(["unshare", "--net", sys.executable, "-u", "-c", code], uid=None):
        assert estate.names() == set()
    assert estate.names() == {torchs.name}


def test_where_there_are_more_sockets_than_can_be_read_one_may_be_anywhere(estate: Estate, old: None) -> None:
    class Crowded(ProcFS):
        def unix_sockets(self, pid: int) -> bytes | None:
            return None

    for name in (SEMAPHORE, MEMMAPS):
        estate.left(name)
    assert estate.names(proc=Crowded()) == {SEMAPHORE}


def test_what_has_changed_lately_may_be_about_to_be_used(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = estate.left(NAMELESS[0])
    monkeypatch.setattr(leftovers, "UNUSED_S", 60.0)
    os.utime(path, (0, 0))
    assert estate.names() == set(), "these times are its owner's to set"
    estate.left(SEMAPHORE)
    assert estate.names() == {SEMAPHORE}, "its maker is known to be gone"
    monkeypatch.setattr(leftovers, "UNUSED_S", 1.5)
    harness.repeat_until(lambda: True if path.name in estate.names() else None, SOON_S, "it is old enough")
    path.chmod(0o600)
    assert estate.names() == {SEMAPHORE}, "it was made long ago, and has changed since"


def test_nothing_of_a_user_is_found_while_a_process_of_hers_does_not_let_itself_be_read(
    estate: Estate, tmp_path: Path
) -> None:
    root = tmp_path / "proc"
    (root / "7/task/7/fd").mkdir(parents=True)
    fields = [b"0"] * 50
    fields[0], fields[17], fields[19] = b"S", b"1", b"99"
    (root / "7/stat").write_bytes(b"7 (x) %s\n" % b" ".join(fields))
    (root / "7/status").write_text(f"Name:\tx\nUid:\t0\t{OWNER}\t0\t0\n")
    os.mkfifo(root / "7/task/7/maps")
    (root / "self").symlink_to("/proc/self")
    estate.left(SEMAPHORE)
    assert estate.names(proc=ProcFS(str(root))) == set()
    (root / "7/status").write_text("Name:\tx\nUid:\t5\t5\t5\t5\n")
    assert estate.names(proc=ProcFS(str(root))) == {SEMAPHORE}, "another user's is no reason"
    (root / "7/status").write_text(f"Name:\tx\nUid:\t{OWNER}\t{OWNER}\t{OWNER}\t{OWNER}\n")
    assert estate.names(proc=ProcFS(str(root))) == set()

    class Ended(ProcFS):
        def is_alive(self, process_id: ProcessId) -> bool:
            return False

    assert estate.names(proc=Ended(str(root))) == {SEMAPHORE}, "it has ended meanwhile"


@pytest.mark.parametrize("flags", [0, PF_EXITING])
def test_who_shows_no_mappings_may_have_anything_mapped_unless_on_its_way_out(
    estate: Estate, flags: int
) -> None:
    class Mapless(ProcFS):
        def stat(self, pid: int) -> Stat:
            stat = super().stat(pid)
            return stat._replace(flags=stat.flags | flags)

        def maps(self, pid: int, task: int) -> bytes:
            return b""

    estate.left(SEMAPHORE)
    with running(["sleep", "600"], silent=True):
        assert estate.names(proc=Mapless()) == ({SEMAPHORE} if flags else set())


def test_who_shows_no_descriptors_may_have_anything_open(estate: Estate) -> None:
    """As it is for a daemon that may trace everybody and may not pass by file permissions."""

    class Blind(ProcFS):
        def descriptors(self, pid: int, task: int, *, most: int | None = None) -> dict[int, str]:
            return {}

        def may_read_descriptors(self, pid: int, task: int) -> bool:
            return False

    estate.left(SEMAPHORE)
    assert estate.names(proc=Blind()) == {SEMAPHORE}, "others are no reason"
    with running(["sleep", "600"], silent=True):
        assert estate.names(proc=Blind()) == set()
        assert estate.names() == {SEMAPHORE}


HIDING = """
import ctypes, time
ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
print(flush=True)
time.sleep(600)
"""


def test_a_user_finds_what_is_his_own_and_nothing_while_one_of_his_may_not_be_read(estate: Estate) -> None:
    estate.left(SEMAPHORE)
    estate.left(f"{SEMAPHORE}x", uid=OWNER + 1)
    look = python(
        "import json; from reaperd.leftovers import *; print(json.dumps(leftovers_work('/proc', uid=None)()))"
    )

    def found() -> set[str]:
        with running(look) as (_, line):
            told = json.loads(line)
            withheld.append(told["withheld"])
            return {os.path.basename(one["path"]) for one in told["leftovers"]} & {SEMAPHORE, f"{SEMAPHORE}x"}

    withheld: list[list[str]] = []
    assert found() == {SEMAPHORE, f"{SEMAPHORE}x"}
    with running(python(HIDING)):
        assert found() == {f"{SEMAPHORE}x"}
    assert found() == {SEMAPHORE, f"{SEMAPHORE}x"}
    why = f"1 name of uid {OWNER} left alone: a process of theirs cannot be read, and may use them"
    assert [why in told for told in withheld] == [False, True, False]


# -- removing ---------------------------------------------------------------------------------------


def removed(found: list[Leftover]) -> list[bool]:
    before = len(os.listdir("/proc/self/fd"))
    results = remove_leftovers(ProcFS(), found)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [one for one, _ in results] == found
    return [gone for _, gone in results]


def test_what_came_into_use_since_it_was_found_stays(estate: Estate) -> None:
    path = estate.left(SEMAPHORE)
    found = estate.find()
    with mapping(path):
        assert removed(found) == [False]
    assert path.exists()
    assert removed(found) == [True]
    assert removed(found) == [False], "it was gone before"


def test_what_took_a_leftovers_place_since_stays(estate: Estate) -> None:
    path = estate.left(SEMAPHORE)
    found = estate.find()
    path.rename(estate.left(f"{SEMAPHORE}-kept"))  # so that nothing else gets its inode
    estate.left(SEMAPHORE)
    assert removed(found) == [False]
    assert path.exists()
    assert removed(estate.find()) == [True]


def test_a_name_is_removed_as_long_as_what_was_found_bears_it(estate: Estate) -> None:
    path = estate.left(SEMAPHORE)
    (entry,) = [one.entry for one in estate.find()]
    assert remove_as_owner([entry._replace(inode=entry.inode + 1)], OWNER, OWNER) == [Removal(0, gone=False)]
    assert path.exists()
    assert remove_as_owner([entry], OWNER, OWNER) == [Removal(PAGE, gone=True)]
    assert remove_as_owner([entry], OWNER, OWNER) == [Removal(0, gone=False)]
    assert remove_as_owner([], OWNER, OWNER) == []


def test_a_leftover_that_its_owner_could_not_remove_is_not_removed_for_its_owner(estate: Estate) -> None:
    locked = estate.folder / "locked"
    locked.mkdir(mode=0o755)
    path = estate.left(MEMMAPS, within=locked, files=0)
    found = estate.find(folders=[str(locked)])
    assert [one.path for one in found] == [str(path)]
    assert removed(found) == [False]
    os.chown(locked, OWNER, OWNER)
    assert removed(found) == [True]


def test_what_others_own_in_a_leftover_stays_with_the_folder_that_it_is_in(estate: Estate) -> None:
    path = estate.left(MEMMAPS, files=3)
    (path / "theirs").touch()
    (path / "link").symlink_to(estate.folder)
    os.chown(path / "link", OWNER, OWNER, follow_symlinks=False)
    (estate.folder / "precious").touch()
    (found,) = estate.find()
    assert found.size_bytes == 3 * PAGE
    assert removed([found]) == [False]
    assert os.listdir(path) == ["theirs"]
    assert (estate.folder / "precious").exists()


def test_leftovers_of_several_users_are_each_removed_as_their_owner(estate: Estate) -> None:
    mine, theirs = estate.left(SEMAPHORE), estate.left(f"{SEMAPHORE}x", uid=OWNER + 1)
    found = [*estate.find(), *estate.find(uid=OWNER + 1)]
    assert removed(found) == [True, True]
    assert not mine.exists()
    assert not theirs.exists()


def test_a_folder_deeper_than_anything_needs_stays_and_holds_nobody_up(estate: Estate) -> None:
    path, home = estate.left(MEMMAPS), os.getcwd()
    beside = estate.left(SEMAPHORE)
    try:
        os.chdir(path)
        for _ in range(1500):
            os.mkdir("d")
            os.chown("d", OWNER, OWNER)
            os.chdir("d")
        os.chdir(home)
        found = estate.find()
        assert len(found) == 2
        began_s = time.monotonic()
        assert sorted(zip((one.path for one in found), removed(found), strict=True)) == [
            (str(path), False),
            (str(beside), True),
        ]
        assert time.monotonic() - began_s < SOON_S
    finally:
        os.chdir(home)
        subprocess.run(["rm", "-rf", str(path)], check=True)


# -- in a helper ------------------------------------------------------------------------------------


def answer_of(work: Callable[[], dict[str, Any]]) -> Any:
    """Run ``work`` in a helper that nobody reads from until it is done."""
    started = helper.start_helper(work)
    assert select.select([started.pidfd], [], [], SOON_S)[0]
    return helper.finish_helper(started)


def test_a_helper_tells_them_as_the_wire_has_them(estate: Estate) -> None:
    path = estate.left(MEMMAPS, within=estate.folder, files=2)
    kept = estate.left(SEMAPHORE)
    work = {"uid": OWNER, "folders": [str(estate.folder)]}
    record = {"path": str(path), "kind": "joblib memmaps", "uid": OWNER, "owner_pid": GONE, "bytes": 2 * PAGE}
    answer = answer_of(leftovers_work("/proc", **work))
    evidence = answer["leftovers"][0].pop("evidence")
    assert answer["leftovers"][0] == {**record, "result": None}
    assert len(evidence) == 3
    assert answer["left_out"] == 0
    answer = answer_of(leftovers_work("/proc", **work, remove=[str(path), "/nowhere", "/tmp"]))
    assert [(one["path"], one["result"]) for one in answer["leftovers"]] == [(str(path), "removed")]
    assert not path.exists()
    assert kept.exists()


def test_of_very_many_the_biggest_are_told(estate: Estate) -> None:
    for number in range(300):
        estate.left(f"sem.loky-{GONE}-{number}")
    big = estate.left(MEMMAPS, files=3)
    answer = answer_of(leftovers_work("/proc", uid=OWNER))
    told = answer["leftovers"]
    assert told[0]["path"] == str(big)
    assert len(told) + answer["left_out"] == 301
    assert answer["left_out"] > 0
    assert len(json.dumps(answer)) < 65536


def test_folders_that_are_gone_or_named_twice_or_through_a_link_are_no_fault(estate: Estate) -> None:
    estate.left(MEMMAPS, within=estate.folder)
    link = estate.folder / "link"
    link.symlink_to(estate.folder)
    folders = [
        str(link),
        str(estate.folder),
        "/nowhere",
        str(estate.folder / MEMMAPS / "0.pkl"),
        secrets.token_hex(4),
    ]
    assert [one.path for one in estate.find(folders=folders)] == [str(estate.folder / MEMMAPS)]
    assert [one.path for one in estate.find(folders=[str(link)])] == [str(estate.folder / MEMMAPS)]
