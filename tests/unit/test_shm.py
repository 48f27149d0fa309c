"""What the dead left in /dev/shm and in temporary folders: known names only, and nothing that is not theirs."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reaperd.linux import shm
from reaperd.linux.procfs import ProcFS

UID = os.getuid()
NOBODY = 65534
PID = 4194305  # one more than any pid can be


@contextmanager
def opened(path: Path) -> Iterator[int]:
    with shm.open_directory(str(path)) as directory:
        yield directory


@contextmanager
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


def test_segments_without_a_pid_are_those_of_the_uid_with_a_known_name() -> None:
    mark = secrets.token_hex(4)
    with in_shm(f"psm_{mark}") as one, in_shm(f"torch_{mark}") as two, in_shm(f"sem.mp-{mark}") as three:
        with in_shm(f"other_{mark}"), in_shm(f"xpsm_{mark}"):
            ours = {name for name in shm.shared_names(UID) if mark in name}
            assert ours == {one, two, three}
        assert not [name for name in shm.shared_names(UID + 1) if mark in name]


def test_a_segment_is_known_by_the_path_under_which_it_is_mapped() -> None:
    names = frozenset(("psm_a", "psm_b", "psm_c"))
    paths = [
        *("/dev/shm/psm_a", "/dev/shm/psm_a", "/dev/shm/other", "/tmp/psm_b", "/dev/shm/psm_b (deleted)"),
        *("/dev/shm/x/psm_b", "/dev/shm-psm_b", "psm_b", "[heap]", ""),
    ]
    assert shm.mapped_names(paths, names) == {"psm_a"}


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


# -- when they were made ----------------------------------------------------------------------------


def test_the_birth_of_an_entry_is_told_whatever_its_owner_sets_its_times_to(tmp_path: Path) -> None:
    before_s = time.time()
    (tmp_path / "entry").touch()
    os.utime(tmp_path / "entry", (0, 0))
    with opened(tmp_path) as directory:
        made_s = shm.made_at_epoch_s(directory, "entry")
    assert made_s is not None
    assert before_s - 0.1 < made_s < time.time() + 0.1


def test_the_birth_of_a_link_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere")
    with opened(tmp_path) as directory:
        assert (shm.made_at_epoch_s(directory, "link") or 0) > time.time() - 2


def test_what_is_gone_or_on_a_file_system_without_birth_times_was_made_at_no_time(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        assert shm.made_at_epoch_s(directory, "gone") is None
    with opened(Path("/proc")) as directory:
        assert shm.made_at_epoch_s(directory, "version") is None


def test_a_process_started_a_second_after_what_is_said_at_the_most() -> None:
    started_s = shm.started_at_epoch_s(ProcFS().stat(os.getpid()).id.start_ticks)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ProcFS().stat(os.getpid()).id.start_ticks / 100
    assert time.time() - age_s - 2 < started_s <= time.time() - age_s
