"""What the kernel writes about processes whose owners chose their names, paths and environments."""

from __future__ import annotations

import re

from fuzzing import twins
from fuzzing.dice import Dice, noise
from fuzzing.target import Refused, Target, outcome, stateless

from agent import family, wire
from reaperd.linux import cgroups, mounts, oom, procfs
from reaperd.linux.procfs import PAGE_BYTES, ProcessId

# Everything in /proc/PID/status that is read, and what its parser returns for a text that has nothing.
_STATUS = (
    procfs.parse_uid,
    procfs.parse_uids,
    procfs.parse_gid,
    procfs.parse_groups,
    procfs.parse_pids,
    procfs.parse_innermost_pid,
    procfs.has_pending_sigkill,
)


# -- bytes that no kernel writes ------------------------------------------------------------------


def check_stat(data: bytes) -> None:
    """Three parsers of /proc/PID/stat, and a fourth one here, say the same of any bytes, or that they are none."""
    whole = outcome(procfs.parse_stat, data, raises=(ValueError,))
    parent = outcome(procfs.parse_parent, data, raises=(ValueError,))
    agents = outcome(family._parse_stat, data, raises=(ValueError, IndexError))
    if isinstance(whole, Refused):
        return
    fields = twins.stat_fields(data)
    assert fields is not None
    pid, comm, rest = fields
    assert whole.id == ProcessId(pid, int(rest[19]))
    assert whole.comm == comm.decode("utf-8", "replace")
    assert (whole.state, whole.ppid) == (rest[0].decode(), int(rest[1]))
    assert whole.rss_bytes == int(rest[21]) * PAGE_BYTES
    assert parent == (whole.id, whole.ppid)
    # The agent's goes by the last bracket and the first blank alone, which is the same in all that a kernel writes.
    if (
        not isinstance(agents, Refused)
        and b")" not in data.rpartition(b") ")[2]
        and b" " not in data.partition(b" (")[0]
    ):
        assert (agents.id, agents.ppid, agents.state) == (tuple(whole.id), whole.ppid, whole.state)


def check_status(data: bytes) -> None:
    """Whatever the text is, each parser of /proc/PID/status ends with a value or a ValueError."""
    for parse in _STATUS:
        outcome(parse, data, raises=(ValueError,))
    uids = outcome(procfs.parse_uids, data, raises=(ValueError,))
    uid = outcome(procfs.parse_uid, data, raises=(ValueError,))
    if not isinstance(uids, Refused) and not isinstance(uid, Refused) and uid is not None:
        assert uid in uids


def check_tables(data: bytes) -> None:
    """Maps, sockets, descriptors and mounts: of lines of another form nothing is made, and nothing is raised."""
    mapped = outcome(lambda: [*procfs.parse_maps(data)], raises=(ValueError,))
    assert isinstance(mapped, Refused) or all(one.path and one.inode >= 0 for one in mapped)
    assert all(path.startswith("/") for path in procfs.parse_unix_sockets(data))
    for number in procfs.parse_fdinfo(data):
        assert number is None or number >= 0
    assert all(number >= 0 for number in procfs.parse_mount_kinds(data))
    text = data.decode("utf-8", "surrogateescape")
    for mount in mounts.parse_mount_table(text):
        assert "\n" not in mount.kind
    assert oom.parse_oom_kills(text) is None or re.search(r"(?m)^oom_kill \d+$", text)
    name = procfs.parse_memfd_link(text)
    assert not name or text in (f"/memfd:{name}", f"/memfd:{name} (deleted)")
    for variable in (wire.LINEAGE_VARIABLE, "A"):
        assert procfs.environment_value(data, variable) == twins.environment(data, variable)


def check_cgroup(data: bytes) -> None:
    """Three readings of /proc/PID/cgroup agree with a fourth."""
    text = data.decode("utf-8", "surrogateescape")
    paths = twins.cgroup_paths(text)
    unified, memory = oom.parse_memory_path(text)
    assert unified == paths.get("", "")
    by_memory = [
        path for controllers, path in paths.items() if controllers and "memory" in controllers.split(",")
    ]
    assert memory in by_memory or (not memory and not by_memory)
    known = paths.get("", "/")
    assert wire.parse_cgroup(text) == (known if known != "/" else paths.get("name=systemd", "/"))
    cgroups.parse_hierarchies(text)


# -- what a kernel writes, around names that an enemy has chosen ------------------------------------


def check_kernel(data: bytes) -> None:
    """Whatever a process is called, each parser returns what the kernel meant."""
    dice = Dice(data)
    (_stat_line, _status_text, _maps_line, _environ, _cgroup_lines, _mount_line)[dice.below(6)](dice)


def _stat_line(dice: Dice) -> None:
    comm, state = dice.name(64), dice.choose(b"RSDTtZXI").to_bytes(1, "little")
    numbers = [abs(dice.number()) % 2**63 for _ in range(49)]
    pid = dice.below(2**22) + 1
    line = b"%d (%b) %b %b\n" % (pid, comm, state, b" ".join(b"%d" % one for one in numbers))
    found = procfs.parse_stat(line)
    assert found.id == ProcessId(pid, numbers[18])
    assert (found.comm, found.state) == (comm.decode("utf-8", "replace"), state.decode())
    assert (found.ppid, found.posix_pgid, found.posix_sid, found.flags) == (
        *(numbers[0], numbers[1], numbers[2], numbers[5]),
    )
    assert (found.cpu_ticks, found.threads, found.exit_status) == (
        *(numbers[10] + numbers[11], numbers[16], numbers[48]),
    )
    assert procfs.parse_parent(line) == (found.id, found.ppid)
    agents = family._parse_stat(line)
    assert (agents.id, agents.ppid, agents.state) == (tuple(found.id), found.ppid, found.state)


def _status_text(dice: Dice) -> None:
    # fs/proc/array.c writes the name with escape_str(ESCAPE_SPACE | ESCAPE_SPECIAL, "\n\\").
    name = dice.name(64).replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    uids = [dice.below(2**32) for _ in range(4)]
    if dice.below(2):
        uids[:3] = [uids[0]] * 3
    groups, pids = ([dice.below(2**22) for _ in range(dice.below(5))] for _ in range(2))
    pending, shared = dice.below(2**32), dice.below(2**32)
    lines = (
        b"Name:\t" + name,
        b"State:\tS (sleeping)",
        b"Uid:\t" + b"\t".join(b"%d" % one for one in uids),
        b"Gid:\t%d\t0\t0\t0" % uids[3],
        b"Groups:\t" + b"".join(b"%d " % one for one in groups),
        b"NSpid:" + b"".join(b"\t%d" % one for one in pids),
        b"SigPnd:\t%016x" % pending,
        b"ShdPnd:\t%016x" % shared,
    )
    text = b"\n".join(lines) + b"\n"
    assert procfs.parse_uids(text) == frozenset(uids)
    assert procfs.parse_uid(text) == (uids[0] if len(set(uids[:3])) == 1 else None)
    assert procfs.parse_gid(text) == uids[3]
    assert procfs.parse_groups(text) == tuple(groups)
    assert procfs.parse_pids(text) == tuple(pids)
    assert procfs.parse_innermost_pid(text) == (pids[-1] if pids else None)
    assert procfs.has_pending_sigkill(text) == bool((pending | shared) & 1 << 8)


def _maps_line(dice: Dice) -> None:
    path = b"/" + dice.name(80)
    written = path.replace(b"\n", b"\\012")  # fs/proc/task_mmu.c: seq_path(..., "\n")
    inode, start = dice.below(2**32), dice.below(2**32)
    line = b"%012x-%012x r--s 00000000 00:01 %d %b%b\n" % (start, start + 4096, inode, b" " * 10, written)
    (found,) = procfs.parse_maps(b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n" + line)
    assert (found.inode, found.device) == (inode, "00:01")
    assert found.path == written.decode("utf-8", "surrogateescape")
    link = f"/memfd:{path.decode('utf-8', 'surrogateescape')} (deleted)"
    assert f"/memfd:{procfs.parse_memfd_link(link)} (deleted)" == link


def _environ(dice: Dice) -> None:
    entries = [dice.name(40) for _ in range(dice.below(5))]
    value = dice.name(60)
    place = dice.below(len(entries) + 1)
    ours = wire.LINEAGE_VARIABLE.encode() + b"="
    entries = [entry for entry in entries if not entry.startswith(ours)]
    entries.insert(place, ours + value)
    found = procfs.environment_value(b"\0".join(entries) + b"\0", wire.LINEAGE_VARIABLE)
    assert found == value.decode("utf-8", "surrogateescape")


def _cgroup_lines(dice: Dice) -> None:
    # kernel/cgroup/cgroup.c: no line end may stand in a cgroup's name, anything else may.
    paths = [b"/" + dice.name(60, without=b"\0\n") for _ in range(3)]
    unified, named, memory = (path.decode("utf-8", "surrogateescape") for path in paths)
    text = f"12:cpu,memory:{memory}\n1:name=systemd:{named}\n0::{unified}\n"
    assert oom.parse_memory_path(text) == (unified, memory)
    assert wire.parse_cgroup(text) == (unified if unified != "/" else named)


def _mount_line(dice: Dice) -> None:
    point = "/" + dice.name(60).decode("utf-8", "surrogateescape")
    kind = dice.choose(("cgroup2", "cgroup", "tmpfs"))
    written = twins.kernel_escaped(point, " \t\n\\#")  # fs/proc_namespace.c
    text = f"none {written} {kind} rw,memory 0 0\n"
    (found,) = mounts.parse_mount_table(text)
    assert found == (point, kind, ("rw", "memory"))
    expected = {"cgroup2": (point, ""), "cgroup": ("", point)}
    mounted = cgroups.parse_hierarchies(text)
    assert (mounted.get("", ""), mounted.get("memory", "")) == expected.get(kind, ("", ""))
    line = f"31 1 0:26 / {written} rw shared:4 - {kind} none rw\n"
    assert procfs.parse_mount_kinds(line.encode("utf-8", "surrogateescape")) == {31: kind}


def _read(name: str) -> bytes:
    with open(f"/proc/self/{name}", "rb") as file:
        return file.read()[:4000]


_TABLES = (
    b"7f12e1c00000-7f12e1c01000 rw-s 00000000 00:01 1031 /memfd:reaper:1-2-00000003-00000004 (deleted)\n",
    b"0000000000000000: 00000002 00000000 00010000 0001 01 24318 /run/reaper/reaper.sock\n",
    b"pos:\t0\nflags:\t02100002\nmnt_id:\t1\nino:\t1031\n",
    b"31 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
    b"cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
    b"low 0\nhigh 0\noom 0\noom_kill 3\n",
    b"PATH=/bin\0REAPER_LINEAGE=1-2-00000003-00000004\0A=1\0",
    b"XREAPER_LINEAGE=not\0B=REAPER_LINEAGE=nor\0REAPER_LINEAGE=this\0REAPER_LINEAGE=late\0AA=2\0",
    b"REAPER_LINEAGE=first\0A",
    b"oom_kill \xc2\xb2\noom_kill_disable 0\nunder_oom 0\n",
)
_KERNEL = (
    *(bytes((kind, 9)) + b"foo) Z 1 (\n" * 3 + bytes(range(120)) for kind in range(6)),
    b"\1\0" + b"\2" * 90,
)

TARGETS = (
    Target("stat", stateless(check_stat), lambda: [
        _read("stat"), b"7 (a) Z 1 () (b) S 1 7 7 0 -1 64" + b" 0" * 45, b"7 (x) S 1" + b" 1_0" * 50,
    ], (b") ", b" (", b") Z 1 ", b" -1", b" 18446744073709551615"), 1000),
    Target("status", stateless(check_status), lambda: [_read("status"), b"\nUid:\t1\t1\t1\t1\nNSpid:\t5\nSigPnd:\t100\n"],
           (b"\nUid:\t", b"\nGid:", b"\nGroups:", b"\nNSpid:", b"\nSigPnd:", b"\nShdPnd:"), 3000),
    Target("tables", stateless(check_tables), lambda: [*_TABLES, _read("mounts"), _read("maps")],
           (b" - ", b"/memfd:", b" (deleted)", b"oom_kill ", b"\\040", b"\\777", b"\nino:", b"\xc2\xb2")),
    Target("cgroup", stateless(check_cgroup), lambda: [
        _read("cgroup"), b"0::/a\n", b"12:cpu,memory:/a\n1:name=systemd:/b\n0::/\n", b"0::/a:b\n0::/c\n",
        b"0::/a\x0cb\n", b"0::/a\r1:name=systemd:/b\n", b"1:name=systemd:/a\xc2\x850::/b\n", b"0:", b"::", b"4:memory",
    ], (b"::", b":name=systemd:", b":memory:", b"\n0::/"), 600),
    Target("kernel", stateless(check_kernel), lambda: [*_KERNEL, *noise(60)], (b") Z ", b"\nUid:\t0", b" - ", b":/", b"\x0c", b"\r", b"\xc2\x85"), 800),
)  # fmt: skip
