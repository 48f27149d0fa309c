"""What lies in the memory of others is read by a helper: nobody can hold up the core, and who has tried waits longer and longer."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from specimens import FILE_BYTES, ME, OTHER_ID, SOON_S, child, die, end, executed, id_of, nothing_left

from agent import wire
from reaperd import memory, pauses, signatures
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.memory import ALL_FILES, MemoryReader, Wish
from reaperd.model import ProcessId
from reaperd.signatures import SIGNATURES

LONG_S = 30.0  # no test waits for that


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor or a child behind."""
    with nothing_left():
        yield


class Faulty(ProcFS):
    """A /proc in which some block whoever reads their memory, and some take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: set[int] = set()
        self.slow: dict[int, float] = {}  # seconds of work
        self.idle: dict[int, float] = {}  # seconds of waiting
        self.gone: set[int] = set()
        self.refuses: set[int] = set()
        self.execs: set[int] = set()
        self.empty: set[int] = set()
        self.secret: set[int] = set()
        self.huge: set[int] = set()

    def stat(self, pid: int) -> Stat:
        return super().stat(ME)._replace(image=0 if pid in self.execs | self.secret else 1)

    def environ(self, pid: int, task: int) -> bytes | None:
        assert os.getpid() != ME, "the core itself has read what can block"
        if pid in self.blocks:
            signal.pause()
        if pid in self.gone:
            raise ProcessGone
        if pid in self.refuses:
            raise PermissionError
        if pid in self.secret:
            return None
        if pid in self.execs | self.empty:
            return b""
        if pid in self.huge:
            return b"HOME=/\0TMPDIR=/" + b"x" * memory._MAX_VALUE_CHARS + b"\0"
        select.select([], [], [], self.idle.get(pid, 0.0))
        until_s = time.thread_time() + self.slow.get(pid, 0.0)
        while time.thread_time() < until_s:
            pass
        return b"TMPDIR=/%d\0" % pid


def wish(pid: int, **parts: object) -> Wish:
    stat = ProcFS().stat(pid)
    return Wish(stat, pid, **{"environ": True, **parts})  # type: ignore[arg-type]


def invented(pid: int) -> Wish:
    """Return a wish for a process that only a faulty /proc has."""
    stat = ProcFS().stat(ME)
    return Wish(stat._replace(id=ProcessId(pid, 1), state="S"), pid, environ=True)


def read(reader: MemoryReader, *pids: int) -> dict[int, str]:
    """Return what TMPDIR is, by pid."""
    memories = reader.read([invented(pid) for pid in pids])
    return {pid: one.variables["TMPDIR"] for pid, one in memories.items()}


def told(*pids: int) -> dict[int, str]:
    return {pid: f"/{pid}" for pid in pids}


def stalls(reader: MemoryReader) -> set[int]:
    return {id_.pid for id_ in reader._stalled._pauses}


def let_time_pass(reader: MemoryReader, seconds: float) -> None:
    """Make it that much later for all that a reader remembers."""
    later_s = reader._stalled._clock() + seconds
    reader._stalled._clock = lambda: later_s


# -- what is read -----------------------------------------------------------------------------------


def test_what_was_asked_for_is_told_and_nothing_else(run: str) -> None:
    environment = {
        wire.LINEAGE_VARIABLE: OTHER_ID,
        wire.SPARED_VARIABLE: "\udcff\u2603",
        "TMPDIR": "/scratch",
        "SECRET": "x",
        "REAPER_TEST_RUN": run,
    }
    reader = MemoryReader(ProcFS())
    with executed(**environment) as pid:
        one = reader.read([wish(pid)])[pid]
        assert one.variables == {
            wire.LINEAGE_VARIABLE: OTHER_ID,
            wire.SPARED_VARIABLE: os.fsencode("\udcff\u2603").decode("utf-8", "surrogateescape"),
            "TMPDIR": "/scratch",
        }
        assert (one.argv, one.mapped) == ((), ())
        one = reader.read([wish(pid, environ=False, argv=True)])[pid]
        assert (one.variables, one.argv, one.mapped) == ({}, ("cat",), ())
        one = reader.read([wish(pid, environ=False, maps=ALL_FILES)])[pid]
        assert any(each.path.endswith("/cat") for each in one.mapped)


def test_of_what_is_mapped_only_what_begins_as_was_asked_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(b"x" * FILE_BYTES)

    def map_twice() -> None:
        with open(path, "r+b") as file:
            map_twice.held = [mmap.mmap(file.fileno(), FILE_BYTES) for _ in range(2)]  # type: ignore[attr-defined]

    with child(map_twice) as pid:
        reader = MemoryReader(ProcFS())
        (one,) = reader.read([wish(pid, maps=(f"{tmp_path}/", "/nowhere"))])[pid].mapped
        assert (one.path, one.inode) == (str(path), path.stat().st_ino)
        assert reader.read([wish(pid, maps=("/nowhere",))])[pid].mapped == ()


def test_who_is_gone_is_missing_and_the_others_are_told() -> None:
    with child() as pid:
        wishes = [wish(pid), wish(ME)]
        end(pid)
        memories = MemoryReader(ProcFS()).read(wishes)
        assert memories.keys() == {ME}
    proc = Faulty()
    proc.gone, proc.refuses = {2}, {3}
    assert read(MemoryReader(proc), 1, 2, 3, 4) == told(1, 4)
    assert MemoryReader(proc).read([]) == {}


def test_what_may_not_be_read_is_empty() -> None:
    with child() as pid:
        one = wish(pid, argv=True)
        die(pid)
        for memory_ in MemoryReader(ProcFS()).read([one]).values():
            assert (memory_.variables, memory_.argv) == ({}, ())


def test_a_variable_that_fills_the_memory_of_whoever_asks_is_none() -> None:
    proc = Faulty()
    proc.huge = {1}
    memories = MemoryReader(proc).read([invented(1), invented(2)])
    assert memories[1].variables == {}
    assert memories[2].variables == {"TMPDIR": "/2"}


# -- who blocks -------------------------------------------------------------------------------------


def test_who_blocks_is_passed_over_and_everybody_else_is_read_before_and_behind_it() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.blocks = {3}
    begin_s = time.monotonic()
    assert read(reader, 1, 2, 3, 4, 5) == told(1, 2, 4, 5)
    assert time.monotonic() - begin_s < SOON_S / 2
    assert stalls(reader) == {3}


def test_who_blocked_is_not_read_again_until_its_pause_is_over() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.blocks = {3}
    read(reader, 1, 3)
    proc.blocks = set()
    assert read(reader, 1, 3) == told(1)
    let_time_pass(reader, pauses.FIRST_S + 0.1)
    assert read(reader, 1, 3) == told(1, 3)


def test_another_process_with_the_pid_of_one_that_blocked_is_read() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.blocks = {3}
    read(reader, 3)
    proc.blocks = set()
    other = invented(3)
    other = other._replace(stat=other.stat._replace(id=ProcessId(3, 2)))
    assert reader.read([other]).keys() == {3}


def test_a_batch_ends_after_a_few_stalls_and_who_was_left_is_read_the_next_time() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.blocks = set(range(1, 9))
    begin_s = time.monotonic()
    assert read(reader, *range(1, 10)) == {}
    assert time.monotonic() - begin_s < SOON_S / 2
    assert 1 <= len(stalls(reader)) <= 4
    for _ in range(8):
        if found := read(reader, *range(1, 10)):
            break
    assert found == told(9)


def test_the_likeliest_to_block_are_read_last() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.blocks = {1, 2}
    wishes = [invented(pid) for pid in (1, 2, 3, 4)]
    in_state_d = [
        one._replace(stat=one.stat._replace(state="D")) if one.stat.id.pid < 3 else one for one in wishes
    ]
    reader._stalled.begin(ProcessId(2, 1))
    let_time_pass(reader, pauses.FIRST_S + 1)
    proc.slow = {}
    assert reader.read(in_state_d).keys() == {3, 4}
    # With all stalls spent on them, the others would not have been read.
    reader = MemoryReader(proc)
    proc.blocks = set(range(1, 9))
    both = [
        one._replace(stat=one.stat._replace(state="D")) if one.stat.id.pid in proc.blocks else one
        for one in (invented(pid) for pid in range(1, 12))
    ]
    assert reader.read(both).keys() == {9, 10, 11}


def test_who_only_lets_wait_a_little_is_read_at_every_look() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.idle = {2: 2 * memory._DEAR_S}
    for _ in range(2):
        assert read(reader, 1, 2) == told(1, 2)


def test_who_makes_much_work_is_told_and_then_not_read_at_every_look() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.slow = {2: 3 * memory._DEAR_S}
    assert read(reader, 1, 2) == told(1, 2)
    assert read(reader, 1, 2) == told(1)
    let_time_pass(reader, pauses.FIRST_S + 0.1)
    assert read(reader, 1, 2) == told(1, 2)


def test_a_batch_has_its_time_and_who_was_left_has_not_stalled() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    pids = range(1, 200)
    proc.slow = dict.fromkeys(pids, memory._DEAR_S - 0.002)
    begin_s = time.monotonic()
    first = read(reader, *pids)
    assert time.monotonic() - begin_s < SOON_S / 2
    assert 0 < len(first) < len(pids)
    proc.slow = {}
    left = [pid for pid in pids if pid not in first]
    assert read(reader, *left).keys() >= set(left) - stalls(reader)
    assert len(stalls(reader) - first.keys()) == 0


def test_who_takes_all_the_time_there_is_leaves_it_to_those_behind_the_next_time() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    proc.slow = {1: SOON_S}
    assert read(reader, 1, 2) == {}
    assert read(reader, 1, 2) == told(2)


def test_the_alarm_ends_a_batch_and_is_nobodys_fault() -> None:
    proc = Faulty()
    reader = MemoryReader(proc)
    alarm = Alarm()
    ringing, writer = os.pipe()
    alarm.watch(ringing)
    try:
        assert reader.read([invented(1)], alarm).keys() == {1}
        os.write(writer, b"x")
        assert reader.read([invented(pid) for pid in range(1, 99)], alarm).keys() < set(range(1, 99))
        assert not stalls(reader)
        assert read(reader, 1, 2) == told(1, 2), "what nobody may interrupt is read"
    finally:
        os.close(ringing)
        os.close(writer)
        alarm._epoll.close()


@pytest.mark.needs_root
def test_a_lack_of_processes_is_nobodys_fault() -> None:
    import json
    import resource

    def try_in_vain() -> list[object]:
        os.setresuid(65534, 65534, 65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        proc = ProcFS()
        reader = MemoryReader(proc)
        return [len(reader.read([invented(pid) for pid in range(1, 9)])), len(stalls(reader))]

    reader, writer = os.pipe()
    with child(lambda: os.write(writer, json.dumps(try_in_vain()).encode())), open(reader, "rb") as file:
        os.close(writer)
        assert json.loads(file.read1(100)) == [0, 0]


def test_who_is_in_the_middle_of_an_execve_is_not_taken_for_one_without_an_environment() -> None:
    proc = Faulty()
    proc.execs, proc.empty, proc.secret = {1}, {2}, {4}
    assert MemoryReader(proc).read([invented(pid) for pid in (1, 2, 3, 4)]).keys() == {2, 3, 4}


def test_a_process_is_known_by_what_it_was_when_it_was_wished_for() -> None:
    with child() as pid:
        assert MemoryReader(ProcFS()).read([wish(pid)]).keys() == {id_of(pid).pid}


def test_what_a_signature_is_recognised_by_is_read_of_a_process_that_has_it() -> None:
    for row in SIGNATURES:
        if row.variable:
            with subprocess.Popen(
                ["cat"], stdin=subprocess.PIPE, env={**os.environ, row.variable: "none"}
            ) as one:
                assert one.stdin is not None
                try:  # Popen() returns once the program has been exec'ed
                    memory = MemoryReader(ProcFS()).read([wish(one.pid, argv=True)])[one.pid]
                finally:
                    one.stdin.close()
            assert signatures.find("python3", memory.argv, tuple(memory.variables)) == row
