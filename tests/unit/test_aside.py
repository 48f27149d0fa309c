"""One who raises something unforeseen is set aside, the longer the more often; the others go on."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

import pytest

from reaperd import pauses
from reaperd.aside import Aside
from reaperd.census import Interrupted
from reaperd.model import ProcessId, SessionKey

ONE, TWO, THREE = (SessionKey(1000, name) for name in ("one", "two", "three"))


def fail(of: Aside, who: object, error: Exception) -> None:
    with of.trying(who, "do it"):
        raise error


def pause_s(of: Aside, who: object) -> float:
    until_s = of.until_s(who)
    return 0.0 if until_s is None else until_s - time.monotonic()


def test_who_raises_is_set_aside_with_a_traceback_and_nobody_else_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    of = Aside()
    for who in (ONE, ProcessId(7, 70)):
        for error in (RecursionError(), ValueError(), OSError(errno.EIO, "a disk")):
            fail(of, who, error)
        assert of.until_s(who) is not None
    assert of.until_s(TWO) is None
    assert len(caplog.records) == 6
    assert all(one.exc_info for one in caplog.records)
    assert "'one'" in caplog.text


def test_the_pause_grows_while_it_goes_on_and_has_a_limit() -> None:
    of = Aside()
    for length_s in (5, 10, 20, 40, 80, 160, 300, 300):
        fail(of, ONE, ValueError())
        assert length_s - 1 < pause_s(of, ONE) <= length_s
    of.forget(ONE)
    assert of.until_s(ONE) is None
    fail(of, ONE, ValueError())
    assert pause_s(of, ONE) <= 5


def test_who_only_met_with_a_lack_of_something_is_tried_again_soon(caplog: pytest.LogCaptureFixture) -> None:
    of = Aside()
    for length_s, error in (
        (0.05, MemoryError()),
        (0.1, OSError(errno.ENFILE, "too many")),
        (0.2, MemoryError()),
    ):
        fail(of, ONE, error)
        assert 0 < pause_s(of, ONE) <= length_s
    assert [(one.levelname, one.exc_info) for one in caplog.records] == [("WARNING", None)] * 3
    assert "out of memory" in caplog.text
    for _ in range(20):
        fail(of, ONE, MemoryError())
    assert pause_s(of, ONE) <= 5
    fail(of, ONE, ValueError())
    assert 5 < pause_s(of, ONE) <= 10


def test_a_pause_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "FIRST_S", 0.0)
    of = Aside()
    fail(of, ONE, ValueError())
    assert of.until_s(ONE) is None


def test_who_raises_nothing_is_not_touched() -> None:
    of = Aside()
    with of.trying(ONE, "do it"):
        pass
    assert of.until_s(ONE) is None


def test_what_is_nobodys_fault_is_raised() -> None:
    of = Aside()
    with pytest.raises(Interrupted):
        fail(of, ONE, Interrupted())
    with pytest.raises(OSError, match="too many"), of.trying(ONE, "do it", tell_exhaustion=True):
        raise OSError(errno.EMFILE, "too many")
    with pytest.raises(KeyboardInterrupt), of.trying(ONE, "do it"):
        raise KeyboardInterrupt
    assert of.until_s(ONE) is None


def test_what_is_done_for_many_at_once_is_done_for_each_alone_where_one_spoils_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    of, calls = Aside(), []

    def work(keys: Sequence[SessionKey]) -> dict[SessionKey, str]:
        calls.append(list(keys))
        if TWO in keys:
            raise RecursionError
        return {key: key.id for key in keys}

    assert of.together([ONE, THREE], work, "do it") == {ONE: "one", THREE: "three"}
    assert calls.pop() == [ONE, THREE]
    assert of.together([ONE, TWO, THREE], work, "do it") == {ONE: "one", THREE: "three"}
    assert calls == [[ONE, TWO, THREE], [ONE], [TWO], [THREE]]
    assert [of.until_s(key) is not None for key in (ONE, TWO, THREE)] == [False, True, False]
    assert [one.levelname for one in caplog.records] == ["WARNING", "ERROR"]


def test_what_is_nobodys_fault_is_not_tried_for_each_alone() -> None:
    of, calls = Aside(), []
    for error in (Interrupted(), OSError(errno.ENFILE, "")):

        def work(keys: Sequence[SessionKey], error: Exception = error) -> dict[SessionKey, str]:
            calls.append(keys)
            raise error

        with pytest.raises(type(error)):
            of.together([ONE, TWO], work, "do it")
    assert len(calls) == 2
