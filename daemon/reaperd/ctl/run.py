"""``reaperctl run``: a command as the leader of a session, started again where it fails, with nothing left in between."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from agent import limits, session, wire
from agent.family import Remains
from agent.status import FAILED as RUN_FAILED
from agent.status import StatusFile, end_for
from reaperd import report
from reaperd.ctl import FAILED, CommandError, events, render, restarts
from reaperd.ctl.link import Link, next_after, sockets_of
from reaperd.ctl.restarts import Ended, Rules
from reaperd.ctl.terminal import tell
from reaperd.ctl.units import list_of, plural, text_of
from reaperd.linux import oom, prctl
from reaperd.linux.page import open_page, read_page
from reaperd.linux.procfs import ProcFS
from reaperd.pages import Page
from reaperd.words import duration

CANNOT_RUN, NOT_FOUND = 126, 127  # as env(1) and every shell have it
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2)
_SI_KERNEL = 0x80  # siginfo.h: the terminal's, which has sent it to the whole foreground process group
_LOOK_S = 1  # from one look for signals to the next while the daemon cleans up
_CLEAN_UP_WITHIN_S = 60.0
_LONGEST_TIMEOUT_S = 60.0  # to register: the command waits for it
_GRACE_S, _EXIT_GRACE_S = 5.0, 10.0  # as [kill] grace and exit_grace
_LONGEST_NOTE = 65536


def run(options: Namespace) -> int:
    """Run a command until it ends well or has failed too often, and end as it did."""
    command = options.command_line[1:] if options.command_line[:1] == ["--"] else options.command_line
    if not command:
        raise CommandError("run: which command? `reaperctl run [OPTIONS] -- COMMAND ...`", 2)
    _check(command[0])
    if options.user or options.system or options.socket:
        os.environ["REAPER_SOCKET"] = sockets_of(options)[0]  # for the command's own register() as well
    return _end_like(_Run(command, options).until_over())


def _check(program: str) -> None:
    if shutil.which(program):
        return
    found = os.path.exists(program) if os.sep in program else shutil.which(program, os.F_OK)
    if os.path.isdir(program):
        raise CommandError(f"{program}: is a folder", CANNOT_RUN)
    if found:
        raise CommandError(f"{program}: may not be executed (chmod +x, or `python {program}`)", CANNOT_RUN)
    raise CommandError(f"there is no command {program!r}", NOT_FOUND)


def name_of(command: Sequence[str]) -> str:
    """Return what people are to see: the script's name, or the module's, where the command is a Python."""
    return _name_of(command)[: wire.MAX_NAME_CHARS]


def _name_of(command: Sequence[str]) -> str:
    program = os.path.basename(command[0])
    if program.startswith(("python", "pypy")):
        for at, word in enumerate(command[1:], 1):
            if word == "-m" and at + 1 < len(command):
                return command[at + 1]
            if word == "-c":
                break
            if not word.startswith("-") and command[at - 1] not in ("-W", "-X"):
                return os.path.basename(word) or program
    return program


class _StatusFileError(Exception):
    """The status file cannot be written; the text says why."""


class _Started(NamedTuple):
    """What the child has told of itself before it became the command."""

    pid: int
    page: int  # a descriptor of ours of its session page; -1: it has none
    session: str
    socket: str | None  # the daemon that watches it
    max_workers: int | None  # that daemon's limit
    began_s: float
    oom_kills: int


class _Run:
    """The attempts of one command."""

    def __init__(self, command: list[str], options: Namespace) -> None:
        self._command = command
        self._name: str = options.name or name_of(command)
        self._rules = Rules(options.restart, options.backoff)
        self._sockets = sockets_of(options)
        self._isolate: bool = options.isolate
        self._status_file = os.path.abspath(options.status_file) if options.status_file else None
        self._timeout_s: float = min(options.timeout, _LONGEST_TIMEOUT_S)
        self._ended: list[Ended] = []
        self._attempt = 0
        self._asked: int | None = None  # the signal by which somebody asked us for an end
        # What we let the agent, and joblib, have.
        self._workers = self._cpus = options.max_workers
        # One that is ignored (nohup) would be queued for us all the same.
        self._signals = [one for one in (*_ENDING, *_OTHERS) if signal.getsignal(one) != signal.SIG_IGN]
        self._apart = False  # the command has a process group of its own
        self._oom_counter = oom.counter_file(ProcFS().cgroup(os.getpid()))

    def until_over(self) -> Ended:
        """Run the command until nothing more is to be done; return how that came to its end."""
        prctl.adopt_orphans()
        # Taken one by one from here on; the command gets back what we were given.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*self._signals, signal.SIGCHLD))
        while True:
            started = self._start()
            self._wait_for(started.pid)
            ended = self._clean_up_after(started)
            self._ended.append(ended)
            following = restarts.decide(self._rules, self._ended)
            if not following.again:
                if following.reason:
                    self._tell(f"{_how(ended)}; {following.reason}")
                return ended
            limit = self._halve(started) if ended.out_of_memory else ""
            self._tell(f"{_how(ended)}; starting again in {duration(following.after_s)}{limit}")
            if self._pause(following.after_s):
                # The number of a signal alone is the status of who died of it.
                return ended._replace(status=self._asked or ended.status)

    # -- one attempt -------------------------------------------------------------------------

    def _start(self) -> _Started:
        self._attempt += 1
        began_s, kills = time.monotonic(), self._count_oom_kills()
        reading, writing = os.pipe()
        us = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._become_the_command(writing, us)
        os.close(writing)
        note: dict[str, Any] = {}
        with open(reading, encoding="utf-8") as pipe:
            for line in pipe.read(_LONGEST_NOTE).splitlines():
                note.update(json.loads(line))
        if "error" in note:
            os.waitpid(pid, 0)
            raise CommandError(f"{self._command[0]}: {note['error']}", note["code"])
        if not note.get("session") and self._attempt == 1:
            tell("this is no session (REAPER_DISABLE=1?): what the command leaves behind is not ended")
        elif note.get("unwatched") and self._attempt == 1:
            tell(
                f"no Reaper daemon watches this session: {note['unwatched']}; "
                "what the command leaves behind is ended by `reaperctl run` itself"
            )
        elif note.get("not_isolated") and self._attempt == 1:
            tell(f"it has no control group of its own, its marks must do: {note['not_isolated']}")
        return _Started(
            pid,
            _open_page(pid, note.get("page", -1)),
            note.get("session", ""),
            note.get("socket"),
            note.get("max_workers"),
            began_s,
            kills,
        )

    def _become_the_command(self, note: int, supervisor: int) -> NoReturn:
        """Register in the child, and be the command from then on; what goes wrong is told through the pipe."""
        status_file: StatusFile | None = None
        try:
            prctl.die_with_parent(signal.SIGTERM)
            if os.getppid() != supervisor:
                os._exit(128 + signal.SIGTERM)
            for variable, limit in (
                (limits.MAX_WORKERS_VARIABLE, self._workers),
                ("LOKY_MAX_CPU_COUNT", self._cpus),
            ):
                if limit is not None:
                    os.environ[variable] = str(limit)
            attempt = (self._attempt, self._rules.restarts + 1)
            warnings.simplefilter("ignore")  # the parent tells, and the command is another program
            ours = session.register(
                self._name,
                timeout=self._timeout_s,
                isolate=self._isolate,
                attempt=attempt,
                for_exec=True,
            )
            if self._status_file is not None:
                status_file = self._begin_status_file(ours)
            self._note(
                note,
                session=ours.id,
                page=session.page_descriptor(),
                socket=ours.socket,
                max_workers=ours.max_workers,
                unwatched=ours.unwatched,
                not_isolated=ours.not_isolated,
            )
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the command would
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            os.execvp(self._command[0], self._command)  # noqa: S606 - it is what was asked for
        except _StatusFileError as error:
            self._note(note, error=str(error), code=FAILED)
            session.unregister()
        except BaseException as error:  # noqa: BLE001 - the parent's to tell, in a sentence
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
            why = getattr(error, "strerror", None) or repr(error)
            if status_file is not None:  # it says that the command runs
                with contextlib.suppress(OSError):
                    status_file.end(RUN_FAILED, error=f"{self._command[0]}: {why}")
            self._note(note, error=why, code=code)
            session.unregister()
        finally:
            os._exit(CANNOT_RUN)

    def _begin_status_file(self, ours: session.Session) -> StatusFile:
        """Say that the command runs; where it is killed with us, the daemon writes how it ended."""
        assert self._status_file is not None, "it is asked for"
        try:
            begun = StatusFile(self._status_file, ours.name, ours.id)
        except OSError as error:
            raise _StatusFileError(f"cannot write {self._status_file}: {error.strerror}") from None
        session.say(status_file=self._status_file)
        return begun

    def _end_status_file(self, started: _Started, found: os.waitid_result, page: Page | None) -> None:
        """Write how the command ended, before what it left is ended: that may take a minute."""
        if self._status_file is None:
            return
        killed = self._count_oom_kills() > started.oom_kills and found.si_status == signal.SIGKILL
        kind = "exit" if found.si_code == os.CLD_EXITED else "oom" if killed else "signal"
        told = None if page is None or page.progress is None else report.progress_record(page.progress)
        try:
            ended = started.pid, session.read_start_ticks(started.pid)
            end_for(self._status_file, ended, {"kind": kind, "code": found.si_status}, told)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            self._tell(f"cannot write {self._status_file}: {why}")

    def _note(self, pipe: int, **told: Any) -> None:
        os.write(pipe, json.dumps(told).encode() + b"\n")

    def _wait_for(self, pid: int) -> None:
        """Pass signals on until the command has ended; it stays a zombie, so that its end can be asked for."""
        command = os.pidfd_open(pid)
        try:
            while not self._has_ended(pid):
                told = signal.sigwaitinfo((*self._signals, signal.SIGCHLD))
                if told.si_signo != signal.SIGCHLD:
                    self._apart = os.getpgid(pid) != os.getpgrp()
                    self._take(told, command)
        finally:
            os.close(command)

    def _has_ended(self, pid: int) -> bool:
        """Say whether the command is dead; whatever else has died below us is waited for."""
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid == pid:
                return True
            os.waitpid(found.si_pid, 0)
        return False

    def _take(self, told: signal.struct_siginfo, command: int | None = None) -> bool:
        """Take in a signal that was sent to us, and say whether somebody wants an end."""
        if told.si_signo in _ENDING:
            self._asked = told.si_signo
        # The terminal's have reached the command as well: a second one would be one too many.
        if command is not None and (told.si_code != _SI_KERNEL or self._apart):
            try:
                signal.pidfd_send_signal(command, told.si_signo)
            except ProcessLookupError:
                pass
            except PermissionError:  # it is another user by now (sudo)
                self._tell(f"may not be sent {render.signal_name(told.si_signo)} by this user")
        return told.si_signo in _ENDING

    def _take_pending(self) -> bool:
        """Take in what was sent to us until now, and say whether somebody wants an end."""
        wants = False
        while (told := signal.sigtimedwait(self._signals, 0)) is not None:
            wants = self._take(told) or wants
        return wants

    # -- between two -------------------------------------------------------------------------

    def _clean_up_after(self, started: _Started) -> Ended:
        """Have all that the dead command left ended, wait for it and return how the command came to its end."""
        lasted_s = time.monotonic() - started.began_s
        found = os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None, "the command has ended"
        # A Ctrl-C that ended the command was sent to us before the command could die of it (kill(2) holds up exits).
        self._take_pending()
        page = _read_page(started.page)
        self._end_status_file(started, found, page)
        told = self._wait_for_daemon(started)
        if not told:
            spared, ended = ((), False) if page is None else (page.spared, bool(page.flags & wire.ENDED))
            grace_s = _EXIT_GRACE_S if found.si_code == os.CLD_EXITED else 0.0
            self._end_remains(Remains(started.session, spared, ended=ended), grace_s)
        _, status = os.waitpid(started.pid, 0)
        while _collect():
            pass
        killed = text_of(told.get("cause"), "kind") == "oom" or self._count_oom_kills() > started.oom_kills
        return Ended(
            status,
            lasted_s,
            out_of_memory=killed,
            asked=self._asked is not None or told.get("stopped_by_uid") is not None,
            workers=self._workers,
        )

    def _end_remains(self, remains: Remains, exit_grace_s: float) -> None:
        """End what the command left, of which nobody else takes care; another signal to us cuts its grace short."""
        until_s = time.monotonic() + exit_grace_s
        while remains.workers() and (left_s := until_s - time.monotonic()) > 0:
            told = signal.sigtimedwait((*self._signals, signal.SIGCHLD), min(left_s, _LOOK_S))
            if told is not None and told.si_signo != signal.SIGCHLD and self._take(told):
                break
        count = len(remains.workers())
        left = [str(one.pid) for one in remains.end(_GRACE_S)]
        if count:
            self._tell(f"left {plural(count, 'process')}, which had to be ended")
        if left:
            self._tell(f"cannot end pid {', '.join(left)}")

    def _count_oom_kills(self) -> int:
        return (oom.read_kills(self._oom_counter) if self._oom_counter else None) or 0

    def _wait_for_daemon(self, started: _Started) -> dict[str, Any]:
        """Return the event that tells how the session ended, and tell of it; an empty one where the daemon does not get there."""
        link = Link([started.socket] if started.socket else self._sockets, timeout_s=self._timeout_s)
        after, until_s = 0, time.monotonic() + _CLEAN_UP_WITHIN_S
        while time.monotonic() < until_s:
            try:
                wait_s = _LOOK_S if started.socket or after else 0
                reply = link.ask("events", after=after, wait_s=wait_s, session=started.session)
            except CommandError:
                break
            found: list[dict[str, Any]] = list_of(reply, "events")
            for one in found:
                if text_of(one, "kind") in events.ENDS:
                    self._tell_what_was_left(one)
                    return one
            if not found and not after and started.socket is None:
                break  # a daemon that began later, and has not adopted the session
            after = next_after(reply, after)
            if self._take_pending():  # the daemon goes on without us
                return {"kind": ""}
        return {}

    def _tell_what_was_left(self, end: dict[str, Any]) -> None:
        signalled = [one for one in list_of(end, "processes") if text_of(one, "signal")]
        if count := len(signalled):
            freed = render.freed(end)
            self._tell(
                f"left {plural(count, 'process')}, which had to be ended" + (f": {freed}" if freed else "")
            )
        if left := render.remaining(end):
            self._tell(f"cannot end pid {', '.join(map(str, left))}")

    def _halve(self, started: _Started) -> str:
        cpus = limits.usable_cpus()
        self._workers = restarts.halve(min(self._workers or limits.n_jobs(started.max_workers), cpus))
        self._cpus = restarts.halve(min(self._cpus or cpus, cpus))
        return (
            f", out of memory: with at most {plural(self._workers, 'worker')} (REAPER_MAX_WORKERS, LOKY_MAX_CPU_COUNT); "
            "a number that stands in the script itself still holds"
        )

    def _pause(self, for_s: float) -> bool:
        """Wait; True when somebody wants an end meanwhile."""
        until_s = time.monotonic() + for_s
        while self._asked is None and (left_s := until_s - time.monotonic()) > 0:
            told = signal.sigtimedwait(self._signals, left_s)
            if told is not None:
                self._take(told)
        return self._asked is not None

    def _tell(self, text: str) -> None:
        restarts_ = self._rules.restarts
        tell(f"{self._name}: " + (f"attempt {self._attempt} of {restarts_ + 1} " if restarts_ else "") + text)


def _open_page(pid: int, descriptor: int) -> int:
    """Return a descriptor of a child's session page; -1 where it has none, or has ended. Ours makes us no member: we are older."""
    try:
        return open_page(f"/proc/{pid}/fd/{descriptor}", uid=os.geteuid()) if descriptor >= 0 else -1
    except (OSError, wire.WireError):
        return -1


def _read_page(descriptor: int) -> Page | None:
    """Return what the page of a dead command said at last, and close it."""
    if descriptor < 0:
        return None
    try:
        return read_page(descriptor, writer_is_dead=True)
    except wire.WireError:
        return None
    finally:
        os.close(descriptor)


def _collect() -> bool:
    """Wait for one of our dead, of which we may have inherited many; False when there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _how(ended: Ended) -> str:
    how = (
        f"was killed by {render.signal_name(ended.signal)}"
        if ended.signal
        else f"exited with code {ended.code}"
    )
    return f"{how} after {duration(ended.lasted_s)}"


def _end_like(ended: Ended) -> int:
    """Return the exit code, or end by the signal that ended the command: a shell stops its loop then."""
    if not ended.signal:
        return ended.code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has dumped its own
    with contextlib.suppress(OSError):  # SIGKILL, and those that the C library keeps to itself
        signal.signal(ended.signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (ended.signal,))
    with contextlib.suppress(OSError):
        signal.raise_signal(ended.signal)
    return ended.code
