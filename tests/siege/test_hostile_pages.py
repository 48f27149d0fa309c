"""A session page is whatever its owner makes of it: none stops, blocks or misleads the core, or reaches another user."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attackers import Attacker, Siege, answers
from harness import (
    NEIGHBOUR,
    SETTINGS,
    STRANGER,
    WORKERS_GONE_S,
    Cgroup,
    Daemon,
    Leader,
    Scratch,
    broken_promise,
    has_ended,
    needed_interpreter,
    test_environment,
    wait_gone,
)

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

pytestmark = pytest.mark.needs_root

FINISHED = "29999-1-00000000-00000000"


@pytest.fixture
def attack(scratch: Scratch) -> Iterator[Callable[..., Attacker]]:
    with contextlib.ExitStack() as stack:
        yield lambda daemon, kind, **options: stack.enter_context(Attacker(daemon, kind, **options))


@pytest.fixture
def lay_siege(start_leader: StartLeader) -> Iterator[Callable[..., Siege]]:
    with contextlib.ExitStack() as stack:
        yield lambda daemon, **settings: stack.enter_context(Siege(daemon, start_leader, **settings))


def signalled(daemon: Daemon) -> set[int]:
    """Return the pids that the daemon's log says it has signalled."""
    return {int(pid) for pid in re.findall(r"sent SIG\w+ pid=(\d+)", daemon.read_log())}


# -- everything that could pass for a page --------------------------------------------------------


@pytest.mark.parametrize("when", ["before the daemon starts", "while it runs"])
def test_nothing_that_bears_a_page_s_name_misleads_the_core(
    when: str,
    start_daemon: StartDaemon,
    start_leader: StartLeader,
    lay_siege: Callable[..., Siege],
    attack: Callable[..., Attacker],
    scratch: Scratch,
) -> None:
    daemon = start_daemon()
    finished = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR)
    finished.kill9()
    assert broken_promise(finished) == ""
    daemon.wait_end(finished.session)
    siege = lay_siege(daemon, victims=2)
    options = {
        "victim": siege.stays.session,
        "innocent": siege.victims[0].pid,
        "finished": finished.session,
        "directory": scratch.directory("names", 0o777),
        "numbers": [1000, 5000, 12_000],
    }
    if when == "before the daemon starts":
        daemon.stop()
        attacker = attack(daemon, "pages", **options)
        assert attacker.read_line()["ready"] > 100
        daemon.start()  # READY comes after the first sweep, in time
        siege.watch.renew()
    else:
        attacker = attack(daemon, "pages", **options)
        assert attacker.read_line()["ready"] > 100
        daemon.wait_event(uid=STRANGER, kind="registered", adopted=True)  # a sweep has seen them
    siege.reap()
    assert answers(daemon) < 5
    lies = [
        event for event in daemon.events() if str(event.get("session")).endswith(("-0000b007", "-0000b008"))
    ]
    assert not lies, "of another boot, or of another daemon"
    theirs = {session["uid"] for session in daemon.sessions()} - {NEIGHBOUR}
    assert theirs <= {STRANGER}
    told = [event for event in daemon.events() if event.get("session") == siege.stays.session]
    assert {event["uid"] for event in told} == {NEIGHBOUR}
    # Another user's session of the same id is another one.
    ended = [event for event in daemon.events(session=finished.session) if event["uid"] == NEIGHBOUR]
    assert [event["kind"] for event in ended] == ["registered", "reaped"], "it is over, whoever bears its id"
    attacker.close()
    for session in daemon.sessions():
        if session["uid"] == STRANGER:
            daemon.wait_end(session["id"])
    siege.check()
    ours = {pid for leader in (finished, siege.stays, *siege.reaped) for pid in leader.family.everyone}
    assert signalled(daemon) <= ours
    assert set(finished.family.everyone) <= signalled(daemon)


def test_thousands_of_pages_in_one_process_delay_no_reap(
    start_daemon: StartDaemon,
    lay_siege: Callable[..., Siege],
    attack: Callable[..., Attacker],
    scratch: Scratch,
) -> None:
    daemon = start_daemon()
    siege = lay_siege(daemon, victims=4)
    attacker = attack(
        daemon,
        "pages",
        victim=siege.stays.session,
        innocent=siege.stays.pid,
        finished=FINISHED,
        directory=scratch.directory("names", 0o777),
        many=2500,
    )
    while siege.victims:  # at their making, in the sweep that finds them, and while what they named is reaped
        siege.reap()
    assert attacker.read_line()["ready"] > 2500
    daemon.wait_event(uid=STRANGER, kind="registered", adopted=True)
    assert answers(daemon) < 5
    attacker.close()
    siege.check()


# -- pages of real leaders ------------------------------------------------------------------------

PRELUDE = """
import ctypes, fcntl, json, os, subprocess, sys, threading, time
import agent
from agent import session as inside, wire
def up(**facts):
    lineage = os.environ.get("REAPER_LINEAGE")
    print(json.dumps(dict(leader=os.getpid(), pids=dict(worker=WORKERS), lineage=lineage, **facts)), flush=True)
    sys.stdin.readline()
def fork():
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(told, b".")
        time.sleep(150)
        os._exit(0)
    os.read(ready, 1)
    WORKERS.append(pid)
WORKERS = []
"""


@pytest.fixture
def start_code(start_leader: StartLeader, scratch: Scratch) -> Callable[..., Leader]:
    """Start a training script of which the code is given: it forks its workers, then calls ``up()``."""

    def start(code: str, **settings: Any) -> Leader:
        path = scratch.file(f"script{time.monotonic_ns()}.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(PRELUDE + code)
        return start_leader(path, **settings)

    return start


TEARS = """
agent.register("torn")
fork(); fork()
def tear():
    memory, number = inside._process.page._memory, 1
    while True:
        memory[8:12] = (number & 0xFFFFFFFF).to_bytes(4, "little")
        number += 2
threading.Thread(target=tear, daemon=True).start()
up()
"""
REPLACES = """
agent.register("replaced")
fork()
page = inside._process.page
other = os.memfd_create("reaper:1-1-00000000-00000001", os.MFD_ALLOW_SEALING)
os.ftruncate(other, 4096)
fcntl.fcntl(other, 1033, 0x17)
os.dup2(other, page.fd)
fork()
up()
"""
LIES = """
agent.register("lies")
fork(); fork()
memory = inside._process.page._memory
record = json.dumps(dict(v=1, id=VICTIM, name="victim", start_ticks=1, boot_id="x", fd=0, sockets=["/x"])).encode()
memory[64:64 + len(record)] = record
memory[16:18] = len(record).to_bytes(2, "little")
up()
"""


@pytest.mark.parametrize(
    "code", [TEARS, REPLACES, LIES], ids=["torn for ever", "replaced", "another's record"]
)
def test_what_becomes_of_a_page_after_registration_changes_no_reap(
    code: str, daemon: Daemon, start_code: Callable[..., Leader], lay_siege: Callable[..., Siege]
) -> None:
    siege = lay_siege(daemon)
    leader = start_code(code.replace("VICTIM", repr(siege.stays.session)), socket=daemon.socket, uid=STRANGER)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    assert wait_gone(leader.family.workers, WORKERS_GONE_S) == []
    assert daemon.wait_end(leader.session)["uid"] == STRANGER
    siege.check()


BEYOND = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = [os.dup(0) for _ in range(6000)]
agent.register("beyond")
fork(); fork()
up(page=inside._process.page.fd)
"""


@pytest.mark.parametrize("dies", ["before the daemon starts", "afterwards"])
def test_a_page_behind_thousands_of_descriptors_is_found_by_a_daemon_that_starts_late(
    dies: str, start_daemon: StartDaemon, start_code: Callable[..., Leader]
) -> None:
    daemon = start_daemon(started=False)
    leader = start_code(BEYOND, socket=daemon.socket, uid=NEIGHBOUR)
    assert leader.family.facts["page"] > 6000
    if dies == "before the daemon starts":
        leader.kill9()
    daemon.start()
    if dies == "afterwards":
        assert daemon.session_of(leader.pid) is not None
        leader.kill9()
    assert wait_gone(leader.family.workers, WORKERS_GONE_S) == []
    daemon.wait_end(leader.session)


SAYS = """
agent.register(NAME)
fork()
agent.progress(1, 2, MESSAGE)
page = inside._process.page
if RAW:
    page._memory[2080:2080 + len(RAW)] = RAW
    page._memory[2064:2066] = len(RAW).to_bytes(2, "little")
up()
"""
HOSTILE_TEXT = "a\x1b[2J\x1b]0;owned\x07\x9b31m\r\nroot  fake line\u202egnp.exe\u2066\u200b\U0001f480\x00\x08\x7f\u2028end"


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe\x1b[2J\xed\xa0\x80\xf0\x9f\x92 \x00\n\x9b2J"], ids=["text", "bytes"]
)
def test_no_text_of_a_page_reaches_a_terminal_as_it_is(
    raw: bytes, daemon: Daemon, start_code: Callable[..., Leader]
) -> None:
    name = HOSTILE_TEXT.replace("\0", "")
    code = SAYS.replace("NAME", ascii(name)).replace("MESSAGE", ascii(HOSTILE_TEXT)).replace("RAW", repr(raw))
    leader = start_code(code, socket=daemon.socket, uid=STRANGER)
    for command in (("ps",), ("events",), ("ps", "--json"), ("stop", "\x1b[2J" + name[:20])):
        shown = on_a_terminal(daemon, *command)
        text = re.sub(r"\x1b\[[0-9;]*m", "", shown.replace("\r\n", "\n"))  # colours are reaperctl's own
        assert "\x1b" not in text, repr(shown)
        assert not [c for c in text if not c.isprintable() and c != "\n"], repr(shown)
        assert "stop" in command or "owned" in text, "nothing was shown at all"
        assert not re.search(r"^root  fake line", text, re.MULTILINE)
    leader.kill9()
    assert wait_gone(leader.family.workers, WORKERS_GONE_S) == []
    daemon.wait_end(leader.session)
    assert "\x1b" not in daemon.read_log()


def on_a_terminal(daemon: Daemon, *arguments: str) -> str:
    """Return what ``reaperctl`` prints on a terminal of 300 columns."""
    primary, secondary = pty.openpty()
    environment = test_environment(daemon.run, REAPER_SOCKET=daemon.socket, COLUMNS="300", TERM="xterm")
    with open(primary, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "reaperd.ctl.main", *arguments],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            env=environment,
        )
        os.close(secondary)
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while select.select([screen], [], [], 30)[0] and (chunk := screen.read(65536)):
                data += chunk
        process.wait(10)
    return data.decode("utf-8", "backslashreplace")


NAMED = """
import shutil
hostile = NAME
folder = os.path.join(os.environ["REAPER_TEST_DIR"], hostile)
os.mkdir(folder)
program = os.path.join(folder, hostile)
shutil.copy(shutil.which("sleep"), program)
os.environ["JOBLIB_TEMP_FOLDER"] = folder
session = agent.training_session(hostile, status_file=os.path.join(folder, hostile + ".json"))
session.__enter__()
ctypes.CDLL(None).prctl(15, hostile.encode()[:15], 0, 0, 0)  # PR_SET_NAME
worker = subprocess.Popen([hostile, "150"], executable=program, cwd=folder)
WORKERS.append(worker.pid)
fork()
up(folder=folder)
"""
LINE_OF_OURS = {
    "text": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) ",
    "journal": r"<[3467]>(?!\d{4}-)",
    "json": r'\{"at": "[^"]+", "level": "[a-z]+", "logger": "[a-z._]+", "message": ".*"\}$',
}


@pytest.mark.parametrize("form", LINE_OF_OURS)
def test_names_of_any_kind_forge_no_line_of_the_log_and_reach_no_terminal(
    form: str,
    start_daemon: StartDaemon,
    start_code: Callable[..., Leader],
    monkeypatch: pytest.MonkeyPatch,
    unified_cgroup: Callable[[str], Cgroup],
) -> None:
    """Of a session, a process, its program, its folder, its status file and its cgroup; the kernel forbids line breaks in the last."""
    log_format = "json" if form == "json" else "text"
    settings = SETTINGS.replace("[daemon]", f'[daemon]\nlog_format = "{log_format}"')
    daemon = start_daemon(config=settings, started=False)
    if form == "journal":
        with open(daemon.log, "ab") as log:
            at = os.fstat(log.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{at.st_dev}:{at.st_ino}")
    daemon.start()
    name = "x\n<0>2030-01-01T00:00:00Z ERROR forged\r\x1b[2J\x1b]0;owned\x07\u202e\u2028end"
    group = unified_cgroup("\x1b[2J\x1b]0;owned\x07\u202e")
    leader = start_code(
        NAMED.replace("NAME", ascii(name)), socket=daemon.socket, uid=STRANGER, groups=[group]
    )
    program, forked = leader.family.workers
    daemon.wait_listed(leader.pid, leader.family.workers)
    done = [daemon.ctl("explain", str(program)), daemon.ctl("ps")]
    leader.kill9()
    assert broken_promise(leader) == ""
    daemon.wait_end(leader.session)
    done += [daemon.ctl("explain", str(forked)), daemon.ctl("events")]
    assert "forged" in done[1].stdout
    assert "forged" in done[3].stdout
    for one in done:
        assert all(line.isprintable() for line in one.stdout.splitlines()), one.stdout
        assert not re.search("^(<0>|2030)", one.stdout, re.MULTILINE)
    told = daemon.read_log().partition("\n")[2].splitlines()
    assert any("forged" in line for line in told)
    assert [line for line in told if not re.match(LINE_OF_OURS[form], line) or not line.isprintable()] == []
    status = os.listdir(leader.family.facts["folder"])
    assert [one for one in status if one.endswith(".json")], "its end was written all the same"


# -- another user's name for one's own ------------------------------------------------------------


@pytest.mark.parametrize("dies", ["before the daemon starts", "afterwards"])
def test_another_user_s_page_cannot_take_the_place_of_a_session(
    dies: str, start_daemon: StartDaemon, start_leader: StartLeader, attack: Callable[..., Attacker]
) -> None:
    """Ids are no secret. The daemon has lost its state, and the page that it finds first is a stranger's."""
    daemon = start_daemon()
    squatter = attack(daemon, "squatter")
    squatter.read_line()
    leader = start_leader("kin.py", "everything-left", socket=daemon.socket, uid=NEIGHBOUR)
    assert squatter.pid < leader.pid, "the pids have wrapped: run it again"
    assert leader.session in [session["id"] for session in daemon.ask("ps", uid=STRANGER)]
    daemon.kill9()
    shutil.rmtree(daemon.state)
    squatter.tell(leader.session)
    assert squatter.read_line()["squats"] == 3
    if dies == "before the daemon starts":
        leader.kill9()
    daemon.start()
    if dies == "afterwards":
        session = daemon.session_of(leader.pid)
        assert session is not None, "the session was not adopted"
        assert session["uid"] == NEIGHBOUR
        leader.kill9()
    assert broken_promise(leader) == ""
    assert NEIGHBOUR in {event["uid"] for event in daemon.events(session=leader.session)}


@pytest.mark.parametrize(
    "keeps", [True, False], ids=["and keeps the descriptor", "and closes the descriptor"]
)
def test_a_memfd_of_another_user_makes_nobody_a_member(
    keeps: bool, daemon: Daemon, start_leader: StartLeader, attack: Callable[..., Attacker], scratch: Scratch
) -> None:
    """A service of the victim's maps what a client of another user gives it, named like the victim's page."""
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=NEIGHBOUR)
    at = os.path.join(scratch.directory("service", 0o777), "socket")
    service = attack(daemon, "service", uid=NEIGHBOUR, at=at, keeps=keeps)
    pid = service.read_line()["pid"]
    giver = attack(daemon, "giver", victim=leader.session, to=at)
    assert giver.read_line()["given"]
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        assert f"/memfd:reaper:{leader.session}" in maps.read()
    pidfd = os.pidfd_open(pid)
    try:
        leader.kill9()
        assert broken_promise(leader) == ""
        event = daemon.wait_end(leader.session)
        assert not has_ended(pidfd), event
        assert pid not in [process["pid"] for process in event["processes"]]
    finally:
        os.close(pidfd)


# -- processes that are bad to look at ------------------------------------------------------------


def test_a_process_whose_memory_cannot_be_read_blocks_nobody(
    start_daemon: StartDaemon,
    lay_siege: Callable[..., Siege],
    attack: Callable[..., Attacker],
    scratch: Scratch,
) -> None:
    """Its main thread sleeps, another one waits for a file system with the lock of their memory: state S, for ever."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse")
    daemon = start_daemon()
    siege = lay_siege(daemon, victims=3)
    directory = scratch.directory("stalled")
    holder = attack(
        daemon, "stalled", uid=None, holds=STRANGER, directory=directory, python=needed_interpreter(STRANGER)
    )
    try:
        holder.read_until("holds")
        siege.reap()  # while the scans and the sweeps meet it
        answers(daemon, within_s=6)
        siege.reap()
        daemon.kill9()
        daemon.start()  # its first sweep meets it, too
        siege.watch.renew()
        siege.reap()
    finally:
        holder.close()
    siege.check()


@pytest.mark.parametrize("depth, width", [(3000, 0), (10, 5000)], ids=["deep", "wide"])
def test_a_folder_that_never_ends_costs_only_its_owner(
    depth: int,
    width: int,
    daemon: Daemon,
    lay_siege: Callable[..., Siege],
    attack: Callable[..., Attacker],
    start_leader: StartLeader,
) -> None:
    """What a dead leader left in /dev/shm is measured and removed: it is as deep and as wide as its owner likes."""
    siege = lay_siege(daemon, victims=2)
    leader = start_leader("kin.py", "subprocess", socket=daemon.socket, uid=STRANGER)
    with contextlib.ExitStack() as stack:
        maker = attack(daemon, "deep", leader=leader.pid, depth=depth, width=width)
        folder = os.path.join("/dev/shm", maker.read_line()["made"])
        stack.callback(subprocess.run, ["rm", "-rf", folder], check=False)
        leader.kill9()
        assert wait_gone(leader.family.workers, WORKERS_GONE_S) == []
        siege.reap()
        daemon.wait_end(leader.session, within_s=45)
        siege.reap()
        daemon.kill9()
        daemon.start()  # what is on record must not end the next one either
        siege.watch.renew()
    siege.check()


@pytest.mark.parametrize("registered", [True, False], ids=["of a session", "of nobody"])
def test_processes_that_are_dear_to_look_at_delay_no_reap(
    registered: bool,
    start_daemon: StartDaemon,
    lay_siege: Callable[..., Siege],
    attack: Callable[..., Attacker],
) -> None:
    daemon = start_daemon()
    siege = lay_siege(daemon, victims=3)
    crowd = attack(daemon, "crowd", processes=20, descriptors=5000, mappings=5000, registers=registered)
    while siege.victims:
        siege.reap()
    assert crowd.read_line()["ready"]
    siege.victims = [siege.victim() for _ in range(2)]
    while siege.victims:
        assert answers(daemon) < 5
        siege.reap()
    crowd.close()
    siege.check()
