"""``reaperctl run``: the command notices nothing but its marks, is started again where it fails, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Cgroup, Daemon, children_of, entering, repeat_until, test_environment, wait_gone

import agent

ZOO = os.path.join(os.path.dirname(os.path.dirname(__file__)), "support", "zoo")
CTL = [sys.executable, "-m", "reaperd.ctl.main"]
WITHIN_S = 60.0
NO_DAEMON = "/nonexistent/reaper.sock"


class Run:
    """A run of zoo/command.py."""

    def __init__(
        self,
        run: str,
        folder: Path,
        words: Sequence[str],
        *options: str,
        socket: str = NO_DAEMON,
        within: Sequence[str] = (),
        **how: Any,
    ) -> None:
        self.folder = folder
        self._said = folder / "said"  # no pipe: what is spared would hold it open
        with open(self._said, "wb") as said:
            self.process = subprocess.Popen(
                [
                    *within, *CTL, "run", *options, "--",
                    sys.executable, "-W", "ignore", os.path.join(ZOO, "command.py"), str(folder), *words,
                ],
                env=test_environment(run, REAPER_SOCKET=socket),
                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": said, "start_new_session": True, **how},
            )  # fmt: skip

    def told(self, number: int = 1) -> dict[str, Any]:
        """Return what an attempt has told that has ended, or is ready."""
        found: dict[str, Any] = json.loads((self.folder / f"told.{number}").read_text())
        return found

    def hear(self, word: str) -> int:
        """Return the number that the command says next with ``word``."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], WITHIN_S)[0], (
            f"it never said {word!r}: {self.said}"
        )
        line = self.process.stdout.readline()
        assert line, f"it ended and never said {word!r}: {self.said}"
        (found,) = json.loads(line).items()
        assert found[0] == word, line
        return int(found[1])

    def ready(self) -> int:
        """Return the pid of the command once it waits for a signal."""
        return self.hear("ready")

    def leave(self) -> None:
        """Let a command that was signalled go on to its end."""
        with open(self.folder / "leave", "wb"):
            pass

    def end(self) -> tuple[int, str]:
        """Return the exit status, negative for a signal, and what was said."""
        return self.process.wait(WITHIN_S), self.said

    def heard_to_the_end(self) -> list[str]:
        """Return what else the command has said; nobody else may have its standard output by now."""
        assert self.process.stdout is not None
        return [line.decode() for line in self.process.stdout]

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def attempts(self) -> int:
        return len(list(self.folder.glob("told.*")))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def start(run: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with contextlib.ExitStack() as stack:

        def begin(words: str, *options: str, **how: Any) -> Run:
            one = Run(run, tmp_path, words.split(), *options, **how)
            stack.callback(one.close)
            return one

        yield begin


# -- the command, and its session -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "status"),
    [("exit:0", 0), ("exit:3", 3), ("signal:9", -9), ("signal:11", -11), ("signal:15", -15)],
)
def test_it_ends_as_the_command_did(start: Callable[..., Run], word: str, status: int) -> None:
    assert start(word).end()[0] == status


def test_what_the_command_registers_is_the_same_session(start: Callable[..., Run], daemon: Daemon) -> None:
    one = start("wait", "--name", "nightly", "--restart", "on-failure:2", socket=daemon.socket)
    pid, told = one.ready(), one.told()
    (session,) = daemon.sessions()
    assert (session["id"], session["name"], session["leader"]["pid"]) == (told["session"], "nightly", pid)
    assert told["name"] == "nightly"
    assert session["progress"] == {"done": 1, "total": 1, "message": "wait"}
    assert session["attempt"] == {"number": 1, "most": 3}
    assert len(daemon.events(kind="registered")) == 1
    page = next(
        number for number in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:reaper:")
    )  # fmt: skip
    # A program that registers is what every leader is: nobody inherits its page, and nobody writes to it.
    flags = Path(f"/proc/{pid}/fdinfo/{page}").read_text().split("flags:")[1].split()[0]
    assert int(flags, 8) & os.O_CLOEXEC
    with pytest.raises(PermissionError), open(f"/proc/{pid}/fd/{page}", "r+b", buffering=0) as file:
        file.write(b"x")
    one.process.send_signal(signal.SIGTERM)
    assert one.hear("signal") == signal.SIGTERM
    one.leave()
    assert one.end()[0] == 143


def test_a_command_that_never_registers_is_a_session_too(run: str, daemon: Daemon) -> None:
    script = 'test -n "$REAPER_LINEAGE" && kill -9 $$'
    ended = subprocess.run(
        [*CTL, "--socket", daemon.socket, "run", "sh", "-c", f"sleep 1000 & {script}"],
        env=test_environment(run),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=WITHIN_S,
        check=False,
    )
    assert ended.returncode == -9
    assert b"sh: left 1 process, which had to be ended" in ended.stderr
    event = daemon.wait_event(kind="reaped", name="sh")
    assert [one["result"] for one in event["processes"]] == ["killed"]
    assert event["attempt"] == {"number": 1, "most": 1}


def test_a_training_session_in_the_command_does_not_end_its_session(run: str, daemon: Daemon) -> None:
    script = (
        "import agent\n"
        "with agent.training_session() as one: first = one.session.id\n"
        "print(first == agent.register().id)"
    )
    ended = subprocess.run(
        [*CTL, "run", sys.executable, "-W", "ignore", "-c", script],
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=True,
    )
    assert ended.stdout == "True\n"
    assert len(daemon.events(kind="registered")) == 1


def test_what_a_worker_registers_below_the_command_is_a_session_of_its_own(run: str, daemon: Daemon) -> None:
    script = f'"{sys.executable}" -c "import agent; print(agent.register().id)"; echo $REAPER_LINEAGE; exit 0'
    ended = subprocess.run(
        [*CTL, "--socket", daemon.socket, "run", "sh", "-c", script],
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=True,
    )
    inner, outer = ended.stdout.split()
    assert inner != outer
    assert len(daemon.events(kind="registered")) == 2


def test_limits_reach_the_command(start: Callable[..., Run]) -> None:
    one = start("exit:0", "--max-workers", "1")
    assert one.end()[0] == 0
    assert (one.told()["workers"], one.told()["cpus"], one.told()["n_jobs"]) == ("1", "1", 1)


def test_without_a_daemon_it_says_so_once_and_who_cleans_up(start: Callable[..., Run]) -> None:
    said = start("exit:1 exit:0", "--restart", "on-failure:1", "--backoff", "0.05").end()[1]
    assert said.count("no Reaper daemon watches this session") == 1
    assert "ended by `reaperctl run` itself" in said


# -- again ----------------------------------------------------------------------------------------


def test_after_a_failure_it_begins_again_and_ends_well(start: Callable[..., Run], daemon: Daemon) -> None:
    one = start("left left exit:0", "--restart", "on-failure:3", "--backoff", "0.05", socket=daemon.socket)
    try:
        status, said = one.end()
        assert status == 0, said
        first, second, last = (one.told(number) for number in (1, 2, 3))
        assert [second["lost"], last["lost"]] == [[], []]
        assert one.attempts == 3
        assert len({told["session"] for told in (first, second, last)}) == 3
        assert said.count("left 3 processes, which had to be ended") == 2
        ends = [daemon.wait_end(told["session"]) for told in (first, second, last)]
        assert [end["attempt"] for end in ends] == [{"number": number, "most": 4} for number in (1, 2, 3)]
        assert [end["kind"] for end in ends] == ["reaped", "reaped", "ended"]
        spared = [*first["spared"], *second["spared"]]
        assert wait_gone(spared, 0.0) == spared
    finally:
        _end([*one.told(1)["spared"], *one.told(2)["spared"]])


def test_without_a_daemon_nothing_but_what_was_spared_is_left_either(start: Callable[..., Run]) -> None:
    one = start("left exit:0", "--restart", "on-failure:1", "--backoff", "0.05")
    try:
        status, said = one.end()
        assert status == 0, said
        assert one.told(2)["lost"] == []
        assert "left 3 processes, which had to be ended" in said
        assert wait_gone(one.told(1)["spared"], 0.0) == one.told(1)["spared"]
    finally:
        _end(one.told(1)["spared"])


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert wait_gone(pids, WITHIN_S) == []


def test_a_crash_loop_is_stopped(start: Callable[..., Run]) -> None:
    one = start("exit:7", "--restart", "on-failure:50", "--backoff", "0.05")
    status, said = one.end()
    assert (status, one.attempts) == (7, 3)
    assert "it failed in the same way 3 times in a row" in said


def test_no_more_restarts_than_were_asked_for(start: Callable[..., Run]) -> None:
    one = start("exit:1 exit:2 exit:3", "--restart", "on-failure:1", "--backoff", "0.05")
    status, said = one.end()
    assert (status, one.attempts) == (2, 2)
    assert "that was the last of 2 attempts" in said


@pytest.mark.needs_root
def test_after_an_oom_kill_it_begins_again_with_half_the_workers(
    start: Callable[..., Run], memory_cgroup: Callable[[str], Cgroup]
) -> None:
    group = memory_cgroup("halved")
    limit = 96 << 20
    group.limit_memory(limit)
    one = start(
        f"eat:{4 * limit} exit:0", "--restart", "on-failure:2", "--backoff", "0.05", "--max-workers", "2",
        within=entering([group], []),
    )  # fmt: skip
    status, said = one.end()
    assert status == 0, said
    assert "was killed by SIGKILL" in said
    assert "out of memory: with at most 1 worker" in said
    assert [one.told(number)["workers"] for number in (1, 2)] == ["2", "1"]
    assert [one.told(number)["cpus"] for number in (1, 2)] == ["2", "1"]


def test_a_sigkill_of_somebodys_is_not_called_out_of_memory(start: Callable[..., Run]) -> None:
    one = start("signal:9 exit:0", "--restart", "on-failure:1", "--backoff", "0.05", "--max-workers", "2")
    status, said = one.end()
    assert status == 0
    assert "out of memory" not in said
    assert one.told(2)["workers"] == "2"


# -- who wants an end -----------------------------------------------------------------------------


def test_a_signal_is_passed_on_once_and_is_the_end(start: Callable[..., Run]) -> None:
    one = start("stubborn", "--restart", "on-failure:3", "--backoff", "0.05")
    one.ready()
    one.process.send_signal(signal.SIGUSR1)
    assert one.hear("signal") == signal.SIGUSR1
    one.process.send_signal(signal.SIGINT)
    assert one.hear("signal") == signal.SIGINT
    one.leave()
    status, said = one.end()
    assert (status, one.attempts, one.heard_to_the_end()) == (1, 1, []), said


def test_ctrl_c_reaches_the_command_once_and_is_the_end_whatever_it_exits_with(
    start: Callable[..., Run],
) -> None:
    controller, terminal = pty.openpty()
    try:
        one = start(
            "stubborn", "--restart", "on-failure:3", "--backoff", "0.05",
            stdin=terminal, stderr=terminal, preexec_fn=lambda: _take_terminal(terminal),
        )  # fmt: skip
        one.ready()
        one.process.send_signal(signal.SIGSTOP)  # else the second one might be one with the first
        os.write(controller, b"\x03")
        assert one.hear("signal") == signal.SIGINT
        one.process.send_signal(signal.SIGCONT)
        repeat_until(lambda: _has_taken(one.process.pid, signal.SIGINT), WITHIN_S, "it never takes Ctrl-C")
        one.leave()
        assert one.process.wait(WITHIN_S) == 1
        assert (one.attempts, one.heard_to_the_end()) == (1, [])
    finally:
        os.close(controller)
        os.close(terminal)


def _has_taken(pid: int, number: int) -> bool | None:
    """Say that a process has none of a signal pending; None while it has."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return None if int(status["ShdPnd"], 16) >> (number - 1) & 1 else True


def _take_terminal(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_signal_between_two_attempts_is_the_end(start: Callable[..., Run]) -> None:
    one = start("exit:1", "--restart", "on-failure:3", "--backoff", "1000", stderr=subprocess.PIPE)
    assert one.process.stderr is not None
    while b"starting again in" not in (line := one.process.stderr.readline()):
        assert line, "it never said that it begins again"
    one.process.send_signal(signal.SIGTERM)
    assert one.end()[0] == -signal.SIGTERM
    assert one.attempts == 1


def test_a_run_that_is_stopped_through_the_daemon_does_not_begin_again(
    start: Callable[..., Run], daemon: Daemon
) -> None:
    one = start("stubborn", "--restart", "on-failure:3", "--backoff", "0.05", socket=daemon.socket)
    one.ready()
    stopping = threading.Thread(target=lambda: codes.append(daemon.ctl("stop", "command.py").returncode))
    codes: list[int] = []
    stopping.start()
    assert one.hear("signal") == signal.SIGTERM
    one.leave()
    stopping.join(WITHIN_S)
    assert codes == [0]
    assert one.end()[0] == 1
    assert one.attempts == 1


def test_the_command_does_not_outlive_it(start: Callable[..., Run]) -> None:
    one = start("wait")
    pid = one.ready()
    one.process.kill()
    assert one.hear("signal") == signal.SIGTERM
    one.leave()
    assert wait_gone([pid], WITHIN_S) == []


def test_what_is_ignored_and_blocked_is_for_the_command_what_it_is_without_it(run: str) -> None:
    """A SIGPIPE that stayed ignored, as Python has it, would keep a shell's `yes | head` from ending."""
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    asked = ["grep", "-E", "^Sig(Ign|Blk|Cgt)", "/proc/self/status"]
    plain, ours = (
        subprocess.run(
            [*shell, *within, *asked],
            env=test_environment(run, REAPER_SOCKET=NO_DAEMON),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WITHIN_S,
            check=True,
        ).stdout
        for within in ([], [*CTL, "run", "--"])
    )
    assert plain == ours
    ignored = ours.split(b"SigIgn:\t")[1].split()[0]
    assert int(ignored, 16) & 1 << (signal.SIGHUP - 1)
    assert not int(ignored, 16) & 1 << (signal.SIGPIPE - 1)


def test_what_loses_its_parent_below_the_run_is_waited_for(run: str) -> None:
    """Who adopts must wait, or zombies pile up for as long as the training lasts."""
    script = "for i in 1 2 3; do (sh -c 'exit 0' &) ; done; echo begun; read line; ps -o stat= --ppid $PPID"
    with subprocess.Popen(
        [*CTL, "run", "sh", "-c", script],
        env=test_environment(run, REAPER_SOCKET=NO_DAEMON),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        repeat_until(
            lambda: len(children_of(process.pid)) == 1 or None, WITHIN_S, "the dead are never waited for"
        )
        stdout, _ = process.communicate(b"\n", WITHIN_S)
        assert b"Z" not in stdout


# -- what a script may do to its session ----------------------------------------------------------

ODD = {
    # Named in the page alone: it was given an environment from before.
    "spares with a copied environment": """
        environment = dict(os.environ)
        with agent.spared():
            tell(subprocess.Popen(SLEEP, env=environment).pid)
        os.kill(os.getpid(), 9)
    """,
    # Its environment is the one that the leader was run with, which says whose it was.
    "forks after unregister()": """
        agent.unregister()
        if (pid := os.fork()) == 0:
            signal.pause()
        tell(pid)
        os.kill(os.getpid(), 9)
    """,
    "has a session after another": """
        with agent.training_session():
            pass
        with agent.training_session("second"):
            tell(subprocess.Popen(SLEEP).pid)
            os.kill(os.getpid(), 9)
    """,
    "goes on after a session": """
        with agent.training_session():
            pass
        tell(subprocess.Popen(SLEEP).pid)
        os.kill(os.getpid(), 9)
    """,
    "registers anew": """
        agent.unregister()
        agent.register("second")
        tell(subprocess.Popen(SLEEP).pid)
        os.kill(os.getpid(), 9)
    """,
    "execs itself": """
        if len(sys.argv) < 2:
            os.execv(sys.executable, [sys.executable, "-W", "ignore", sys.argv[0], "again"])
        tell(subprocess.Popen(SLEEP).pid)
        os.kill(os.getpid(), 9)
    """,
}
LEFT_ALONE = ("spares with a copied environment", "forks after unregister()")


@pytest.mark.parametrize("watched", [False, True], ids=["without a daemon", "with one"])
@pytest.mark.parametrize("what", ODD)
def test_what_a_script_does_to_its_session_is_heeded(
    what: str, watched: bool, run: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script, told = tmp_path / "odd.py", tmp_path / "pid"
    head = f"""
import agent, os, signal, subprocess, sys
SLEEP = [sys.executable, "-c", "import signal; signal.pause()"]

def tell(pid):
    with open({str(told)!r}, "w") as file:
        file.write(str(pid))

agent.register("first")
"""
    script.write_text(head + textwrap.dedent(ODD[what]))
    daemon: Daemon | None = request.getfixturevalue("daemon") if watched else None
    ended = subprocess.run(
        [*CTL, "run", "--", sys.executable, "-W", "ignore", str(script)],
        env=test_environment(run, REAPER_SOCKET=daemon.socket if daemon else NO_DAEMON),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=WITHIN_S,
        check=False,
    )
    assert ended.returncode == -9
    pid = int(told.read_text())
    try:
        if daemon is not None:
            repeat_until(lambda: daemon.sessions() == [] or None, WITHIN_S, "a session is not over")
        assert wait_gone([pid], 0.0 if what in LEFT_ALONE else WITHIN_S) == [pid] * (what in LEFT_ALONE)
    finally:
        _end([pid])


def test_a_signal_that_is_ignored_stops_no_restart(start: Callable[..., Run]) -> None:
    """nohup is how trainings are started that are to outlive the terminal."""
    one = start(
        "wait exit:0", "--restart", "on-failure:1", "--backoff", "0.05", within=["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    )  # fmt: skip
    pid = one.ready()
    one.process.send_signal(signal.SIGHUP)
    os.kill(pid, signal.SIGKILL)
    status, said = one.end()
    assert (status, one.attempts) == (0, 2), said


def test_a_run_that_a_later_daemon_stops_does_not_begin_again(
    start: Callable[..., Run], start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon(started=False)
    one = start("stubborn", "--restart", "on-failure:3", "--backoff", "0.05", socket=daemon.socket)
    one.ready()
    daemon.start()
    repeat_until(lambda: daemon.sessions() or None, WITHIN_S, "the daemon does not adopt the session")
    codes: list[int] = []
    stopping = threading.Thread(target=lambda: codes.append(daemon.ctl("stop", "command.py").returncode))
    stopping.start()
    assert one.hear("signal") == signal.SIGTERM
    one.leave()
    stopping.join(WITHIN_S)
    assert codes == [0]
    status, said = one.end()
    assert (status, one.attempts) == (1, 1), said


def test_ctrl_c_is_passed_on_to_a_command_that_has_left_the_process_group(run: str) -> None:
    controller, terminal = pty.openpty()
    script = "import os, signal, time; os.setpgid(0, 0); print('begun', flush=True); signal.pause()"
    try:
        with subprocess.Popen(
            [*CTL, "run", "--", sys.executable, "-c", script],
            env=test_environment(run, REAPER_SOCKET=NO_DAEMON),
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(terminal),
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            os.write(controller, b"\x03")
            assert process.wait(WITHIN_S) == -signal.SIGINT
    finally:
        os.close(controller)
        os.close(terminal)


@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-"])
def test_the_page_is_no_standard_file_of_the_command(closed: str, run: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2 > {told}; exit 0"
    subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *CTL, "run", "sh", "-c", command],
        env=test_environment(run, REAPER_SOCKET=NO_DAEMON),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=WITHIN_S,
        check=True,
    )
    assert "memfd" not in told.read_text()


# -- what cannot be run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "run: which command?"),
        (["--", "no-such-command"], 127, "there is no command 'no-such-command'"),
        (["/etc/passwd"], 126, "/etc/passwd: may not be executed"),
        (["/etc"], 126, "/etc: is a folder"),
        ([""], 127, "there is no command ''"),
        (["--restart", "always", "true"], 2, "must be on-failure, on-failure:N or no, got 'always'"),
        (["--restart", "on-failure:0", "true"], 2, "must be a whole number of at least 1, got '0'"),
        (["--restart", "on-failure:9999", "true"], 2, "must be at most on-failure:1000"),
        (["--max-workers", "none", "true"], 2, "must be a whole number of at least 1, got 'none'"),
        (["--backoff", "0", "true"], 2, "must be a number of seconds, more than 0"),
        (["--name", "x" * 201, "true"], 2, "must have 1 to 200 characters"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(run: str, words: list[str], code: int, sentence: str) -> None:
    ended = _run_alone(run, *words)
    assert ended.returncode == code
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_script_without_a_first_line_is_a_sentence(run: str, tmp_path: Path) -> None:
    script = tmp_path / "train"
    script.write_bytes(b"\x00\x01")
    script.chmod(0o755)
    ended = _run_alone(run, str(script))
    assert ended.returncode == 126
    assert "Exec format error" in ended.stderr


def _run_alone(run: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CTL, "run", *words],
        env=test_environment(run, REAPER_SOCKET=NO_DAEMON),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


STATUS_FILES = [
    ("agent.register(); agent.progress(3, 4, 'x')", "completed", {"kind": "exit", "code": 0}),
    ("os.kill(os.getpid(), 9)", "killed", {"kind": "signal", "code": 9}),
    ("os.kill(os.getpid(), 15)", "interrupted", {"kind": "signal", "code": 15}),
    ("raise SystemExit(3)", "failed", {"kind": "exit", "code": 3}),
]


@contextlib.contextmanager
def _telling(run: str, socket: str, path: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script that prints the state that its status file tells, then does what ``script`` says."""
    look = f"import agent, os, sys; print(agent.read_status({str(path)!r}).state, flush=True)"
    with subprocess.Popen(
        [*CTL, "run", f"--status-file={path}", "--", sys.executable, "-c", f"{look}; {script}"],
        env=test_environment(run, REAPER_SOCKET=socket, PYTHONWARNINGS="ignore"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process


def _tell_how_they_end(
    run: str, socket: str, folder: Path, cases: list[tuple[str, str, dict[str, Any]]]
) -> None:
    with contextlib.ExitStack() as stack:  # at once: each is mostly waited for
        runs = [
            stack.enter_context(_telling(run, socket, folder / state, script)) for script, state, _ in cases
        ]
        said = [one.communicate(timeout=WITHIN_S) for one in runs]
    for (_, state, cause), (printed, errors) in zip(cases, said, strict=True):
        assert printed == "running\n", errors
        found = agent.read_status(folder / state)
        assert (found.state, found.cause) == (state, cause)
        assert (found.progress or {}).get("done") == (3 if state == "completed" else None)


def test_a_status_file_says_that_the_command_runs_and_how_it_ended(run: str, tmp_path: Path) -> None:
    _tell_how_they_end(run, NO_DAEMON, tmp_path, STATUS_FILES)


def test_a_status_file_is_as_true_with_a_daemon_which_ends_it_where_the_run_is_killed_with_its_command(
    run: str, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    with _telling(run, daemon.socket, path, "import time; time.sleep(60)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        session = agent.read_status(path).session
        os.killpg(process.pid, signal.SIGKILL)
        _tell_how_they_end(run, daemon.socket, tmp_path, STATUS_FILES[:2])
    daemon.wait_end(session)
    assert json.loads(path.read_text())["state"] == "killed"


def test_the_status_file_of_a_command_that_cannot_be_run_says_that_it_failed(
    run: str, tmp_path: Path
) -> None:
    path, command = tmp_path / "run.json", tmp_path / "command"
    command.write_text("#!/nonexistent/interpreter\n")
    command.chmod(0o755)
    done = _run_alone(run, f"--status-file={path}", "--", str(command))
    assert done.returncode == 127
    found = agent.read_status(path)
    assert (found.state, found.error) == ("failed", f"{command}: No such file or directory")


def test_a_status_file_that_cannot_be_written_is_a_sentence(run: str) -> None:
    done = _run_alone(run, "--status-file=/nonexistent/run.json", "--", "true")
    assert done.returncode == 1
    assert "cannot write /nonexistent/run.json: No such file or directory" in done.stderr
