"""The checks of ``reaperctl doctor`` about what is installed and set up: Python, modules, socket, daemon, directories."""

from __future__ import annotations

import os
import stat
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec

from reaperd import __version__, surroundings
from reaperd.ctl import CommandError, probes
from reaperd.ctl.findings import Check, Finding, limit, ok, problem
from reaperd.linux import transient

_UNIT = "reaperd.service"


# -- Python and its modules -----------------------------------------------------------------------


def python() -> Finding:
    """The interpreter that runs this."""
    return ok(f"Python {'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def zeromq() -> Finding:
    """Pyzmq, and whether libzmq tells who is at the other end of a socket."""
    try:
        import zmq
    except ImportError as error:
        return problem(f"pyzmq cannot be imported: {error}", "pip install pyzmq")
    versions = f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
    try:
        told = probes.peer_address()
    except (OSError, zmq.ZMQError) as error:
        return problem(
            f"{versions}: an ipc socket does not work: {error}", "reinstall pyzmq: pip install -U pyzmq"
        )
    if told != f"localhost:{os.geteuid()}:{os.getegid()}:{os.getpid()}":
        return problem(
            f"{versions}: a peer is shown as {told!r}, not with its uid and pid",
            "install pyzmq's own wheel (pip install -U pyzmq): this libzmq was built without SO_PEERCRED",
        )
    return ok(f"{versions}: an ipc socket tells the uid and pid of its peer")


def agent_module() -> Finding:
    """Whether ``import agent`` gets Reaper's: another distribution on PyPI has the same import name."""
    from importlib.util import find_spec

    spec = find_spec("agent")
    if spec is None:
        return problem("there is no module `agent`", "reinstall: pip install --force-reinstall reaperd")
    where = _directory_of(spec)
    if not _is_ours(spec):
        return problem(
            f"`import agent` in this Python gets {spec.origin or where}, which is not Reaper's",
            "remove the other one (pip uninstall agent) or move it away, then reinstall reaperd",
        )
    for rival in ("agent.py", "agent"):
        path = os.path.realpath(rival)
        if os.path.exists(path) and path != os.path.realpath(where):
            return limit(
                f"`import agent` gets Reaper's, in {where}, but a script in this directory would get {path}",
                f"rename {path}",
            )
    return ok(f"`import agent` gets Reaper's, in {where}")


def _directory_of(spec: ModuleSpec) -> str:
    return next(iter(spec.submodule_search_locations or ()), "") or os.path.dirname(spec.origin or "")


def _is_ours(spec: ModuleSpec) -> bool:
    """Say whether the module is Reaper's; one that does not look like it is never run."""
    if not spec.origin or not os.path.isfile(os.path.join(_directory_of(spec), "wire.py")):
        return False
    import agent

    return callable(getattr(agent, "register", None))


# -- directories, socket, daemon ------------------------------------------------------------------


def runtime_directory() -> Finding:
    """Where this user's own socket would be."""
    from agent import sockets

    if os.geteuid() == 0:
        return ok("root needs none of its own: root's daemon is the system's")
    path = sockets.user_runtime_directory()
    if os.path.lexists(path) and not sockets.is_private(path):
        return problem(
            f"{path} is not yours alone ({_describe(path)}), so your own daemon's socket is not looked for there",
            f"chmod 700 {path}, or, where it is not yours, have its owner remove it",
        )
    if not os.environ.get("XDG_RUNTIME_DIR"):
        return limit(
            f"XDG_RUNTIME_DIR is not set: your own daemon would use {path}",
            "log in through systemd-logind, or set it to a directory of yours with mode 0700",
        )
    return ok(
        f"{path} is yours alone" if os.path.lexists(path) else f"{path} is not there yet; reaperd makes it"
    )


def socket_file(options: Namespace) -> Finding:
    """The socket that would be used, and who could put another in its place."""
    from agent import sockets
    from reaperd.ctl.link import sockets_of

    try:
        paths = sockets_of(options)
    except CommandError as error:
        return problem(str(error), "chmod 700 the directory, or use --system")
    path = next((path for path in paths if sockets.why_deaf(path) is None), paths[0])
    directory = os.path.dirname(path)
    if not os.path.lexists(path):
        return ok(f"{path} would be used; nothing is there yet")
    shown = f"{path} ({_describe(path)}) in a directory of {_describe(directory)}"
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return problem(f"{shown} is no socket", "remove it")
    if not os.access(path, os.W_OK):
        return problem(f"{shown}: you may not connect to it", "use your own daemon, or the system's")
    holder = os.stat(directory)
    if holder.st_uid not in (0, os.geteuid()):
        return problem(
            f"{shown}: its owner can put another socket there",
            "use a socket in a directory of root's or yours",
        )
    if holder.st_mode & 0o022:
        return problem(f"{shown}: others can put a socket there", f"chmod go-w {directory}")
    return ok(shown)


def _describe(path: str) -> str:
    found = os.lstat(path)
    return f"mode {stat.S_IMODE(found.st_mode):04o}, owner uid {found.st_uid}"


def daemon(options: Namespace) -> Finding:
    """Whether a daemon answers, and whether it is of this version."""
    import time

    from reaperd.ctl.link import Link, NoDaemonError

    began = time.monotonic()
    try:
        link = Link.of(options)
        reply = link.ask("ping")
    except NoDaemonError as error:
        return problem(error.reason, error.advice)
    except CommandError as error:
        return problem(f"the daemon refuses to answer: {error}", "see the daemon's log")
    latency_ms = (time.monotonic() - began) * 1000
    said = f"reaperd {reply.get('version')}, pid {reply.get('pid')}, answered on {link.socket} in {latency_ms:.1f} ms"
    if reply.get("version") != __version__:
        return limit(f"{said}, but this is reaperctl {__version__}", "restart reaperd after an upgrade")
    return ok(said)


def reach(options: Namespace) -> Finding:
    """What the daemon has to do without where it runs; where none answers, what one that is started here would have to."""
    from reaperd.ctl.link import Link, NoDaemonError
    from reaperd.linux.procfs import ProcFS

    try:
        told = Link.of(options).ask("status")["status"].get("limits", [])
        found = [surroundings.Lack(str(one["fact"]), str(one["advice"])) for one in told]
        who = "the daemon"
    except (NoDaemonError, CommandError):
        proc = ProcFS()
        if (why := surroundings.why_unusable(proc)) is not None:
            return problem(f"no daemon can be started here: {why}", "start it elsewhere, or as that says")
        found, who = surroundings.lacks(proc), "a daemon that is started here"
    return judge_reach(found, who)


def judge_reach(found: list[surroundings.Lack], who: str) -> Finding:
    """Return the finding for what ``who`` has to do without."""
    from reaperd.rights import RIGHTS

    if not found:
        return ok(f"{who} can see and signal all that it has to")
    grave = tuple(f"without {name} " for name, right in RIGHTS.items() if right.vital or name == "CAP_KILL")
    judge = problem if any(one.fact.startswith(grave) for one in found) else limit
    return judge(
        f"of {who}: {'; '.join(one.fact for one in found)}",
        "; ".join(dict.fromkeys(one.advice for one in found)),
    )


def state_directory() -> Finding:
    """Where a daemon of this user keeps its state."""
    from reaperd.paths import default_paths

    path = default_paths().state
    found = path
    while not os.path.isdir(found) and os.path.dirname(found) != found:
        found = os.path.dirname(found)
    try:
        probes.write_in(found)
    except OSError as error:
        return problem(
            f"{path}: cannot write in {found}: {error.strerror}", "make it writable, or use --state-dir"
        )
    return ok(f"{path} can be written" if found == path else f"{path} is not there yet and can be made")


# -- systemd --------------------------------------------------------------------------------------


def systemd() -> Finding:
    """The unit, where systemd runs the machine."""
    if not transient.is_running():
        return limit(
            "systemd does not run here",
            "start reaperd from whatever starts the other daemons of this machine",
        )
    import subprocess

    mode = [] if os.geteuid() == 0 else ["--user"]
    command = ["systemctl", *mode, "show", _UNIT, "--property=LoadState,ActiveState,UnitFileState"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return limit(f"systemctl cannot be asked: {error}", "see `systemctl status reaperd`")
    return judge_unit(done.stdout, " ".join(["systemctl", *mode]))


def judge_unit(text: str, systemctl: str) -> Finding:
    """Return the finding for what ``systemctl show`` printed."""
    state = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if state.get("LoadState") != "loaded":
        return limit(f"{_UNIT} is not installed", "reaperd must be started by hand, or its unit be installed")
    said = f"{_UNIT} is {state.get('ActiveState', 'in no known state')}"
    if state.get("ActiveState") != "active":
        return limit(said, f"{systemctl} enable --now reaperd")
    if state.get("UnitFileState") == "disabled":
        return limit(
            f"{said}, but not enabled: it will not be started at boot", f"{systemctl} enable reaperd"
        )
    return ok(said)


def checks(options: Namespace) -> list[tuple[str, Check]]:
    """Return the checks, each with what it is about, but for ``agent_module``: several need that one's answer."""
    return [
        ("Python", python),
        ("pyzmq", zeromq),
        ("runtime directory", runtime_directory),
        ("state directory", state_directory),
        ("socket", lambda: socket_file(options)),
        ("daemon", lambda: daemon(options)),
        ("daemon's reach", lambda: reach(options)),
        ("systemd", systemd),
    ]
