"""The daemon's one loop: waits for leaders, workers, requests and signals, and for nothing while nothing is due."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import resource
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from agent import sockets
from reaperd import __version__, kinship, report, surroundings
from reaperd.adoption import Adoption
from reaperd.alerts import Alerts
from reaperd.census import Interrupted
from reaperd.claims import Claims
from reaperd.config import Config, ConfigError, render_config, without_effect
from reaperd.config_files import open_to_others_in_words, secrets_open_to_others
from reaperd.core import Core
from reaperd.gate_link import GateLink, Peer, Return
from reaperd.gpu import GpuMeter
from reaperd.hunt import Hunt
from reaperd.linux.alarm import Alarm
from reaperd.linux.exhaustion import is_exhaustion, reason_of
from reaperd.linux.procfs import ProcFS
from reaperd.linux.systemd import Notifier
from reaperd.observer import Observer
from reaperd.orphans import Orphans
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.server import Facts, Server
from reaperd.settings import kill_policy, scan_rules, uids_of
from reaperd.store import Store

if TYPE_CHECKING:
    from reaperd.metrics import Metrics

log = logging.getLogger(__name__)

_ORPHANS = "orphans that nobody registered"  # who is set aside where something about them raises
_PRUNE_EVERY_S = 6 * 3600.0
_PRUNE_PAUSE_S = 0.5  # where more is to be dropped than is at a time
_BACKLOG = 1024
_FEW_DESCRIPTORS = 1024
_BREATH_S = 0.02  # where something has run out
_BETWEEN_RELOADS_S = 0.2
_LONGEST_WAIT_S = 86400.0  # epoll_wait(2) counts milliseconds in an int


class StartError(Exception):
    """The daemon cannot start; the text says what, where and what would help. ``code`` is how it is to leave."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class Daemon:
    """One running daemon."""

    def __init__(
        self,
        *,
        mode: str,
        socket_path: str,
        state_dir: str,
        config_path: str,
        config: Config,
        read_config: Callable[[], Config],
    ) -> None:
        self._mode = mode
        self._socket_path = os.path.realpath(socket_path)
        self._state_dir = state_dir
        self._config_path = config_path
        self._read_config = read_config
        self._config = config
        self._signals: set[int] = set()
        self._reload_from_s = 0.0  # no earlier: a storm of SIGHUPs must not be all that we do
        self._metrics: Metrics | None = None  # where they are on
        self._is_ailing = False  # something ran out, and what that left half done is not mended yet
        self._notifier = Notifier(os.environ, os.getpid())

    def check_start(self) -> None:
        """Raise StartError where another daemon serves the socket: once in the background, nobody sees the exit code."""
        with _single_instance(self._socket_path, private=self._mode == "user"):
            pass

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; StartError when that cannot begin."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_single_instance(self._socket_path, private=self._mode == "user"))
            listener = stack.enter_context(_listening(self._socket_path, private=self._mode == "user"))
            self._poller = Poller()
            stack.enter_context(self._signals_caught())  # first: a SIGHUP right after READY must not end us
            self._begin(listener)
            stack.callback(self._end)
            self._serve()

    def _begin(self, listener: socket.socket) -> None:
        _make_directory(self._state_dir)
        _raise_descriptor_limit()
        proc = ProcFS()
        if (why := surroundings.why_unusable(proc)) is not None:
            raise StartError(f"cannot look after processes from here: {why}")
        if self._mode == "system":
            _check_rights(proc)
        self._lacks = tuple(surroundings.lacks(proc))
        alarm = Alarm()
        observer = Observer(proc, alarm)
        observer.marks.memory.keeps_helper = True
        self._untouchable = frozenset((proc.stat(os.getpid()).id, *kinship.ancestors(proc, os.getpid())))
        self._reaper = Reaper(proc, self._untouchable)
        self._store = Store(self._state_dir, observer.boot_id, observer.era)
        self._core = Core(
            observer,
            self._reaper,
            self._store,
            self._poller,
            policy=self._policy(),
            alarm=alarm,
            socket_path=self._socket_path,
        )
        self._adoption = Adoption(self._core, self._socket_path)
        self._link = GateLink(listener, self._socket_path, self._poller, self._on_request)
        self._orphans = Orphans(
            proc,
            Scan(proc, observer.marks, alarm),
            Reaper(proc, self._untouchable),
            self._poller,
            self._store,
            Claims(self._core.sessions, proc),
            self._core.sessions.record,
            GpuMeter(proc).read,
        )
        self._orphans.on_end = self._count_ended
        self._orphans.heed(scan_rules(self._config), self._core.policy, enabled=self._config.scan.enabled)
        self._alerts = Alerts(self._poller, self._config.alerts)
        self._core.sessions.listeners.append(self._alerts.note)
        self._server = Server(self._core, self._link, self._facts(), self._orphans, self._alerts)
        self._count_if_wanted()  # from the first event on
        self._tell_of_settings()
        log.info(
            "started version=%s pid=%d mode=%s socket=%s config=%s%s",
            __version__, os.getpid(), self._mode, self._socket_path, self._config_path,
            " dry_run" if self._config.kill.dry_run else "",
        )  # fmt: skip
        for lack in self._lacks:
            log.warning("limited here: %s; %s", lack.fact, lack.advice)
        self._core.sessions.record(report.event("started", version=__version__))
        self._adoption.recover()
        self._sweep_all()
        self._core.step()
        self._link.on_up = self._say_ready
        self._link.start(time.monotonic())
        self._serve_metrics()
        self._scan_due_s = time.monotonic() + self._config.scan.interval_s
        self._prune_due_s = 0.0
        self._watchdog_due_s = 0.0

    def _say_ready(self) -> None:
        """The first sweep is over and a gate without privileges listens: whoever waited for us can begin."""
        self._notifier.send(f"READY=1\nSTATUS={len(self._core.sessions.entries)} sessions")

    def _end(self) -> None:
        self._notifier.send("STOPPING=1")
        self._core.sessions.record(report.event("stopped"))
        self._server.take_turns()
        self._link.stop()
        if self._metrics is not None:
            self._metrics.companion.close(time.monotonic())
        self._server.close()
        self._core.close()
        self._alerts.close(time.monotonic())
        log.info("stopped sessions=%d", len(self._core.sessions.entries))

    def _serve(self) -> None:
        while not self._signals & {signal.SIGTERM, signal.SIGINT}:
            try:
                if self._is_ailing:
                    self._mend()
                    # What was due may have been taken off the list, and not been done.
                    self._core.sessions.touch()
                    self._is_ailing = False
                self._go_round()
            except (OSError, MemoryError) as error:
                if not is_exhaustion(error):
                    raise
                self._catch_breath(error)
        # A leader may have died in the middle of all that: there may be no next daemon to see it.
        self._poller.wait(0)
        self._core.step()

    def _go_round(self) -> None:
        self._core.sessions.save()
        self._poller.wait(self._timeout_s())
        if signal.SIGHUP in self._signals and self._reload_from_s <= time.monotonic():
            self._signals.discard(signal.SIGHUP)
            self._reload()
            self._reload_from_s = time.monotonic() + _BETWEEN_RELOADS_S
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))
        self._core.step()
        self._do_due(time.monotonic())
        self._see_to_orphans(self._orphans.step)
        # What strangers ask goes last, and never for long.
        self._link.exchange()
        if self._link.hopeless:
            raise StartError(f"cannot serve anybody: {self._link.hopeless}", code=2)
        self._server.take_turns()
        if self._metrics is not None:
            self._metrics.step(time.monotonic())
        self._alerts.exchange(time.monotonic())

    def _catch_breath(self, error: Exception) -> None:
        """Memory or descriptors have run out in the middle of anything: before we go on, that is to be mended."""
        before, self._is_ailing = self._is_ailing, True
        if not before:
            with contextlib.suppress(OSError, MemoryError):
                log.warning("cannot go on: %s, trying again until that is over", reason_of(error))
        time.sleep(_BREATH_S)

    def _mend(self) -> None:
        self._core.mend()
        self._link.mend(time.monotonic())

    def _on_request(self, peer: Peer, to: Return, message: dict[str, Any]) -> None:
        self._server.admit(peer, to, message)

    # -- time --------------------------------------------------------------------------------

    def _timeout_s(self) -> float | None:
        due = [self._scan_due_s, self._prune_due_s]
        due += [
            deadline
            for deadline in (
                self._core.next_deadline(),
                self._core.sessions.aside.until_s(_ORPHANS) or self._orphans.next_deadline(),
                self._server.next_deadline(),
                self._link.restart_at_s,
                self._alerts.next_deadline(),
                self._watchdog_due_s if self._notifier.watchdog_s is not None else None,
                self._reload_from_s if signal.SIGHUP in self._signals else None,
                None if self._metrics is None else self._metrics.next_deadline(),
            )
            if deadline is not None
        ]
        return min(max(0.0, min(due) - time.monotonic()), _LONGEST_WAIT_S)

    def _do_due(self, now_s: float) -> None:
        if self._link.restart_at_s is not None and self._link.restart_at_s <= now_s:
            self._link.start(now_s)
            # Who tried to register while there was no gate is known by its page.
            self._sweep_all()
            self._core.step()
        if self._scan_due_s <= now_s:
            self._scan(now_s)
        if self._prune_due_s <= now_s:
            self._prune(now_s)
        self._alerts.step(now_s)
        if self._notifier.watchdog_s is not None and self._watchdog_due_s <= now_s:
            self._watchdog_due_s = now_s + self._notifier.watchdog_s
            self._notifier.send(f"WATCHDOG=1\nSTATUS={len(self._core.sessions.entries)} sessions")

    def _prune(self, now_s: float) -> None:
        goes_on = self._store.prune(self._config.history.keep_s)
        self._prune_due_s = now_s + (_PRUNE_PAUSE_S if goes_on else _PRUNE_EVERY_S)

    def _scan(self, now_s: float) -> None:
        """Look at all sessions, and then at whom nobody registered."""
        self._scan_due_s = now_s + self._config.scan.interval_s
        listing = None
        try:
            listing = self._core.observer.proc.listing()
            # Who found no gate is known by its page, and may be somebody whom an earlier scan has seen without one.
            # Where one is found, what is below it may be younger than the listing.
            if self._adoption.sweep(None if self._link.may_have_missed() else listing):
                listing = self._core.observer.proc.listing()
            self._core.living.scan(listing)
            self._core.strays.look()
        except Interrupted:
            self._scan_due_s = now_s
        except (OSError, MemoryError) as error:
            if not is_exhaustion(error):
                raise
            log.warning("cannot look at the sessions: %s, trying again at the next scan", reason_of(error))
        self._mend()
        self._core.step()
        self._see_to_orphans(functools.partial(self._orphans.look, listing))
        if self._metrics is not None and self._scan_due_s > now_s:  # one that was interrupted is done again
            self._metrics.counters.scans.add(time.monotonic() - now_s)

    def _count_ended(self, hunt: Hunt) -> None:
        ended, freed = report.ended_by(hunt)
        self._store.add_total("reaped", ended)
        self._store.add_total("freed_bytes", freed.rss_bytes)

    def _see_to_orphans(self, work: Callable[[], None]) -> None:
        """Do what is due about orphans: after the sessions, and no mistake in it may keep the daemon from those."""
        aside = self._core.sessions.aside
        if aside.until_s(_ORPHANS) is None:
            with contextlib.suppress(Interrupted), aside.trying(_ORPHANS, "see to those"):
                work()

    def _sweep_all(self) -> None:
        try:
            self._adoption.sweep()
        except (OSError, MemoryError) as error:
            if not is_exhaustion(error):
                raise
            log.warning("cannot look for sessions: %s, going on with those that are new", reason_of(error))

    # -- signals and settings ----------------------------------------------------------------

    @contextlib.contextmanager
    def _signals_caught(self) -> Iterator[None]:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)

        def drain() -> None:
            with contextlib.suppress(BlockingIOError):
                reader.recv(4096)  # only to be woken: each is noted by its handler, which has run by now

        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # Where whoever started us has it ignored, no child can be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._note_signal(number))
        self._poller.watch(reader.fileno(), drain)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            reader.close()
            writer.close()

    def _note_signal(self, number: int) -> None:
        self._signals.add(number)
        if number == signal.SIGHUP:  # each one that follows would take time, and says nothing more
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))

    def _reload(self) -> None:
        self._notifier.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._read_config()
        except ConfigError as error:
            for fault in error.faults:
                log.error("kept the old settings: %s", fault)
            self._core.sessions.record(report.event("reload", faults=list(error.faults)))
        else:
            self._config = config
            set_log_level(config)
            self._core.policy = self._policy()
            self._orphans.heed(scan_rules(config), self._core.policy, enabled=config.scan.enabled)
            self._server.facts = self._facts()
            self._alerts.heed(config.alerts)
            self._scan_due_s = time.monotonic() + config.scan.interval_s
            self._prune_due_s = 0.0  # [history] keep may be shorter by now
            self._count_if_wanted()
            self._serve_metrics()
            log.info("reloaded config=%s", self._config_path)
            self._tell_of_settings()
            self._core.sessions.record(report.event("reload", faults=[]))
        self._notifier.send("READY=1")

    def _tell_of_settings(self) -> None:
        for name in without_effect(self._config):
            log.warning("%s has no effect yet", name)
        for name in secrets_open_to_others(self._config_path):
            log.warning("%s", open_to_others_in_words(name))

    # -- figures -----------------------------------------------------------------------------

    def _count_if_wanted(self) -> None:
        """Count what happens from now on, or no longer, as the settings say."""
        wanted = self._config.metrics.enabled
        if wanted and self._metrics is None:
            from reaperd.metrics import Metrics  # nobody pays for it where it is off

            self._metrics = Metrics(
                self._poller, self._core.sessions, self._read_state, lambda: (self._alerts.companion,)
            )
        elif not wanted and self._metrics is not None:
            self._metrics.stop(time.monotonic())
            self._metrics = None

    def _serve_metrics(self) -> None:
        """Have what is counted served as the settings say."""
        if self._metrics is not None:
            self._metrics.heed(self._config, time.monotonic())

    def _read_state(self) -> dict[str, Any]:
        """Return the figures that are as they are now."""
        states = Counter(map(report.state_of, self._core.sessions.entries.values()))
        return {
            **self._server.count()._asdict(),
            "sessions": {state: states[state] for state in report.STATES},
            "mode": self._mode,
            "dry_run": self._config.kill.dry_run,
            "gate_restarts": self._link.lives_lost,
        }

    def _policy(self) -> Policy:
        return kill_policy(self._config, self._untouchable, self._store.spared())

    def _facts(self) -> Facts:
        sessions = self._config.sessions
        return Facts(
            mode=self._mode,
            config_path=self._config_path,
            config_toml=render_config(self._config, show_secrets=False),
            max_workers=sessions.max_workers,
            admins=uids_of(self._config.access.admins, "[access] admins"),
            dry_run=self._config.kill.dry_run,
            isolate=sessions.isolate,
            lacks=self._lacks,
        )


def set_log_level(config: Config) -> None:
    """Log from the configured level on."""
    logging.getLogger().setLevel(config.daemon.log_level.upper())


# -- the socket -------------------------------------------------------------------------------


@contextlib.contextmanager
def _single_instance(path: str, *, private: bool) -> Iterator[None]:
    """Hold ``<socket>.lock``: a second ZeroMQ bind would silently take the socket away from the first."""
    directory = os.path.dirname(path)
    _make_directory(directory, private=private)
    if private and not sockets.is_private(directory):
        raise StartError(f"cannot use {directory}: it must be yours alone (your uid, mode 0700, no link)")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(f"{path}.lock", flags, 0o600)
    except OSError as error:
        raise StartError(f"cannot create {path}.lock: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise StartError(f"another reaperd (pid {holder or 'unknown'}) already serves {path}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _listening(path: str, *, private: bool) -> Iterator[socket.socket]:
    """Bind the socket; it stays the core's through all lives of the gate."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise StartError(f"cannot listen on {path}: something that is no socket is in its place")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        # Made private first: nobody may connect before the mode is right.
        previous = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(previous)
        os.chmod(path, 0o600 if private else 0o666)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        hint = " (a socket path has at most 107 bytes)" if len(os.fsencode(path)) > 107 else ""
        raise StartError(f"cannot listen on {path}: {error.strerror or error}{hint}") from None
    except StartError:
        listener.close()
        raise
    try:
        yield listener
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.close()


def _make_directory(path: str, *, private: bool = True) -> None:
    try:
        os.makedirs(path, mode=0o700 if private else 0o755, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise StartError(f"cannot create the directory {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise StartError(f"cannot use {path}: it is no directory")


def _check_rights(proc: ProcFS) -> None:
    """Raise StartError where a capability is withheld without which no gate could be let run."""
    vital = [right for right in surroundings.missing_rights(proc) if right.vital]
    if vital:
        names = " and ".join(right.name for right in vital)
        # 2: it does not get better by trying again.
        raise StartError(f"cannot start without {names}: {vital[0].without}", code=2)


def _raise_descriptor_limit() -> None:
    """Take as many descriptors as are allowed: a pidfd for each process that is to be ended."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < _FEW_DESCRIPTORS:
        log.warning("only %d files may be open (ulimit -n): few sessions can be watched at a time", hard)
