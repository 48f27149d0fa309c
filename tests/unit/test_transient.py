"""What systemd is asked for over D-Bus, by the book: who is to be moved is named by a pidfd where it takes one."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, HeaderFields, Message, new_error, new_method_return, new_signal
from jeepney.low_level import Parser

from reaperd.linux.transient import ScopeRefused, Wanted, start_scope

JOB, SYSTEMD = "/org/freedesktop/systemd1/job/7", ":1.0"
MANAGER = DBusAddress("/org/freedesktop/systemd1", interface="org.freedesktop.systemd1.Manager")
UNKNOWN = "org.freedesktop.DBus.Error.PropertyReadOnly"


class Bus:
    """A bus with a systemd on it, for one caller; ``refuses`` are properties that it does not know."""

    def __init__(self, path: Path, refuses: frozenset[str]) -> None:
        self.address = f"unix:path={path}"
        self._refuses = refuses
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.asked: list[dict[str, Any]] = []  # properties of each scope; the pid for a pidfd
        self.parts_of: list[str] = []
        self.holds_to: dict[str, tuple[str, Any]] = {
            "RuntimeMaxUSec": ("t", 2**64 - 1),
            "DevicePolicy": ("s", "auto"),
            "IPAddressDeny": ("a(iayu)", []),
            "RestrictNetworkInterfaces": ("(bas)", (False, [])),
        }
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            caller, _ = self._listener.accept()
            with caller:
                self._converse(caller, self._authenticate(caller))

    def _authenticate(self, caller: socket.socket) -> bytes:
        """Return what has come of messages already."""
        data = b""
        while b"BEGIN\r\n" not in data:
            data += (more := caller.recv(4096))
            if b"AUTH" in more:
                caller.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
            elif b"NEGOTIATE" in more:
                caller.sendall(b"AGREE_UNIX_FD\r\n")
        return data.partition(b"BEGIN\r\n")[2]

    def _converse(self, caller: socket.socket, begun: bytes) -> None:
        parser, serial = Parser(), 0
        parser.add_data(begun)
        while True:
            while (message := parser.get_next_message()) is None:
                data, descriptors, _, _ = socket.recv_fds(caller, 65536, 8)
                if not data:
                    return
                parser.add_data(data, descriptors)
            for answer in self._answers(message):
                serial += 1
                answer.header.fields[HeaderFields.sender] = SYSTEMD
                caller.sendall(answer.serialise(serial))

    def _answers(self, message: Message) -> list[Message]:
        member = message.header.fields[HeaderFields.member]
        if member == "GetAll":
            return [new_method_return(message, "a{sv}", (self.holds_to,))]
        if member == "Get":
            self.parts_of.append(message.header.fields[HeaderFields.path].rpartition("/")[2])
            return [new_method_return(message, "v", (("as", ["session-1.scope"]),))]
        if member != "StartTransientUnit":
            return [
                new_method_return(message, "s", (":1.5",))
                if member == "Hello"
                else new_method_return(message)
            ]
        properties = {name: value for name, (_, value) in message.body[2]}
        for one in properties.get("PIDFDs", []):
            with contextlib.closing(_Handle(handle=one)) as handle:
                properties["PIDFDs"] = _pid_of(handle.fd)
        self.asked.append(properties)
        if not self._refuses.isdisjoint(properties):
            return [new_error(message, UNKNOWN, "s", ("Cannot set property, or unknown property.",))]
        done = new_signal(MANAGER, "JobRemoved", "uoss", (7, JOB, message.body[0], "done"))
        return [new_method_return(message, "o", (JOB,)), done]


def _pid_of(handle: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pid:")).split()[1])


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(bus: Bus, leader: subprocess.Popen[bytes], handle: int) -> None:
    with contextlib.closing(bus):
        wanted = Wanted("r.scope", "user-1.slice", "reaper-1-x.scope", "Reaper's", leader.pid)
        start_scope(wanted, bus.address, handle, within_s=5)


def test_who_is_moved_is_named_by_a_pidfd(tmp_path: Path, leader: subprocess.Popen[bytes]) -> None:
    bus = Bus(tmp_path / "bus", frozenset())
    with contextlib.closing(_Handle(leader.pid)) as handle:
        ask(bus, leader, handle.fd)
    (asked,) = bus.asked
    assert (asked["PIDFDs"], "PIDs" in asked) == (leader.pid, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RuntimeMaxUSec", ("t", 600_000_000)),
        ("IPAddressDeny", ("a(iayu)", [(2, [0, 0, 0, 0], 0)])),
        ("DevicePolicy", ("s", "closed")),
        ("RestrictNetworkInterfaces", ("(bas)", (True, ["lo"]))),
    ],
)
def test_nobody_is_moved_out_of_what_systemd_holds_its_unit_to(
    name: str, value: tuple[str, Any], tmp_path: Path, leader: subprocess.Popen[bytes]
) -> None:
    bus = Bus(tmp_path / "bus", frozenset())
    bus.holds_to[name] = value
    with (
        contextlib.closing(_Handle(leader.pid)) as handle,
        pytest.raises(ScopeRefused, match=f"held to: {name}"),
    ):
        ask(bus, leader, handle.fd)
    assert bus.asked == []


def test_a_scope_is_stopped_with_whatever_the_one_before_was_stopped_with(
    tmp_path: Path, leader: subprocess.Popen[bytes]
) -> None:
    """The one before is that of an earlier session of the leader's, which is gone once nobody is in it."""
    bus = Bus(tmp_path / "bus", frozenset())
    with contextlib.closing(_Handle(leader.pid)) as handle:
        ask(bus, leader, handle.fd)
    assert bus.parts_of == ["reaper_2d1_2dx_2escope"]
    assert bus.asked[0]["PartOf"] == ["reaper-1-x.scope", "session-1.scope"]


def test_a_systemd_that_knows_no_pidfds_is_told_the_pid(
    tmp_path: Path, leader: subprocess.Popen[bytes]
) -> None:
    bus = Bus(tmp_path / "bus", frozenset({"PIDFDs"}))
    with contextlib.closing(_Handle(leader.pid)) as handle:
        ask(bus, leader, handle.fd)
    assert [one.get("PIDs") for one in bus.asked] == [None, [leader.pid]]


def test_nobody_is_moved_in_the_place_of_who_has_ended(
    tmp_path: Path, leader: subprocess.Popen[bytes]
) -> None:
    bus = Bus(tmp_path / "bus", frozenset())
    with contextlib.closing(_Handle(leader.pid)) as handle:
        leader.kill()
        select.select([handle.fd], [], [], 5)
        with pytest.raises(ScopeRefused, match="it has ended"):
            ask(bus, leader, handle.fd)
    assert bus.asked == []


class _Handle:
    """A pidfd."""

    def __init__(self, pid: int = 0, *, handle: int = -1) -> None:
        self.fd = os.pidfd_open(pid) if pid else handle

    def close(self) -> None:
        os.close(self.fd)
