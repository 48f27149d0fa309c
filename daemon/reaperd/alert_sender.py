"""The alerts' companion: takes events from the core, groups them for each target, and has helpers send them.

Every attempt to send is a helper of its own, that is given a time, and ends: a target that hangs holds up nobody else, and
what a library leaves behind in memory goes with it. URLs come through the channel, and are shown to nobody.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Container, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from reaperd import alert_delivery, companion_process
from reaperd.alert_groups import Group, Outbox, Outcome
from reaperd.alert_trial import Job, Trial
from reaperd.alert_words import body_of, gravity_of, line_of, title_of
from reaperd.config_values import hidden_url
from reaperd.linux import prctl
from reaperd.linux.helper import Helper, end_children, finish_helper, start_helper
from reaperd.words import duration

AT_ONCE = 4  # helpers
SEND_S, COMMAND_S, TEST_S = 30.0, 30.0, 20.0
TRIAL_S = 43.0  # until what is known of a test is told: the core waits a little longer
_END_COMMAND_S = 2.0  # that a helper has for it, beyond what the command has
LAST_WORDS_S = 2.0
_AGAIN_S = 1.0  # until a process is started again where none could be
_MAX_EVENTS, _MAX_EVENT_CHARS = 1000, 16 * 1024 * 1024  # that wait for the command
_MEMORY_BYTES = 512 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_NO_ANSWER = "it did not answer within {:g} s"


class Settings(NamedTuple):
    """What the core tells of ``[alerts]``."""

    urls: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    group_within_s: float = 60.0
    host: str = ""


class _Running(NamedTuple):
    helper: Helper
    until_s: float
    job: Job


class Target:
    """One URL, and what waits for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.number = 0  # its place among the settings
        self.outbox = Outbox(Settings().group_within_s)
        self.is_hopeless = False  # as far as is known, and was told

    @property
    def shown(self) -> str:
        """What people are told it is."""
        return f"{hidden_url(self.url)} (entry {self.number} of urls)"


class Sender:
    """Everything that is to be sent, and the helpers at it.

    ``say`` tells the core something; ``end_strays`` is to end what helpers have left behind: every child but the pids it is
    given.
    """

    def __init__(
        self,
        say: Callable[[dict[str, Any]], None],
        end_strays: Callable[[Container[int]], None] = lambda _: None,
    ) -> None:
        self._say = say
        self._end_strays = end_strays
        self._settings = Settings()
        self._targets: list[Target] = []
        self._events: collections.deque[str] = collections.deque()  # for the command, as JSON
        self._event_chars = 0
        self._not_run = 0  # events that the command was not given
        self._command_again_at_s: float | None = None  # no process could be started for it
        self._jobs: collections.deque[Job] = collections.deque()  # beside those that the targets have
        self._trials: list[Trial] = []
        self._running: dict[int, _Running] = {}  # by pidfd
        self._last: list[Target] | None = None  # who is to be sent to once more, as the daemon ends

    # -- what the core says ------------------------------------------------------------------

    def take(self, message: Mapping[str, Any], now_s: float) -> None:
        """Take in a message of the core's."""
        if "settings" in message:
            given = message["settings"]
            self._heed(
                Settings(
                    tuple(given["urls"]), tuple(given["command"]), given["group_within_s"], given["host"]
                )
            )
        elif "event" in message:
            self._note(message["event"], now_s)
        elif "lost" in message:
            for kind, count in message["lost"].items():
                self._note_group(Group(kind, count, message["at"], message["at"], ()), now_s)
                self._not_run += count if self._settings.command else 0
        elif "test" in message:
            self._test(message["test"], now_s)

    def _heed(self, settings: Settings) -> None:
        """Go by other settings: what waits for a URL that stays goes on waiting."""
        kept = {target.url: target for target in self._targets}
        self._targets = []
        for number, url in enumerate(settings.urls, 1):
            if url in settings.urls[: number - 1]:
                continue
            target = kept.get(url) or Target(url)
            target.number, target.outbox.window_s = number, settings.group_within_s
            self._targets.append(target)
            if url not in kept:
                work = functools.partial(alert_delivery.check, url)
                self._jobs.append(Job(work, SEND_S, functools.partial(self._checked, target)))
        self._settings = settings
        if self._events and not settings.command:
            self._log(
                "warning", f"not given to a command, as there is none any more: {_events(len(self._events))}"
            )
            self._events.clear()
            self._event_chars = 0

    def _note(self, event: Mapping[str, Any], now_s: float) -> None:
        kind, at = str(event.get("kind")), str(event.get("at"))
        if self._targets:
            self._note_group(Group(kind, 1, at, at, (line_of(event),)), now_s)
        if self._settings.command:
            text = json.dumps({"host": self._settings.host, **event})
            if len(self._events) < _MAX_EVENTS and self._event_chars + len(text) <= _MAX_EVENT_CHARS:
                self._events.append(text)
                self._event_chars += len(text)
            else:
                self._not_run += 1

    def _note_group(self, group: Group, now_s: float) -> None:
        for target in self._targets:
            target.outbox.note(group, now_s)

    # -- helpers -----------------------------------------------------------------------------

    def descriptors(self) -> list[int]:
        """Return what becomes readable when a helper is done."""
        return list(self._running)

    def next_deadline(self) -> float | None:
        """Return when there is something to do."""
        due = [running.until_s for running in self._running.values()]
        due += [trial.until_s for trial in self._trials]
        if self._events and self._command_again_at_s is not None:
            due.append(self._command_again_at_s)
        if len(self._running) < AT_ONCE and self._last is None:
            due += [at_s for target in self._targets if (at_s := target.outbox.next_deadline()) is not None]
        return min(due, default=None)

    def step(self, now_s: float) -> None:
        """See to the helpers that are done, or have taken too long, and start those that are due."""
        ended = self._ended(now_s)
        for descriptor in ended:
            running = self._running.pop(descriptor)
            late = running.until_s <= now_s
            running.job.done(
                *_what_came_of(finish_helper(running.helper), running.job.most_s if late else None)
            )
        if ended:
            self._end_strays(self._helpers())
        for trial in self._trials[:]:
            if trial.until_s <= now_s:
                self._end_trial(trial)
        self._start_due(now_s)
        if self._not_run and not self._events and not self._is_at_command():
            count, self._not_run = self._not_run, 0
            self._log(
                "warning", f"the command was not run for {_events(count)}: there were too many at a time"
            )

    def _helpers(self) -> set[int]:
        return {running.helper.pid for running in self._running.values()}

    def _ended(self, now_s: float) -> list[int]:
        poller = select.poll()
        for descriptor in self._running:
            poller.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(0)}
        return [one for one, running in self._running.items() if one in ready or running.until_s <= now_s]

    def _start_due(self, now_s: float) -> None:
        if self._events and not self._is_at_command() and (self._command_again_at_s or 0.0) <= now_s:
            self._start_command(now_s)
        self._start_sending(now_s)
        # After what happened: whether something can be sent matters less.
        while self._jobs and len(self._running) < AT_ONCE:
            self._start(self._jobs.popleft(), now_s)
        for trial in self._trials:
            while len(self._running) < AT_ONCE and (job := trial.take(now_s)):
                self._start(job, now_s)

    def _start_command(self, now_s: float) -> None:
        event = self._events[0]
        work = functools.partial(alert_delivery.run_command, self._settings.command, event, COMMAND_S)
        try:
            self._begin(Job(work, COMMAND_S + _END_COMMAND_S, self._command_done), now_s)
        except OSError as error:  # processes or descriptors have run out
            if self._command_again_at_s is None:
                self._log("warning", f"the command for an event waits: {_not_started(error)}; trying again")
            self._command_again_at_s = now_s + _AGAIN_S
            return
        self._command_again_at_s = None
        self._events.popleft()
        self._event_chars -= len(event)

    def _start_sending(self, now_s: float) -> None:
        for target in self._by_turn() if self._last is None else list(self._last):
            if len(self._running) >= AT_ONCE:
                break
            if self._last is not None:
                # What waits behind that has its turn once it is known what came of it.
                if target.outbox.is_sending:
                    continue
                self._last.remove(target)
            if message := target.outbox.take(now_s, at_once=self._last is not None):
                gravity = gravity_of(group.kind for group in message)
                text = title_of(message, self._settings.host), body_of(message)
                work = functools.partial(alert_delivery.send, target.url, *text, gravity)
                self._start(Job(work, SEND_S, functools.partial(self._sent, target)), now_s)

    def _by_turn(self) -> list[Target]:
        """Return who has something to be sent, who has waited longest first: those that hang must not keep taking all helpers."""
        due = [(target.outbox.next_deadline(), target) for target in self._targets]
        return [
            target
            for _, target in sorted((one for one in due if one[0] is not None), key=lambda one: one[0] or 0.0)
        ]

    def _is_at_command(self) -> bool:
        return any(running.job.done == self._command_done for running in self._running.values())

    def _start(self, job: Job, now_s: float) -> None:
        try:
            self._begin(job, now_s)
        except OSError as error:  # processes or descriptors have run out
            job.done(Outcome.FAILED, _not_started(error))

    def _begin(self, job: Job, now_s: float) -> None:
        helper = start_helper(job.work)
        self._running[helper.pidfd] = _Running(helper, now_s + job.most_s, job)

    def end(self) -> None:
        """The daemon ends: from now on, what waits is sent at once, and tried once."""
        self._last = [target for target in self._targets if target.outbox.count()]
        self._jobs.clear()
        self._trials.clear()

    def is_done(self) -> bool:
        """Say whether all has been tried that there was to try."""
        return not (self._running or self._events or self._last)

    def close(self) -> None:
        """End the helpers, and tell what is lost with us."""
        not_done = len(self._events) + self._not_run + self._is_at_command()
        for running in self._running.values():
            finish_helper(running.helper)
        self._end_strays(())
        for target in self._targets:
            if count := target.outbox.count():
                self._log("warning", f"not sent to {target.shown}, as the daemon ends: {_events(count)}")
        if not_done:
            self._log(
                "warning",
                f"not given to the command, or not to its end, as the daemon ends: {_events(not_done)}",
            )

    # -- what came of it ---------------------------------------------------------------------

    def _checked(self, target: Target, outcome: Outcome, reason: str) -> None:
        if outcome is Outcome.HOPELESS and not target.is_hopeless and target in self._targets:
            target.is_hopeless = True
            self._log("error", f"nothing can be sent to {target.shown}: {reason}")

    def _sent(self, target: Target, outcome: Outcome, reason: str) -> None:
        now_s, failing_since_s = time.monotonic(), target.outbox.failing_since_s
        given_up = target.outbox.done(outcome, now_s)
        was_hopeless, target.is_hopeless = target.is_hopeless, outcome is Outcome.HOPELESS
        if target.is_hopeless and was_hopeless:
            return
        if given_up:
            self._log("error", f"gave up sending {_events(given_up)} to {target.shown}: {reason}")
        elif outcome is not Outcome.SENT and failing_since_s is None:
            self._log("warning", f"cannot send to {target.shown}: {reason}; trying again")
        elif outcome is Outcome.SENT and failing_since_s is not None:
            self._log(
                "info", f"sending to {target.shown} works again, after {duration(now_s - failing_since_s)}"
            )

    def _command_done(self, outcome: Outcome, reason: str) -> None:
        if outcome is not Outcome.SENT:
            self._log("warning", f"the command for an event failed: {reason}")

    def _log(self, level: str, text: str) -> None:
        self._say({"log": level, "text": text})

    # -- a test ------------------------------------------------------------------------------

    def _test(self, number: int, now_s: float) -> None:
        """Send a message to every target, and answer once it is known what came of each, or with what is known in time."""
        host = self._settings.host
        title, body = (
            f"Reaper on {host}: a test",
            "Somebody ran `reaperctl alerts test`. Alerts reach this place.",
        )
        trial = Trial(number, now_s + TRIAL_S, self._end_trial)
        for target in self._targets:
            trial.add(
                target.shown, functools.partial(alert_delivery.send, target.url, title, body, "info"), TEST_S
            )
        if command := self._settings.command:
            event = json.dumps({"host": host, "kind": "test", "message": body})
            run = functools.partial(alert_delivery.run_command, command, event, TEST_S)
            trial.add(command[0], run, TEST_S + _END_COMMAND_S)
        self._trials.append(trial)
        if not trial.jobs:
            self._end_trial(trial)

    def _end_trial(self, trial: Trial) -> None:
        if trial in self._trials:
            self._trials.remove(trial)
            self._say({"tested": trial.number, "results": trial.results(TRIAL_S)})


def _events(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"


def _not_started(error: OSError) -> str:
    return f"no process could be started for it: {(error.strerror or '').lower()}"


def _what_came_of(result: Any, late_after_s: float | None) -> tuple[Outcome, str]:
    """Return what a helper has answered, as far as it has."""
    if isinstance(result, list) and len(result) == 2:
        return Outcome(result[0]), str(result[1])
    if late_after_s is not None:
        return Outcome.FAILED, _NO_ANSWER.format(late_after_s)
    return Outcome.FAILED, "whoever was to send it ended before it was done"


def serve(channel: socket.socket, sender: Sender, last_words_s: float = LAST_WORDS_S) -> None:
    """Do what the core says until it hangs up, then send at once what waits, as far as there is time."""
    unread = b""
    while True:
        _wait(sender, time.monotonic(), channel.fileno())
        now_s = time.monotonic()
        try:
            data = channel.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sender.step(now_s)
            continue
        except OSError:
            break
        if not data:
            break
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            sender.take(json.loads(line), now_s)
        sender.step(now_s)
    sender.end()
    until_s = time.monotonic() + last_words_s
    sender.step(time.monotonic())
    while not sender.is_done() and time.monotonic() < until_s:
        _wait(sender, time.monotonic(), until_s=until_s)
        sender.step(time.monotonic())
    sender.close()


def _wait(sender: Sender, now_s: float, *descriptors: int, until_s: float | None = None) -> None:
    poller = select.poll()
    for descriptor in (*descriptors, *sender.descriptors()):
        poller.register(descriptor, select.POLLIN)
    due = [at_s for at_s in (sender.next_deadline(), until_s) if at_s is not None]
    poller.poll(max(0.0, min(due) - now_s) * 1000 + 1 if due else None)


def main() -> None:
    """Run the companion: ``python -m reaperd.alert_sender CHANNEL_FD CORE_PID``."""
    uses_apprise = companion_process.peek().get("settings", {}).get("urls")
    if uses_apprise:
        alert_delivery.load()
    # As many as there must be, and no RLIMIT_NPROC: that counts all that the user runs, who has a daemon of his own.
    channel = companion_process.begin("reaperd-alerts", memory_bytes=_MEMORY_BYTES, tasks=None)
    say = functools.partial(companion_process.say, channel)
    sys.excepthook = functools.partial(_tell_uncaught, say)
    if uses_apprise:
        alert_delivery.find_certificates()
    with contextlib.suppress(OSError):
        os.nice(5)  # what it does is never urgent; systemd's filter may not allow it
    prctl.adopt_orphans()
    serve(channel, Sender(say, end_children))


def _tell_uncaught(
    say: Callable[[dict[str, Any]], None],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Say where it failed, and not with what: that may hold a URL."""
    del error
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "nowhere"
    say({"log": "error", "text": f"failed: {kind.__name__} at {where}"})


if __name__ == "__main__":
    main()
