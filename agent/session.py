"""Registration: this process becomes the leader of a session, and what it starts from then on carries the session's marks.

Everything here acts for the process that called ``register()``; a forked child is a worker of that session
and never a second leader. Whoever registers waits for this to be loaded: what few need is imported where it is needed.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import time

from agent import client, sockets, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from agent.page import SessionPage, SparedMark

    Progress = Callable[[float, float | None, str], None]

_RETRY_S = 30.0
_ISOLATING_S = 5.0  # that a daemon may take for it, beside what it takes to answer


class RegistrationError(RuntimeError):
    """``register(required=True)`` found no daemon that watches this session; the text says why.

    The session's marks stay: a daemon that starts later adopts it.
    """


class Session:
    """What ``register()`` returns.

    ``id`` is empty where nothing was registered (``REAPER_DISABLE=1``, not Linux); ``socket`` is the daemon that
    accepted the session, None where none did (yet); ``max_workers`` is that daemon's limit, None without one;
    ``isolated`` says whether that daemon gave it a control group of its own, and ``not_isolated`` why not, where asked to.
    """

    __slots__ = ("id", "isolated", "max_workers", "name", "not_isolated", "pid", "socket", "unwatched")

    def __init__(self, session: str, name: str, pid: int) -> None:
        """Describe a session; registering it is ``register()``'s work."""
        self.id = session
        self.name = name
        self.pid = pid
        self.socket: str | None = None
        self.max_workers: int | None = None
        self.isolated = False
        self.not_isolated = ""
        self.unwatched = ""  # why no daemon watches

    @property
    def leading(self) -> bool:
        """Whether this process is the session's leader (a forked worker holds the same object and is not)."""
        return self.pid == os.getpid()

    def __repr__(self) -> str:
        """Return the id, the name and whether a daemon watches."""
        return f"<Session {self.id or 'off'} name={self.name!r} socket={self.socket!r}>"


class _Process:
    """What this process is to Reaper."""

    def __init__(self) -> None:
        # What threading has: a call may be made in the middle of another, by a signal handler.
        self.lock = _thread.RLock()
        self.session: Session | None = None
        self.page: SessionPage | None = None
        self.outer_lineage: str | None = None
        self.sparing = 0
        self.limits: list[int] = []  # of the training sessions that go on in here, the innermost last
        self.listeners: list[Progress] = []
        self.spared: list[tuple[int, int]] = []  # (pid, start ticks) of what was started under spared()
        self.spared_mark: SparedMark | None = None
        self.outer_spared: str | None = None
        self.retry_at_s = 0.0  # a daemon that did not answer is not asked again before
        self.hooked = False
        self.handed_over = False  # the session is that of `reaperctl run`, and ends with the process
        # Of that one: sessions that follow are below the same supervisor.
        self.attempt: tuple[int, int] | None = None
        self.warned = False


_process = _Process()


def register(
    name: str | None = None,
    *,
    socket: str | None = None,
    timeout: float = 1.0,
    required: bool = False,
    isolate: bool = False,
    attempt: tuple[int, int] | None = None,
    for_exec: bool = False,
) -> Session:
    """Make this process the leader of a session; see ``agent.register``.

    ``for_exec`` has the session go on in the program that this process is to run (execve(2)). ``attempt`` says which one of
    how many at most it is, and that its parent is a subreaper.
    """
    name = _checked_name(name)
    if not 0 < timeout < 3600:
        raise ValueError(f"timeout: must be more than 0 s and less than an hour, got {timeout!r}")
    if os.environ.get("REAPER_DISABLE") == "1":
        return Session("", name, os.getpid())
    if sys.platform != "linux":
        return _without_daemon(
            Session("", name, os.getpid()), "Reaper works on Linux only", required=required
        )
    with _process.lock:
        session = _process.session
        paths: list[str] = []
        if session is not None and not session.leading:
            return session
        if session is None:
            inherited = _session_of_parent(name)
            if inherited is not None:
                _process.session = inherited
                return inherited
            try:
                session = _handed_over() or _stamp(
                    name, sockets.candidate_sockets(socket), attempt or _process.attempt, for_exec=for_exec
                )
                paths = _process.page.sockets if _process.page is not None else []
            except (OSError, ValueError, AttributeError, wire.WireError) as error:
                return _without_daemon(
                    Session("", name, os.getpid()),
                    f"the session cannot be marked: {error}",
                    required=required,
                )
        wanting = session.socket is None or (isolate and not session.isolated)
        if wanting and (required or time.monotonic() >= _process.retry_at_s):
            _announce(
                session,
                paths or sockets.candidate_sockets(socket),
                float(timeout),
                required=required,
                isolate=isolate,
            )
        return session


def _checked_name(name: str | None) -> str:
    if name is None:
        script = os.path.basename(sys.argv[0]) if sys.argv else ""
        return (script if script not in ("", "-c", "-m") else "python")[: wire.MAX_NAME_CHARS]
    if not isinstance(name, str):
        raise TypeError(f"name: must be a text, got {type(name).__name__}")
    if not 0 < len(name) <= wire.MAX_NAME_CHARS or "\0" in name:
        raise ValueError(f"name: must have 1 to {wire.MAX_NAME_CHARS} characters and no NUL, got {len(name)}")
    return name.encode("utf-8", "replace").decode()  # a lone surrogate is no JSON


def _session_of_parent(name: str) -> Session | None:
    """Return the leader's session in a worker that multiprocessing or loky started: it is never a leader itself.

    An unguarded ``agent.register()`` at the top of a script runs in every spawn, forkserver and loky worker too, while
    the worker imports the script anew (``_inheriting`` is what multiprocessing/spawn.py itself looks at then).
    """
    module = sys.modules.get("multiprocessing.process")
    if module is None:
        return None
    process = module.current_process()
    if process.name == "MainProcess" and not getattr(process, "_inheriting", False):
        return None
    lineage = wire.parse_lineage(os.environ.get(wire.LINEAGE_VARIABLE, ""))
    if not lineage:  # the leader did not register
        return Session("", name, 0) if getattr(process, "_inheriting", False) else None
    return Session(lineage[-1], name, wire.SessionId.parse(lineage[-1]).pid)


def _stamp(name: str, paths: list[str], attempt: tuple[int, int] | None, *, for_exec: bool) -> Session:
    """Put both marks on this process: from here on, whatever it starts is recognised without any daemon's help."""
    from agent.page import SessionPage

    pid, start_ticks = os.getpid(), read_start_ticks()
    cgroup = wire.parse_cgroup(_read_text("/proc/self/cgroup"))
    realm = read_realm()
    place = wire.place_of(_first_listening(paths), cgroup, os.geteuid(), realm)
    session_id = wire.format_session_id(pid, start_ticks, place, int.from_bytes(os.urandom(4), "little"))
    boot_id = _read_text("/proc/sys/kernel/random/boot_id").strip()
    page = SessionPage(
        session_id, name, start_ticks, boot_id, realm=realm, attempt=attempt, for_exec=for_exec
    )
    return _lead(page, paths, Session(session_id, name, pid))


def _handed_over() -> Session | None:
    """Take over the session that this process led before it exec'ed (``reaperctl run``); None where it led none.

    Every other leader's page is closed by execve(2), and its session is over.
    """
    words = os.environ.get(wire.LINEAGE_VARIABLE, "").split(":")
    ours = f"{os.getpid()}-"  # by itself first: hardly anybody has exec'ed so, and registering is waited for
    if not words[-1].startswith(ours) or not words[-1].startswith(f"{ours}{read_start_ticks():x}-"):
        return None
    from agent import handover

    found = handover.take_over(words[-1])
    if found is not None:
        _process.handed_over, _process.attempt = True, found.page.attempt
        _process.warned = True  # by who has handed it over
    return found and _lead(found.page, found.sockets, Session(words[-1], found.name, os.getpid()))


def _lead(page: SessionPage, paths: list[str], session: Session) -> Session:
    try:
        page.write_record(paths)
    except (ValueError, wire.WireError):
        page.close()
        raise
    outer = _outer_lineage(session.pid, wire.SessionId.parse(session.id).start_ticks)
    os.environ[wire.LINEAGE_VARIABLE] = f"{outer}:{session.id}" if outer else session.id
    _process.outer_lineage, _process.page, _process.session = outer, page, session
    if not _process.hooked:
        os.register_at_fork(after_in_child=_after_fork_in_child)
        atexit.register(_at_exit)
        _process.hooked = True
    return session


def _outer_lineage(pid: int, start_ticks: int) -> str | None:
    """Return the sessions that this process is a worker of: not those that it led itself before it exec'ed."""
    outer = os.environ.get(wire.LINEAGE_VARIABLE)
    if outer is None:
        return None
    mine = f"{pid}-{start_ticks:x}-"
    return ":".join(word for word in outer.split(":") if word and not word.startswith(mine)) or None


def _first_listening(paths: list[str]) -> str:
    for path in paths if len(paths) > 1 else ():
        if sockets.why_deaf(path) is None:
            return path
    return paths[0]


def _announce(session: Session, paths: list[str], timeout_s: float, *, required: bool, isolate: bool) -> None:
    """Tell a daemon, the first that accepts; without one the marks must do until a daemon starts."""
    page = _process.page
    assert page is not None, "a session that leads has a page"
    message = {
        "op": "register",
        "session": session.id,
        "name": session.name,
        "start_ticks": wire.SessionId.parse(session.id).start_ticks,
        "page_fd": page.fd,
        "temp_dirs": _temp_dirs(),
        **({"attempt": list(page.attempt)} if page.attempt else {}),
        **({"isolate": True} if isolate else {}),
    }
    if isolate:
        timeout_s += _ISOLATING_S
    reasons = []
    for path in paths:
        try:
            reply = client.request(path, message, timeout_s=timeout_s)
        except client.Unreachable as error:
            reasons.append(str(error))
        except wire.WireError as error:
            reasons.append(f"{path}: refused: {error}")
        else:
            session.socket = path
            limit = reply.get("max_workers")
            session.max_workers = limit if isinstance(limit, int) and limit > 0 else None
            session.isolated = reply.get("isolated") is True
            page.write_record([path])
            if isolate and not session.isolated:
                _go_on_without_isolation(session, reply.get("not_isolated"))
            return
    _process.retry_at_s = time.monotonic() + _RETRY_S
    _without_daemon(session, "; ".join(reasons), required=required)


def _go_on_without_isolation(session: Session, told: object) -> None:
    _process.retry_at_s = time.monotonic() + _RETRY_S
    session.not_isolated = told if isinstance(told, str) and told else "the daemon is too old for that"
    import warnings

    warnings.warn(
        f"the session has no control group of its own, its marks must do: {session.not_isolated}",
        RuntimeWarning,
        stacklevel=_frames_of_ours(),
    )


def _temp_dirs() -> list[str]:
    """Return where joblib puts memory-mapped arrays, where /dev/shm is not the place."""
    folders = (os.environ.get(name, "") for name in wire.TEMP_VARIABLES)
    return [
        folder for folder in folders if os.path.isabs(folder) and len(folder) <= 4096 and folder.isprintable()
    ]


def _without_daemon(session: Session, reason: str, *, required: bool) -> Session:
    if required:
        raise RegistrationError(f"no Reaper daemon watches this session: {reason}")
    session.unwatched = reason
    if not _process.warned:
        _process.warned = True
        import warnings

        warnings.warn(
            f"no Reaper daemon watches this session, training goes on without one: {reason}",
            RuntimeWarning,
            stacklevel=_frames_of_ours(),
        )
    return session


def _frames_of_ours() -> int:
    """Return how far up the stack the caller of this package is, as ``warnings.warn()`` counts for whoever asks this."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "agent":
        frame, depth = frame.f_back, depth + 1
    return depth


def unregister() -> None:
    """End this process's session cleanly; see ``agent.unregister``."""
    with _process.lock:
        session, page = _process.session, _process.page
        if session is None or page is None or not session.leading:
            return
        _remove_environment_stamp(session.id)
        _process.session = _process.page = None
        _process.handed_over = False
        page.raise_flag(wire.ENDED)  # for the daemon that comes later: forked workers hold the page, too
        if session.socket is not None:
            try:  # noqa: SIM105 - to load contextlib takes longer
                client.request(session.socket, {"op": "unregister", "session": session.id})
            except (client.Unreachable, wire.WireError):
                pass
        page.close()


def _remove_environment_stamp(session_id: str) -> None:
    current = os.environ.get(wire.LINEAGE_VARIABLE, "")
    words = [word for word in current.split(":") if word and word != session_id]
    if words or _process.outer_lineage is not None:
        os.environ[wire.LINEAGE_VARIABLE] = ":".join(words)
    else:
        os.environ.pop(wire.LINEAGE_VARIABLE, None)


def say(**fields: object) -> dict[str, object]:
    """Tell the daemon of this session, in its page, and return what was told before.

    ``status_file`` is the file into which it is to write the end of this run, should this process be killed; ``stray`` the
    seconds and the percent of a core from which on it is to report workers that lost their pool; None for neither. What the
    page has no room for is left out: then nothing is returned.
    """
    page = _page_that_leads()
    try:
        return {} if page is None else page.say(**fields)
    except wire.WireError:
        return {}


def _page_that_leads() -> SessionPage | None:
    session = _process.session
    return _process.page if session is not None and session.leading else None


def page_descriptor() -> int:
    """Return this process's descriptor of its session page; -1 where it leads no session."""
    page = _page_that_leads()
    return -1 if page is None else page.fd


def is_handed_over() -> bool:
    """Say whether the session was begun for this whole process, before it ran its program."""
    return _process.handed_over


def is_registered() -> bool:
    """Say whether this process belongs to a session, as its leader or as a worker."""
    return _process.session is not None


def listen(to_progress: Progress) -> None:
    """Have a function called with whatever ``agent.progress()`` is told from now on."""
    _process.listeners.append(to_progress)


def unlisten(to_progress: Progress) -> None:
    """Take that back."""
    if to_progress in _process.listeners:  # else a signal handler has done so
        _process.listeners.remove(to_progress)


def limit_of_workers() -> int | None:
    """Return how many workers this process may have: the innermost training session's, else the daemon's; None without any."""
    if _process.limits:
        return _process.limits[-1]
    session = _process.session
    return None if session is None else session.max_workers


def push_limit(limit: int) -> None:
    """Let a training session that begins in this process say how many workers there may be."""
    _process.limits.append(limit)


def pop_limit(limit: int) -> None:
    """Take that back: of those that say the same, the innermost."""
    at = len(_process.limits) - 1 - _process.limits[::-1].index(limit)
    del _process.limits[at]


def name_of_session() -> str:
    """Return what this process's session is called, "" where there is none."""
    session = _process.session
    return "" if session is None else session.name


def progress(done: float, total: float | None = None, message: str = "") -> None:
    """Say how far the session is; see ``agent.progress``."""
    page, session = _process.page, _process.session
    if page is None or session is None or not session.leading:
        return
    try:
        page.write_progress(done, total, message)
        for listener in tuple(_process.listeners):
            listener(done, total, message)
    except (TypeError, AttributeError):
        raise TypeError(
            f"done and total must be numbers and message a text, got {done!r}, {total!r}, {message!r}"
        ) from None
    except OverflowError:
        raise ValueError("done and total must be numbers that fit into a float") from None


class Spared:
    """The context that ``agent.spared()`` returns."""

    def __init__(self) -> None:
        """Nothing happens before the block is entered."""
        self._pid = 0
        self._entered = 0  # as long as there was a session to spare from
        self._before: set[tuple[int, int]] = set()

    def __enter__(self) -> None:
        """Mark what is started from here on, by any thread, as meant to outlive the session."""
        with _process.lock:
            self._pid = os.getpid()
            session = _spared_session()
            if session is None:
                return
            self._before = _children()
            self._entered += 1
            _process.sparing += 1
            # Blocks of several threads can overlap: the first sets, the last takes away.
            if _process.sparing == 1:
                _process.outer_spared = outer = os.environ.get(wire.SPARED_VARIABLE)
                os.environ[wire.SPARED_VARIABLE] = f"{outer}:{session}" if outer else session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the mark away again, but not in a child that was forked inside: that one is spared for good."""
        with _process.lock:
            if self._pid != os.getpid() or not self._entered:
                return
            self._entered -= 1
            self._note_children()
            _process.sparing -= 1
            if _process.sparing:
                return
            if _process.outer_spared is None:
                os.environ.pop(wire.SPARED_VARIABLE, None)
            else:
                os.environ[wire.SPARED_VARIABLE] = _process.outer_spared

    def _note_children(self) -> None:
        """Name in the page what was started meanwhile: its environment may lack the mark."""
        page, session = _process.page, _process.session
        started = sorted(_children() - self._before - set(_process.spared))
        if page is not None and session is not None and session.leading and started:
            living = _children()
            _process.spared = [one for one in _process.spared if one in living] + started
            page.write_spared(_process.spared)


def _children() -> set[tuple[int, int]]:
    """Return (pid, start ticks) of this process's children; empty where the kernel does not list them."""
    found: set[tuple[int, int]] = set()
    if not proc_is_ours():  # it has other numbers for them than we do
        return found
    for task in os.listdir("/proc/self/task"):
        try:
            for pid in _read_text(f"/proc/self/task/{task}/children").split():
                found.add((int(pid), read_start_ticks(pid)))
        except OSError:  # a thread or a child that has just ended
            continue
    return found


def spared_processes() -> list[tuple[int, int]]:
    """Return (pid, start ticks) of what this process has started under ``spared()``."""
    return list(_process.spared)


def _spared_session() -> str | None:
    """Return the id of the innermost session that this process belongs to, as leader or as worker."""
    if _process.session is not None and _process.session.id:
        return _process.session.id
    lineage = wire.parse_lineage(os.environ.get(wire.LINEAGE_VARIABLE, ""))
    return lineage[-1] if lineage else None


def _after_fork_in_child() -> None:
    """Make the child what it is: a worker, or, inside ``spared()``, a process of its own."""
    _process.lock = _thread.RLock()
    if _process.page is not None:
        _process.page.after_fork()
    if _process.sparing:
        _drop_marks()


def _drop_marks() -> None:
    from agent.page import SparedMark

    session = _process.session
    if session is not None:
        _process.spared_mark = SparedMark(session.id)
    if _process.page is not None:
        _process.page.close()
    _process.page = _process.session = None
    _process.sparing = 0


def _at_exit() -> None:
    """Note in the page, at no cost, that this interpreter ends in good order; the daemon reads it after the end."""
    session, page = _process.session, _process.page
    if session is not None and page is not None and session.leading:
        page.raise_flag(wire.CLOSING)


def read_start_ticks(pid: int | str = "self") -> int:
    """Return the start time of a process (proc(5), field 22 of stat); OSError where there is none."""
    return int(_read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])


def proc_is_ours() -> bool:
    """Say whether a pid in /proc is whom pidfd_open(2) opens under it: in another pid namespace (``unshare --pid`` without
    ``--mount-proc``) that is somebody else.
    """
    for line in _read_text("/proc/self/status").split("\n"):
        if line.startswith("NSpid:"):  # from the namespace of this /proc down to our own
            return line.split()[1:] == [str(os.getpid())]
    return os.readlink("/proc/self") == str(os.getpid())


def read_realm() -> str:
    """Return ``wire.realm_of()`` this process."""
    return wire.realm_of(_inode_of("/proc/self/ns/pid"), _inode_of("/proc/self/ns/time"))


def _inode_of(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _read_text(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while chunk := os.read(descriptor, 65536):
            data += chunk
    finally:
        os.close(descriptor)
    return data.decode("utf-8", "surrogateescape")
