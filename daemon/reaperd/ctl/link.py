"""Which daemon a command speaks to, and what its refusals mean for the exit code."""

from __future__ import annotations

import errno
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from agent import client, sockets, wire
from reaperd.ctl import FAILED, NO_DAEMON, NOT_ALLOWED, USAGE, CommandError
from reaperd.ctl.units import list_of, number_of
from reaperd.linux import transient

_CODES = {"not-allowed": NOT_ALLOWED, "bad-request": USAGE, "ambiguous-session": USAGE}
_POLL_S = 5  # how long one question about events stays open: a daemon that died is noticed no later
_RETRY_S = 0.5


class NoDaemonError(CommandError):
    """No daemon answered on any socket: why, and what would help."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}. {advice}", NO_DAEMON)
        self.reason = reason
        self.advice = advice

    def or_here(self) -> NoDaemonError:
        """Return it with the advice of a command that can do without a daemon."""
        return NoDaemonError(self.reason, f"{self.advice}, or say --local to do without one")


def sockets_of(options: Namespace) -> list[str]:
    """Return the sockets that the global options allow, in the order to try them."""
    if options.system:
        return [sockets.SYSTEM_SOCKET]
    if options.user:
        directory = sockets.user_runtime_directory()
        if os.path.lexists(directory) and not sockets.is_private(directory):
            raise NoDaemonError(
                f"will not speak to a daemon in {directory}: the directory is not yours alone",
                "Make it yours with mode 0700, or use --system",
            )
        return [os.path.realpath(sockets.user_socket())]
    return sockets.candidate_sockets(options.socket)


class Link:
    """One daemon: the first that answers among ``sockets``, and from then on no other."""

    def __init__(
        self,
        sockets: list[str],
        *,
        timeout_s: float,
        decode: Callable[[bytes], dict[str, Any]] = wire.decode,
    ) -> None:
        """``decode`` reads the replies, each of which whoever asked may change."""
        self._sockets = sockets
        self._decode = decode
        self._timeout_s = timeout_s
        self.socket = ""  # the one that answered

    @property
    def place(self) -> str:
        """The socket that is asked: that which answered, or the only one that may; "" where it may be one of several."""
        return self.socket or (self._sockets[0] if len(self._sockets) == 1 else "")

    @classmethod
    def of(cls, options: Namespace) -> Link:
        """Return the link that the global options ask for; nothing is opened yet."""
        return cls(sockets_of(options), timeout_s=options.timeout)

    def reading_with(self, decode: Callable[[bytes], dict[str, Any]]) -> Link:
        """Return a link to the same daemon whose replies are read with ``decode``."""
        same = Link(self._sockets, timeout_s=self._timeout_s, decode=decode)
        same.socket = self.socket
        return same

    def ask(self, op: str, *, wait_s: int = 0, within_s: float = math.inf, **fields: Any) -> dict[str, Any]:
        """Return the daemon's reply; raise NoDaemonError when none answers, CommandError when it refuses.

        ``wait_s`` is how long the daemon itself may hold the answer back, in whole seconds. Who has less time than the
        options allow for an answer says so with ``within_s``.
        """
        message = {"op": op, **fields, **({"wait_s": wait_s} if wait_s else {})}
        timeout_s = min(self._timeout_s + wait_s, within_s)
        reasons = []
        for path in [self.socket] if self.socket else self._sockets:
            try:
                reply = client.request(path, message, timeout_s=timeout_s, decode=self._decode)
            except client.Unreachable as error:
                reasons.append(str(error))
            except wire.WireError as error:
                raise refused(error) from None
            else:
                self.socket = path
                return reply
        raise _no_daemon(reasons, self.socket or self._sockets[0])


def refused(error: wire.WireError) -> CommandError:
    """Return a refusal as what ends the command."""
    return CommandError(str(error), _CODES.get(error.kind, FAILED))


def _no_daemon(reasons: list[str], socket: str) -> NoDaemonError:
    tried = "; ".join(dict.fromkeys(reasons))
    if "pyzmq cannot be imported" in tried:
        return NoDaemonError(f"cannot ask any daemon: {tried}", "Install it with `pip install pyzmq`")
    if os.strerror(errno.EACCES) in tried:
        return NoDaemonError(f"no daemon may be asked: {tried}", "Ask as the user whose daemon that is")
    return NoDaemonError(f"no daemon answers: {tried}", how_to_start(socket))


def how_to_start(socket: str) -> str:
    """Return the command that starts a daemon on ``socket``."""
    if socket == sockets.SYSTEM_SOCKET:
        if os.geteuid() == 0:
            by = "systemctl start reaperd" if transient.is_running() else "reaperd"
            return f"Start one with `{by}`"
        return "Start your own with `reaperd`, or have an administrator start the system's"
    if socket == os.path.realpath(sockets.user_socket()) and os.geteuid() != 0:
        return "Start your own with `reaperd`"
    return f"Start one there with `reaperd --socket {socket}`"


def so_far(link: Link, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events there are."""
    after = 0
    while found := list_of(reply := link.ask("events", after=after, **asked), "events"):
        yield from found
        before, after = after, next_after(reply, after)
        if after <= before:  # it counts anew, or is no daemon of ours: this would go on for ever
            return


def follow(
    link: Link, *, after: int = 0, on_lost: Callable[[str], None], until: float | None = None, **fields: Any
) -> Iterator[dict[str, Any]]:
    """Yield each event newer than ``after`` as it comes, through restarts of the daemon, until the monotonic ``until``.

    ``on_lost`` is given a sentence when the daemon stops answering and one when it is back.
    """
    lost = False
    while until is None or time.monotonic() < until:
        wait_s = _POLL_S if until is None else min(_POLL_S, math.ceil(until - time.monotonic()))
        try:
            reply = link.ask("events", after=after, wait_s=wait_s, **fields)
        except NoDaemonError as error:
            if not link.socket:
                raise  # it never was there
            if not lost:
                on_lost(f"{error.reason}; waiting for it to come back")
            lost = True
            time.sleep(_RETRY_S)
            continue
        if lost:
            on_lost("the daemon is back")
            lost = False
        yield from list_of(reply, "events")
        after = next_after(reply, after)


def next_after(reply: dict[str, Any], after: int) -> int:
    """Return the number after which to ask next: a long history comes in several replies."""
    events = list_of(reply, "events")
    last = number_of(events[-1] if events else reply, "seq" if events else "last")
    if last is None:
        return after
    return 0 if last < after else int(last)  # less: a daemon that lost its history counts anew
