"""One round trip to whoever listens on a socket: a daemon is understood, and nobody else can hold the caller up."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import client, wire, zmtp

SOON_S = 10.0  # a deadline, not a wait
# rfc.zeromq.org/spec/23: signature, version, mechanism, as-server, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x1c" + b"\x05READY" + b"\x0bSocket-Type" + b"\0\0\0\x06ROUTER"
assert len(GREETING) == 64
assert len(READY) == 2 + 0x1C

Script = Callable[[socket.socket], object]


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Fail a test that leaves a descriptor or a thread behind, whatever its server did."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@contextlib.contextmanager
def serving(path: Path, *scripts: Script) -> Iterator[str]:
    """Listen on ``path`` and treat one connection after the other as the scripts say."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(SOON_S)
    faults: list[Exception] = []

    def serve() -> None:
        try:
            for script in scripts:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(SOON_S)
                    script(connection)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must fail of it
            faults.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield str(path)
    finally:
        thread.join()
        listener.close()
    assert faults == []


def take(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        assert chunk, "the dealer hung up"
        data += chunk
    return data


def take_frame(connection: socket.socket) -> tuple[int, bytes]:
    flags, first = take(connection, 2)
    if not flags & 2:
        return flags, take(connection, first)
    return flags, take(connection, int.from_bytes(bytes((first,)) + take(connection, 7), "big"))


def take_handshake(connection: socket.socket) -> None:
    take(connection, 64)
    take_frame(connection)


def shake_hands(connection: socket.socket) -> None:
    connection.sendall(GREETING + READY)
    take_handshake(connection)


def frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | 2,)) + len(body).to_bytes(8, "big") + body


def wait_for_hang_up(connection: socket.socket) -> None:
    """Take whatever comes until the dealer has gone."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


def answering(*data: bytes) -> Script:
    """Return a server that shakes hands, takes one request and sends these bytes."""

    def script(connection: socket.socket) -> None:
        shake_hands(connection)
        take_frame(connection)
        for part in data:
            connection.sendall(part)

    return script


def saying(*data: bytes, then: Script = wait_for_hang_up) -> Script:
    """Return a server that listens to nothing, sends these bytes and then does something else."""

    def script(connection: socket.socket) -> None:
        for part in data:
            connection.sendall(part)
        then(connection)

    return script


def ask(path: str, request: bytes = b"request", timeout_s: float = SOON_S) -> bytes:
    dealer = zmtp.Dealer(path, timeout_s)
    try:
        return dealer.round_trip(request)
    finally:
        dealer.close()


# -- a server that is one ---------------------------------------------------------------------------


def test_a_dealer_greets_as_the_protocol_asks_and_names_itself_a_dealer(tmp_path: Path) -> None:
    said = []

    def script(connection: socket.socket) -> None:
        said.append(take(connection, 64))
        said.append(take_frame(connection))
        connection.sendall(GREETING + READY)
        said.append(take_frame(connection))
        connection.sendall(frame(b"reply"))

    with serving(tmp_path / "s", script) as path:
        assert ask(path) == b"reply"
    ready = b"\x05READY" + b"\x0bSocket-Type\0\0\0\x06DEALER" + b"\x08Identity\0\0\0\0"
    assert said == [GREETING, (4, ready), (0, b"request")]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 4095, 70_000, 1_000_000])
def test_a_request_and_a_reply_of_any_size_go_through_whole(size: int, tmp_path: Path) -> None:
    body = bytes(range(256)) * (size // 256 + 1)

    def echo(connection: socket.socket) -> None:
        shake_hands(connection)
        flags, request = take_frame(connection)
        assert not flags & 5
        connection.sendall(frame(request))

    with serving(tmp_path / "s", echo) as path:
        assert ask(path, body[:size]) == body[:size]


def test_a_reply_that_comes_byte_by_byte_is_put_together(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        for byte in GREETING + READY:
            connection.sendall(bytes((byte,)))
        take_handshake(connection)
        take_frame(connection)
        for byte in frame(b"x" * 300):
            connection.sendall(bytes((byte,)))

    with serving(tmp_path / "s", script) as path:
        assert ask(path) == b"x" * 300


def test_a_reply_that_comes_in_one_go_with_the_greeting_is_told_apart_from_it(tmp_path: Path) -> None:
    with serving(tmp_path / "s", saying(GREETING + READY + frame(b"early") + frame(b"late"))) as path:
        dealer = zmtp.Dealer(path, SOON_S)
        try:
            assert dealer.round_trip(b"one") == b"early"
            assert dealer.round_trip(b"two") == b"late"
        finally:
            dealer.close()


def test_commands_between_the_frames_are_passed_over(tmp_path: Path) -> None:
    ping, long_one = frame(b"\x04PING\0\0", 4), frame(b"\x04NOISE" + b"x" * 300, 4)
    with serving(tmp_path / "s", answering(ping, long_one, ping + frame(b"reply"))) as path:
        assert ask(path) == b"reply"


def test_of_a_reply_in_several_frames_the_last_counts(tmp_path: Path) -> None:
    with serving(tmp_path / "s", answering(frame(b"", 1) + frame(b"y" * 300, 1) + frame(b"reply"))) as path:
        assert ask(path) == b"reply"


def test_a_newer_server_is_understood(tmp_path: Path) -> None:
    with serving(
        tmp_path / "s",
        saying(GREETING[:10] + b"\x03\x01" + GREETING[12:] + READY + frame(b"one")),
        saying(GREETING[:10] + b"\x04\x00" + GREETING[12:] + READY + frame(b"two")),
    ) as path:
        assert ask(path) == b"one"
        assert ask(path) == b"two"


def test_a_real_router_understands_a_dealer_and_is_understood(run: str, tmp_path: Path) -> None:
    program = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.linger = 1000
router.heartbeat_ivl, router.heartbeat_timeout = 1, 60_000  # PING commands, and patience without a PONG
router.bind("ipc://" + sys.argv[1])
print("ready", flush=True)
for _ in range(5):
    identity, body = router.recv_multipart()
    router.send_multipart([identity, b"", b"more", body[::-1]])
router.close()
"""
    path = str(tmp_path / "s")
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as router:
        try:
            assert router.stdout is not None
            assert select.select([router.stdout], [], [], SOON_S)[0]
            assert router.stdout.readline() == b"ready\n"
            for size in (1, 255, 256, 70_000):
                body = bytes(range(256)) * (size // 256 + 1)
                assert ask(path, body[:size]) == body[:size][::-1]
            reply = wire.encode({"ok": True, "name": "grid"})
            assert ask(path, reply[::-1]) == reply
            assert router.wait(SOON_S) == 0
        finally:
            router.kill()


# -- a server that is none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        bytes(64),
        b"\xff" * 64,
        b"\xff" + GREETING[1:9] + b"\x7e" + GREETING[10:],
        GREETING[:10] + b"\x01" + GREETING[11:],
        GREETING[:10] + b"\x00" + GREETING[11:],
        b"\x7f" + GREETING[1:],
    ],
    ids=["http", "zeroes", "ones", "signature", "version 1", "version 0", "first byte"],
)
def test_whoever_greets_in_another_way_does_not_speak_zmtp(greeting: bytes, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", saying(greeting)) as path,
        pytest.raises(zmtp.ZmtpError, match="does not speak ZMTP 3"),
    ):
        ask(path)


@pytest.mark.parametrize(
    "answer",
    [frame(b"\x05ERROR\x04nope", 4), frame(b"\x05READY", 0), frame(b"", 4), frame(b"\x05READ", 4)],
    ids=["an error", "a message", "an empty command", "another command"],
)
def test_whoever_is_not_ready_after_its_greeting_refuses_the_handshake(answer: bytes, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", saying(GREETING + answer)) as path,
        pytest.raises(zmtp.ZmtpError, match="refused"),
    ):
        ask(path)


REPLY = frame(b"x" * 300)
POINTS = [b"", GREETING[:1], GREETING[:63], GREETING, GREETING + READY[:1], GREETING + READY[:9]]
LATER_POINTS = [b"", b"\0", b"\0\x05", b"\0\x05half", REPLY[:4], REPLY[:200], frame(b"more", 1)]


@pytest.mark.parametrize("said", POINTS, ids=len)
def test_whoever_hangs_up_in_the_handshake_is_told_to_have_hung_up(said: bytes, tmp_path: Path) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.sendall(said)
        take_handshake(connection)  # what is unread when a socket is closed would reset it

    with serving(tmp_path / "s", hang_up) as path, pytest.raises(zmtp.ZmtpError, match="hung up"):
        ask(path)


@pytest.mark.parametrize("said", LATER_POINTS, ids=len)
def test_whoever_hangs_up_before_its_reply_is_whole_is_told_to_have_hung_up(
    said: bytes, tmp_path: Path
) -> None:
    with serving(tmp_path / "s", answering(said)) as path, pytest.raises(zmtp.ZmtpError, match="hung up"):
        ask(path)


def test_whoever_hangs_up_at_once_is_no_worse_than_an_os_error(tmp_path: Path) -> None:
    with serving(tmp_path / "s", *[lambda connection: None] * 20) as path:
        for _ in range(20):
            with pytest.raises((OSError, zmtp.ZmtpError)):
                ask(path)


@pytest.mark.parametrize("size", [64 * 1024 * 1024 + 1, 2**32, 2**63, 2**64 - 1])
def test_a_frame_without_end_is_refused_before_anything_of_it_is_read(size: int, tmp_path: Path) -> None:
    endless = b"\x02" + size.to_bytes(8, "big")
    with serving(
        tmp_path / "s",
        saying(GREETING + READY + endless + b"x" * 100),
        saying(GREETING + b"\x06" + size.to_bytes(8, "big")),
    ) as path:
        for _ in range(2):
            with pytest.raises(zmtp.ZmtpError, match=f"announced {size} bytes"):
                ask(path)


# -- a server that is slow --------------------------------------------------------------------------

STAGES = [b"", GREETING[:30], GREETING, GREETING + READY, GREETING + READY + REPLY[:20]]


@pytest.mark.parametrize("said", STAGES, ids=len)
def test_whoever_falls_silent_is_waited_for_until_the_deadline_and_no_longer(
    said: bytes, tmp_path: Path
) -> None:
    with serving(tmp_path / "s", saying(said)) as path:
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(path, timeout_s=0.03)
        assert 0.02 < time.monotonic() - began_s < 1.0


def test_every_byte_in_time_does_not_put_the_deadline_off(tmp_path: Path) -> None:
    def dribble(connection: socket.socket) -> None:
        connection.sendall(GREETING + READY + b"\x02" + (60_000).to_bytes(8, "big"))
        take_handshake(connection)
        take_frame(connection)
        with contextlib.suppress(BrokenPipeError):
            for _ in range(2000):  # a byte every 5 ms, until the dealer hangs up
                if select.select([connection], [], [], 0.005)[0]:
                    return
                connection.sendall(b"x")

    with serving(tmp_path / "s", dribble) as path:
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(path, timeout_s=0.05)
        assert time.monotonic() - began_s < 1.0


@pytest.mark.parametrize("flags", [4, 1], ids=["commands", "frames of one message"])
def test_whoever_never_stops_talking_does_not_put_the_deadline_off(flags: int, tmp_path: Path) -> None:
    many = frame(b"", flags) * 30_000  # faster sent than read

    def talk(connection: socket.socket) -> None:
        end_s = time.monotonic() + 0.25
        shake_hands(connection)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < end_s:
                connection.sendall(many)

    with serving(tmp_path / "s", talk) as path:
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(path, timeout_s=0.03)
        assert time.monotonic() - began_s < 0.2


def test_whoever_does_not_read_is_written_to_until_the_deadline_and_no_longer(tmp_path: Path) -> None:
    done = threading.Event()

    def never_read(connection: socket.socket) -> None:
        shake_hands(connection)
        done.wait(SOON_S)

    with serving(tmp_path / "s", never_read) as path:
        began_s = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                ask(path, b"x" * 16_000_000, timeout_s=0.05)
        finally:
            done.set()
        assert time.monotonic() - began_s < 1.0


def test_a_server_that_hung_up_does_not_end_a_program_that_dies_of_sigpipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hang_up_when_told(connection: socket.socket) -> None:
        shake_hands(connection)
        os.read(reader, 1)

    with serving(tmp_path / "s", hang_up_when_told) as path:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                dealer = zmtp.Dealer(path, SOON_S)
                os.write(writer, b"x")
                hung_up = select.poll()
                hung_up.register(dealer._socket, select.POLLRDHUP)
                hung_up.poll(SOON_S * 1000)
                try:
                    dealer.round_trip(b"request")
                except (OSError, zmtp.ZmtpError):
                    os._exit(7)
            os._exit(1)
        status = os.waitpid(pid, 0)[1]
    os.close(reader)
    os.close(writer)
    assert os.waitstatus_to_exitcode(status) == 7


# -- what the agent makes of it ---------------------------------------------------------------------


def request(path: str, timeout_s: float = SOON_S) -> dict[str, object]:
    return client.request(path, {"op": "ping"}, timeout_s=timeout_s)


def test_a_request_is_one_frame_of_json_and_its_reply_a_dict(tmp_path: Path) -> None:
    requests = []

    def script(connection: socket.socket) -> None:
        shake_hands(connection)
        requests.append(wire.decode(take_frame(connection)[1]))
        connection.sendall(frame(wire.encode({"ok": True, "version": "1"})))

    with serving(tmp_path / "s", script) as path:
        assert request(path) == {"v": 1, "ok": True, "version": "1"}
    assert requests == [{"v": 1, "op": "ping"}]


def test_a_refusal_is_a_wire_error_with_the_daemons_own_words(tmp_path: Path) -> None:
    for number, (reply, kind, words) in enumerate(
        (
            ({"ok": False, "kind": "busy", "message": "try again"}, "busy", "try again"),
            ({"ok": False}, "failed", "no reason"),
            ({}, "failed", "no reason"),
            ({"ok": 1}, "failed", "no reason"),
            ({"ok": "true", "kind": 7, "message": None}, "7", "None"),
        )
    ):
        with serving(tmp_path / f"s{number}", answering(frame(wire.encode(reply)))) as path:
            with pytest.raises(wire.WireError, match=words) as caught:
                request(path)
            assert caught.value.kind == kind


def test_a_reply_that_is_no_message_is_nonsense_and_says_whose(tmp_path: Path) -> None:
    for number, body in enumerate((b"", b"\xff", b"{}", b'{"v":2,"ok":true}', b"[" * 100_000)):
        with serving(tmp_path / f"s{number}", answering(frame(body))) as path:
            with pytest.raises(wire.WireError, match=f"{path} answered nonsense") as caught:
                request(path)
            assert caught.value.kind == "bad-reply"


def test_a_daemon_that_cannot_be_reached_is_told_with_its_path_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (str(tmp_path / "missing"), "No such file or directory"),
        (str(tmp_path / "file"), "Connection refused"),
        (str(tmp_path / ("x" * 200)), "too long"),
        ("\ud800", "surrogate"),
    ):
        with pytest.raises(client.Unreachable, match=words) as caught:
            request(path)
        assert str(caught.value).startswith(path)
    scripts: list[tuple[Script, str]] = [
        (saying(bytes(64)), "does not speak ZMTP 3"),
        (answering(), "hung up"),
        (saying(GREETING), "no answer within 0.03 s"),
    ]
    for number, (script, words) in enumerate(scripts):
        with serving(tmp_path / f"s{number}", script) as path:
            with pytest.raises(client.Unreachable, match=words) as caught:
                request(path, timeout_s=0.03 if "within" in words else SOON_S)
            assert str(caught.value).startswith(path)


def test_a_daemon_with_a_full_backlog_has_not_answered(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        for _ in range(100):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(path)
            except BlockingIOError:
                break
        else:
            pytest.fail("the backlog has no end")
        with pytest.raises(client.Unreachable, match="no answer within"):
            request(path, timeout_s=0.03)
