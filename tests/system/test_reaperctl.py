"""reaperctl as a person and as a script use it: without a daemon, and against a real one."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Daemon, Leader, Scratch, as_user, interpreter_for, test_environment

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

WITHIN_S = 30.0
SOMEBODY = 54321  # no overflow uid (65534): a peer of that one is refused
HOSTILE = "risk\x1b]0;owned\x07\x1b[2J\n\u202etxt\x9b31m"
NAMED = """\
import sys, agent
agent.register(sys.argv[1])
agent.progress(1, 4, sys.argv[1])
print('{"pids": {}, "leader": %d, "lineage": "%s"}' % (__import__("os").getpid(), __import__("os").environ["REAPER_LINEAGE"]), flush=True)
sys.stdin.read()
"""


def command(*arguments: str, uid: int | None = None) -> list[str]:
    interpreter = interpreter_for(uid)
    if interpreter is None:
        pytest.skip(f"uid {uid} may execute no Python of this version")
    return as_user(uid, [interpreter, "-m", "reaperd.ctl.main", *arguments])


def ctl(
    run: str, *arguments: str, uid: int | None = None, cwd: str | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run reaperctl to its end, with nothing of Reaper's in the environment but ``more``."""
    return subprocess.run(
        command(*arguments, uid=uid),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
        cwd=cwd,
        env=test_environment(run, **more),
    )


class Running:
    """A reaperctl that goes on, its output read line by line against a deadline."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._unread: dict[int, bytes] = {}

    def line(self, stream: Any, within_s: float = WITHIN_S) -> str:
        number = stream.fileno()
        poll = select.poll()
        poll.register(number, select.POLLIN)
        data = self._unread.get(number, b"")
        end_s = time.monotonic() + within_s
        while b"\n" not in data:
            assert poll.poll(max(0.0, end_s - time.monotonic()) * 1000), (
                f"nothing within {within_s:g} s, only {data!r}"
            )
            more = os.read(number, 65536)
            assert more, f"it ended, saying {data!r}"
            data += more
        line, _, self._unread[number] = data.partition(b"\n")
        return line.decode()

    def out(self) -> str:
        return self.line(self.process.stdout)

    def err(self) -> str:
        return self.line(self.process.stderr)


@pytest.fixture
def start_ctl(run: str) -> Iterator[Callable[..., Running]]:
    """Start a reaperctl that goes on; it is ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **more: str) -> Running:
        process = subprocess.Popen(
            command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=test_environment(run, **more),
        )
        started.append(process)
        return Running(process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def silent_socket(scratch: Scratch) -> Iterator[tuple[str, socket.socket]]:
    """A socket on which somebody listens and never answers."""
    path = scratch.file("silent")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(8)
        listener.settimeout(WITHIN_S)
        yield path, listener


# -- without a daemon -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["ping"], ["status"], ["status", "--check"], ["ps", "--json"], ["events"], ["events", "-f"], ["stop", "x"],
     ["config", "show"], ["orphans"], ["orphans", "--score"], ["explain", "1"], ["cleanup", "--yes"], ["protect", "1"],
     ["release", "1"], ["monitor"], ["monitor", "--duration", "0.01", "--json"]],
)  # fmt: skip
def test_without_a_daemon_one_sentence_says_where_and_why_and_how_to_start_one(
    run: str, scratch: Scratch, words: list[str]
) -> None:
    path = scratch.file("none.sock")
    done = ctl(run, *words, "--socket", path)
    or_here = (
        words[0] in ("orphans", "explain", "cleanup", "monitor") and words[-1] != "--score"
    ) * ", or say --local to do without one"
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"reaperctl: no daemon answers: {path}: No such file or directory. "
        f"Start one there with `reaperd --socket {path}`{or_here}\n"
    )


@pytest.mark.needs_root
def test_a_daemon_that_one_may_not_ask_is_not_said_to_be_none(run: str, scratch: Scratch) -> None:
    path = scratch.file("none.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        os.chmod(path, 0o600)
        os.chmod(scratch.path, 0o711)
        done = ctl(run, "ping", "--socket", path, uid=SOMEBODY)
    assert done.returncode == 3
    assert done.stderr == (
        f"reaperctl: no daemon may be asked: {path}: Permission denied. Ask as the user whose daemon that is\n"
    )


def test_a_dead_daemons_socket_is_told_from_a_missing_one(run: str, scratch: Scratch) -> None:
    path = scratch.file("dead.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
    done = ctl(run, "ping", REAPER_SOCKET=path)
    assert done.returncode == 3
    assert f"{path}: Connection refused" in done.stderr


def test_a_daemon_that_does_not_answer_costs_the_timeout_and_no_more(
    run: str, silent_socket: tuple[str, socket.socket]
) -> None:
    path, _ = silent_socket
    began_s = time.monotonic()
    done = ctl(run, "ps", "--timeout", "0.3", "--socket", path)
    assert done.returncode == 3
    assert f"{path}: no answer within 0.3 s" in done.stderr
    assert time.monotonic() - began_s < 5


def test_ctrl_c_is_quiet_and_leaves_with_130(
    start_ctl: Callable[..., Running], silent_socket: tuple[str, socket.socket]
) -> None:
    path, listener = silent_socket
    running = start_ctl("ps", "--timeout", "60", "--socket", path)
    with listener.accept()[0]:  # it waits for an answer now
        running.process.send_signal(signal.SIGINT)
        out, err = running.process.communicate(timeout=WITHIN_S)
    assert (running.process.returncode, out, err) == (130, b"", b"")


def test_a_socket_name_is_never_echoed_raw(run: str) -> None:
    done = ctl(run, "ping", "--socket", "/nowhere/\x1b[2J\u202e\n")
    assert done.returncode == 3
    assert done.stderr.rstrip("\n").isprintable()


@pytest.mark.needs_root
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_users_socket_counts_only_in_a_directory_that_is_that_users_alone(
    run: str, scratch: Scratch, mode: int
) -> None:
    runtime = scratch.directory("xdg")
    os.mkdir(os.path.join(runtime, "reaper"), mode)
    for path in (runtime, os.path.join(runtime, "reaper")):
        os.chown(path, SOMEBODY, SOMEBODY)
    os.chmod(os.path.join(runtime, "reaper"), mode)
    socket_path = os.path.join(runtime, "reaper", "reaper.sock")

    done = ctl(run, "ping", uid=SOMEBODY, XDG_RUNTIME_DIR=runtime)
    assert done.returncode == 3
    assert (socket_path in done.stderr) == (mode == 0o700)
    assert "/run/reaper/reaper.sock" in done.stderr

    only_user = ctl(run, "ping", "--user", uid=SOMEBODY, XDG_RUNTIME_DIR=runtime)
    assert only_user.returncode == 3
    assert ("is not yours alone" in only_user.stderr) == (mode != 0o700)
    assert "/run/reaper" not in only_user.stderr

    only_system = ctl(run, "ping", "--system", uid=SOMEBODY, XDG_RUNTIME_DIR=runtime)
    assert socket_path not in only_system.stderr


def test_a_closed_pipe_is_quiet(run: str) -> None:
    for words, codes in ((["config", "default"], {141}), (["--help"], {0, 141})):  # argparse may hide it
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            command(*words), stdout=writer, stderr=subprocess.PIPE, check=False, env=test_environment(run)
        )
        os.close(writer)
        assert done.returncode in codes
        assert done.stderr == b""


def test_a_full_disk_is_a_failure_and_not_a_traceback(run: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("config", "default"),
            stdout=full, stderr=subprocess.PIPE, check=False, env=test_environment(run), timeout=WITHIN_S,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"reaperctl: No space left on device\n")


def test_help_and_version_need_nothing_but_argparse(run: str) -> None:
    program = (
        "import sys\nfrom reaperd.ctl.main import main\n"
        "assert main([sys.argv[1]]) == 0\n"
        "print({'zmq', 'psutil', 'logging', 'dataclasses', 'json', 'agent', 'unicodedata'} & set(sys.modules))"
    )
    for option in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", program, option],
            capture_output=True,
            text=True,
            check=True,
            env=test_environment(run),
        )
        assert done.stdout.splitlines()[-1] == "set()"


# -- config ---------------------------------------------------------------------------------------


def test_config_default_is_a_file_that_config_check_accepts(run: str, scratch: Scratch) -> None:
    done = ctl(run, "config", "default")
    assert (done.returncode, done.stderr) == (0, "")
    path = scratch.file("default.toml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(done.stdout)
    checked = ctl(run, "config", "check", path)
    assert (checked.returncode, checked.stdout) == (0, f"{path}: no faults\n")
    assert json.loads(ctl(run, "config", "default", "--json").stdout)["kill"]["grace"] == "5s"


def test_config_check_names_every_fault_and_leaves_with_2(run: str, scratch: Scratch) -> None:
    path = scratch.file("bad.toml")
    with open(path, "w", encoding="utf-8") as file:
        file.write('[scan]\ninterval = -1\n[kill]\ngraze = "5s"\n[alerts]\nurls = ["\\u001b[2J"]\nurl = 1\n')
    done = ctl(run, "config", "check", path)
    assert done.returncode == 2
    assert "interval" in done.stdout
    assert "graze" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())
    document = json.loads(ctl(run, "config", "check", path, "--json").stdout)
    assert (document["ok"], document["file"]) == (False, path)
    assert len(document["faults"]) == len(done.stdout.splitlines()) >= 3


def test_config_check_of_a_missing_file_is_a_fault_only_where_it_was_asked_for(
    run: str, scratch: Scratch
) -> None:
    missing = scratch.file("none.toml")
    assert ctl(run, "config", "check", missing).returncode == 2
    assert ctl(run, "config", "check", REAPER_CONFIG=missing).returncode == 2


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_finds_that_no_daemon_answers_and_says_how_to_start_one(run: str, scratch: Scratch) -> None:
    path = scratch.file("none.sock")
    done = ctl(run, "doctor", "--socket", path)
    assert done.returncode == 1
    assert re.search(r"^PROBLEM +daemon +no daemon answers", done.stdout, re.MULTILINE)
    assert f"reaperd --socket {path}" in done.stdout
    assert done.stderr == ""
    document = json.loads(ctl(run, "doctor", "--socket", path, "--json").stdout)
    assert document["ok"] is False
    assert {check["level"] for check in document["checks"]} <= {"ok", "limit", "problem"}
    assert all(bool(check["advice"]) == (check["level"] != "ok") for check in document["checks"])
    assert [check["check"] for check in document["checks"] if check["level"] == "problem"] == ["daemon"]


def test_doctor_with_a_daemon_finds_no_problem(daemon: Daemon) -> None:
    done = daemon.ctl("doctor")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^OK +daemon +reaperd .*pid {daemon.pid}, answered", done.stdout, re.MULTILINE)
    assert re.search(
        rf"^OK +socket +{daemon.socket} \(mode 0[0-7]+, owner uid \d+\)", done.stdout, re.MULTILINE
    )


def test_doctor_finds_a_socket_that_others_could_replace(daemon: Daemon) -> None:
    os.chmod(os.path.dirname(daemon.socket), 0o777)
    done = daemon.ctl("doctor")
    assert done.returncode == 1
    assert re.search(r"^PROBLEM +socket .*others can put a socket there", done.stdout, re.MULTILINE)


def test_a_foreign_agent_module_is_found_and_never_run(run: str, scratch: Scratch) -> None:
    directory, witness = scratch.directory("foreign"), scratch.file("it-ran")
    with open(os.path.join(directory, "agent.py"), "w", encoding="utf-8") as file:
        file.write(f"open({witness!r}, 'w')\n")
    path = os.pathsep.join([directory, test_environment(run)["PYTHONPATH"]])
    done = ctl(run, "doctor", cwd=directory, PYTHONPATH=path)
    assert done.returncode == 1
    assert re.search(
        rf"^PROBLEM +agent module +.*{directory}/agent\.py, which is not Reaper's", done.stdout, re.MULTILINE
    )
    assert not os.path.exists(witness)

    asked = ctl(run, "ping", cwd=directory, PYTHONPATH=path)
    assert asked.returncode == 1
    assert "`reaperctl doctor` says more" in asked.stderr
    assert asked.stderr.count("\n") == 1


@pytest.mark.needs_root
def test_doctor_for_an_ordinary_user_probes_as_that_user(run: str, scratch: Scratch) -> None:
    home = scratch.directory("home")
    os.chown(home, SOMEBODY, SOMEBODY)
    more = {"HOME": home, "XDG_RUNTIME_DIR": "", "TMPDIR": home}
    document = json.loads(ctl(run, "doctor", "--json", uid=SOMEBODY, **more).stdout)
    found = {check["check"]: check for check in document["checks"]}
    assert found["state directory"]["level"] == "ok"
    assert f"{home}/.local/state/reaper" in found["state directory"]["fact"]
    assert found["runtime directory"]["level"] == "limit"
    assert found["reading processes"]["level"] == "ok"
    assert "your own processes" in found["reading processes"]["fact"]


# -- with a daemon: reading -----------------------------------------------------------------------


def test_ping_says_who_answered(daemon: Daemon) -> None:
    done = daemon.ctl("ping")
    assert re.fullmatch(
        rf"reaperd \S+, pid {daemon.pid}, answered on {daemon.socket} in [\d.]+ ms\n", done.stdout
    ), done
    document = daemon.ask("ping")
    assert (document["pid"], document["socket"]) == (daemon.pid, daemon.socket)


def test_the_socket_option_wins_over_the_environment(daemon: Daemon, run: str, scratch: Scratch) -> None:
    done = ctl(run, "--socket", daemon.socket, "ping", REAPER_SOCKET=scratch.file("none"))
    assert done.returncode == 0


def test_an_idle_daemon_has_helpful_empty_states(daemon: Daemon) -> None:
    assert "agent.register()" in daemon.ctl("ps").stdout
    assert daemon.ask("ps") == []
    assert daemon.ctl("events", "--since", "2100-01-01").stdout.startswith("no events")
    assert daemon.ctl("events", "--since", "2100-01-01", "--json").stdout == ""


def test_status_says_what_the_daemon_is_doing(daemon: Daemon, start_leader: StartLeader) -> None:
    start_leader("pools.py", "executor", socket=daemon.socket)
    found = daemon.ask("status")
    assert {
        "version", "pid", "uptime_s", "mode", "config", "sessions", "workers", "orphans", "reaped_total",
        "freed_bytes_total", "dry_run",
    } <= set(found)  # fmt: skip
    said = daemon.ctl("status", "--check")
    assert said.returncode == 0
    assert re.search(r"^  sessions  1 with 2 workers$", said.stdout, re.MULTILINE), said.stdout


def test_ps_shows_a_tree_of_the_session(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    (found,) = daemon.ask("ps")
    assert (found["id"], found["state"], found["uid"]) == (leader.session, "running", os.geteuid())
    first, second, *rest = daemon.ctl("ps").stdout.splitlines()
    assert leader.session in first
    assert re.match(rf"├─ leader +{leader.pid}  python\S* .*pools\.py executor", second)
    for pid in leader.family.workers:
        assert any(re.match(rf"[├└]─ worker +{pid} .* %  .*iB  \S", line) for line in rest), rest


def test_in_an_ascii_locale_ps_is_ascii(daemon: Daemon, run: str, start_leader: StartLeader) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    done = ctl(run, "ps", REAPER_SOCKET=daemon.socket, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert re.search(rf"^\|- leader +{leader.pid} ", done.stdout, re.MULTILINE)


def start_named(start_leader: StartLeader, scratch: Scratch, daemon: Daemon, name: str) -> Leader:
    """Start a leader under a name of the test's choice; it waits for its stdin to end."""
    script = scratch.file("named.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(NAMED)
    return start_leader(script, name, socket=daemon.socket)


def on_a_terminal(run: str, *arguments: str, width: int, **more: str) -> str:
    """Return what reaperctl writes to a terminal of ``width`` columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, width)) if sys.version_info >= (3, 11) else _set_size(theirs, width)
    with subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=test_environment(run, TERM="tmux-256color", **more),
    ) as process:
        os.close(theirs)
        data = b""
        try:
            while more_data := os.read(ours, 65536):
                data += more_data
        except OSError:  # EIO: the other end is closed
            pass
        os.close(ours)
        assert process.wait(WITHIN_S) == 0, data
    return data.decode().replace("\r\n", "\n")


def _set_size(descriptor: int, width: int) -> None:
    import fcntl
    import struct

    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))


@pytest.mark.parametrize("words", [["ps"], ["events"], ["events", "--json"], ["ps", "--json"], ["status"]])
def test_a_hostile_session_cannot_reach_the_terminal(
    daemon: Daemon, run: str, scratch: Scratch, start_leader: StartLeader, words: list[str]
) -> None:
    start_named(start_leader, scratch, daemon, HOSTILE)
    said = on_a_terminal(run, *words, width=100, REAPER_SOCKET=daemon.socket)
    plain = re.sub(r"\x1b\[\d*m", "", said)  # our own colours
    assert all(line.isprintable() for line in plain.split("\n")), plain


def test_on_a_terminal_lines_fit_and_have_colours_unless_no_color_is_set(
    daemon: Daemon, run: str, scratch: Scratch, start_leader: StartLeader
) -> None:
    start_named(start_leader, scratch, daemon, "nightly " * 20)
    coloured = on_a_terminal(run, "ps", width=80, REAPER_SOCKET=daemon.socket)
    bare = on_a_terminal(run, "ps", width=80, REAPER_SOCKET=daemon.socket, NO_COLOR="1")
    assert "\x1b[1m" in coloured
    assert "\x1b" not in bare
    assert max(map(len, bare.split("\n"))) <= 80
    assert "25 %" in bare


# -- with a daemon: events ------------------------------------------------------------------------


def test_events_tell_the_whole_story_of_a_session(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    daemon.wait_event(kind="reaped", session=leader.session)
    said = daemon.ctl("events").stdout.splitlines()
    assert re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  started ", said[0])
    assert re.search(rf"registered .*leader {leader.pid}", said[1])
    assert re.search(r"reaped .*killed by SIGKILL, 2 processes .*gone in .*, freed .* of memory", said[-1])


def test_events_of_one_session_are_found_by_id_by_its_beginning_and_by_name(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader
) -> None:
    alpha = start_named(start_leader, scratch, daemon, "alpha")
    start_named(start_leader, scratch, daemon, "beta")
    for wanted in ("alpha", alpha.session, alpha.session[:-4]):
        found = daemon.ask("events", "--session", wanted)
        assert [one["session"] for one in found] == [alpha.session], wanted
    assert daemon.ask("events", "--session", "gamma") == []


def test_a_long_history_is_read_to_its_end(daemon: Daemon) -> None:
    daemon.reload()
    daemon.wait_event(kind="reload")  # nothing is written while we write
    import sqlite3

    with sqlite3.connect(os.path.join(daemon.state, "reaper.db")) as database:
        for number in range(1200):  # more than one reply holds
            database.execute(
                "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (?, 'stopped', NULL, NULL, ?)",
                (1.0, json.dumps({"at": "1970-01-01T00:00:01Z", "kind": "stopped", "number": number})),
            )
    database.close()
    numbers = [one["number"] for one in daemon.ask("events") if "number" in one]
    assert numbers == list(range(1200))


def test_follow_prints_events_as_they_come(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader, start_ctl: Callable[..., Running]
) -> None:
    running = start_ctl("events", "--follow", "--json", "--since", "1h", "--socket", daemon.socket)
    assert json.loads(running.out())["kind"] == "started"
    leader = start_named(start_leader, scratch, daemon, "alpha")
    assert json.loads(running.out())["session"] == leader.session
    leader.kill9()
    ended = json.loads(running.out())
    assert (ended["session"], ended["cause"]) == (leader.session, {"kind": "signal", "code": 9})
    running.process.send_signal(signal.SIGINT)
    assert running.process.communicate(timeout=WITHIN_S) == (b"", b"")
    assert running.process.returncode == 130


def test_follow_survives_a_restart_of_the_daemon_and_says_so_once(
    daemon: Daemon, start_ctl: Callable[..., Running]
) -> None:
    running = start_ctl("events", "-f", "--since", "1h", "--socket", daemon.socket, "--timeout", "1")
    assert " started " in running.out()
    daemon.stop()
    assert re.fullmatch(r"reaperctl: no daemon answers: .*; waiting for it to come back", running.err())
    daemon.start()
    assert running.err() == "reaperctl: the daemon is back"
    assert running.out().endswith("  stopped")
    assert " started " in running.out()


def test_follow_misses_nothing_when_the_daemon_is_killed(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader, start_ctl: Callable[..., Running]
) -> None:
    leader = start_named(start_leader, scratch, daemon, "alpha")
    running = start_ctl(
        "events", "-f", "--since", "1h", "--json", "--socket", daemon.socket, "--timeout", "1"
    )
    kinds = [json.loads(running.out())["kind"] for _ in range(2)]
    daemon.kill9()
    leader.kill9()
    daemon.start()
    kinds += [json.loads(running.out())["kind"] for _ in range(2)]
    assert kinds[:2] == ["started", "registered"]
    assert set(kinds[2:]) == {"started", "ended"}


def test_follow_into_a_closed_pipe_ends_quietly_at_the_next_event(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader, start_ctl: Callable[..., Running]
) -> None:
    running = start_ctl("events", "-f", "--since", "1h", "--socket", daemon.socket)
    assert " started " in running.out()
    assert running.process.stdout is not None
    running.process.stdout.close()
    running.process.stdout = None
    start_named(start_leader, scratch, daemon, "alpha")
    _, err = running.process.communicate(timeout=WITHIN_S)
    assert (running.process.returncode, err) == (141, b"")


# -- with a daemon: stop --------------------------------------------------------------------------


def test_stop_ends_a_session_and_tells_what_became_of_it(daemon: Daemon, start_leader: StartLeader) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    done = daemon.ctl("stop", leader.session)
    assert done.returncode == 0, done
    assert re.fullmatch(
        r"stopped .*: killed by SIGTERM, stopped by uid 0, 2 processes \(.*\), gone in .*, freed .* of memory.*\n",
        done.stdout,
    ), done.stdout
    assert leader.still_alive([leader.pid, *leader.family.workers]) == []


@pytest.mark.parametrize("by", ["name", "beginning"])
def test_stop_takes_a_name_or_the_beginning_of_an_id(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader, by: str
) -> None:
    other = start_named(start_leader, scratch, daemon, "beta")
    leader = start_named(start_leader, scratch, daemon, "alpha")
    done = daemon.ctl("stop", "alpha" if by == "name" else leader.session[:-1])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"stopped alpha ({leader.session}): killed by SIGTERM, stopped by uid 0\n"
    assert other.still_alive([other.pid]) == [other.pid]


def test_stop_of_an_ambiguous_name_is_a_usage_error_and_ends_nobody(
    daemon: Daemon, scratch: Scratch, start_leader: StartLeader
) -> None:
    leaders = [start_named(start_leader, scratch, daemon, "twin") for _ in range(2)]
    done = daemon.ctl("stop", "twin")
    assert (done.returncode, done.stdout) == (2, "")
    assert all(leader.session in done.stderr for leader in leaders)
    assert all(leader.still_alive([leader.pid]) for leader in leaders)


def test_stop_of_an_unknown_session_fails(daemon: Daemon) -> None:
    done = daemon.ctl("stop", "nobody\x1b[2J")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no session" in done.stderr
    assert "\x1b" not in done.stderr


def test_stop_that_waits_too_short_says_what_is_going_on_and_fails(
    start_daemon: StartDaemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    daemon = start_daemon(config='[kill]\ngrace = "20s"\n')
    script = scratch.file("deaf.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + NAMED)
    start_leader(script, "deaf", socket=daemon.socket)
    done = daemon.ctl("stop", "deaf", "--wait", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "was not gone after 1 s" in done.stderr


@pytest.mark.needs_root
def test_another_users_session_may_be_seen_but_not_stopped(
    daemon: Daemon, run: str, scratch: Scratch, start_leader: StartLeader
) -> None:
    leader = start_named(start_leader, scratch, daemon, "alpha")
    done = ctl(run, "stop", "alpha", uid=SOMEBODY, REAPER_SOCKET=daemon.socket)
    assert (done.returncode, done.stdout) == (4, "")
    assert "another user" in done.stderr
    assert leader.still_alive([leader.pid]) == [leader.pid]
    assert "(command line not shown)" in ctl(run, "ps", uid=SOMEBODY, REAPER_SOCKET=daemon.socket).stdout


def test_a_dry_run_daemon_refuses_to_stop_anything(
    start_daemon: StartDaemon, scratch: Scratch, start_leader: StartLeader
) -> None:
    daemon = start_daemon("--dry-run")
    start_named(start_leader, scratch, daemon, "alpha")
    done = daemon.ctl("stop", "alpha")
    assert done.returncode == 4
    assert "dry" in daemon.ctl("status").stdout


def test_config_show_prints_what_the_daemon_uses(daemon: Daemon, run: str, scratch: Scratch) -> None:
    path = scratch.file("shown.toml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(daemon.ctl("config", "show").stdout)
    assert ctl(run, "config", "check", path).returncode == 0
    assert daemon.ask("config", "show")["scan"]["interval"] in ("200ms", 0.2, "0.2s")
