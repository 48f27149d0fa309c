"""What a dead leader held by name is freed: its own names only, from its own lifetime, and nothing that is in use."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from specimens import mapping

from reaperd import reclaim
from reaperd.linux import shm
from reaperd.linux.procfs import TICKS_PER_S, ProcFS
from reaperd.model import ProcessId, Session

UID = os.getuid()
NOBODY = 65534
PAGE = mmap.PAGESIZE


@contextlib.contextmanager
def child() -> Iterator[ProcessId]:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        yield ProcFS().stat(pid).id
    finally:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@dataclass
class Dead:
    """A leader that is dead and waited for, and what it left."""

    leader: ProcessId
    folder: Path
    made: list[Path] = field(default_factory=list)

    def left(self, name: str = "", *, within: Path | None = None) -> Path:
        """Return a file of one page that the leader left; joblib's kind, where no name is given."""
        path = (within or self.folder) / (
            name or f"joblib_memmapping_folder_{self.leader.pid}_{len(self.made)}"
        )
        path.write_bytes(b"x" * PAGE)
        self.made.append(path)
        return path

    def claim(
        self, *, mapped: tuple[str, ...] = (), until_s: float | None = None, **facts: Any
    ) -> reclaim.Claim:
        session = Session("s", "", UID, os.getgid(), self.leader, "", temp_dirs=(str(self.folder),))
        until_epoch_s = time.time() if until_s is None else until_s
        return reclaim.Claim(session._replace(**facts), frozenset(mapped), until_epoch_s)


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Dead]:
    with child() as leader:
        one = Dead(leader, tmp_path)
    yield one
    for path in one.made:
        path.unlink(missing_ok=True)


def freed(*claims: reclaim.Claim) -> int:
    before = len(os.listdir("/proc/self/fd"))
    freed_bytes = reclaim.reclaim_work(list(claims), "/proc")()
    assert len(os.listdir("/proc/self/fd")) == before
    return freed_bytes


# -- whose ------------------------------------------------------------------------------------------


def test_what_bears_the_leaders_pid_is_freed_wherever_its_session_keeps_such_things(dead: Dead) -> None:
    left = [dead.left(), dead.left(f"sem.loky-{dead.leader.pid}-x", within=Path(shm.SHM))]
    other = dead.left(f"joblib_memmapping_folder_{dead.leader.pid}7_x")
    assert freed(dead.claim()) == 2 * PAGE
    assert [path.exists() for path in (*left, other)] == [False, False, True]
    assert freed(dead.claim()) == 0


def test_what_only_members_had_mapped_is_freed_from_shared_memory_alone(dead: Dead) -> None:
    name = f"psm_{secrets.token_hex(4)}"
    there, here = dead.left(name, within=Path(shm.SHM)), dead.left(name)
    assert freed(dead.claim()) == 0
    assert freed(dead.claim(mapped=(name, "psm_gone"))) == PAGE
    assert [there.exists(), here.exists()] == [False, True]


def test_one_helper_serves_many_sessions_of_a_user(dead: Dead, tmp_path: Path) -> None:
    with child() as leader:
        other = Dead(leader, tmp_path)
    dead.left()
    other.left()
    assert (
        freed(dead.claim(), other.claim()._replace(session=other.claim().session._replace(id="t")))
        == 2 * PAGE
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_named_twice_or_through_a_link_is_one_and_one_that_is_gone_is_none(
    dead: Dead,
) -> None:
    left, link = dead.left(), dead.folder / "link"
    link.symlink_to(dead.folder)
    folders = (str(link), str(dead.folder), str(dead.folder), "/nowhere", str(left))
    assert freed(dead.claim(temp_dirs=folders)) == PAGE
    assert not left.exists()
    dead.left()
    assert freed(dead.claim(temp_dirs=(str(link),))) == PAGE


@pytest.mark.needs_root
def test_what_the_user_could_not_remove_is_not_removed_for_the_user(dead: Dead) -> None:
    theirs, roots = dead.left(), dead.left()
    os.chown(theirs, NOBODY, NOBODY)
    assert freed(dead.claim(uid=NOBODY, gid=NOBODY)) == 0, "the folder is not writable for them"
    os.chown(dead.folder, NOBODY, NOBODY)
    for folder in (dead.folder.parent, dead.folder.parent.parent):
        folder.chmod(0o711)
    assert freed(dead.claim(uid=NOBODY, gid=NOBODY)) == PAGE
    assert [theirs.exists(), roots.exists()] == [False, True]


@pytest.mark.needs_root
def test_the_sessions_of_two_users_with_the_same_id_each_free_their_own(dead: Dead, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)
    with child() as leader:
        other = Dead(leader, shared)
    mine, theirs = dead.left(), other.left()
    os.chown(theirs, NOBODY, NOBODY)
    claim = other.claim(uid=NOBODY, gid=NOBODY)
    assert claim.session.id == dead.claim().session.id
    assert freed(dead.claim(), claim) == 2 * PAGE
    assert [mine.exists(), theirs.exists()] == [False, False]


# -- when -------------------------------------------------------------------------------------------


def test_what_was_made_after_the_leader_had_died_is_somebody_elses(dead: Dead) -> None:
    left = dead.left()
    made_s = time.time()
    assert freed(dead.claim(until_s=made_s - 1.5)) == 0
    assert left.exists()
    assert freed(dead.claim(until_s=made_s - 0.5)) == PAGE, "a clock may have been set by as much"


def test_what_was_made_before_the_leader_started_is_somebody_elses(dead: Dead) -> None:
    left = dead.left()
    younger = ProcessId(dead.leader.pid, dead.leader.start_ticks + 5 * TICKS_PER_S)
    assert freed(dead.claim(leader=younger, until_s=time.time() + 60)) == 0
    assert left.exists()


# -- still in use -----------------------------------------------------------------------------------


def test_nothing_is_freed_where_the_leaders_pid_is_another_process_by_now(dead: Dead) -> None:
    with child() as living:
        before = ProcessId(living.pid, living.start_ticks - 1)
        left = dead.left(f"joblib_memmapping_folder_{living.pid}_x")
        assert freed(dead.claim(leader=before)) == 0
        assert left.exists()
        os.kill(living.pid, signal.SIGKILL)
        os.waitid(os.P_PID, living.pid, os.WEXITED | os.WNOWAIT)
        assert freed(dead.claim(leader=before)) == 0, "a zombie has its pid still"
        assert freed(dead.claim(leader=living)) == PAGE, "but a leader that nobody has waited for is itself"


def test_nothing_is_freed_where_a_living_process_is_like_the_leader_down_to_the_tick(dead: Dead) -> None:
    """Start times count ticks of 10 ms: within one, a pid can be given away and be another's."""
    with child() as living:
        left = dead.left(f"joblib_memmapping_folder_{living.pid}_x")
        assert freed(dead.claim(leader=living)) == 0
    assert left.exists()


def test_what_a_living_process_has_open_or_mapped_stays(dead: Dead) -> None:
    opened, mapped, left = dead.left(), dead.left(), dead.left()
    with open(opened, "rb"), mapping(mapped):
        assert freed(dead.claim()) == PAGE
        assert [opened.exists(), mapped.exists(), left.exists()] == [True, True, False]
    assert freed(dead.claim()) == 2 * PAGE


def proc_with(tmp_path: Path, *, uid: int) -> Path:
    """Return a folder that looks like a /proc whose only process, of ``uid``, never lets its mappings be read."""
    root = tmp_path / "proc"
    (root / "7/task/7/fd").mkdir(parents=True)
    fields = [b"0"] * 50
    fields[0], fields[17], fields[19] = b"S", b"1", b"99"
    (root / "7/stat").write_bytes(b"7 (x) %s\n" % b" ".join(fields))
    (root / "7/status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    os.mkfifo(root / "7/task/7/maps")
    (root / "self").symlink_to("/proc/self")
    return root


def test_nothing_is_freed_while_a_process_of_that_user_does_not_let_itself_be_read(
    dead: Dead, tmp_path: Path
) -> None:
    left = dead.left()
    root = proc_with(tmp_path, uid=UID)
    begin_s = time.monotonic()
    assert reclaim.reclaim_work([dead.claim()], str(root))() == 0
    assert time.monotonic() - begin_s < 10
    assert left.exists()
    (root / "7/status").write_text("Name:\tx\nUid:\t5\t5\t5\t5\n")
    assert reclaim.reclaim_work([dead.claim()], str(root))() == PAGE, "another user's is no reason"


def test_nobody_waits_for_a_process_that_has_ended_meanwhile(dead: Dead, tmp_path: Path) -> None:
    dead.left()
    root = proc_with(tmp_path, uid=UID)
    (root / "7/task/7/maps").unlink()
    (root / "7/status").unlink()
    assert reclaim.reclaim_work([dead.claim()], str(root))() == PAGE


def test_what_a_forked_helper_or_another_thread_has_mapped_stays(dead: Dead) -> None:
    left = dead.left()
    with mapping(left), child() as inheriting:
        assert inheriting.pid
        assert freed(dead.claim()) == 0
    assert left.exists()


def test_a_folder_deeper_than_anything_needs_costs_nothing_but_itself(dead: Dead) -> None:
    deep = Path(f"{shm.SHM}/joblib_memmapping_folder_{dead.leader.pid}_deep")
    left, home = dead.left(), os.getcwd()
    try:
        deep.mkdir()
        os.chdir(deep)
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
        assert freed(dead.claim()) == PAGE
        assert not left.exists()
    finally:
        os.chdir(home)
        subprocess.run(["rm", "-rf", str(deep)], check=True)


# -- the last word ----------------------------------------------------------------------------------


def status_of(path: Path, **more: Any) -> Path:
    told = {
        "state": "running",
        "name": "x",
        "session": "s",
        "pid": 1,
        "start_ticks": 2,
        "boot_id": "b",
        "started_at": "t",
    }
    path.write_text(json.dumps({**told, **more}))
    path.chmod(0o640)
    return path


def last_word(dead: Dead, path: Path, **facts: Any) -> dict[str, Any]:
    last = reclaim.LastWord(str(path), {"kind": "signal", "code": 9}, {"done": 1, "total": 2, "message": ""})
    freed(dead.claim(**facts)._replace(last_word=last, frees=False))
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_the_end_of_a_killed_run_is_written_for_it(dead: Dead, tmp_path: Path) -> None:
    path = status_of(tmp_path / "run.json")
    told = last_word(dead, path)
    assert (told["state"], told["cause"], told["started_at"]) == (
        "killed",
        {"kind": "signal", "code": 9},
        "t",
    )
    assert told["progress"] == {"done": 1, "total": 2, "message": ""}
    assert told["ended_at"].endswith("Z")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("more", [{"state": "completed"}, {"session": "another"}])
def test_what_another_run_says_or_this_one_has_said_itself_stays(
    dead: Dead, tmp_path: Path, more: dict[str, Any]
) -> None:
    path = status_of(tmp_path / "run.json", **more)
    before = path.read_bytes()
    last_word(dead, path)
    assert path.read_bytes() == before


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("mode", "groups", "state"),
    [(0o755, (), "running"), (0o770, (), "running"), (0o770, (7, 54322), "killed"), (0o777, (), "killed")],
)
def test_it_is_written_with_the_rights_of_the_leaders_user_and_groups(
    dead: Dead, mode: int, groups: tuple[int, ...], state: str
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to other users
        os.chown(folder, 0, 54322)
        path = status_of(Path(folder, "run.json"))
        path.chmod(0o644)
        os.chmod(folder, mode)
        assert last_word(dead, path, uid=54321, gid=54321, groups=groups)["state"] == state


def test_a_fifo_or_a_folder_of_that_name_holds_nobody_up(dead: Dead, tmp_path: Path) -> None:
    fifo, folder, garbage = tmp_path / "fifo", tmp_path / "folder", tmp_path / "garbage"
    os.mkfifo(fifo)
    folder.mkdir()
    garbage.write_bytes(b"\0" * 100_000)
    began_s = time.monotonic()
    for path in (fifo, folder, garbage, tmp_path / "missing"):
        last = reclaim.LastWord(str(path), None, None)
        freed(dead.claim()._replace(last_word=last, frees=False))
    assert time.monotonic() - began_s < reclaim._LONGEST_S / 2, "it was the alarm that ended one"
    assert garbage.read_bytes() == b"\0" * 100_000
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "garbage"]
