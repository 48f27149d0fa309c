"""A sweep finds what carries the marks of sessions, opens nothing but session pages, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from specimens import (
    FILE_BYTES,
    ME,
    NOBODY,
    OTHER_ID,
    SOON_S,
    UID,
    Mine,
    changing,
    child,
    count_descriptors,
    die,
    executed,
    found,
    id_of,
    open_on_a_mount_of_ones_own,
    session,
)

from agent import wire
from agent.page import SessionPage
from reaperd import sweep as sweep_module
from reaperd.census import Interrupted
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcessGone, ProcFS, Stat
from reaperd.model import ProcessId, SessionKey
from reaperd.observer import Observer
from reaperd.sweep import FoundPage, StampedProcess, Sweep

ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x10


def swept(sweep: Sweep, *, all_of_them: bool) -> list[FoundPage | StampedProcess]:
    """Return what a sweep finds, with every descriptor closed."""
    found_ = []
    for one in sweep.run(None if all_of_them else sweep._proc.listing()):
        if isinstance(one, FoundPage):
            os.close(one.descriptor)
        found_.append(one)
    return found_


def holders(found_: list[FoundPage | StampedProcess]) -> set[int]:
    return {one.holder.stat.id.pid for one in found_}


def stamps_of(found_: list[FoundPage | StampedProcess]) -> list[str]:
    return [one.session for one in found_ if isinstance(one, StampedProcess)]


# -- what is found ----------------------------------------------------------------------------------


def test_a_sweep_finds_the_page_of_a_leader_and_of_its_worker(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        pages = [one for one in swept(Sweep(observer), all_of_them=True) if isinstance(one, FoundPage)]
        assert {one.holder.stat.id for one in pages} == {id_of(ME), id_of(pid)}
        assert {(one.page.id, one.holder.uid, one.holder.gid) for one in pages} == {
            (session(page).id, UID, os.getgid())
        }


def test_a_sweep_names_who_carries_a_session_in_its_environment(observer: Observer, run: str) -> None:
    stamps = {wire.LINEAGE_VARIABLE: f"{OTHER_ID}:{OTHER_ID}:x", "REAPER_TEST_RUN": run}
    with executed(**stamps) as pid:
        found_ = [one for one in swept(Sweep(observer), all_of_them=True) if isinstance(one, StampedProcess)]
        assert {(one.session, one.holder.stat.id, one.holder.uid) for one in found_} == {
            (OTHER_ID, id_of(pid), UID)
        }
        assert {one.cgroup for one in found_} == {observer.cgroup_path(pid)}


def test_a_holder_is_told_with_the_folders_that_its_environment_names(observer: Observer, run: str) -> None:
    stamps = {wire.LINEAGE_VARIABLE: OTHER_ID, "REAPER_TEST_RUN": run}
    with executed(JOBLIB_TEMP_FOLDER="/scratch/joblib", TMPDIR="relative/tmp", **stamps):
        (one,) = swept(Sweep(observer), all_of_them=True)
        assert one.holder.folders == ("/scratch/joblib",)
    with executed(JOBLIB_TEMP_FOLDER="/a", TMPDIR="/b", **stamps):
        (one,) = swept(Sweep(observer), all_of_them=True)
        assert one.holder.folders == ("/a", "/b")


def test_a_sweep_passes_over_the_sessions_that_a_process_is_spared_from(observer: Observer, run: str) -> None:
    other = "8-8-00000008-00000008"
    stamps = {wire.LINEAGE_VARIABLE: f"{OTHER_ID}:{other}", wire.SPARED_VARIABLE: OTHER_ID}
    with executed(REAPER_TEST_RUN=run, **stamps):
        assert stamps_of(swept(Sweep(observer), all_of_them=True)) == [other]


@pytest.mark.needs_root
def test_a_worker_that_closed_all_its_descriptors_is_found_by_what_it_has_mapped(
    observer: Observer, page: SessionPage
) -> None:
    def close_all() -> None:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if wire.PAGE_PREFIX in os.readlink(f"/proc/self/fd/{name}"):
                    os.close(int(name))

    with child(close_all) as pid:
        assert wire.PAGE_PREFIX not in "".join(ProcFS().descriptors(pid, pid).values())
        pages = [one for one in swept(Sweep(observer), all_of_them=True) if isinstance(one, FoundPage)]
        assert {one.holder.stat.id.pid: one.page.id for one in pages} == {
            ME: session(page).id,
            pid: session(page).id,
        }


# -- what is passed over ----------------------------------------------------------------------------


def test_a_sweep_passes_over_a_page_under_another_name(observer: Observer, page: SessionPage) -> None:
    other = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(other, page._memory[:])
        fcntl.fcntl(other, 1033, ALL_SEALS)
        page.close()
        assert swept(Sweep(observer), all_of_them=True) == []
    finally:
        os.close(other)


def test_a_sweep_passes_over_what_only_looks_like_a_page(observer: Observer) -> None:
    broken = os.memfd_create(wire.PAGE_PREFIX + OTHER_ID, os.MFD_CLOEXEC)
    try:
        assert swept(Sweep(observer), all_of_them=True) == []
    finally:
        os.close(broken)


def test_a_sweep_keeps_nothing_open_of_a_page_that_is_broken(observer: Observer, page: SessionPage) -> None:
    page._memory[wire.RECORD_AT : wire.RECORD_AT + 4] = b"junk"
    before = count_descriptors()
    assert swept(Sweep(observer), all_of_them=True) == []
    assert count_descriptors() == before


@pytest.mark.needs_root
def test_a_page_that_another_user_made_is_not_the_holders(observer: Observer, page: SessionPage) -> None:
    with child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)):
        assert holders(swept(Sweep(observer), all_of_them=True)) == {ME}


@pytest.mark.needs_root
def test_a_file_that_is_called_like_a_page_and_is_no_memfd_is_never_even_opened_or_asked_about(
    observer: Observer, page: SessionPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"memfd:{wire.PAGE_PREFIX}{OTHER_ID} (deleted)"
    reader, writer = os.pipe()

    def hold_one() -> None:
        page.close()
        descriptor = open_on_a_mount_of_ones_own(tmp_path, name)
        hold_one.held = mmap.mmap(descriptor, FILE_BYTES)  # type: ignore[attr-defined]
        os.write(writer, b"%d\n" % descriptor)

    with child(hold_one) as pid, open(reader, "rb") as told:
        os.close(writer)
        number = int(told.readline())
        assert os.readlink(f"/proc/{pid}/fd/{number}") == f"/{name}"
        touched: list[str] = []
        for call in ("open", "stat"):
            monkeypatch.setattr(os, call, noting(getattr(os, call), touched))
        assert holders(swept(Sweep(observer), all_of_them=True)) == {ME}
        monkeypatch.undo()
        through_links = [path for path in touched if "/fd/" in path or "/map_files/" in path]
        assert [path for path in through_links if f"/{pid}/" in path] == []
        assert [path for path in through_links if f"/{ME}/" in path], "nobody would have noticed"


def noting(call: Callable[..., Any], touched: list[str]) -> Callable[..., Any]:
    """Return ``call`` as one that writes down what it is called for."""

    def noted(path: Any, *arguments: Any, **options: Any) -> Any:
        touched.append(str(path))
        return call(path, *arguments, **options)

    return noted


def test_a_sweep_passes_over_the_dead(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        die(pid)
        assert holders(swept(Sweep(observer), all_of_them=True)) == {ME}


def test_whoever_dies_while_it_is_looked_at_is_passed_over(page: SessionPage) -> None:
    class Dying(Mine):
        """A /proc in which everybody but this process is a zombie already, and can still be read."""

        def stat(self, pid: int) -> Stat:
            told = super().stat(pid)
            return told if pid == ME else told._replace(state="Z", threads=1)

    with child():
        assert holders(swept(Sweep(Observer(Dying())), all_of_them=True)) == {ME}


def test_a_sweep_goes_on_where_somebody_vanishes_or_may_not_be_read(page: SessionPage) -> None:
    class Shy(ProcFS):
        """A /proc in which one process is gone by now, one may not be read and one says nonsense."""

        faults: dict[int, type[Exception]] = {1: ProcessGone, 2: PermissionError, 3: ValueError}

        def listing(self) -> dict[int, int]:
            return {1: 1, 2: 2, 3: 3, ME: 4}

        def stat(self, pid: int) -> Stat:
            return super().stat(ME)._replace(id=ProcessId(pid, 1))

        def descriptors(self, pid: int, task: int, *, most: int | None = None) -> dict[int, str]:
            if pid in self.faults:
                raise self.faults[pid]
            return super().descriptors(pid, task, most=most)

    assert holders(swept(Sweep(Observer(Shy())), all_of_them=True)) == {ME}


def test_a_sweep_never_reads_what_lies_in_memory_itself_and_goes_on_without(page: SessionPage) -> None:
    class Blocking(Mine):
        """A /proc in which nobody's memory can be read in time."""

        def environ(self, pid: int, task: int) -> bytes | None:
            assert os.getpid() != ME
            signal.pause()
            return None

    begin_s = time.monotonic()
    with executed(**{wire.LINEAGE_VARIABLE: OTHER_ID}):
        found_ = swept(Sweep(Observer(Blocking())), all_of_them=True)
    assert time.monotonic() - begin_s < SOON_S / 2
    assert holders(found_) == {ME}
    assert stamps_of(found_) == []


def test_of_a_process_with_very_many_descriptors_only_the_first_are_looked_at(page: SessionPage) -> None:
    class Counting(Mine):
        """A /proc that counts the links that are read."""

        links = 0

        def descriptor(self, pid: int, task: int, number: int) -> str:
            self.links += 1
            return super().descriptor(pid, task, number)

    proc = Counting()
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.callback(os.close, os.dup(0))
        with child():
            swept(Sweep(Observer(proc)), all_of_them=True)
    assert 0 < proc.links < 300


@pytest.mark.needs_root
def test_the_pages_of_one_user_are_those_of_its_processes_that_are_young_enough(
    observer: Observer, page: SessionPage
) -> None:
    sweep = Sweep(observer)
    with child() as pid, child(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)):
        started = id_of(pid).start_ticks
        pages = list(sweep.pages_of(UID, started))
        later = list(sweep.pages_of(UID, started + 10**6))
        for one in (*pages, *later):
            os.close(one.descriptor)
    assert holders(pages) - {ME} == {pid}  # this process can have started in the same tick
    assert later == []


# -- whom a sweep looks at --------------------------------------------------------------------------


def test_a_sweep_looks_at_who_is_new_at_once(observer: Observer, page: SessionPage) -> None:
    sweep = Sweep(observer)
    with child() as one, child() as two:
        assert holders(swept(sweep, all_of_them=False)) >= {ME, one, two}
        with child() as three:
            assert three in holders(swept(sweep, all_of_them=False))


def test_a_sweep_of_all_looks_at_those_it_knows_too(observer: Observer, page: SessionPage) -> None:
    sweep = Sweep(observer)
    for _ in range(2):
        assert holders(swept(sweep, all_of_them=True)) == {ME}


def test_who_is_known_is_looked_at_in_turn() -> None:
    sweep = Sweep(Observer(Mine(slow_s=0.003)))
    with changing(**{wire.LINEAGE_VARIABLE: OTHER_ID}) as (pid, execute):
        assert stamps_of(swept(sweep, all_of_them=False)) == []
        execute()
        for _ in range(100):
            if found_ := swept(sweep, all_of_them=False):
                break
        assert holders(found_) == {pid}


def test_a_page_that_was_made_since_is_found_in_turn_and_one_that_is_known_is_not_found_again() -> None:
    observer, known = Observer(Mine(slow_s=0.003)), set()
    sweep, pages = Sweep(observer, known.__contains__), []
    assert swept(sweep, all_of_them=False) == []
    with contextlib.closing(SessionPage(OTHER_ID, "late", 1, observer.boot_id)) as late:
        late.write_record(["/run/reaper/reaper.sock"])
        for _ in range(2):  # as long as nobody has taken it on
            pages = next(filter(None, (swept(sweep, all_of_them=False) for _ in range(200))))
            assert holders(pages) == {ME}
        known.add(pages[0].key)
        observer.census.cover(session(late))
        for _ in range(20):  # it is opened once more, and then it is known
            swept(sweep, all_of_them=False)
        assert [swept(sweep, all_of_them=False) for _ in range(20)] == [[]] * 20


def test_a_stamp_is_found_again_in_turn_until_its_session_is_known() -> None:
    known: set[SessionKey] = set()
    sweep = Sweep(Observer(Mine(slow_s=0.003)), known.__contains__)
    with executed(**{wire.LINEAGE_VARIABLE: OTHER_ID}) as pid:
        assert stamps_of(swept(sweep, all_of_them=True)) == [OTHER_ID]
        again = next(filter(None, (swept(sweep, all_of_them=False) for _ in range(200))))
        assert holders(again) == {pid}
        known.add(again[0].key)
        assert [swept(sweep, all_of_them=False) for _ in range(20)] == [[]] * 20


def test_a_process_whose_memory_could_not_be_read_is_read_again_in_turn() -> None:
    class Busy(Mine):
        """A /proc in which nobody's environment can be read yet."""

        busy = True

        def environ(self, pid: int, task: int) -> bytes | None:
            if self.busy:
                raise ProcessGone
            return super().environ(pid, task)

    proc = Busy(slow_s=0.003)
    observer = Observer(proc)
    sweep = Sweep(observer)
    with executed(**{wire.LINEAGE_VARIABLE: OTHER_ID}) as pid:
        assert swept(sweep, all_of_them=True) == []
        proc.busy = False
        assert holders(next(filter(None, (swept(sweep, all_of_them=False) for _ in range(200))))) == {pid}


def test_a_turn_takes_no_longer_than_it_should_however_many_are_known() -> None:
    proc = Mine(slow_s=0.003)
    sweep = Sweep(Observer(proc))
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(child()) for _ in range(10)]
        swept(sweep, all_of_them=False)
        proc.stats.clear()
        swept(sweep, all_of_them=False)
        assert sum(proc.stats[pid] for pid in pids) <= 2


def test_a_pid_with_another_inode_is_somebody_new(page: SessionPage) -> None:
    proc = Mine(slow_s=0.003)
    sweep = Sweep(Observer(proc))
    with child() as pid:
        swept(sweep, all_of_them=False)
        proc.inodes[pid] = 1
        assert pid in holders(swept(sweep, all_of_them=False))


GONE = set(range(10**7, 10**7 + 300))


def test_who_is_gone_is_forgotten(observer: Observer) -> None:
    sweep = Sweep(observer)
    with child() as pid:
        swept(sweep, all_of_them=False)
        assert pid in sweep._known
    swept(sweep, all_of_them=False)
    assert pid not in sweep._known


class Crowded(Mine):
    """A /proc that lists hundreds who are gone by the time they are looked at, and in which a leader dies meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = os.pipe()
        self.at = self.others = 0
        self.order: list[int] = []

    def listing(self) -> dict[int, int]:
        return {**super().listing(), **{pid: pid + self.others for pid in GONE}}

    def stat(self, pid: int) -> Stat:
        self.order.append(pid)
        if pid == self.at:
            os.write(self.writer, b"x")
        return super().stat(pid)


@pytest.fixture
def crowd() -> Iterator[tuple[Crowded, Observer]]:
    proc, alarm = Crowded(), Alarm()
    alarm.watch(proc.reader)
    yield proc, Observer(proc, alarm)
    alarm._epoll.close()
    os.close(proc.reader)
    os.close(proc.writer)


def test_a_leaders_death_interrupts_a_sweep_and_the_next_one_goes_on_from_there(
    crowd: tuple[Crowded, Observer],
) -> None:
    proc, observer = crowd
    sweep = Sweep(observer)
    sweep._at_a_time_s = SOON_S
    proc.at = 10**7 + 100
    with pytest.raises(Interrupted):
        swept(sweep, all_of_them=False)
    before = set(proc.order)
    assert 100 < len(before & GONE) < 200
    proc.order.clear()
    with pytest.raises(Interrupted):
        swept(sweep, all_of_them=False)
    assert proc.order == [], "it goes first as long as it goes on"
    os.read(proc.reader, 1)
    swept(sweep, all_of_them=False)
    left = sorted(GONE - before)
    assert proc.order[: len(left)] == left


def test_a_sweep_of_many_who_are_new_makes_way_now_and_then_and_comes_to_its_end(
    crowd: tuple[Crowded, Observer], monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, observer = crowd
    monkeypatch.setattr(sweep_module, "_AT_A_TIME_S", 0.0)
    sweep = Sweep(observer)
    times = 1
    while True:
        seen = len(proc.order)
        try:
            swept(sweep, all_of_them=False)
            break
        except Interrupted:
            times += 1
            assert seen < len(proc.order) <= seen + 64
    assert set(proc.order) >= GONE
    assert len(GONE) / 64 <= times <= len(GONE) / 64 + 2


def test_a_sweep_comes_to_its_end_though_all_are_new_at_each_attempt(
    crowd: tuple[Crowded, Observer], monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, observer = crowd
    monkeypatch.setattr(sweep_module, "_AT_A_TIME_S", 1e-5)
    sweep = Sweep(observer)
    for _ in range(2):
        interruptions = 0
        while True:
            proc.others += 1
            try:
                swept(sweep, all_of_them=False)
                break
            except Interrupted:
                interruptions += 1
                assert interruptions < 40
        assert interruptions  # the second time, too: it begins with little again


def test_nothing_interrupts_a_sweep_of_all(crowd: tuple[Crowded, Observer]) -> None:
    proc, observer = crowd
    proc.at = 10**7 + 100
    swept(Sweep(observer), all_of_them=True)
    assert set(proc.order) >= GONE


def test_what_was_found_before_an_interruption_was_told(
    crowd: tuple[Crowded, Observer], page: SessionPage
) -> None:
    proc, observer = crowd
    proc.at = 10**7 + 100
    told = set()

    def sweep() -> None:
        for one in Sweep(observer).run(observer.proc.listing()):
            assert isinstance(one, FoundPage)
            os.close(one.descriptor)
            told.add(one.holder.stat.id.pid)

    with child() as pid:
        with pytest.raises(Interrupted):
            sweep()
        assert told == {ME, pid}


def test_a_look_finds_what_a_sweep_finds(observer: Observer, page: SessionPage) -> None:
    with child() as pid:
        (inode,) = {
            os.fstat(one.descriptor).st_ino
            for one in keeping(Sweep(observer), pid)
            if isinstance(one, FoundPage)
        }
        one = session(page, page_inode=inode)
        assert found(observer.census.look([one], hold=False), pid).pages == {one.id}


def keeping(sweep: Sweep, pid: int) -> Iterator[FoundPage | StampedProcess]:
    """Yield what is found at ``pid``, whose descriptors are closed afterwards."""
    for one in sweep.run():
        if one.holder.stat.id.pid == pid:
            yield one
        if isinstance(one, FoundPage):
            os.close(one.descriptor)
