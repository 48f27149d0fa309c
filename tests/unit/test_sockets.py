"""Where a daemon is looked for: in which order, never in a directory of somebody else's, and why nobody answers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import STRANGER, Scratch

from agent import sockets
from agent.sockets import SYSTEM_SOCKET, candidate_sockets, is_private, user_runtime_directory, why_deaf

ROOT = os.geteuid() == 0
UID = STRANGER if ROOT else os.geteuid()  # whose directory these tests speak of


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REAPER_SOCKET", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def as_user(work: Callable[[], Any], **environment: str) -> Any:
    """Return what ``work`` returns to a user who is not root, with this environment added."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            if ROOT:
                os.setresuid(UID, UID, UID)
            os.environ.update(environment)
            os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    os.waitpid(pid, 0)
    return json.loads(told)


@pytest.fixture
def runtime(scratch: Scratch) -> str:
    """Return a directory of that user for run-time files, with a private one for the daemon in it."""
    path = scratch.directory("run")
    os.mkdir(f"{path}/reaper", 0o700)
    for one in (path, f"{path}/reaper"):
        os.chown(one, UID, -1)
    return path


# -- the order --------------------------------------------------------------------------------------


def test_the_socket_that_is_asked_for_is_the_only_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAPER_SOCKET", "/from/the/environment")
    assert candidate_sockets("/asked/for") == ["/asked/for"]
    assert candidate_sockets() == ["/from/the/environment"]
    assert candidate_sockets("") == ["/from/the/environment"]
    monkeypatch.setenv("REAPER_SOCKET", "")
    assert candidate_sockets()[-1] == SYSTEM_SOCKET


def test_a_users_own_daemon_comes_before_the_systems(runtime: str) -> None:
    assert as_user(candidate_sockets, XDG_RUNTIME_DIR=runtime) == [
        f"{runtime}/reaper/reaper.sock",
        SYSTEM_SOCKET,
    ]


def test_without_a_directory_for_run_time_files_it_is_one_in_the_temporary_directory(runtime: str) -> None:
    os.rename(f"{runtime}/reaper", f"{runtime}/reaper-{UID}")
    expected = [f"{runtime}/reaper-{UID}/reaper.sock", SYSTEM_SOCKET]
    for xdg in ("", "relative/path"):
        assert as_user(candidate_sockets, XDG_RUNTIME_DIR=xdg, TMPDIR=runtime) == expected
    assert as_user(user_runtime_directory, TMPDIR="") == f"/tmp/reaper-{UID}"


@pytest.mark.needs_root
def test_root_has_no_daemon_of_its_own_but_the_systems(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", scratch.path)
    os.mkdir(f"{scratch.path}/reaper", 0o700)
    assert is_private(f"{scratch.path}/reaper")
    assert candidate_sockets() == [SYSTEM_SOCKET]


def test_a_path_through_a_link_is_told_as_what_it_leads_to(scratch: Scratch, runtime: str) -> None:
    link = scratch.file("link")
    os.symlink(runtime, link)
    assert candidate_sockets(f"{link}/../x.sock") == [scratch.file("x.sock")]
    own = as_user(candidate_sockets, XDG_RUNTIME_DIR=link)
    assert own == [f"{runtime}/reaper/reaper.sock", SYSTEM_SOCKET]


def test_a_path_that_cannot_be_resolved_is_taken_as_it_is() -> None:
    def without_a_directory() -> list[str]:
        os.mkdir("/tmp/reaper-gone", 0o700)
        os.chdir("/tmp/reaper-gone")
        os.rmdir("/tmp/reaper-gone")
        return candidate_sockets("x.sock")

    assert candidate_sockets("/a\0b") == ["/a\0b"]
    assert as_user(without_a_directory) == ["x.sock"]


# -- whose directory --------------------------------------------------------------------------------


def make_open(path: str) -> None:
    os.chmod(path, 0o750)


def make_executable(path: str) -> None:
    os.chmod(path, 0o701)


def make_link(path: str) -> None:
    os.rename(path, f"{path}-real")
    os.symlink(f"{path}-real", path)
    os.chown(path, UID, -1, follow_symlinks=False)


def make_file(path: str) -> None:
    os.rmdir(path)
    os.close(os.open(path, os.O_CREAT, 0o600))
    os.chown(path, UID, -1)


def make_strange(path: str) -> None:
    os.chown(path, UID + 1, -1)


@pytest.mark.parametrize(
    "spoil",
    [
        make_open,
        make_executable,
        make_link,
        make_file,
        os.rmdir,
        pytest.param(make_strange, marks=pytest.mark.needs_root),
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_directory_that_is_not_the_users_alone_is_no_place_for_a_daemon(
    spoil: Callable[[str], object], runtime: str
) -> None:
    assert as_user(lambda: is_private(f"{runtime}/reaper"))
    spoil(f"{runtime}/reaper")
    assert not as_user(lambda: is_private(f"{runtime}/reaper"))
    assert as_user(candidate_sockets, XDG_RUNTIME_DIR=runtime) == [SYSTEM_SOCKET]


# -- why nobody answers -----------------------------------------------------------------------------


@contextlib.contextmanager
def bound(
    path: str, kind: socket.SocketKind = socket.SOCK_STREAM, backlog: int | None = None
) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as one:
        one.bind(path)
        if backlog is not None:
            one.listen(backlog)
        yield one


def test_a_socket_on_which_somebody_listens_is_not_deaf_and_is_told_nothing(tmp_path: Path) -> None:
    with bound(str(tmp_path / "s"), backlog=5) as listener:
        assert why_deaf(str(tmp_path / "s")) is None
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b"", "it hung up without a word"


def test_a_socket_with_a_full_backlog_is_slow_and_not_deaf(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with bound(path, backlog=0), contextlib.ExitStack() as stack:
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
            pytest.fail("the backlog has no end")
        assert why_deaf(path) is None


def test_why_nobody_listens_is_told_in_the_kernels_words(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").touch()
    with bound(str(tmp_path / "left")):
        pass
    with bound(str(tmp_path / "datagrams"), socket.SOCK_DGRAM), bound(str(tmp_path / "mute")):
        for name, words in (
            ("missing", "No such file or directory"),
            ("file", "Connection refused"),
            ("left", "Connection refused"),
            ("mute", "Connection refused"),
            ("datagrams", "Protocol wrong type for socket"),
            ("file/s", "Not a directory"),
            ("x" * 200, "AF_UNIX path too long"),
            ("\ud800", "surrogates not allowed"),
        ):
            assert words in (why_deaf(f"{tmp_path}/{name}") or ""), name
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs_root
def test_a_socket_that_one_may_not_connect_to_is_deaf_for_that_reason(scratch: Scratch) -> None:
    path = scratch.file("s")
    with bound(path, backlog=5):
        os.chmod(path, 0o600)
        assert as_user(lambda: why_deaf(path)) == "Permission denied"
        os.chmod(path, 0o666)
        assert as_user(lambda: why_deaf(path)) is None


def test_the_system_socket_is_where_packages_put_it() -> None:
    assert sockets.SYSTEM_SOCKET == "/run/reaper/reaper.sock"
