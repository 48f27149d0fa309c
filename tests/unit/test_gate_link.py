"""The core's end of the gate: whose a connection is, and what waits for a gate that does not take it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import repeat_until

from reaperd import gate_frames
from reaperd.gate_link import GateLink, Peer, Return, read_credentials
from reaperd.poller import Poller

SOON_S = 20.0


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(8)
        yield listener


@contextlib.contextmanager
def caller(path: Path, name: Path | None = None) -> Iterator[int]:
    """Have another process connect to ``path``, its own end called ``name``; yield its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            if name is not None:
                one.bind(str(name))
            one.connect(str(path))
            signal.pause()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- whose a connection is --------------------------------------------------------------------------


def test_who_connected_to_our_socket_is_who_the_kernel_says(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    with listening(path) as listener, caller(path) as pid, listener.accept()[0] as accepted:
        assert read_credentials(accepted, str(path)) == (os.getuid(), os.getgid(), pid)


def test_who_has_hung_up_is_still_who_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    with listening(path) as listener:
        with caller(path) as pid:
            accepted = listener.accept()[0]
        with accepted:
            assert read_credentials(accepted, str(path)) == (os.getuid(), os.getgid(), pid)


def test_the_end_of_one_who_called_somebody_is_nobodys_request(tmp_path: Path) -> None:
    """At the other end stands who listens, whoever called: root, for all who call root's sockets."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for path in (ours, other):
        with listening(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as calling:
            calling.connect(str(path))
            for name in (ours, other):
                assert read_credentials(calling, str(name)) is None


def test_an_end_that_only_has_the_name_of_our_socket_is_nobodys_request(tmp_path: Path) -> None:
    """The name is what bind(2) was told, in whatever root directory: here a socket that is gone."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    pid = os.fork()
    if pid == 0:  # another process, for one of our own is refused anyway
        try:
            with listening(other), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as calling:
                calling.bind(str(ours))
                calling.connect(str(other))
                os._exit(0 if _reads_as_nobody(calling, ours) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _reads_as_nobody(connection: socket.socket, path: Path) -> bool:
    """Say what the daemon would, were its pid not the listener's."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if read_credentials(connection, str(path)) is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_connection_that_was_accepted_elsewhere_is_nobodys_request(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with listening(path) as listener, caller(path), listener.accept()[0] as accepted:
        assert read_credentials(accepted, str(tmp_path / "ours")) is None


def test_a_caller_with_a_name_of_its_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    with (
        listening(path) as listener,
        caller(path, tmp_path / "named"),
        listener.accept()[0] as accepted,
    ):
        assert read_credentials(accepted, str(path)) is None


def test_no_request_is_the_daemons_own(tmp_path: Path) -> None:
    """The gate's channel was made by us, and can be given the name of our socket."""
    path = tmp_path / "ours"
    left, right = socket.socketpair()
    with left, right:
        assert read_credentials(left, "") is None
        left.bind(str(path))
        assert read_credentials(left, str(path)) is None
    path.unlink()
    with listening(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as calling:
        calling.connect(str(path))
        with listener.accept()[0] as accepted:
            assert read_credentials(accepted, str(path)) is None


def test_what_is_no_connection_is_an_os_error() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alone, pytest.raises(OSError, match="107"):
        read_credentials(alone, "")


# -- what waits for the gate ------------------------------------------------------------------------


class Router:
    """A gate that reads what it is sent when the test says so."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        channel.setblocking(False)

    def read(self) -> list[tuple[bytes, int]]:
        """Return the routing id and the length of each part that is there."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while True:
                routing_id, part, _ = gate_frames.parse_reply(self._channel.recv(gate_frames.MAX_REPLY_BYTES))
                parts.append((routing_id, len(part)))
        return parts


@pytest.fixture
def linked() -> Iterator[tuple[GateLink, Router]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    poller = Poller()
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        ours.setblocking(False)
        link = GateLink(listener, "", poller, lambda peer, to, message: None)
        link._channel = ours
        poller.watch(ours.fileno(), link._note_ready)
        yield link, Router(theirs)
        poller._epoll.close()


def read_all(link: GateLink, router: Router) -> dict[bytes, int]:
    """Return how many bytes each peer was sent, in the end."""
    found: dict[bytes, int] = {}
    while parts := router.read():
        for routing_id, length in parts:
            found[routing_id] = found.get(routing_id, 0) + length
        link._note_ready()
        link.exchange()
    return found


def test_who_does_not_read_its_replies_costs_a_few_of_its_own_and_nobody_elses(
    linked: tuple[GateLink, Router], caplog: pytest.LogCaptureFixture
) -> None:
    link, router = linked
    reply = b"x" * 200_000
    for number in range(1000):
        link.reply(Return(0, b"deaf %d" % number, 1), reply)
    link.reply(Return(0, b"other", 2), b"y" * 10_000_000)
    assert link._waiting_bytes.total() < 4 * 1024 * 1024 + 10_000_000 + 3 * len(reply)
    assert [one.levelname for one in caplog.records] == ["WARNING"], "it is told once"
    found = read_all(link, router)
    assert found.pop(b"other") == 10_000_000, "one reply may be larger than what many may be"
    assert 20 <= len(found) <= 24
    assert set(found.values()) == {len(reply)}, "a reply is dropped whole"
    link.reply(Return(0, b"deaf again", 1), reply)
    assert read_all(link, router) == {b"deaf again": len(reply)}


def test_so_much_waits_in_all_whoever_it_is_for(linked: tuple[GateLink, Router]) -> None:
    link, _ = linked
    for uid in range(100):
        link.reply(Return(0, b"peer", uid), b"x" * 1_000_000)
    assert link._waiting_bytes.total() < 35_000_000


def test_a_reply_for_a_peer_of_an_earlier_gate_is_lost_with_it(linked: tuple[GateLink, Router]) -> None:
    link, router = linked
    link.reply(Return(7, b"peer", 1), b"x")
    assert read_all(link, router) == {}


def test_requests_are_taken_for_a_few_milliseconds_however_many_there_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ours"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    poller = Poller()
    taken: list[Peer] = []

    def take(peer: Peer, to: Return, message: object) -> None:
        peer.connection.close()
        taken.append(peer)
        until_s = time.monotonic() + 0.003
        while time.monotonic() < until_s:  # it is dear
            pass

    with listening(path) as listener, ours, theirs, caller(path) as pid, listener.accept()[0] as accepted:
        ours.setblocking(False)
        link = GateLink(listener, str(path), poller, take)
        link._channel = ours
        poller.watch(ours.fileno(), link._note_ready)
        claim = gate_frames.Request(os.getuid(), os.getgid(), pid, b"id", b'{"v":1,"op":"ping"}')
        for _ in range(10):
            socket.send_fds(theirs, [gate_frames.pack_request(claim)], [accepted.fileno()])
        poller.wait(0)
        assert taken == [], "nothing is taken before the loop says so"
        for turn in range(1, 4):
            poller.wait(0)
            link.exchange()
            assert len(taken) == turn
        poller._epoll.close()


def test_it_is_known_that_somebody_may_have_been_missed(tmp_path: Path) -> None:
    path, poller, up = tmp_path / "ours", Poller(), []
    with listening(path) as listener, contextlib.ExitStack() as stack:
        link = GateLink(listener, str(path), poller, lambda peer, to, message: None)
        link.on_up = lambda: up.append(True)
        stack.callback(link.stop)
        assert link.may_have_missed(), "there is no gate yet"

        def start() -> int:
            up.clear()
            link.start(time.monotonic())
            while not up:
                poller.wait(SOON_S)
                link.exchange()
            assert link._child is not None
            return link._child.pid

        gate = start()
        assert not link.may_have_missed()
        os.kill(gate, signal.SIGSTOP)
        with caller(path):
            repeat_until(lambda: link.may_have_missed() or None, SOON_S, "nobody is seen to wait")
            os.kill(gate, signal.SIGCONT)
            repeat_until(lambda: not link.may_have_missed() or None, SOON_S, "the gate takes nobody")
        os.kill(gate, signal.SIGKILL)
        while link.restart_at_s is None:
            poller.wait(SOON_S)
            link.exchange()
        start()
        assert link.may_have_missed(), "there was none for a while"
        assert not link.may_have_missed()
