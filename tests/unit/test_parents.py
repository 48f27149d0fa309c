"""Which parents may have started a process, and which can only have adopted it."""

from __future__ import annotations

from pathlib import Path

import pytest

from reaperd.linux.procfs import ProcFS, Stat
from reaperd.model import ProcessId
from reaperd.parents import Parents

CHILD = 500


class Tree:
    """A /proc of a few processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = ProcFS(str(root))

    def add(
        self,
        pid: int,
        comm: str,
        exe: str = "",
        *,
        ppid: int = 1,
        sid: int = 1,
        ticks: int = 10,
        inner: int = 0,
    ) -> None:
        folder = self.root / str(pid)
        folder.mkdir()
        rest = [0] * 49
        rest[0], rest[2], rest[18] = ppid, sid, ticks
        (folder / "stat").write_text(f"{pid} ({comm}) S " + " ".join(map(str, rest)))
        (folder / "status").write_text(
            f"Name:\t{comm}\nNSpid:\t{pid}" + (f"\t{inner}" if inner else "") + "\n"
        )
        if exe:
            (folder / "exe").symlink_to(exe)

    def child(self, ppid: int, *, sid: int = 40, ticks: int = 20) -> Stat:
        self.add(CHILD, "python3", ppid=ppid, sid=sid, ticks=ticks)
        return self.proc.stat(CHILD)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def adopts(tree: Tree, child: Stat) -> str:
    return Parents(tree.proc).of(child).adopts


@pytest.mark.parametrize("exe", ["/usr/lib/systemd/systemd", "/usr/bin/tini", "/bin/bash", "/bin/sleep"])
def test_process_1_that_is_an_init_or_stands_in_for_one_adopts(tree: Tree, exe: str) -> None:
    tree.add(1, "anything", exe)
    assert adopts(tree, tree.child(1, sid=1))


@pytest.mark.parametrize("name", ["python3.11", "pypy3", "python"])
def test_a_python_may_have_started_it_though_it_is_process_1(tree: Tree, name: str) -> None:
    tree.add(1, name, f"/usr/bin/{name}")
    assert not adopts(tree, tree.child(1, sid=40))


def test_an_unknown_process_1_adopts_only_who_comes_from_another_posix_session(tree: Tree) -> None:
    tree.add(1, "own-init", "/sbin/own-init", sid=1)
    child = tree.child(1, sid=1)
    assert not adopts(tree, child)
    assert not adopts(tree, child._replace(posix_sid=CHILD))  # it has begun that itself
    assert "POSIX session (40)" in adopts(tree, child._replace(posix_sid=40))


def test_an_unknown_parent_may_have_started_it_whatever_its_session(tree: Tree) -> None:
    tree.add(70, "blender", "/opt/blender", sid=1)
    assert not adopts(tree, tree.child(70, sid=40))


@pytest.mark.parametrize("name", ["bash", "tini", "dumb-init"])
def test_what_stands_in_for_an_init_adopts_as_process_1_of_a_container_alone(tree: Tree, name: str) -> None:
    """Anywhere else a pool may have its workers started by it."""
    tree.add(70, name, f"/bin/{name}", inner=1)
    tree.add(71, name, f"/bin/{name}", inner=7)
    child = tree.child(70, sid=1)
    assert adopts(tree, child)
    assert not adopts(tree, child._replace(ppid=71))


@pytest.mark.parametrize("name", ["conmon", "containerd-shim-runc-v2"])
def test_what_runs_containers_has_started_what_is_below_it(tree: Tree, name: str) -> None:
    """With podman run --pid=host that is a worker's parent from the beginning, while its pool lives."""
    tree.add(812, name, f"/usr/bin/{name}")
    assert not adopts(tree, tree.child(812))


def test_a_users_own_manager_adopts(tree: Tree) -> None:
    tree.add(812, "systemd", "/usr/lib/systemd/systemd")
    told = Parents(tree.proc).of(tree.child(812))
    assert (told.name, bool(told.adopts)) == ("systemd --user", True)


def test_the_file_that_runs_goes_before_the_name_that_a_process_gives_itself(tree: Tree) -> None:
    tree.add(812, "systemd", "/usr/bin/python3.11")
    assert not adopts(tree, tree.child(812))


def test_where_that_may_not_be_asked_the_name_must_do(tree: Tree) -> None:
    tree.add(812, "systemd")
    assert adopts(tree, tree.child(812))


def test_who_is_younger_than_its_child_has_not_adopted_it(tree: Tree) -> None:
    tree.add(812, "systemd", "/usr/lib/systemd/systemd", ticks=21)
    assert not adopts(tree, tree.child(812, ticks=20))


def test_nobody_is_lost_for_a_parent_that_is_gone_or_out_of_sight(tree: Tree) -> None:
    child = tree.child(4711)
    assert not adopts(tree, child)
    assert not adopts(tree, child._replace(ppid=0))
    assert Parents(tree.proc).id_of(4711) is None


def test_a_parent_is_read_once_for_all_its_children(tree: Tree) -> None:
    tree.add(70, "bash", "/bin/bash")
    parents = Parents(tree.proc)
    assert parents.id_of(70) == ProcessId(70, 10)
    (tree.root / "70" / "stat").unlink()
    assert parents.id_of(70) == ProcessId(70, 10)
