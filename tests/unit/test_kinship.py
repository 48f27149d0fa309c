"""Who stands above and below real processes."""

from __future__ import annotations

from specimens import ME, child, id_of

from reaperd import kinship
from reaperd.linux.procfs import ProcFS
from reaperd.model import ProcessId


def test_ancestors_are_all_who_stand_above_but_init() -> None:
    with child() as pid:
        above = kinship.ancestors(ProcFS(), pid)
        assert id_of(ME) in above
        assert {one.pid for one in above} - {ME} == {one.pid for one in kinship.ancestors(ProcFS(), ME)}
        assert not {one.pid for one in above} & {0, 1, pid}
    assert kinship.ancestors(ProcFS(), pid) == frozenset()
    assert kinship.ancestors(ProcFS(), 1) == frozenset()


def test_children_in_a_circle_end_the_search() -> None:
    class Circle(ProcFS):
        """A /proc that was read while pids were given away: everybody is everybody's child."""

        calls = 0

        def children(self, pid: int) -> list[int]:
            self.calls += 1
            assert self.calls < 100
            return [2, 3, 4]

    assert sorted(kinship.descendants(Circle(), ProcessId(2, 0))) == [3, 4]
