"""What doctor makes of what its probes told, and the probes themselves, on the kernel at hand."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

import pytest

from reaperd.ctl import check_kernel, check_setup, doctor, probes
from reaperd.ctl.findings import LIMIT, OK, PROBLEM, Finding, limit, ok, problem, run
from reaperd.ctl.text import Look
from reaperd.linux.mounts import Mount, parse_mount_table

MOUNTS = r"""
proc /proc proc rw,nosuid,hidepid=invisible 0 0
tmp\040fs /dev/shm tmpfs rw,size=64k 0 0
cgroup2 /sys/fs/cgroup cgroup2 rw 0 0
/dev/sda1 /mnt/with\040space\134040\043\011 ext4 rw 0 0
"""


def test_mounts_are_read_with_their_options_and_with_escaped_names() -> None:
    mounts = {mount.point: mount for mount in parse_mount_table(MOUNTS)}
    assert mounts["/proc"].options == ("rw", "nosuid", "hidepid=invisible")
    assert mounts["/dev/shm"].kind == "tmpfs"
    assert "/mnt/with space\\040#\t" in mounts
    assert len(mounts) == 4


@pytest.mark.parametrize("text", ["", "\n\n", " - ", "1 2 3", "\0\xff -\n- - \n"])
def test_a_mount_table_of_another_shape_names_no_mount(text: str) -> None:
    assert parse_mount_table(text) == []


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\r", "\x85", "\u2028"])
def test_the_name_of_a_mount_point_cannot_forge_a_mount(character: str) -> None:
    line = f"fuse /home/u/x{character}cgroup\\040/fake\\040cgroup2\\040rw fuse.sshfs rw 0 0\n"
    (mount,) = parse_mount_table(line)
    assert (mount.kind, mount.options) == ("fuse.sshfs", ("rw",))


def test_the_mount_table_at_hand_has_proc() -> None:
    text = probes.read_text("/proc/self/mounts")
    assert "proc" in {mount.kind for mount in parse_mount_table(text) if mount.point == "/proc"}


def mount(kind: str) -> Mount:
    return Mount("/x", kind, ())


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["cgroup2"], "unified"),
        (["cgroup", "cgroup2", "cgroup"], "hybrid"),
        (["cgroup"], "v1"),
        (["tmpfs"], "no cgroups"),
    ],
)
def test_the_cgroup_layout_is_told_from_the_mounts(kinds: list[str], words: str) -> None:
    assert words in check_kernel.cgroup_layout([mount(kind) for kind in kinds])


def test_a_check_that_cannot_be_made_is_a_limit_and_not_a_traceback() -> None:
    def fails() -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    found = run("thing", fails)
    assert (found.level, found.subject) == (LIMIT, "thing")
    assert "Operation not permitted" in found.fact


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n", OK, "active"),
        ("LoadState=loaded\nActiveState=active\nUnitFileState=disabled\n", LIMIT, "not enabled"),
        ("LoadState=loaded\nActiveState=failed\nUnitFileState=enabled\n", LIMIT, "failed"),
        ("LoadState=not-found\nActiveState=inactive\nUnitFileState=\n", LIMIT, "not installed"),
        ("", LIMIT, "not installed"),
        ("Failed to connect to bus: No medium found\n", LIMIT, "not installed"),
    ],
)
def test_the_unit_is_judged_by_what_systemctl_says(text: str, level: str, words: str) -> None:
    found = check_setup.judge_unit(text, "systemctl")
    assert found.level == level
    assert words in found.fact


FOUND = [
    ok("as it should be")._replace(subject="one"),
    limit("less " * 40, "get more")._replace(subject="two"),
    problem("broken \x1b[2J\u202e", "mend it")._replace(subject="three"),
]


def test_a_report_has_one_line_a_check_and_says_what_to_do() -> None:
    lines = doctor.report(FOUND, Look())
    assert lines[0] == "OK       one                as it should be"
    assert lines[1].startswith("LIMIT    two                less less")
    assert lines[2].strip() == "-> get more"
    assert lines[3].startswith(r"PROBLEM  three              broken \x1b[2J\u202e")
    assert lines[-1] == "1 problem and 1 limit: what to do stands below each"


def test_a_report_fits_the_terminal() -> None:
    assert max(map(len, doctor.report(FOUND, Look(width=80)))) <= 80


def test_a_report_without_a_fault_says_so() -> None:
    assert doctor.summary([Finding(OK, "x")]) == "all is well"


def test_every_check_has_a_subject_of_its_own_that_fits_its_column() -> None:
    options = argparse.Namespace(user=False, system=False, socket="/nowhere", timeout=1.0)
    names = [name for name, _ in [*check_kernel.CHECKS, *check_setup.checks(options)]]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 19


def test_the_probes_leave_no_descriptor_and_no_child_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for probe in (probes.send_by_pidfd, probes.reads_exit_code, probes.lists_children, probes.seal_memfd):
        probe()
    probes.reads_environ(of_another_user=False)
    probes.write_in("/tmp")
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(FileNotFoundError):
        probes.write_in(os.path.join(tmp_path, "none"))


def test_a_peer_on_an_ipc_socket_is_known_by_its_uid_gid_and_pid() -> None:
    assert probes.peer_address() == f"localhost:{os.geteuid()}:{os.getegid()}:{os.getpid()}"


def test_a_kernel_that_is_not_linux_ends_the_examination() -> None:
    assert check_kernel.kernel().level in (OK, PROBLEM)
