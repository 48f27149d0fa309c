"""What the core does with a request that passed the gate: each gets an answer, and never that the daemon made a mistake."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from fuzzing.messages import MESSAGES, WORDS
from fuzzing.target import Check, Target

from agent import wire
from reaperd.alerts import Alerts
from reaperd.claims import Claims
from reaperd.config import AlertsConfig
from reaperd.core import Core
from reaperd.gate_link import Peer, Return
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import ProcFS
from reaperd.observer import Observer
from reaperd.orphans import Orphans
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.server import Facts, Server
from reaperd.store import Store

# Nobody's: whatever is asked for, there is no process that such a peer may have signalled.
_STRANGER = 3_999_999_999
_MOST_SESSIONS = 50


class _Link:
    """Keeps the last reply."""

    lives_lost = 0

    def __init__(self) -> None:
        self.last = b""

    def reply(self, to: Return, reply: bytes) -> None:
        self.last = reply


class World:
    """A server without a gate, asked by a stranger who has this process's pid."""

    def __init__(self, directory: str) -> None:
        proc, alarm = ProcFS(), Alarm()
        observer = Observer(proc, alarm)
        self._store = Store(directory, observer.boot_id)
        reaper = Reaper(proc, frozenset())
        self.core = Core(observer, reaper, self._store, Poller(), Policy(max_per_uid=_MOST_SESSIONS), alarm)
        self._link = _Link()
        self._orphans = Orphans(
            proc, Scan(proc, observer.marks, alarm), reaper, Poller(), self._store,
            Claims(self.core.sessions, proc), self.core.sessions.record,
        )  # fmt: skip
        # A dry run: the leader of whatever is registered here is this process.
        facts = Facts("user", "", "[kill]\n", 4, frozenset(), dry_run=True)
        alerts = Alerts(Poller(), AlertsConfig())
        self.server = Server(self.core, self._link, facts, self._orphans, alerts)  # type: ignore[arg-type]
        self.ticks = proc.stat(os.getpid()).id.start_ticks

    def ask(self, message: dict[str, Any]) -> bytes:
        """Return the reply; empty where the peer is to wait for an event."""
        self._link.last = b""
        ours, theirs = socket.socketpair()
        with ours:
            # It is not about whose turn it is: each request finds its user's account full.
            self.server._turns._accounts.clear()
            self.server.admit(
                Peer(_STRANGER, _STRANGER, os.getpid(), theirs), Return(1, b"", _STRANGER), message
            )
            self.server.take_turns()
        return self._link.last

    def close(self) -> None:
        self.server.close()
        self.core.close()


@contextlib.contextmanager
def opened_world() -> Iterator[World]:
    """Open a server that a stranger asks."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="reaper-fuzz-") as directory:
        world = World(directory)
        try:
            yield world
        finally:
            world.close()
            logging.disable(before)


@contextlib.contextmanager
def opened() -> Iterator[Check]:
    """Every request that the gate lets through gets an answer that is none of a mistake."""
    with opened_world() as world:
        me = wire.format_session_id(os.getpid(), world.ticks, 0, 0)[:-18].encode()

        def check(data: bytes) -> None:
            try:
                message = wire.decode(data.replace(b"$ME", me).replace(b"$TICKS", b"%d" % world.ticks))
            except wire.WireError:
                return
            reply = world.ask(message)
            if not reply:
                assert message.get("op") == "events"
                assert message["wait_s"] > 0
                return
            told = wire.decode(reply)
            assert type(told["ok"]) is bool
            assert told.get("kind") != "internal", f"{message}: {told}"

        yield check


def _seeds() -> list[bytes]:
    ours = (
        b'{"v":1,"op":"register","session":"$ME-00000001-00000002","start_ticks":$TICKS,"name":"x"}',
        b'{"v":1,"op":"unregister","session":"$ME-00000001-00000002"}',
        b'{"v":1,"op":"stop","session":"$ME-00000001-00000002"}',
        b'{"v":1,"op":"events","after":0,"wait_s":1,"since":"0001-01-01T00:00:00+14:00"}',
        b'{"v":1,"op":"events","owner":0,"kinds":["reaped","killed"]}',
    )
    return [*(one for one in MESSAGES if b'"op"' in one), *ours]


TARGETS = (
    Target("request", opened, _seeds, (*WORDS, b"$ME-00000001-00000002", b"$TICKS", b'"wait_s":', b'"temp_dirs":["/'), cost=40),
)  # fmt: skip
