"""Keeps a process of its own running beside the core, for work that may be slow: fed with messages, and never waited for.

Knows nothing of what a companion does. One that takes no messages loses those that do not fit, and one that dies is
started anew after a pause. What it says is taken last in the loop and little at a time: it may have been taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reaperd.linux.child import Child, inherited, start_child
from reaperd.linux.exhaustion import reason_of
from reaperd.poller import Poller
from reaperd.words import plain

log = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 * 1024  # of messages that it has not taken; one may be larger where none waits
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GOOD_LIFE_S = 0.5, 60.0, 60.0
_TURN_BYTES = 16 * 1024  # that are taken from it in a turn of the loop
_MAX_LINE_BYTES = 16 * 1024
_MAX_TOLD_CHARS = 500
_TOLD_BURST, _TOLD_EVERY_S = 10.0, 6.0  # lines of its in our log
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

Message = Mapping[str, Any]


class Companion:
    """Runs ``command CHANNEL_FD CORE_PID`` from ``start`` until ``stop``; see ``companion_process`` for what it does first.

    Each of its lives is given what ``greeting`` returns first, as ``feed`` gives the rest: one line of JSON a message. It
    answers in the same way: ``{"log": LEVEL, "text": ...}`` is put into our log, ``{"hopeless": ...}`` is why it cannot do
    its work before something is changed, and is not started again; anything else is for ``on_message``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        poller: Poller,
        *,
        greeting: Callable[[], Iterable[Message]] = tuple,
        on_message: Callable[[dict[str, Any]], None] = lambda _: None,
        last_words_s: float = 0.0,
        environment: Iterable[str] = (),
    ) -> None:
        """``last_words_s`` is how long it may go on after it was told to stop; ``environment`` names variables it is given."""
        self.name = name
        self.lives_lost = 0
        self.dropped = 0  # messages
        self.hopeless = ""
        self._command = command
        self._poller = poller
        self._greeting = greeting
        self._on_message = on_message
        self._last_words_s = last_words_s
        self._variables = tuple(environment)
        self._wanted = False
        self._channel: socket.socket | None = None
        self._child: Child | None = None
        self._leaving: dict[Child, float] = {}  # until when each may go on
        self._waiting = bytearray()
        self._unread = b""
        self._is_ready = False
        self._started_at_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._restart_at_s: float | None = None
        self._told_left, self._told_at_s, self._told_lost = _TOLD_BURST, 0.0, 0

    # -- its life ----------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self, now_s: float) -> None:
        """Have it running from now on; nothing where it does."""
        if not self._wanted:
            self._wanted, self.hopeless, self._pause_s = True, "", _FIRST_PAUSE_S
            self._start(now_s)

    def stop(self, now_s: float) -> None:
        """Have it running no longer; it is told by a closed channel, ended after its last words, and not waited for."""
        self._wanted, self._restart_at_s = False, None
        self._leave(now_s + self._last_words_s)
        self.step(now_s)

    def close(self, now_s: float) -> None:
        """Stop it, and hear its last words: the daemon ends."""
        self._hear_out(now_s, now_s + self._last_words_s)
        self.stop(now_s)
        for child in self._leaving:
            self._poller.unwatch(child.fileno())
            if child.wait(self._last_words_s) is None:
                child.kill()
                child.wait(1.0)  # one in state D is left to init
        self._leaving.clear()

    def _hear_out(self, now_s: float, until_s: float) -> None:
        """Tell it to stop, and take what it says until it hangs up, or has had its time."""
        channel, self._wanted = self._channel, False
        if channel is None or not self._last_words_s:
            return
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_WR)
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        while self._channel is not None and now_s < until_s and poller.poll((until_s - now_s) * 1000):
            now_s = time.monotonic()
            self._is_ready = True
            self.exchange(now_s)

    def step(self, now_s: float) -> None:
        """Do what is due: start it after a pause, end who was given time for last words."""
        self._end_leaving(now_s)
        if self._restart_at_s is not None and self._restart_at_s <= now_s:
            self._start(now_s)
        elif self._wanted and self._channel is None and self._restart_at_s is None and not self.hopeless:
            self._restart_later(now_s)  # an error in the middle of something has left us without one

    def next_deadline(self) -> float | None:
        """Return the monotonic second at which ``step()`` has something to do, None when nothing is due."""
        due = [until_s for until_s in self._leaving.values() if until_s != float("inf")]
        return min((*due, *([] if self._restart_at_s is None else [self._restart_at_s])), default=None)

    def _start(self, now_s: float) -> None:
        self._restart_at_s = None
        with contextlib.ExitStack() as stack:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                stack.enter_context(theirs)
                stack.callback(ours.close)
                ours.setblocking(False)
                arguments = [*self._command, str(theirs.fileno()), str(os.getpid())]
                # Watched first: a child that cannot be watched would have to be ended at once.
                self._poller.watch(ours.fileno(), self._note_ready)
                stack.callback(self._poller.unwatch, ours.fileno())
                self._child = start_child(arguments, (theirs.fileno(),), inherited(*self._variables))
            except (OSError, MemoryError) as error:  # processes, descriptors or memory have run out
                log.warning("cannot start %s: %s, trying again", self.name, reason_of(error))
                self._restart_later(now_s)
                return
            stack.pop_all()
            theirs.close()
        self._channel, self._started_at_s = ours, now_s
        self._waiting.clear()
        self._unread, self._is_ready = b"", False
        for message in self._greeting():
            self.feed(message)

    def _leave(self, until_s: float) -> None:
        """Hang up, and let it go on for a while; whoever has ended is waited for when the kernel says so."""
        if self._channel is not None:
            self._poller.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None
        self._waiting.clear()
        child, self._child = self._child, None
        if child is not None:
            self._leaving[child] = until_s
            try:
                self._poller.watch(child.fileno(), lambda: self._left(child))
            except OSError:
                # Memory has run out: it is ended, and its zombie is collected by the next of them.
                child.kill()

    def _end_leaving(self, now_s: float) -> None:
        for child, until_s in self._leaving.items():
            if until_s <= now_s:
                child.kill()
                self._leaving[child] = float("inf")

    def _left(self, child: Child) -> None:
        self._poller.unwatch(child.fileno())
        child.wait(0)
        self._leaving.pop(child, None)

    def _lost(self, now_s: float) -> None:
        """It has ended, or hung up: the next is started after a pause that grows while they die young."""
        lived_s = now_s - self._started_at_s
        child = self._child
        self._leave(now_s)
        self._end_leaving(now_s)
        if self.hopeless or not self._wanted:
            return
        self.lives_lost += 1
        if lived_s > _GOOD_LIFE_S:
            self._pause_s = _FIRST_PAUSE_S / 2
        self._restart_later(now_s)
        log.warning(
            "%s ended pid=%s lived_s=%.1f, restarting in %.1f s",
            self.name, None if child is None else child.pid, lived_s, self._pause_s,
        )  # fmt: skip

    def _restart_later(self, now_s: float) -> None:
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._restart_at_s = now_s + self._pause_s

    # -- messages ----------------------------------------------------------------------------

    def feed(self, message: Message) -> bool:
        """Give it a message; False where that was dropped: it takes none, or there is none of it now."""
        if self._channel is None:
            self.dropped += self._wanted and not self.hopeless
            return False
        line = json.dumps(message).encode() + b"\n"
        if self._waiting and len(self._waiting) + len(line) > MAX_WAITING_BYTES:
            self.dropped += 1
            return False
        self._waiting += line
        self._flush()
        return True

    def _note_ready(self) -> None:
        self._is_ready = True

    def exchange(self, now_s: float) -> None:
        """Take a little of what it says, and give it what waits. Called by the loop after all that is due."""
        if not self._is_ready:
            return
        self._is_ready = False  # the poller says so again where something is left
        self._flush()
        channel = self._channel
        if channel is None:
            return
        try:
            data = channel.recv(_TURN_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(line, now_s)
        if not data or len(self._unread) > _MAX_LINE_BYTES:
            self._lost(now_s)

    def _flush(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            while self._waiting:
                del self._waiting[: channel.send(self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it died; reading notices
            self._waiting.clear()
        self._poller.also_writable(channel.fileno(), wanted=bool(self._waiting))

    def _take(self, line: bytes, now_s: float) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return  # no companion of ours says that
        if not isinstance(message, dict):
            return
        if isinstance(text := message.get("hopeless"), str):
            self.hopeless = plain(text[:_MAX_TOLD_CHARS])
            log.warning("%s: %s", self.name, self.hopeless)
        elif isinstance(text := message.get("text"), str) and isinstance(message.get("log"), str):
            self._tell(_LEVELS.get(message["log"], logging.WARNING), text[:_MAX_TOLD_CHARS], now_s)
        else:
            self._on_message(message)

    def _tell(self, level: int, text: str, now_s: float) -> None:
        """Put a line of its into our log, unless it has said very much."""
        earned = (now_s - self._told_at_s) / _TOLD_EVERY_S
        self._told_left, self._told_at_s = min(_TOLD_BURST, self._told_left + earned), now_s
        if self._told_left < 1:
            self._told_lost += 1
            return
        self._told_left -= 1
        if self._told_lost:
            log.warning("%s: %d lines of its were left out", self.name, self._told_lost)
            self._told_lost = 0
        log.log(level, "%s: %s", self.name, text)
