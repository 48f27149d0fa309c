"""A lack of descriptors or memory is told from what a process, or its owner, refuses to tell."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

import pytest

from reaperd.linux.exhaustion import is_exhaustion, reason_of, tell_exhaustion
from reaperd.linux.procfs import ProcFS


@pytest.fixture
def no_descriptor() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as lowest:
        free = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_only_what_runs_out_is_exhaustion() -> None:
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        error = OSError(number, "too little")
        assert is_exhaustion(error)
        assert reason_of(error) == "too little"
        with pytest.raises(OSError, match="too little"):
            tell_exhaustion(error)
    assert is_exhaustion(MemoryError())
    assert reason_of(MemoryError()) == "out of memory"
    for number in (errno.EACCES, errno.ENOENT, errno.EPERM, errno.ESRCH, errno.EIO):
        assert not is_exhaustion(OSError(number, ""))
        tell_exhaustion(OSError(number, ""))
    assert not is_exhaustion(ValueError())


def test_a_process_of_which_nothing_can_be_read_for_want_of_a_descriptor_is_not_one_that_has_nothing(
    no_descriptor: None,
) -> None:
    """Who seems to hold no page, or no file, is nobody's member, and what it uses is taken away."""
    proc, pid = ProcFS(), os.getpid()
    proc._memfds = (7, "00:01")
    for question in (
        lambda: proc.descriptors(pid, pid),
        lambda: proc.memfd_inode(pid, pid, 0),
        lambda: proc.stat(pid),
        lambda: proc.environ(pid, pid),
        lambda: proc.maps(pid, pid),
        lambda: proc.tasks(pid),
        proc.listing,
    ):
        with pytest.raises(OSError, match="Too many open files"):
            question()
    assert proc.descriptor(pid, pid, 0), "a link is read without one"
