"""What the dead left in /dev/shm and in temporary folders: known names only, and nothing that is not theirs."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reaperd.linux import shm
from reaperd.linux.procfs import ProcFS

UID = os.getuid()
NOBODY = 65534
PID = 4194305  # one more than any pid can be


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    with shm.open_directory(str(path)) as directory:
        yield directory


@contextlib.contextmanager
def in_shm(name: str, data: bytes = b"") -> Iterator[str]:
    path = f"{shm.SHM}/{name}"
    with open(path, "xb") as file:
        file.write(data)
    try:
        yield name
    finally:
        os.unlink(path)


def remove(folder: Path, name: str, *, uid: int = UID) -> int:
    with opened(folder) as directory:
        return shm.remove(directory, name, uid)


def write(path: Path, data: bytes = b"x" * 10_000) -> int:
    """Write a file and return what it takes on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def give_away(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


# -- removing ---------------------------------------------------------------------------------------


def test_a_file_is_removed_and_its_size_on_the_disk_returned(tmp_path: Path) -> None:
    size = write(tmp_path / "entry")
    assert size >= 10_000
    assert remove(tmp_path, "entry") == size
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    sizes = [write(tmp_path / "folder" / name) for name in ("a", "b/c", "b/d/e/f")]
    (tmp_path / "folder/empty").mkdir()
    assert remove(tmp_path, "folder") == sum(sizes)
    assert list(tmp_path.iterdir()) == []


def test_a_deep_nest_of_folders_is_removed(tmp_path: Path) -> None:
    deepest = tmp_path.joinpath("folder", *["d"] * 60)
    size = write(deepest / "file")
    assert remove(tmp_path, "folder") == size
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside / "precious")
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(outside)
    (tmp_path / "folder/file-link").symlink_to(outside / "precious")
    (tmp_path / "folder/dangling").symlink_to("/nowhere")
    remove(tmp_path, "link")
    remove(tmp_path, "folder")
    assert [one.name for one in tmp_path.iterdir()] == ["outside"]
    assert (outside / "precious").read_bytes() == b"x" * 10_000


def test_a_directory_is_never_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "file", "missing"):
        with pytest.raises(OSError, match=name), shm.open_directory(str(tmp_path / name)):
            pass
    with opened(tmp_path) as directory:
        with pytest.raises(OSError, match="link"), shm.open_directory("link", directory):
            pass
        with shm.open_directory("real", directory) as inner:
            assert os.path.samestat(os.fstat(inner), (tmp_path / "real").stat())
            assert not os.get_inheritable(inner)


def test_a_file_with_another_name_elsewhere_frees_nothing(tmp_path: Path) -> None:
    write(tmp_path / "folder/file")
    os.link(tmp_path / "folder/file", tmp_path / "kept")
    assert remove(tmp_path, "folder") == 0
    assert (tmp_path / "kept").stat().st_size == 10_000


def chain(at: Path, depth: int) -> None:
    """Make folders within each other, deeper than a path can be long."""
    home = os.getcwd()
    try:
        at.mkdir()
        os.chdir(at)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(home)


def unchain(at: Path) -> None:
    subprocess.run(["rm", "-rf", str(at)], check=True)


def test_folders_deeper_than_anything_needs_cost_neither_a_stack_nor_what_lies_beside_them() -> None:
    folder = Path(f"{shm.SHM}/joblib_memmapping_folder_{PID}_{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        chain(folder / "deep", 3000)
        size = write(folder / "a") + write(folder / "z")
        before = set(os.listdir("/proc/self/fd"))
        assert remove(Path(shm.SHM), folder.name) == size
        assert set(os.listdir("/proc/self/fd")) <= before  # the garbage of other tests may go meanwhile
        assert os.listdir(folder) == ["deep"]
    finally:
        unchain(folder)


def test_removing_ends_when_its_time_is_over(tmp_path: Path) -> None:
    write(tmp_path / "folder/file")
    with opened(tmp_path) as directory:
        assert shm.remove(directory, "folder", UID, until_s=time.monotonic()) == 0
        assert (tmp_path / "folder/file").exists()
        assert shm.remove(directory, "folder", UID, until_s=time.monotonic() + 60) > 0


@pytest.mark.needs_root
def test_what_is_mounted_in_a_folder_is_neither_measured_nor_removed_nor_asked(tmp_path: Path) -> None:
    (tmp_path / "folder/mounted").mkdir(parents=True)
    size = write(tmp_path / "folder/file")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "folder/mounted")], check=True)
    try:
        write(tmp_path / "folder/mounted/precious")
        with opened(tmp_path / "folder") as folder:
            assert shm.stat_here(folder, "mounted") is None
            assert shm.stat_here(folder, "file") is not None
            with pytest.raises(OSError, match="mounted"):
                shm._open_here(folder, "mounted")
        assert remove(tmp_path, "folder") == size
        assert (tmp_path / "folder/mounted/precious").exists()
    finally:
        subprocess.run(["umount", str(tmp_path / "folder/mounted")], check=True)


@pytest.mark.needs_root
def test_what_is_mounted_there_from_the_same_file_system_is_not_entered_either(tmp_path: Path) -> None:
    """A bind mount has the device of its folder: only openat2(2) tells that it is one."""
    write(tmp_path / "outside/precious")
    (tmp_path / "folder/mounted").mkdir(parents=True)
    size = write(tmp_path / "folder/file")
    write(tmp_path / "folder/pinned")
    for source, target in (("outside", "mounted"), ("outside/precious", "pinned")):
        subprocess.run(
            ["mount", "--bind", str(tmp_path / source), str(tmp_path / "folder" / target)], check=True
        )
    try:
        assert remove(tmp_path, "folder") == size
        assert (tmp_path / "outside/precious").exists()
    finally:
        for target in ("pinned", "mounted"):
            subprocess.run(["umount", str(tmp_path / "folder" / target)], check=True)


def test_sockets_fifos_and_other_names_of_a_file_are_removed_and_nothing_that_they_stand_for(
    tmp_path: Path,
) -> None:
    """Nothing of it is opened: a FIFO would be waited for."""
    write(tmp_path / "outside", b"precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.link(tmp_path / "outside", folder / "hard")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
        if UID == 0:
            os.mknod(folder / "device", 0o600 | stat.S_IFBLK, os.makedev(7, 200))
        remove(tmp_path, "folder")
    assert not folder.exists()
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert (tmp_path / "outside").stat().st_nlink == 1


@pytest.mark.needs_root
def test_what_cannot_be_removed_saves_nothing_but_itself(tmp_path: Path) -> None:
    size = write(tmp_path / "folder/a") + write(tmp_path / "folder/z")
    write(tmp_path / "folder/m/immutable")
    if subprocess.run(["chattr", "+i", tmp_path / "folder/m/immutable"], check=False).returncode:
        pytest.skip("this file system knows no immutable files")
    try:
        assert remove(tmp_path, "folder") == size
        assert [one.name for one in (tmp_path / "folder").iterdir()] == ["m"]
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "folder/m/immutable"], check=True)


SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
one, other = (os.fsencode(path) for path in sys.argv[1:])
print(flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)  # AT_FDCWD, RENAME_EXCHANGE
"""


def test_a_folder_that_becomes_a_link_between_look_and_removal_leads_nowhere(tmp_path: Path) -> None:
    """Its owner swaps them without a pause; both ways must be taken for this to show anything."""
    write(tmp_path / "outside/precious")
    write(tmp_path / "outside/deep/precious")
    folder, link = tmp_path / "folder/inner", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to("../outside")  # from where it is swapped to
    refused = 0
    with subprocess.Popen([sys.executable, "-c", SWAP, folder, link], stdout=subprocess.PIPE) as swapping:
        try:
            assert swapping.stdout is not None
            swapping.stdout.readline()
            with opened(tmp_path / "folder") as directory:
                end_s = time.monotonic() + 10
                while refused < 20 and time.monotonic() < end_s:
                    found = shm.stat_here(directory, "inner")
                    if found is None or not stat.S_ISDIR(found.mode):
                        continue
                    try:
                        os.close(shm._open_here(directory, "inner"))
                    except OSError:
                        refused += 1
                for _ in range(200):
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir()
                    with contextlib.suppress(FileExistsError):
                        link.symlink_to("../outside")  # from where it is swapped to
                    with contextlib.suppress(OSError):
                        shm.remove(directory, "inner", UID)
        finally:
            swapping.kill()
    assert refused == 20, "the folder was never swapped at the moment that matters"
    assert (tmp_path / "outside/precious").exists()
    assert (tmp_path / "outside/deep/precious").exists()


def test_without_openat2_folders_are_opened_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(tmp_path / "folder/a/b/c")
    monkeypatch.setattr(shm, "_SYS_OPENAT2", 100_000)  # there is no such call
    assert remove(tmp_path, "folder") == size


@pytest.mark.needs_root
def test_what_belongs_to_another_uid_stays_with_the_folder_that_it_is_in(tmp_path: Path) -> None:
    mine = write(tmp_path / "folder/mine")
    write(tmp_path / "folder/inner/other")
    write(tmp_path / "folder/theirs/mine")
    (tmp_path / "folder/link").symlink_to("/nowhere")
    for name in ("inner/other", "theirs", "link"):
        give_away(tmp_path / "folder" / name)
    assert remove(tmp_path, "folder") == mine
    left = sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*"))
    assert left == ["folder", "folder/inner", "folder/inner/other", "folder/link", *(
        ["folder/theirs", "folder/theirs/mine"]
    )]  # fmt: skip


@pytest.mark.needs_root
def test_an_entry_of_another_uid_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path / "file")
    write(tmp_path / "folder/mine")
    for name in ("file", "folder"):
        give_away(tmp_path / name)
        assert remove(tmp_path, name) == 0
    assert (tmp_path / "folder/mine").exists()


def test_nothing_on_another_device_is_touched() -> None:
    # Nobody can remove anything from /proc: were this guard gone, an error would say so.
    with opened(Path("/")) as root:
        assert shm.remove(root, "proc", os.stat("/proc").st_uid) == 0


def test_an_entry_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remove(tmp_path, "gone")


def test_removing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "folder/a/b/c")
    remove(tmp_path, "folder")
    with pytest.raises(FileNotFoundError):
        remove(tmp_path, "gone")
    assert len(os.listdir("/proc/self/fd")) == before


# -- whose they are ---------------------------------------------------------------------------------


def test_names_that_carry_the_leaders_pid_are_the_leaders_and_no_others(tmp_path: Path) -> None:
    mine = ["joblib_memmapping_folder_42_abc", "sem.loky-42-x", "joblib_memmapping_folder_42_", "psm_mapped"]
    others = [
        "joblib_memmapping_folder_421_abc",
        "joblib_memmapping_folder_4_2",
        "sem.loky-421-x",
        "psm_other",
    ]
    others += ["xsem.loky-42-x", "sem.loky-42", "sem.mp-42", "joblib_memmapping_folder_42", "psm_mappedtoo"]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    with opened(tmp_path) as directory:
        found = shm.candidates(directory, 42, frozenset(("psm_mapped", "psm_gone")))
    assert sorted(found) == sorted(mine)


def test_a_user_may_have_segments_where_one_of_them_bears_a_known_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = UID + 1
    assert not shm.may_have_segments(other)
    with in_shm(f"other_{secrets.token_hex(4)}"), in_shm(f"xpsm_{secrets.token_hex(4)}") as name:
        os.chown(f"{shm.SHM}/{name}", other, other)
        assert not shm.may_have_segments(other)
    for prefix in ("psm_", "torch_", "sem.mp-"):
        with in_shm(f"{prefix}{secrets.token_hex(4)}") as name:
            assert shm.may_have_segments(UID)
            assert not shm.may_have_segments(other)


def test_a_user_may_have_segments_among_more_names_than_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with in_shm(f"psm_{secrets.token_hex(4)}"):
        assert not shm.may_have_segments(UID + 1)
        monkeypatch.setattr(shm, "MAX_NAMES", 1)
        assert shm.may_have_segments(UID + 1)


def test_a_segment_is_known_by_the_path_under_which_it_is_mapped() -> None:
    mark = secrets.token_hex(4)
    with contextlib.ExitStack() as made:
        one, two, three, other, unmapped = (
            made.enter_context(in_shm(f"{stem}{mark}"))
            for stem in ("psm_", "torch_", "sem.mp-", "other_", "psm_un")
        )
        paths = [f"/dev/shm/{name}" for name in (one, one, two, three, other, "psm_gone")]
        paths += [f"/tmp/{unmapped}", f"/dev/shm/{unmapped} (deleted)", f"/dev/shm/x/{unmapped}"]
        paths += [f"/dev/shm-{unmapped}", unmapped, f"/dev/shm/psm_/../{unmapped}", "[heap]", ""]
        assert shm.segments_among(paths, UID) == {one, two, three}
        assert shm.segments_among(paths, UID + 1) == frozenset()


def test_what_a_leader_holds_is_counted_by_its_names_alone() -> None:
    page = os.sysconf("SC_PAGESIZE")
    mark = f"psm_{secrets.token_hex(4)}"
    assert shm.held_bytes(PID, frozenset(), UID) == 0
    with in_shm(f"sem.loky-{PID}-x", b"x" * page), in_shm(mark, b"x" * 2 * page):
        assert shm.held_bytes(PID, frozenset(), UID) == page
        assert shm.held_bytes(PID, frozenset((mark, "psm_gone")), UID) == 3 * page
        assert shm.held_bytes(PID, frozenset((mark,)), UID + 1) == 0
        assert shm.held_bytes(PID + 1, frozenset(), UID) == 0


def test_a_folder_in_shm_is_counted_with_all_that_is_in_it() -> None:
    folder = Path(f"{shm.SHM}/joblib_memmapping_folder_{PID}_{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        (folder / "inner").mkdir()
        (folder / "inner/array.pkl").write_bytes(b"x" * 5000)
        (folder / "link").symlink_to("/usr")
        assert shm.held_bytes(PID, frozenset(), UID) == 8192
        with shm.open_directory(shm.SHM) as directory:
            assert shm.remove(directory, folder.name, UID) == 8192
    finally:
        assert not folder.exists()


def test_measuring_ends_however_much_a_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(f"{shm.SHM}/joblib_memmapping_folder_{PID}_{secrets.token_hex(4)}")
    try:
        chain(folder, 3000)
        page = write(folder / "near", b"x")
        assert shm.held_bytes(PID, frozenset(), UID) == page
        for number in range(20):
            write(folder / f"file-{number}", b"x")
        assert shm.held_bytes(PID, frozenset(), UID) == 21 * page
        monkeypatch.setattr(shm, "MAX_MEASURED", 10)
        assert 0 < shm.held_bytes(PID, frozenset(), UID) <= 10 * page
        monkeypatch.setattr(shm, "MAX_NAMES", 0)
        assert shm.held_bytes(PID, frozenset(), UID) == 0
    finally:
        unchain(folder)


# -- when they were made ----------------------------------------------------------------------------


def made_at_epoch_s(directory: int, name: str) -> float | None:
    found = shm.stat_here(directory, name)
    return found and found.born_epoch_s


def test_the_birth_of_an_entry_is_told_whatever_its_owner_sets_its_times_to(tmp_path: Path) -> None:
    before_s = time.time()
    (tmp_path / "entry").touch()
    os.utime(tmp_path / "entry", (0, 0))
    with opened(tmp_path) as directory:
        made_s = made_at_epoch_s(directory, "entry")
    assert made_s is not None
    assert before_s - 0.1 < made_s < time.time() + 0.1


def test_the_birth_of_a_link_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere")
    with opened(tmp_path) as directory:
        assert (made_at_epoch_s(directory, "link") or 0) > time.time() - 2


def test_what_is_gone_or_on_a_file_system_without_birth_times_was_made_at_no_time(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        assert made_at_epoch_s(directory, "gone") is None
    with opened(Path("/proc")) as directory:
        assert made_at_epoch_s(directory, "version") is None


def test_a_process_started_a_second_after_what_is_said_at_the_most() -> None:
    started_s = shm.started_at_epoch_s(ProcFS().stat(os.getpid()).id.start_ticks)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ProcFS().stat(os.getpid()).id.start_ticks / 100
    assert time.time() - age_s - 2 < started_s <= time.time() - age_s
