"""Attackers of the daemon's socket and of the session page: processes of other users that break every rule.

``attacker.py KIND OPTIONS`` (options in JSON) is one attacker, as whatever user runs it. It says what it did in lines of
JSON on stdout, and stops when its stdin says something or ends.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import itertools
import json
import mmap
import os
import random
import resource
import select
import socket
import string
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agent import wire
from agent.zmtp import frame

LIFETIME_S = 600.0  # of an attacker, should its stdin never end
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
MORE, COMMAND = 0x01, 0x04
NULL = b"NULL".ljust(20, b"\0")
SEAL_ALL = 0x1 | 0x2 | 0x4 | 0x10
F_ADD_SEALS = 1033

Options = Mapping[str, Any]


# -- a client that speaks ZMTP by hand ------------------------------------------------------------


def greeting(*, version: bytes = b"\x03\x00", mechanism: bytes = NULL, as_server: int = 0) -> bytes:
    """Return the 64 bytes that open a ZMTP 3 connection, or something like them."""
    return (SIGNATURE + version + mechanism + bytes((as_server,))).ljust(64, b"\0")


def command(name: bytes, body: bytes = b"") -> bytes:
    """Return one command frame."""
    return frame(bytes((len(name),)) + name + body, COMMAND)


def ready(properties: Mapping[bytes, bytes] | None = None) -> bytes:
    """Return the READY command with these properties; a DEALER without identity where none are given."""
    told = {b"Socket-Type": b"DEALER", b"Identity": b""} if properties is None else properties
    body = b"".join(
        bytes((len(name),)) + name + struct.pack(">I", len(value)) + value for name, value in told.items()
    )
    return command(b"READY", body)


class HungUp(Exception):
    """The other end is gone."""


class Peer:
    """One connection to the daemon's socket; nothing is sent unless it is told to."""

    def __init__(self, path: str, within_s: float = 8.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(within_s)
        self._unread = b""
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise HungUp from None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data, socket.MSG_NOSIGNAL)
        except OSError:
            raise HungUp from None

    def read(self, size: int) -> bytes:
        while len(self._unread) < size:
            try:
                chunk = self.socket.recv(1 << 16)
            except OSError:
                raise HungUp from None
            if not chunk:
                raise HungUp
            self._unread += chunk
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def shake_hands(self, properties: Mapping[bytes, bytes] | None = None) -> Peer:
        self.send(greeting() + ready(properties))
        self.read(64)
        self.read_frame()
        return self

    def read_frame(self) -> tuple[int, bytes]:
        flags = self.read(1)[0]
        size = struct.unpack(">Q", self.read(8))[0] if flags & 0x02 else self.read(1)[0]
        return flags, self.read(size)

    def reply(self) -> dict[str, Any]:
        """Return the next reply; commands are passed over."""
        while True:
            flags, body = self.read_frame()
            if not flags & COMMAND:
                answer: dict[str, Any] = json.loads(body)
                return answer

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one request and return the reply, a refusal as well."""
        self.send(request(**message))
        return self.reply()

    def hears_the_end(self) -> bool:
        """Say whether the other end hangs up before the connection's time is over."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


def request(**message: Any) -> bytes:
    return frame(json.dumps({"v": 1, **message}).encode())


def own_ticks() -> int:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def own_id(nonce: int = 0) -> str:
    """Return a session id that this process may well have."""
    return wire.format_session_id(os.getpid(), own_ticks(), 0, nonce)


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


# -- hostile requests -----------------------------------------------------------------------------

_JSON_BOMBS = (
    b"[" * 16000,
    b'{"a":' * 3000,
    b'{"v":1,"op":' + b"[" * 8000 + b"]" * 8000 + b"}",
    b'{"v":1,"v":1,"op":"ping"}',
    b'{"v":1,"op":"ping","op":"stop"}',
    b'{"v":1,"op":"ping","x":NaN}',
    b'{"v":1,"op":"ping","x":-Infinity}',
    b'{"v":1,"op":"ping","x":1e999}',
    b'{"v":1,"op":"ping","x":' + b"9" * 15000 + b"}",
    b'{"v":1,"op":"ping","x":-' + b"9" * 30 + b"}",
    b'{"v":1,"op":"ping","x":0.' + b"0" * 15000 + b"1}",
    b'{"v":1,"op":"' + b"x" * 16000 + b'"}',
    b'{"v":1,"op":"\\ud800"}',
    b'{"v":1,"op":"stop","session":"\\udfff\\ud800"}',
    b'{"v":1,"\\ud800":1,"op":"ping"}',
    b'{"v":1,"op":"ping\\u0000"}',
    b"\xef\xbb\xbf" + b'{"v":1,"op":"ping"}',
    '{"v":1,"op":"ping"}'.encode("utf-16"),
    b'{"v":1,"op":"\xed\xa0\x80"}',
    b'{"v":1,"op":"\xc0\xaf"}',
    b'{"v":true,"op":"ping"}',
    b'{"v":1.0,"op":"ping"}',
    b'{"v":"1","op":"ping"}',
    b'{"v":1}',
    b"{}",
    b"null",
    b"",
    b"\0",
    b'{"v":1,"op":"ping"} {"v":1,"op":"ping"}',
    b'{"v":1,"op":"ping"}\0',
    b"{" + b" " * 16300 + b'"v":1,"op":"ping"}',
)
_OPS = ("register", "unregister", "ping", "status", "ps", "events", "stop", "config", "")
_TAKES: dict[str, tuple[str, ...]] = {
    "register": ("session", "start_ticks", "name", "page_fd"),
    "unregister": ("session",),
    "stop": ("session",),
    "events": ("session", "after", "since"),
}
_FIELDS = (
    *("op", "session", "name", "start_ticks", "page_fd", "after", "since", "wait_s", "pid", "uid", "v"),
    *("gid", "admin", "Peer-Address", "User-Id", "__class__", ""),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63) + 1, 0.5, -0.0, 1e308),
    *("", "x", "*", "%", "'; DROP TABLE sessions; --", "1-", "-", "1-1-00000000-00000000", "0-0-0-0", "\x1b[2J"),
    *("\u202eevil", "\U0001f480" * 100, "a" * 4096, "../../etc/passwd", "1970-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
    *("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "\u0663"),
    *([], {}, [[]], {"a": {"b": []}}, ["x"] * 100),
)  # fmt: skip


def hostile_body(rng: random.Random, sessions: list[str]) -> bytes:
    """Return the body of one request that no honest client sends."""
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.choice((1, 10, 100, 1000, 16384, 17000)))
        case 1:
            return rng.choice(_JSON_BOMBS)
        case 2:
            return json.dumps(_anything(rng, 4)).encode()
        case 3:
            body = bytearray(
                json.dumps({"v": 1, "op": rng.choice(_OPS), "session": rng.choice(sessions)}).encode()
            )
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            return bytes(body)
        case 4 | 5:
            op = rng.choice(tuple(_TAKES))
            plausible = {
                "session": rng.choice(sessions),
                "start_ticks": 1,
                "after": 5,
                "name": "n",
                "page_fd": 3,
            }
            fields = {
                key: plausible.get(key) if rng.random() < 0.6 else rng.choice(_VALUES) for key in _TAKES[op]
            }
            return json.dumps({"v": 1, "op": op, **fields}).encode()
        case _:
            message = {"v": 1, "op": rng.choice(_OPS)}
            for _ in range(rng.randrange(6)):
                message[rng.choice(_FIELDS)] = rng.choice((*_VALUES, *sessions, *(s[:9] for s in sessions)))
            if message.get("op") == "events" and rng.random() < 0.9:
                message["wait_s"] = 0  # the others wait, up to the daemon's limit
            return json.dumps(message).encode()


def _anything(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(4 if depth else 2)
    if kind == 3:
        return {rng.choice(_FIELDS): _anything(rng, depth - 1) for _ in range(rng.randrange(5))}
    if kind == 2:
        return [_anything(rng, depth - 1) for _ in range(rng.randrange(5))]
    return rng.choice(_VALUES) if kind else "".join(rng.choices(string.printable, k=rng.randrange(50)))


def strange_openings() -> Iterator[tuple[str, bytes]]:
    """Yield beginnings of a connection that are no handshake, each with its name."""
    whole = greeting() + ready()
    for size in (0, 1, 9, 10, 11, 12, 32, 63, 64, 65, 70, len(whole) - 1):
        yield f"the first {size} bytes", whole[:size]
    yield "zeros", bytes(4096)
    yield "an HTTP request", b"GET / HTTP/1.1\r\nHost: reaper\r\n\r\n"
    yield "a greeting of 1 MiB", (SIGNATURE + b"\x03").ljust(1 << 20, b"\0")
    for version in (b"\x00", b"\x01", b"\x02", b"\x7f", b"\xff"):
        yield f"ZMTP {version[0]}", greeting(version=version + b"\0") + ready()
    yield "ZMTP 1", b"\x01\x00"
    yield "ZMTP 2, whole", SIGNATURE + b"\x01\x05" + b"\x00\x00" + b"\x00\x05hello"
    for mechanism in (b"PLAIN", b"CURVE", b"GSSAPI", b"", b"\xff" * 20, b"NULL\0\0\0\1"):
        yield f"mechanism {mechanism!r}", greeting(mechanism=mechanism.ljust(20, b"\0")) + ready()
    yield "as a server", greeting(as_server=1) + ready()
    for kind in (b"ROUTER", b"PUB", b"PAIR", b"", b"x" * 255):
        yield f"socket type {kind[:8]!r}", greeting() + ready({b"Socket-Type": kind})
    yield "no socket type", greeting() + ready({})
    yield "an identity of 300 bytes", greeting() + ready({b"Socket-Type": b"DEALER", b"Identity": b"i" * 300})
    yield (
        "a property that lies about its length",
        greeting() + command(b"READY", b"\x0bSocket-Type\xff\xff\xff\xffDEALER"),
    )
    yield "a name that lies about its length", greeting() + command(b"READY", b"\xffSocket")
    yield "a thousand properties", greeting() + ready({f"X-{n}".encode(): b"y" * 50 for n in range(1000)})
    for size in (2**63, 2**64 - 1, 2**31):
        yield f"a command of {size} bytes", greeting() + bytes((COMMAND | 2,)) + struct.pack(">Q", size)
        yield f"a message of {size} bytes", whole + b"\x02" + struct.pack(">Q", size) + b"x" * 100
    yield "a message before READY", greeting() + frame(b'{"v":1,"op":"ping"}')
    yield "READY twice", whole + ready()
    yield "HELLO", greeting() + command(b"HELLO", b"\x04user\x04pass")
    yield "ERROR", greeting() + command(b"ERROR", b"\x05wrong")
    yield "PING in place of READY", greeting() + command(b"PING", b"\0\0ctx")
    for name in (b"PING", b"PONG", b"SUBSCRIBE", b"CANCEL", b"ERROR", b"JOIN", b"LEAVE", b"", b"x" * 255):
        yield (
            f"a command {name[:9]!r} after the handshake",
            whole + command(name, b"\x00\x0acontext" * 40) * 50,
        )
    yield "reserved flags", whole + b"\xf8\x05hello"
    yield "an empty frame for ever", whole + b"\x01\x00" * 5000


# -- one attacker, as a process -------------------------------------------------------------------


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def told_to_stop(within_s: float = 0.0) -> bool:
    """Say whether stdin has something to read, or has ended."""
    return bool(select.select([0], [], [], within_s)[0])


def wait_for_the_end() -> None:
    """Return when stdin says something or ends."""
    told_to_stop(LIFETIME_S)


def take_descriptors() -> int:
    """Raise this process's limit, and return how many connections it may well have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - 64


def garbage(options: Options) -> None:
    """Send ``count`` messages of every hostile kind, a few dozen on each connection; say what came back."""
    rng = random.Random(options["seed"])
    left, kinds = options["count"], Counter[str]()
    say(ready=True)
    while left > 0 and not told_to_stop():
        try:
            with Peer(options["socket"]) as peer:
                opening = rng.randrange(10)
                if opening == 0:
                    peer.send(rng.randbytes(rng.randrange(1, 5000)))
                    left, kinds["bytes"] = left - 1, kinds["bytes"] + 1
                    continue
                if opening == 1:
                    peer.send(greeting() + rng.randbytes(rng.randrange(1, 5000)))
                    left, kinds["handshake"] = left - 1, kinds["handshake"] + 1
                    continue
                peer.shake_hands()
                for _ in range(min(left, 40)):
                    body, left = hostile_body(rng, options["sessions"]), left - 1
                    flags = MORE if rng.random() < 0.02 else 0
                    peer.send(frame(body, flags) + (frame(b"") if flags else b""))
                    # Whoever sends more than the daemon takes is hung up on; whoever waits is answered late.
                    waits = b"wait_s" in body and b'"wait_s": 0' not in body
                    if len(body) <= wire.MAX_REQUEST_BYTES and not waits:
                        kinds[_kind_of(peer.reply())] += 1
        except HungUp:
            kinds["hung up"] += 1
    say(sent=options["count"] - left, kinds=kinds)


def _kind_of(reply: dict[str, Any]) -> str:
    return "ok" if reply["ok"] else str(reply["kind"])


def openings(options: Options) -> None:
    """Begin connections in every strange way, keep them all open, then drip others byte by byte."""
    held = []
    for name, data in strange_openings():
        with contextlib.suppress(HungUp):
            peer = Peer(options["socket"])
            held.append(peer)
            peer.send(data)
        say(opened=name)
    drips = [Peer(options["socket"]) for _ in range(20)]
    whole = greeting() + ready() + request(op="ping")
    for number in range(len(whole)):
        for peer in drips:
            with contextlib.suppress(HungUp):
                peer.send(whole[number : number + 1])
        if told_to_stop(0.01):
            break
    say(done=len(held))
    wait_for_the_end()


def connects(options: Options) -> None:
    """Open bare connections, as many as can be, again and again, and hold them."""
    most = take_descriptors()
    held: list[socket.socket] = []
    refused = made = 0
    say(ready=True)
    while not told_to_stop():
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            one.connect(options["socket"])
            held.append(one)
            made += 1
        except OSError:
            one.close()
            refused += 1
            told_to_stop(0.01)
        if len(held) >= most:
            for old in held[: most // 2]:
                old.close()
            held = held[most // 2 :]
    say(connects=made, refused=refused)


def endless(options: Options) -> None:
    """Send one message that has ever more frames, until ``megabytes`` are sent on each of some connections."""
    sent = lives = 0
    part = frame(b"x" * 16000, MORE)
    say(ready=True)
    for _ in range(options["messages"]):
        try:
            with Peer(options["socket"]) as peer:
                peer.shake_hands()
                for _ in range(options["megabytes"] * 1_000_000 // len(part)):
                    peer.send(part)
                    sent += len(part)
        except HungUp:
            lives += 1
        if told_to_stop():
            break
    say(sent_bytes=sent, hung_up=lives)


def deaf(options: Options) -> None:
    """Ask and ask, over ``connections``, and never read a reply."""
    asked = 0
    peers: list[Peer] = []
    data = request(**options["message"]) * 20
    say(ready=True)
    while not told_to_stop(0.001):
        while len(peers) < options["connections"]:
            try:
                peer = Peer(options["socket"], within_s=5).shake_hands()
            except HungUp:
                break
            peer.socket.setblocking(False)
            peers.append(peer)
        for peer in list(peers):
            try:
                if peer.socket.send(data, socket.MSG_NOSIGNAL) == len(data):
                    asked += 20
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            peers.remove(peer)  # hung up on, or a message cut short: a new connection must do
    say(asked=asked)


def waiters(options: Options) -> None:
    """Wait for events that never come, over ``connections``; every other one hangs up meanwhile."""
    take_descriptors()
    peers = []
    for _ in range(options["connections"]):
        peer = Peer(options["socket"]).shake_hands()
        peer.send(request(op="events", session="1-1-00000000-00000000", wait_s=25))
        peers.append(peer)
    for peer in peers[::2]:
        peer.close()
    say(ready=True)
    wait_for_the_end()


def registrar(options: Options) -> None:
    """Register ever new sessions of one process, as fast as they are taken."""
    say(ready=True)
    number, accepted = 0, 0
    while not told_to_stop():
        try:
            with Peer(options["socket"]) as peer:
                peer.shake_hands()
                for _ in range(20):
                    batch = [
                        request(
                            op="register", session=own_id(number + n), start_ticks=own_ticks(), name="n" * 200
                        )
                        for n in range(20)
                    ]
                    number += len(batch)
                    peer.send(b"".join(batch))
                    accepted += sum(peer.reply()["ok"] for _ in batch)
                    if told_to_stop():
                        break
        except HungUp:
            continue
    say(registered=accepted)


def many(options: Options) -> None:
    """Be ``sessions`` leaders, each with a page and two forked workers."""
    reader, writer = os.pipe()
    for _ in range(options["sessions"]):
        if os.fork() == 0:
            session = own_id()
            page = sealed_page(session, record_of(session, [options["socket"]]))
            accepted = False
            with contextlib.suppress(HungUp), Peer(options["socket"]) as peer:
                accepted = peer.shake_hands().ask(
                    op="register", session=session, start_ticks=own_ticks(), name="many", page_fd=page
                )["ok"]
            for _ in range(2):
                if os.fork() == 0:
                    break
            else:
                os.write(writer, b"+" if accepted else b"-")
            wait_for_the_end()
            os._exit(0)
    answers = b""
    while len(answers) < options["sessions"]:
        answers += os.read(reader, 4096)
    say(registered=answers.count(b"+"))
    wait_for_the_end()


def planted(options: Options) -> None:
    """Take the routing ids that the gate would give next, then make it give them."""
    peers = []
    for identity in options["identities"]:
        with contextlib.suppress(HungUp):
            peer = Peer(options["socket"])
            peers.append(peer)
            peer.send(greeting() + ready({b"Socket-Type": b"DEALER", b"Identity": bytes.fromhex(identity)}))
            peer.read(64)
    for _ in range(20):
        with contextlib.suppress(HungUp):
            peer = Peer(options["socket"])
            peers.append(peer)
            peer.shake_hands()
    say(planted=len(peers))
    wait_for_the_end()


def courier(options: Options) -> None:
    """Connect, shake hands, and hand the connection to whoever listens on ``to``."""
    peer = Peer(options["socket"]).shake_hands()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as outlet:
        outlet.connect(options["to"])
        socket.send_fds(outlet, [b"x"], [peer.socket.fileno()])
        say(pid=os.getpid())
        wait_for_the_end()


def impostor(options: Options) -> None:
    """Ask for what concerns a victim's session in every way, and say what came back; ``properties`` are claimed."""
    victim = options["victim"]
    claims = {name.encode(): value.encode() for name, value in options.get("properties", {}).items()}
    claims = {b"Socket-Type": b"DEALER", b"Identity": b"", **claims}
    told = wire.SessionId.parse(victim["id"])
    as_victim = {
        "pid": told.pid,
        "uid": victim["uid"],
        "gid": victim["uid"],
        "peer": told.pid,
        "User-Id": "0",
    }
    fake = sealed_page(victim["id"], record_of(victim["id"], [options["socket"]]))
    mine = own_id(7)
    register = {"op": "register", "start_ticks": told.start_ticks, "name": "mine"}
    questions: dict[str, dict[str, Any]] = {
        "stop by id": {"op": "stop", "session": victim["id"]},
        "stop by name": {"op": "stop", "session": victim["name"]},
        "stop by prefix": {"op": "stop", "session": victim["id"][:12]},
        "stop as the victim": {"op": "stop", "session": victim["id"], **as_victim},
        "unregister": {"op": "unregister", "session": victim["id"]},
        "unregister as the victim": {"op": "unregister", "session": victim["id"], **as_victim},
        "register its id": {**register, "session": victim["id"]},
        "register its id as the victim": {**register, "session": victim["id"], **as_victim},
        "register its id with a page": {**register, "session": victim["id"], "page_fd": fake},
        "its page as mine": {
            "op": "register",
            "session": mine,
            "start_ticks": own_ticks(),
            "name": "mine",
            "page_fd": fake,
        },
    }
    if "page" in options:  # the victim's own page, handed over by somebody whom it trusted
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as source:
            source.connect(options["page"])
            handed = socket.recv_fds(source, 1, 2)[1]
        for name, descriptor in zip(("the very page as mine", "a page made for me"), handed, strict=True):
            questions[name] = {**questions["its page as mine"], "page_fd": descriptor}
    with Peer(options["socket"]).shake_hands(claims) as peer:
        say(kinds={name: _kind_of(peer.ask(**question)) for name, question in questions.items()})
        say(ps=peer.ask(op="ps"), events=peer.ask(op="events"), status=peer.ask(op="status"))
    wait_for_the_end()


# -- hostile pages --------------------------------------------------------------------------------


def record_of(session: str, sockets: list[str], **changed: Any) -> bytes:
    """Return the record that a leader would write, or one with ``changed`` fields."""
    fields = {
        "v": 1, "id": session, "name": "hostile", "start_ticks": wire.SessionId.parse(session).start_ticks,
        "boot_id": boot_id(), "fd": 3, "sockets": sockets,
    }  # fmt: skip
    return json.dumps({**fields, **changed}).encode()


def page_bytes(record: bytes, *, sequence: int = 2, flags: int = 0, length: int | None = None) -> bytes:
    """Return a page with that record."""
    header = wire.pack_header(sequence, flags, len(record) if length is None else length)
    data = header.ljust(wire.RECORD_AT, b"\0") + record
    return data[: wire.PAGE_BYTES].ljust(wire.PAGE_BYTES, b"\0")


def memfd(name: str, data: bytes, *, size: int | None = None, seals: int = SEAL_ALL) -> int:
    """Return a memfd of that name and content; it is not sealed at all where ``seals`` is 0."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    if size is not None:
        os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, F_ADD_SEALS, seals)
    return descriptor


def sealed_page(session: str, record: bytes, **header: Any) -> int:
    return memfd(wire.PAGE_PREFIX + session, page_bytes(record, **header))


def pages(options: Options) -> None:
    """Hold everything that could pass for a page, some of it in the name of the victim's session."""
    paths, victim = [options["socket"]], options["victim"]
    take_descriptors()
    held: list[int] = []
    names = itertools.count()

    def fresh() -> str:
        return own_id(next(names))

    for session in (fresh(), victim):
        name, record = wire.PAGE_PREFIX + session, record_of(session, paths)
        whole = page_bytes(record)
        for size in (0, 1, wire.PAGE_BYTES - 1, wire.PAGE_BYTES + 1, 1 << 44):
            held.append(memfd(name, whole, size=size))
        held += [
            memfd(name, whole, seals=seals)
            for seals in (0, 0x2, 0x1 | 0x2, 0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4)
        ]
        held += [memfd(name, data) for data in (b"", b"junk", whole[:30], b"\xff" * wire.PAGE_BYTES)]
        held += [sealed_page(session, record, length=length) for length in (0, 1, 1984, 1985, 65535)]
        held.append(sealed_page(session, record, sequence=3))  # a write that never ends
        for changed in _lies(options, session):
            held.append(sealed_page(session, record_of(session, **{"sockets": paths, **changed})))
        for body in _JSON_BOMBS:
            held.append(sealed_page(session, body[:1984]))
    if options.get("numbers"):
        for number in options["numbers"]:
            fcntl.fcntl(held[0], fcntl.F_DUPFD_CLOEXEC, number)
    for count in range(options.get("many", 0)):
        session = wire.format_session_id(30_000 + count % 2000, 1, 0, count)
        held.append(sealed_page(session, record_of(session, paths)))
    _tear_for_ever(own_id(0xFEED), paths)
    held += _named_like_pages(options["directory"], victim)  # last: afterwards there is no /proc
    say(ready=len(held))
    wait_for_the_end()


def _lies(options: Options, session: str) -> Iterator[dict[str, Any]]:
    """Yield what a record can say that is not so."""
    innocent = wire.SessionId.parse(options["victim"])
    for other in (options["innocent"], 1, 2**31 - 1):
        yield {
            "id": wire.format_session_id(other, innocent.start_ticks, 0, 1),
            "start_ticks": innocent.start_ticks,
        }
        yield {"id": wire.format_session_id(other, 1, 0, 1), "start_ticks": 0}
    for nonce, lie in (
        (0xB007, {"boot_id": "00000000-0000-0000-0000-000000000000"}),
        (0xB008, {"sockets": ["/x"]}),
    ):
        yield {"id": wire.format_session_id(30_000, 1, 0, nonce), "start_ticks": 1, **lie}
    yield {"id": session, "start_ticks": 2**62}
    yield {"sockets": ["/run/somebody/else.sock", "../../x", "", "\x1b[2J", "/" + "x" * 1000]}
    yield {"sockets": "text"}
    yield {"sockets": [options["socket"]] * 9}
    yield {"name": 7}
    yield {"name": "x" * 201}
    yield {"fd": -1}
    yield {"fd": 2**62}
    yield {"id": "no-id-at-all"}
    yield {"id": "x" * 65}
    yield {"id": options["finished"], "start_ticks": wire.SessionId.parse(options["finished"]).start_ticks}


def _named_like_pages(directory: str, session: str) -> list[int]:
    """Return descriptors of what is no memfd and bears the name of one, also at the root of a mount of one's own."""
    name = f"memfd:{wire.PAGE_PREFIX}{session}"
    libc = ctypes.CDLL(None, use_errno=True)
    held = _files_named(directory, name)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER | CLONE_NEWNS
        return held
    for file_name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file_name}", "w", encoding="ascii") as file:
            file.write(text)
    os.mkdir(f"{directory}/root")
    libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None)  # MS_PRIVATE | MS_REC
    if libc.mount(b"none", f"{directory}/root".encode(), b"tmpfs", 0, None):
        return held
    held += _files_named(f"{directory}/root", name)
    for count, device in enumerate(("/dev/zero", "/dev/null", "/dev/tty", "/dev/full")):
        # A device in the place of a file, at the root of a mount that the daemon does not see.
        target = f"{directory}/root/{count}"
        os.mkdir(target)
        place = f"{target}/{name}"
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        if not libc.mount(device.encode(), place.encode(), None, 1 << 12, None):  # MS_BIND
            held.append(os.open(place, os.O_PATH))
    os.mkdir(f"{directory}/root/old")
    os.chdir(f"{directory}/root")
    libc.syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b"old")  # pivot_root(2)
    return held


def _files_named(directory: str, name: str) -> list[int]:
    """Return descriptors of a file, a hard link, a symbolic link, a FIFO, a socket and a folder of that name."""
    path = os.path.join(directory, name)
    held = []
    with open(path, "wb") as file:
        file.truncate(wire.PAGE_BYTES)
    os.link(path, f"{path} hard")
    held += [os.open(path, os.O_RDONLY), os.open(f"{path} hard", os.O_RDONLY)]
    os.unlink(path)
    os.symlink("/etc/passwd", path)
    held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
    os.unlink(path)
    os.mkfifo(path)
    held += [os.open(path, os.O_RDWR), os.open(path, os.O_PATH)]
    os.unlink(path)
    with open(path, "wb") as file:
        file.truncate(1 << 42)
        held.append(os.dup(file.fileno()))
    os.unlink(path)
    os.mkdir(path)
    held.append(os.open(path, os.O_RDONLY))
    return held


def _tear_for_ever(session: str, sockets: list[str]) -> None:
    """Hold a page whose sequence number is never the same twice, and mostly odd."""
    descriptor = os.memfd_create(wire.PAGE_PREFIX + session, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, wire.PAGE_BYTES)
    memory = mmap.mmap(descriptor, wire.PAGE_BYTES)
    fcntl.fcntl(descriptor, F_ADD_SEALS, SEAL_ALL)
    memory[:] = page_bytes(record_of(session, sockets))

    def tear() -> None:
        for number in itertools.count(1, 2):
            memory[wire.SEQUENCE_SLICE] = (number & 0xFFFFFFFF).to_bytes(4, "little")

    threading.Thread(target=tear, daemon=True).start()


def squatter(options: Options) -> None:
    """Wait for a session id on stdin, then hold a page in its name, whoever leads it."""
    say(ready=True)
    session = sys.stdin.readline().strip()
    held = [
        sealed_page(session, record_of(session, [options["socket"]], start_ticks=ticks))
        for ticks in (0, 1, wire.SessionId.parse(session).start_ticks)
    ]
    say(squats=len(held))
    wait_for_the_end()


def giver(options: Options) -> None:
    """Make a memfd that bears the name of the victim's page, and hand it to whoever listens on ``to``."""
    descriptor = memfd(wire.PAGE_PREFIX + options["victim"], b"", size=wire.PAGE_BYTES, seals=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as outlet:
        outlet.connect(options["to"])
        socket.send_fds(outlet, [b"x"], [descriptor])
        outlet.recv(1)
    say(given=True)


def service(options: Options) -> None:
    """Be a forked service of the victim's: map what a client hands over, as display and sound servers do."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inlet:
        inlet.bind(options["at"])
        os.chmod(options["at"], 0o777)
        inlet.listen(1)
        pid = os.fork()
        if pid:
            say(pid=pid)
            os.waitpid(pid, 0)
            return
        while not told_to_stop():
            if inlet.fileno() in select.select([inlet.fileno(), 0], [], [], LIFETIME_S)[0]:
                connection, _ = inlet.accept()
                (descriptor,) = array.array("i", socket.recv_fds(connection, 1, 1)[1])
                libc.mmap(None, wire.PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
                if not options["keeps"]:
                    os.close(descriptor)
                connection.send(b"x")
        os._exit(0)


def crowd(options: Options) -> None:
    """Be many forked processes that are dear to look at: of ``descriptors`` and ``mappings`` each."""
    take_descriptors()
    if options["registers"]:
        import agent

        agent.register("crowd", socket=options["socket"], timeout=10)
    for _ in range(options.get("descriptors", 0)):
        os.dup(0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    for count in range(options.get("mappings", 0)):
        libc.mmap(None, 4096, 1 + count % 2 * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for _ in range(options["processes"]):
        if os.fork() == 0:
            wait_for_the_end()
            os._exit(0)
    say(ready=True)
    wait_for_the_end()


def holder(options: Options) -> None:
    """Be a process in state S whose memory nobody can read: a second thread holds its lock, for a write that never ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    shared, fixed = mmap.MAP_SHARED, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    write = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, 4096, write, shared, os.open(options["file"], os.O_RDWR), 0)
    ctypes.c_char.from_address(address).value = b"x"  # what is dirty is written back when it is mapped over
    # No word may come later: whatever touches this process's memory may stand still.
    say(pid=os.getpid())
    threading.Thread(
        target=libc.mmap, args=(address, 4096, mmap.PROT_READ, fixed, -1, 0), daemon=True
    ).start()
    select.select([0], [], [])


def stalled(options: Options) -> None:
    """Serve a file system (FUSE, in a mount namespace of one's own) that never ends a write, to one process of ``uid``.

    It says ``holds`` when that process waits. Run by root, for /dev/fuse is root's in many a container.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    uid, directory = options["holds"], options["directory"]
    settings = f"fd={device},rootmode=40000,user_id={uid},group_id={uid},allow_other".encode()
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None):
        raise OSError(ctypes.get_errno(), "cannot have a mount namespace")
    if libc.mount(b"stalled", directory.encode(), b"fuse.stalled", 6, settings):
        raise OSError(ctypes.get_errno(), "cannot mount")
    if os.fork() == 0:
        os.close(device)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        python = options["python"]
        os.execv(python, [python, __file__, "holder", json.dumps({"file": f"{directory}/file"})])
    while select.select([device, 0], [], [])[0] == [device]:
        _answer_fuse(device, uid)
    # Closing the device ends the file system, and whoever waits for it.


def _answer_fuse(device: int, uid: int) -> None:
    """Answer one request (linux/fuse.h, protocol 7.31) for a folder with one file; a write is never answered."""
    data = os.read(device, 1 << 20)
    _, operation, unique, node = struct.unpack_from("<IIQQ", data)

    def reply(body: bytes = b"", error: int = 0) -> None:
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def attributes(number: int) -> bytes:
        mode = 0o40755 if number == 1 else 0o100666
        return struct.pack("<6Q10I", number, 4096, 8, *[0] * 6, mode, 1, uid, uid, 0, 4096, 0)

    match operation:
        case 26:  # INIT
            reply(struct.pack("<4I2H2I2H32x", 7, 31, 0, 0, 16, 12, 65536, 1, 16, 0))
        case 1:  # LOOKUP
            reply(struct.pack("<4Q2I", 2, 0, 100, 100, 0, 0) + attributes(2))
        case 3 | 4:  # GETATTR, SETATTR
            reply(struct.pack("<Q2I", 100, 0, 0) + attributes(node))
        case 14 | 27:  # OPEN, OPENDIR
            reply(struct.pack("<Q2I", 1, 0, 0))
        case 15:  # READ
            reply(bytes(4096))
        case 16:  # WRITE
            say(holds=True)
        case 2 | 36 | 42:  # FORGET, INTERRUPT, BATCH_FORGET: want no answer
            pass
        case _:
            reply(error=-38)


def deep(options: Options) -> None:
    """Make a folder in /dev/shm that is named like a leader's own, ``depth`` deep, of ``width`` files."""
    os.chdir("/dev/shm")
    name = f"joblib_memmapping_folder_{options['leader']}_x"
    os.mkdir(name)
    os.chdir(name)
    for number in range(options["width"]):
        os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
    for _ in range(options["depth"]):
        os.mkdir("a")
        os.chdir("a")
    say(made=name)
    wait_for_the_end()


def greedy(options: Options) -> None:
    """Register, then start ``children`` that carry no mark of anything."""
    import subprocess

    import agent

    session = agent.register("greedy", socket=options["socket"], timeout=10)
    bare = {name: value for name, value in os.environ.items() if name.startswith("REAPER_TEST")}
    children = [
        subprocess.Popen(["cat"], env=bare, stdin=0, stdout=subprocess.DEVNULL)
        for _ in range(options["children"])
    ]
    say(ready=session.socket is not None, children=[child.pid for child in children])
    wait_for_the_end()


KINDS: dict[str, Callable[[Options], None]] = {
    function.__name__: function
    for function in (
        *(garbage, openings, connects, endless, deaf, waiters, registrar, many, planted, courier, impostor),
        *(pages, squatter, giver, service, crowd, greedy, deep, stalled, holder),
    )
}


if __name__ == "__main__":
    KINDS[sys.argv[1]](json.loads(sys.argv[2]))
    os._exit(0)
