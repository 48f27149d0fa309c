"""What the service manager is told, through a real socket."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from reaperd.linux.systemd import Notifier


def manager(address: str) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.bind("\0" + address[1:] if address.startswith("@") else address)
    one.settimeout(5)
    return one


def test_a_message_arrives_as_one_datagram(tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as one:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        notifier.send("READY=1\nSTATUS=3 sessions")
        notifier.send("STOPPING=1")
        assert one.recv(4096) == b"READY=1\nSTATUS=3 sessions"
        assert one.recv(4096) == b"STOPPING=1"


def test_a_socket_in_the_abstract_namespace_is_reached_too() -> None:
    address = f"@reaper-test-{os.getpid()}"
    with manager(address) as one:
        Notifier({"NOTIFY_SOCKET": address}, 1).send("READY=1")
        assert one.recv(4096) == b"READY=1"


def test_text_that_is_no_utf8_is_sent_with_a_replacement(tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as one:
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1).send("STATUS=\udcff")
        assert one.recv(4096) == b"STATUS=?"


def test_without_a_manager_every_message_is_dropped(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for environment in (
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": str(tmp_path / "gone")},
        {"NOTIFY_SOCKET": "@"},
    ):
        Notifier(environment, 1).send("READY=1")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")):
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        for _ in range(2000):
            notifier.send("WATCHDOG=1")


def test_the_watchdog_is_fed_twice_in_its_time_and_only_where_it_is_ours() -> None:
    for environment, watchdog_s in (
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),  # our parent's, inherited
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_PID": "7"}, None),
        ({}, None),
    ):
        assert Notifier(environment, 7).watchdog_s == watchdog_s, environment


def test_where_descriptors_have_run_out_the_watchdog_is_fed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many")

    with manager(str(tmp_path / "notify")) as one:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        notifier.send("READY=1")
        monkeypatch.setattr(socket, "socket", fail)
        notifier.send("WATCHDOG=1")
        assert [one.recv(4096), one.recv(4096)] == [b"READY=1", b"WATCHDOG=1"]
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1).send(
            "READY=1"
        )  # and no error where none was made yet
