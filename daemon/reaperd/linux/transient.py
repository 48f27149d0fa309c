"""Scopes that systemd is asked for over D-Bus (org.freedesktop.systemd1(5), StartTransientUnit). For a helper: it blocks."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from reaperd.linux import pidfd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jeepney import DBusAddress
    from jeepney.io.blocking import DBusConnection

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
# What a systemd that knows no PIDFDs= answers (before 253).
_UNKNOWN_PROPERTY = (
    "org.freedesktop.DBus.Error.PropertyReadOnly",
    "org.freedesktop.DBus.Error.UnknownProperty",
)
_ANY_NUMBER = 2**64 - 1
# What systemd itself, or a program of its in the kernel, holds a unit to, and what it says where there is nothing
# (org.freedesktop.systemd1(5)).
_UNRESTRICTED = {
    "RuntimeMaxUSec": _ANY_NUMBER,
    "IPAddressAllow": [],
    "IPAddressDeny": [],
    "IPIngressFilterPath": [],
    "IPEgressFilterPath": [],
    "BPFProgram": [],
    "SocketBindAllow": [],
    "SocketBindDeny": [],
    "RestrictNetworkInterfaces": (False, []),
    "DevicePolicy": "auto",
    "DeviceAllow": [],
}


class ScopeRefused(Exception):
    """systemd made no scope; the text says why."""


class Wanted(NamedTuple):
    """A scope, and who is to be put into it."""

    name: str
    slice: str
    part_of: str
    description: str
    pid: int
    most_tasks: int | None = None  # processes and threads; None: any number


def is_running() -> bool:
    """Say whether systemd runs this system (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def user_bus(uid: int) -> str:
    """Return the address of a user's own bus (systemd's, pam_systemd(8))."""
    return os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path=/run/user/{uid}/bus"


def start_scope(wanted: Wanted, address: str, handle: int, *, within_s: float) -> None:
    """Have the systemd at the bus ``address`` make a scope, and return when it is there; ScopeRefused.

    ``handle`` is a pidfd of who is to be put into it. An older systemd takes a bare pid alone, which is another's once
    that one has ended and was waited for: nothing is asked of it then, but it may end a moment later.
    """
    # Loaded by the helper alone.
    from jeepney import DBusAddress, DBusErrorResponse, HeaderFields, MatchRule, message_bus, new_method_call
    from jeepney.io.blocking import Proxy, open_dbus_connection

    manager = DBusAddress(
        "/org/freedesktop/systemd1",
        bus_name="org.freedesktop.systemd1",
        interface="org.freedesktop.systemd1.Manager",
    )
    done = MatchRule(
        type="signal", interface=manager.interface, member="JobRemoved", path=manager.object_path
    )
    until_s = time.monotonic() + within_s
    try:
        with contextlib.closing(open_dbus_connection(address, enable_fds=True)) as bus:
            Proxy(message_bus, bus, timeout=within_s).AddMatch(done)
            with bus.filter(done, bufsize=64) as jobs:
                if left := restrictions_of(_properties_of(bus, wanted.part_of, within_s)):
                    raise ScopeRefused(f"it would leave what {wanted.part_of} is held to: {', '.join(left)}")
                part_of = [wanted.part_of, *_parts(bus, wanted.part_of, within_s)]
                for who in (("PIDFDs", ("ah", [handle])), ("PIDs", ("au", [wanted.pid]))):
                    if pidfd.has_exited(handle):
                        raise ScopeRefused("it has ended")
                    call = new_method_call(
                        manager,
                        "StartTransientUnit",
                        "ssa(sv)a(sa(sv))",
                        (wanted.name, "fail", [*_properties(wanted, part_of), who], []),
                    )
                    reply = bus.send_and_get_reply(call, timeout=within_s)
                    if reply.header.fields.get(HeaderFields.error_name) not in _UNKNOWN_PROPERTY:
                        break
                if reply.header.message_type.name == "error":
                    raise ScopeRefused(_reason(reply.body))
                by = reply.header.fields.get(HeaderFields.sender)
                while True:
                    told = bus.recv_until_filtered(jobs, timeout=max(0.001, until_s - time.monotonic()))
                    # Anybody on the bus can send such a signal.
                    if told.header.fields.get(HeaderFields.sender) == by and told.body[1] == reply.body[0]:
                        break
                if told.body[3] != "done":
                    raise ScopeRefused(f"its job ended as {told.body[3]!r:.40}")
    except DBusErrorResponse as error:
        raise ScopeRefused(_reason(error.data)) from None
    except TimeoutError:
        raise ScopeRefused(f"no answer within {within_s:g} s") from None
    except (OSError, EOFError) as error:
        raise ScopeRefused(f"no bus at {address}: {getattr(error, 'strerror', None) or error}") from None


def restrictions_of(properties: Mapping[str, object]) -> list[str]:
    """Return which properties of a unit hold its processes to something of which no file of a control group tells."""
    return sorted(name for name, none in _UNRESTRICTED.items() if properties.get(name, none) != none)


def _properties_of(bus: DBusConnection, unit: str, within_s: float) -> dict[str, object]:
    """Return the properties of a scope or a service; ScopeRefused."""
    from jeepney import Properties

    kind = "Scope" if unit.endswith(".scope") else "Service"
    reply = bus.send_and_get_reply(Properties(_address_of(unit, kind)).get_all(), timeout=within_s)
    if reply.header.message_type.name == "error":
        raise ScopeRefused(_reason(reply.body))
    return {name: value for name, (_, value) in reply.body[0].items()}


def _parts(bus: DBusConnection, unit: str, within_s: float) -> list[str]:
    """Return with which units ``unit`` is stopped itself: it may be gone before them, as the scope of an earlier session is."""
    from jeepney import Properties

    reply = bus.send_and_get_reply(Properties(_address_of(unit, "Unit")).get("PartOf"), timeout=within_s)
    if reply.header.message_type.name == "error":
        raise ScopeRefused(_reason(reply.body))
    return [str(one) for one in reply.body[0][1]]


def _address_of(unit: str, kind: str) -> DBusAddress:
    from jeepney import DBusAddress

    # sd_bus_path_encode(3)
    label = "".join(one if one.isascii() and one.isalnum() else f"_{ord(one):02x}" for one in unit)
    return DBusAddress(
        f"/org/freedesktop/systemd1/unit/{label}",
        bus_name="org.freedesktop.systemd1",
        interface=f"org.freedesktop.systemd1.{kind}",
    )


def _properties(wanted: Wanted, part_of: list[str]) -> list[tuple[str, tuple[str, object]]]:
    return [
        ("Description", ("s", wanted.description)),
        ("Slice", ("s", wanted.slice)),
        ("PartOf", ("as", part_of)),
        # What is in it is ours to freeze and to kill: systemd keeps out.
        ("Delegate", ("b", True)),
        ("CollectMode", ("s", "inactive-or-failed")),
        ("TasksMax", ("t", _ANY_NUMBER if wanted.most_tasks is None else wanted.most_tasks)),
    ]


def _reason(body: tuple[object, ...]) -> str:
    return str(body[0]) if body else "systemd gave no reason"
