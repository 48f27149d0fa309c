"""Which file counts OOM kills, in either version of cgroups, and what it says."""

from __future__ import annotations

from pathlib import Path

from reaperd.linux import oom
from reaperd.linux.cgroups import parse_hierarchies
from reaperd.linux.mounts import Mount, parse_mount_table
from reaperd.linux.oom import (
    Counter,
    Counters,
    counter_file,
    parse_memory_path,
    parse_oom_kills,
)

V2 = "cgroup2 {root}/unified cgroup2 rw,nosuid,nsdelegate 0 0\n"
V1 = (
    "cgroup {root}/cpu cgroup rw,cpu,cpuacct 0 0\n"
    "cgroup {root}/memory cgroup rw,relatime,memory 0 0\n"
    "cgroup {root}/systemd cgroup rw,xattr,name=systemd 0 0\n"
)


class Hierarchies:
    """Folders that look like mounted cgroups, and the file that says where they are mounted."""

    def __init__(self, root: Path, mounts: str) -> None:
        self.root = root
        self.mounts = str(root / "mounts")
        Path(self.mounts).write_text(mounts.format(root=root))

    def write(self, name: str, text: str) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def counter(self, cgroup_text: str) -> str:
        return Counters(self.mounts).find(cgroup_text).path


def mounted(table: str) -> tuple[str, str]:
    """Return where the unified hierarchy and version 1's memory controller are mounted."""
    found = parse_hierarchies(table)
    return found.get("", ""), found.get("memory", "")


# -- parsing ----------------------------------------------------------------------------------------


def test_the_mounts_of_both_versions_are_found() -> None:
    assert mounted(V2.format(root="/c")) == ("/c/unified", "")
    assert mounted(V1.format(root="/c")) == ("", "/c/memory")
    assert mounted((V1 + V2).format(root="/c")) == ("/c/unified", "/c/memory")


def test_the_first_of_several_mounts_counts() -> None:
    assert mounted("a /1 cgroup2 rw 0 0\nb /2 cgroup2 rw 0 0\n") == ("/1", "")


def test_a_mount_that_only_looks_like_a_cgroup_is_none() -> None:
    hostile = (
        "cgroup2 /home/u/cgroup2 fuse.cgroup2 rw,memory 0 0\n"
        "memory /home/u/memory tmpfs rw,memory 0 0\n"
        "cgroup /c/hugemem cgroup rw,memoryhog 0 0\n"
        "\n"
        "junk\n"
        "cgroup2 /c cgroup2\n"
    )
    assert mounted(hostile) == ("", "")


def test_what_the_kernel_writes_in_octal_is_read_back() -> None:
    assert mounted("c /with\\040blank\\011\\134\\012\\043 cgroup2 rw 0 0\n") == (
        "/with blank\t\\\n#",
        "",
    )
    assert mounted("c /no\\089octal\\ cgroup2 rw 0 0\n") == ("/no\\089octal\\", "")


def test_only_a_line_feed_ends_a_line_of_the_mount_table() -> None:
    for odd in ("\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"):
        table = f"x{odd}c /c cgroup2 rw 0 0 /home/u/mnt fuse.x rw 0 0\n"
        assert mounted(table) == ("/c", ""), ascii(odd)
        assert mounted(f"source /home/u/a{odd}c /c cgroup2 rw 0 0\n") == ("", ""), ascii(odd)


def test_every_mount_is_told_with_its_kind_and_options() -> None:
    table = parse_mount_table("proc /proc proc rw,relatime,hidepid=2 0 0\njunk\n\ntmpfs /tmp tmpfs rw 0 0\n")
    assert table == [
        Mount("/proc", "proc", ("rw", "relatime", "hidepid=2")),
        Mount("/tmp", "tmpfs", ("rw",)),
    ]


def test_the_path_of_the_memory_controller_is_found() -> None:
    assert parse_memory_path("0::/user.slice\n") == ("/user.slice", "")
    assert parse_memory_path("4:memory:/m\n1:name=systemd:/s\n0::/u\n") == ("/u", "/m")
    assert parse_memory_path("4:cpu,memory:/m\n") == ("", "/m")
    assert parse_memory_path("4:memoryhog:/m\n") == ("", "")
    assert parse_memory_path("0::/a:b\n") == ("/a:b", "")
    assert parse_memory_path("") == ("", "")


def test_the_count_of_oom_kills_is_its_own_line_and_no_other() -> None:
    assert parse_oom_kills("low 0\nhigh 0\nmax 3\noom 2\noom_kill 7\noom_group_kill 1\n") == 7
    assert parse_oom_kills("oom_kill_disable 1\nunder_oom 0\noom_kill 0\n") == 0
    for text in (
        "",
        "oom 2\n",
        "oom_kill\n",
        "oom_kill x\n",
        "oom_kill \u00b2\n",
        "oom_kill -1\n",
        "oom_kill_disable 0\nunder_oom 0\n",
    ):
        assert parse_oom_kills(text) is None, text


# -- the file ---------------------------------------------------------------------------------------


def test_on_a_unified_host_the_counter_is_the_local_one_where_the_kernel_has_it(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V2)
    summed = host.write("unified/user.slice/memory.events", "oom_kill 5\n")
    assert host.counter("0::/user.slice\n") == summed
    local = host.write("unified/user.slice/memory.events.local", "oom_kill 1\n")
    assert host.counter("0::/user.slice\n") == local
    assert oom.read_kills(local) == 1


def test_where_version_1_holds_the_controller_its_count_is_the_one(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V1 + V2)
    counter = host.write("memory/m/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    host.write("unified/u/memory.events", "oom_kill 9\n")
    assert host.counter("4:memory:/m\n0::/u\n") == counter


def test_a_counter_that_does_not_count_is_passed_over(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V1 + V2)
    host.write("memory/m/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")  # before Linux 4.13
    events = host.write("unified/u/memory.events", "oom_kill 9\n")
    assert host.counter("4:memory:/m\n0::/u\n") == events


def test_where_nothing_counts_there_is_no_counter(tmp_path: Path) -> None:
    assert Hierarchies(tmp_path, V2).counter("0::/gone\n") == ""
    assert Hierarchies(tmp_path, "").counter("0::/u\n4:memory:/m\n") == ""
    assert Hierarchies(tmp_path, V1 + V2).counter("") == ""


def test_a_counter_is_told_with_its_count(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V2)
    path = host.write("unified/u/memory.events", "oom_kill 9\n")
    assert Counters(host.mounts).find("0::/u\n") == Counter(path, 9)
    assert Counters(host.mounts).find("0::/gone\n") == Counter("", None)


def test_a_mount_table_is_read_again_only_where_nothing_counts_by_the_last_one(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V2)
    counters = Counters(host.mounts)
    there = host.write("unified/u/memory.events", "oom_kill 9\n")
    assert counters.find("0::/u\n").path == there
    Path(host.mounts).write_text("")
    assert counters.find("0::/u\n").path == there
    Path(host.mounts).write_text(V1.format(root=tmp_path))
    moved = host.write("memory/m/memory.oom_control", "oom_kill 3\n")
    assert counters.find("4:memory:/m\n0::/gone\n") == Counter(moved, 3)


def test_the_root_cgroup_has_the_counter_that_lies_there(tmp_path: Path) -> None:
    host = Hierarchies(tmp_path, V1)
    counter = host.write("memory/memory.oom_control", "oom_kill 0\n")
    assert host.counter("4:memory:/\n") == counter


def test_a_counter_that_is_gone_tells_nothing(tmp_path: Path) -> None:
    assert oom.read_kills(str(tmp_path / "gone")) is None
    assert oom.read_kills(str(tmp_path)) is None


def test_the_counter_of_this_process_counts_or_there_is_none() -> None:
    path = counter_file(Path("/proc/self/cgroup").read_text())
    assert path == "" or isinstance(oom.read_kills(path), int)
