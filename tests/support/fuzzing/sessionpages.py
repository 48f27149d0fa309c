"""The session page: 4 KiB that their owner, and whoever was forked from him, can write at any time."""

from __future__ import annotations

import fcntl
import math
import os
import struct

from fuzzing.dice import Dice
from fuzzing.target import Refused, Target, outcome, stateless

from agent import wire
from agent.page import SessionPage
from reaperd import pages
from reaperd.linux import page as linux_page

_ID = "2859-2f1c4-eb9f3362-3e9773f4"
_BOOT = "c2f4bd2f-77d7-4ac0-9d4f-92a3e0dc0d5e"
_F_ADD_SEALS = 1033
_REFUSED = (wire.WireError,)


def _composed(data: bytes) -> bytes:
    """Return a page: the bytes as they are, or with a header and the blocks at their places."""
    dice = Dice(data)
    if dice.below(4) == 0:
        return dice.rest().ljust(wire.PAGE_BYTES, b"\0")[: wire.PAGE_BYTES]
    sequence, flags = dice.below(2**32), dice.below(4)
    if dice.below(8):
        sequence &= ~1
    progress, spared = dice.take(18), dice.take(26)
    message = dice.take(dice.below(64))
    record = dice.rest()[: wire.PROGRESS_AT - wire.RECORD_AT]
    size = len(record)
    memory = bytearray(wire.PAGE_BYTES)
    for at, block in (
        (0, wire.pack_header(sequence, flags, size)),
        (wire.RECORD_AT, record),
        (wire.PROGRESS_AT, progress),
        (wire.MESSAGE_AT, message),
        (wire.SPARED_AT, spared),
    ):
        memory[at : at + len(block)] = block
    return bytes(memory)


def check_page(data: bytes) -> None:
    """What a page says is within its bounds, and written anew it says the same."""
    memory = _composed(data)
    for torn in (False, True):
        found = outcome(lambda torn=torn: pages.parse_page(memory, torn=torn), raises=_REFUSED)
        if not isinstance(found, Refused):
            _check_fields(found)
            _check_written_anew(found)
    for size in (0, 8, wire.HEADER_BYTES, wire.PAGE_BYTES - 1, wire.PAGE_BYTES + 1):
        part = (memory + b"\0")[:size]
        assert isinstance(outcome(pages.parse_page, part, raises=_REFUSED), Refused)


def _check_fields(found: pages.Page) -> None:
    assert 0 < found.pid < 2**31
    assert 0 <= found.start_ticks < 2**63
    assert 0 <= found.page_fd < 2**63
    assert len(found.name) <= wire.MAX_NAME_CHARS
    assert len(found.sockets) <= wire.MAX_SOCKETS
    assert len(found.spared) <= wire.MAX_SPARED
    assert not found.status_file or (found.status_file.startswith("/") and "\0" not in found.status_file)
    for text in (found.id, found.name, found.boot_id, found.status_file, *found.sockets):
        text.encode()
    if found.stray is not None:
        assert all(math.isfinite(one) for one in found.stray)
    if found.progress is not None:
        assert math.isfinite(found.progress.done)
        assert found.progress.total is None or math.isfinite(found.progress.total)
        assert len(found.progress.message.encode()) <= wire.MAX_MESSAGE_BYTES


def _check_written_anew(found: pages.Page) -> None:
    memory = bytearray(wire.PAGE_BYTES)
    try:
        record = wire.pack_record(
            found.id,
            found.name,
            found.start_ticks,
            found.boot_id,
            found.page_fd,
            list(found.sockets),
            status_file=found.status_file,
            attempt=found.attempt,
            stray=found.stray,
        )
    except wire.WireError:  # a number that takes more room as Python writes it
        return
    blocks = [(0, wire.pack_header(2, found.flags, len(record))), (wire.RECORD_AT, record)]
    if found.progress is not None:
        blocks.append((wire.PROGRESS_AT, wire.pack_progress(*found.progress)))
    blocks.append((wire.SPARED_AT, wire.pack_spared([*found.spared])))
    for at, block in blocks:
        memory[at : at + len(block)] = block
    assert pages.parse_page(bytes(memory)) == found


def check_memfd(data: bytes) -> None:
    """A descriptor is read as a page only where it is one, and says then what the same bytes say."""
    dice = Dice(data)
    name = dice.choose(("reaper:" + _ID, "reaper:", "reaper-spared:x", "other"))
    size = dice.choose((wire.PAGE_BYTES,) * 5 + (0, wire.PAGE_BYTES - 1, wire.PAGE_BYTES + 1))
    seals = dice.choose((0x6, 0x7, 0x17, 0x2, 0x4, 0))
    uid = dice.choose((os.geteuid(),) * 3 + (os.geteuid() + 1,))
    dead = bool(dice.below(2))
    memory = _composed(dice.rest())
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    opened = -1
    try:
        os.write(descriptor, memory)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, seals)
        found = outcome(
            lambda: linux_page.open_page(f"/proc/self/fd/{descriptor}", uid=uid),
            raises=(wire.WireError, OSError),
        )
        fit = (
            name.startswith("reaper:") and size == wire.PAGE_BYTES and seals & 6 == 6 and uid == os.geteuid()
        )
        assert isinstance(found, Refused) == (not fit)
        if isinstance(found, Refused):
            return
        opened = found
        expected = outcome(lambda: pages.parse_page(memory, torn=dead), raises=_REFUSED)
        read = outcome(lambda: linux_page.read_page(opened, writer_is_dead=dead), raises=_REFUSED)
        assert isinstance(read, Refused) == isinstance(expected, Refused)
        assert isinstance(read, Refused) or repr(read) == repr(expected)
        assert os.fstat(descriptor).st_size == size
    finally:
        os.close(descriptor)
        if opened >= 0:
            os.close(opened)


def written() -> bytes:
    """Return a page as the agent writes it, with everything in it that there can be."""
    page = SessionPage(_ID, "grid search", 192964, _BOOT, attempt=(1, 4))
    try:
        page.write_record(["/run/reaper/reaper.sock"])
        page.say(status_file="/tmp/run.json", stray=[300, 50])
        page.write_progress(12, 64, "fold 3")
        page.write_spared([(7, 8), (9, 10)])
        return os.pread(page.fd, wire.PAGE_BYTES, 0)
    finally:
        page.close()


def _seeds() -> list[bytes]:
    whole = written()
    record = whole[wire.RECORD_AT : wire.PROGRESS_AT].rstrip(b"\0")
    blocks = whole[wire.PROGRESS_AT :][:18], whole[wire.SPARED_AT :][:26]
    composed = b"\1" + b"\2\0\0\0\0\1" + blocks[0] + blocks[1] + b"\6fold 3" + record
    odd = []
    for numbers, message in (
        (struct.pack("<ddH", 1.0, 2.0, 1100), b"x" * 1100),
        (struct.pack("<ddH", float("nan"), 2.0, 1), b"x"),
        (struct.pack("<ddH", float("-inf"), 2.0, 1), b"x"),
        (struct.pack("<ddH", 1.0, float("inf"), 0), b""),
    ):
        page = bytearray(whole)
        page[wire.PROGRESS_AT : wire.PROGRESS_AT + 18] = numbers
        page[wire.MESSAGE_AT : wire.MESSAGE_AT + len(message)] = message
        odd.append(b"\0" + bytes(page))
    return [*odd, b"\0" + whole, composed, composed.replace(b'"attempt":[1,4]', b'"attempt":[5,4]')]


def _memfd_seeds() -> list[bytes]:
    page = b"\0" + written()
    choices = [b"\0\0\0\0\0", *(bytes((name, 0, 0, 0, 0)) for name in (1, 2, 3))]
    choices += [bytes((0, size, 0, 0, 1)) for size in (5, 6, 7)]
    choices += [bytes((0, 0, seals, 0, 0)) for seals in range(1, 6)]
    return [
        *(choice + page for choice in (*choices, b"\0\0\0\3\0")),
        *(choices[0] + seed for seed in _seeds()),
    ]


_WORDS = (
    *(b'{"v":1,"id":"', b'","name":"', b'","start_ticks":', b',"boot_id":"', b',"fd":', b',"sockets":["'),
    *(b',"status_file":"/', b',"stray":[', b',"attempt":[', wire.MAGIC, _ID.encode(), b"1e999", b"\\ud800"),
    *(b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\x7f", b"\xff\xff", b"9223372036854775808"),
)
TARGETS = (
    Target("page", stateless(check_page), _seeds, _WORDS, 4200),
    Target("memfd", stateless(check_memfd), _memfd_seeds, _WORDS, 4200, cost=2),
)  # fmt: skip
