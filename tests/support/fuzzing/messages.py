"""What strangers send: messages, the frames that carry them, ids, and what a client gets for an answer."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import zlib
from collections.abc import Iterator

from fuzzing import twins
from fuzzing.dice import Dice
from fuzzing.target import Check, Refused, Target, assert_printable, outcome, stateless

from agent import client, wire
from reaperd import gate, gate_frames

SESSION = "2859-2f1c4-eb9f3362-3e9773f4"
MESSAGES = (
    b'{"v":1,"op":"register","session":"%s","start_ticks":192964,"name":"grid","page_fd":3,'
    b'"temp_dirs":["/tmp"],"attempt":[1,4]}' % SESSION.encode(),
    b'{"v":1,"op":"unregister","session":"%s"}' % SESSION.encode(),
    b'{"v":1,"op":"ping"}',
    b'{"v":1,"op":"status"}',
    b'{"v":1,"op":"ps"}',
    b'{"v":1,"op":"events","after":0,"since":"2026-01-31T12:00:00Z","session":"x","wait_s":0}',
    b'{"v":1,"op":"stop","session":"grid"}',
    b'{"v":1,"op":"config"}',
    b'{"v":1,"op":"orphans","score":true}',
    b'{"v":1,"op":"explain","pid":1}',
    b'{"v":1,"op":"cleanup","dry_run":true}',
    b'{"v":1,"op":"cleanup","processes":[[4194303,1]]}',
    b'{"v":1,"op":"protect","pid":4194303,"undo":true}',
    b'{"v":1,"op":"release","pid":4194303}',
    b'{"v":1,"ok":true,"version":"0.1.0","pid":812}',
    b'{"v":1,"ok":false,"kind":"busy","message":"too many requests"}',
)
# What is none, each for another reason.
ODD = (
    b'{"v":1,"v":1}',
    b'{"v":1,"a":{"b":1,"b":1}}',
    b'{"v":1,"a":NaN}',
    b'{"v":1,"a":1e999}',
    b'{"v":1,"a":"\\ud800"}',
    b'{"v":1,"a":"\xed\xa0\x80"}',
    b'{"v":1,"a":9223372036854775808}',
    b'{"v":2}',
    b'{"v":true}',
    b'{"a":1,"v":1}',
    b'{"v":1.0}',
    b"[1]",
    b'{"v":1} {"v":1}',
    b'\xef\xbb\xbf{"v":1}',
    b'{"v":1,"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
)
_KEYS = ("op", "session", "start_ticks", "page_fd", "attempt", "pid", "after", "since")
WORDS = (
    *(
        b'{"',
        b'":',
        b'",',
        b"[",
        b"]",
        b"{}",
        b"null",
        b"true",
        b"1e999",
        b"-0",
        b"NaN",
        b"\\ud800",
        b"\\u00e9",
    ),
    *(
        b'"v":1',
        b'"op":',
        b'"session":',
        b'"start_ticks":',
        b'"page_fd":',
        b'"attempt":',
        b'"since":',
        b'"pid":',
    ),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808", b"\xed\xa0\x80", b"\xc2\xb2"),
)


def check_message(data: bytes) -> None:
    """``wire.decode()`` takes what the protocol allows and nothing else, and what it takes can be written back."""
    found = outcome(wire.decode, data, raises=(wire.WireError,))
    if isinstance(found, Refused):
        assert isinstance(found.error, wire.WireError)
        assert wire.decode(wire.encode(wire.refusal(found.error)))["message"] == str(found.error)
    if twins.is_nested_deeply(data):
        return
    expected = twins.strict_message(data)
    assert (None if isinstance(found, Refused) else repr(found)) == (expected and repr(expected))
    if expected is None:
        return
    assert repr(wire.decode(wire.encode(found))) == repr(
        {"v": wire.VERSION, **found}
    )  # which is written first
    for key in _KEYS:
        text = outcome(wire.text_field, found, key, raises=(wire.WireError,))
        assert isinstance(text, Refused) or (0 < len(text) <= 4096 and "\0" not in text)
        number = outcome(wire.integer_field, found, key, raises=(wire.WireError,))
        assert isinstance(number, Refused) or (type(number) is int and number >= 0)
        attempt = outcome(wire.attempt_field, {"attempt": found.get(key)}, raises=(wire.WireError,))
        if not isinstance(attempt, Refused) and attempt is not None:
            assert 1 <= attempt[0] <= attempt[1] <= wire.MAX_ATTEMPTS


def check_id(data: bytes) -> None:
    """Ids and stamps are read as their form says, and an id that was read can be written and read again."""
    text = data.decode("utf-8", "surrogateescape")
    expected = twins.session_id(text)
    found = outcome(wire.SessionId.parse, text, raises=(wire.WireError,))
    assert (None if isinstance(found, Refused) else tuple(found)) == expected
    if expected is not None:
        again = wire.SessionId.parse(wire.format_session_id(*expected, 7))
        assert again == found
        assert (again.pid, again.start_ticks, again.place) == expected
    lineage = wire.parse_lineage(text)
    assert lineage == tuple(
        word for word in text.split(":")[-wire.MAX_LINEAGE :] if twins.session_id(word) is not None
    )
    assert wire.parse_lineage(":".join(lineage)) == lineage
    assert wire.crc32(data) == zlib.crc32(data)
    assert wire.place_of(text, text, 7) == zlib.crc32(data + b"\0" + data + b"\0" + b"7")


def check_peer(data: bytes) -> None:
    """Who a peer is is read from what the kernel writes, and from nothing else."""
    text = data.decode("utf-8", "replace")
    found = outcome(gate.parse_peer_address, text, 65534, raises=(wire.WireError,))
    assert (None if isinstance(found, Refused) else found) == twins.peer_address(text, 65534)


def check_frame(data: bytes) -> None:
    """Core and gate understand each other, and know a message that the other can't have sent."""
    request = outcome(gate_frames.parse_request, data, raises=(ValueError,))
    if not isinstance(request, Refused):
        assert gate_frames.pack_request(request) == data
    reply = outcome(gate_frames.parse_reply, data, raises=(ValueError,))
    if not isinstance(reply, Refused):
        routing_id, part, last = reply
        assert bytes((last, len(routing_id))) + routing_id + part == bytes((bool(data[0]),)) + data[1:]
    dice = Dice(data)
    routing_id = dice.take(dice.below(256))
    body = dice.take(32) * (1 + dice.below(10_000)) or b"x"
    parts = [*gate_frames.pack_reply(routing_id, body)]
    assert all(len(part) <= gate_frames.MAX_REPLY_BYTES for part in parts)
    read = [gate_frames.parse_reply(part) for part in parts]
    assert b"".join(part for _, part, _ in read) == body
    assert [last for *_, last in read] == [False] * (len(read) - 1) + [True]
    assert {name for name, *_ in read} == {routing_id}


# -- a client, and who answers it -----------------------------------------------------------------


class Answering:
    """Says the same to each who connects, whatever he says, and hangs up."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "s")
        self.answer = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)
                # To close with something unread would look like a reset at the other end.
                while connection.recv(65536):
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextlib.contextmanager
def answering() -> Iterator[Answering]:
    """Serve on a socket in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="reaper-fuzz-") as directory:
        server = Answering(directory)
        try:
            yield server
        finally:
            server.close()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\1" + bytes(31)
_PROPERTIES = b"\x05READY\x0bSocket-Type\0\0\0\x06ROUTER"
READY = bytes((4, len(_PROPERTIES))) + _PROPERTIES


def framed(body: bytes) -> bytes:
    """Return what a ROUTER sends that answers with ``body``."""
    head = bytes((0, len(body))) if len(body) < 256 else b"\2" + len(body).to_bytes(8, "big")
    return GREETING + READY + head + body


@contextlib.contextmanager
def opened_client() -> Iterator[Check]:
    """``client.request()`` returns what a daemon grants, and raises one of two exceptions whatever else it is told."""
    with answering() as server:

        def check(data: bytes) -> None:
            server.answer = data
            try:
                found = client.request(server.path, {"op": "ping"}, timeout_s=10.0)
            except (client.Unreachable, wire.WireError) as error:
                found = None
                refused = isinstance(error, wire.WireError)
                assert_printable(str(error))
            body = twins.zmtp_message(data)
            if body is None:
                assert found is None
                assert not refused
                return
            if twins.is_nested_deeply(body):
                return
            message = twins.strict_message(body)
            granted = message is not None and message.get("ok") is True
            assert repr(found) == repr(message if granted else None)
            assert granted or refused

        yield check


def _client_seeds() -> list[bytes]:
    whole = [framed(message) for message in MESSAGES]
    return [
        *whole,
        whole[0][:64],
        whole[0][:80],
        GREETING
        + READY
        + b"\1"
        + framed(MESSAGES[-2])[len(GREETING + READY) + 1 :]
        + framed(MESSAGES[-1])[len(GREETING + READY) :],
        GREETING + READY + b"\2" + b"\xff" * 8,
    ]


TARGETS = (
    Target("message", stateless(check_message), lambda: [*MESSAGES, *ODD], WORDS),
    Target("id", stateless(check_id), lambda: [SESSION.encode(), f"{SESSION}:1-0-00000000-ffffffff".encode(),
        *(f"{pid}-{ticks}-00000000-00000000".encode() for pid in (0, "01", 2**31 - 1, 2**31, "\u0661") for ticks in ("7f", "8" + "0" * 15)),
    ], (b"-", b":"), 200),
    Target("peer", stateless(check_peer), lambda: [b"localhost:1000:1000:4321", b":0:0:0", b"x:65534:1:1"], (b":", b"4294967295"), 64),
    Target("frame", stateless(check_frame), lambda: [
        gate_frames.pack_request(gate_frames.Request(1000, 1000, 77, b"\0abcd", MESSAGES[0])),
        *gate_frames.pack_reply(b"\0abcd", MESSAGES[2]),
    ], longest=600),
    Target("client", opened_client, _client_seeds, (*WORDS, READY, GREETING), cost=6),
)  # fmt: skip
