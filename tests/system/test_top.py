"""The screen of ``reaperctl top`` against a real daemon: driven by Textual's pilot, and on a real terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from harness import (
    RUN_MARK,
    STRANGER,
    Daemon,
    Leader,
    Scratch,
    alive,
    as_user,
    end_leftovers,
    marked,
    needed_interpreter,
    repeat_until,
    test_environment,
    wait_gone,
)
from textual import events

from reaperd.ctl import CommandError
from reaperd.ctl.answers import ask_all
from reaperd.ctl.link import Link
from reaperd.ctl.text import Look
from reaperd.ctl.top import actions
from reaperd.ctl.top.app import Top
from reaperd.ctl.top.dialogs import Ask, Panel
from reaperd.ctl.top.model import Kind, picture
from reaperd.ctl.top.source import Lost, News, Source
from reaperd.ctl.top.widgets import Block, Table

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

WITHIN_S = 30.0
CHARACTERS = {"slash": "/", "question_mark": "?"}
SMALL, LARGE = (80, 24), (200, 50)
# Somebody whose processes nobody else's tests touch: all that a daemon of his may end.
LONER = 1_000_000 + os.getpid()
HOSTILE = "[bold red]x[/] [@click=app.quit]y[/]\x1b]0;owned\x07\x1b[2J\n\u202etxt\x9b31m"
NAMED = """\
import sys, os, agent
agent.register(sys.argv[1])
agent.progress(1, 4, sys.argv[1])
print('{"pids": {}, "leader": %d, "lineage": "%s"}' % (os.getpid(), os.environ["REAPER_LINEAGE"]), flush=True)
sys.stdin.read()
"""
ORPHANS = """\
[scan]
interval = "0.2s"
orphan_age_limit = "1h"
memory_threshold = "1MiB"
[kill]
grace = "1s"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon for all tests that leave it as it was; a leader that a test has ended is reaped by it."""
    mark, scratch = uuid.uuid4().hex[:12], Scratch()
    daemon = Daemon(scratch, mark)
    try:
        yield daemon.start()
    finally:
        daemon.close()
        scratch.remove()
    assert marked(RUN_MARK, mark) == []


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """The shared one, once it has seen to what the test before has left."""
    link = Link([shared.socket], timeout_s=WITHIN_S)
    repeat_until(lambda: not link.ask("ps")["sessions"] or None, WITHIN_S, "no session is left")
    before = len(shared.read_log())
    yield shared
    print(shared.read_log()[before:])


class Watched:
    """A screen, and the pilot that presses its keys."""

    def __init__(self, app: Top, pilot: Any, changed: asyncio.Event) -> None:
        self.app = app
        self.pilot = pilot
        self._changed = changed

    @property
    def table(self) -> Table:
        return self.app.screen_stack[0].query_one(Table)

    def text(self) -> str:
        """Return what is on the screen, line by line."""
        # A screenshot without the picture, which takes long.
        strips = self.app.screen._compositor.render_strips()
        return "\n".join(strip.text.rstrip() for strip in strips)

    def rows(self, kind: Kind) -> list[Any]:
        return [line.row for line in self.table.lines if line.row.kind is kind]

    def pids(self, kind: Kind) -> set[int]:
        return {row.pid for row in self.rows(kind)}

    async def until(self, holds: Callable[[], Any], what: str) -> None:
        """Return once ``holds``, asked after each message that the screen handles."""
        end_s = time.monotonic() + WITHIN_S
        while not holds():
            self._changed.clear()
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"{what}: not within {WITHIN_S:g} s, but\n{self.text()}"
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
        await self.pilot.pause(0)

    async def until_seen(self, *words: str) -> None:
        await self.until(
            lambda: all(word in " ".join(self.text().split()) for word in words), f"to see {words}"
        )

    async def press(self, *keys: str) -> None:
        """Press keys as the pilot does, and wait until each is handled: the pilot waits until the whole process is idle."""
        for key in keys:
            character = CHARACTERS.get(key, key)
            self.app.post_message(events.Key(key, character if len(character) == 1 else None))
            for _ in range(3):  # the app hands it on to the screen, and that to a part
                await self.pilot.pause(0)

    async def choose(self, pid: int, kind: Kind) -> None:
        """Move the cursor to a row."""
        await self.until(lambda: pid in self.pids(kind), f"a row of pid {pid}")
        await self.press("home")
        while self.table.chosen is None or (self.table.chosen.pid, self.table.chosen.kind) != (pid, kind):
            before = self.table.cursor
            await self.press("down")
            assert self.table.cursor > before, self.text()

    async def question(self) -> str:
        await self.until(lambda: isinstance(self.app.screen, Ask), "to be asked")
        return self.dialog()

    def dialog(self) -> str:
        """Return what is on the screen of what has come over it alone."""
        _, top, _, height = place = self.app.screen.query_one(".dialog").region
        lines = self.text().split("\n")[top : top + height]
        return "\n".join(line[place.x : place.right] for line in lines)


@contextlib.asynccontextmanager
async def opened(socket: str, size: tuple[int, int], timeout_s: float = 10.0) -> AsyncIterator[Watched]:
    changed = asyncio.Event()
    app = Top(Link([socket], timeout_s=timeout_s), 0.2)
    async with app.run_test(size=size, message_hook=lambda _: changed.set()) as pilot:
        watched = Watched(app, pilot, changed)
        await watched.until(lambda: app.news or app.lost, "an answer")
        yield watched


def watch(
    socket: str, size: tuple[int, int], look: Callable[[Watched], Coroutine[Any, Any, None]], **more: float
) -> None:
    """Open the screen and have ``look`` use it."""

    async def run() -> None:
        async with opened(socket, size, **more) as watched:
            await look(watched)

    asyncio.run(run())


def start_named(start_leader: StartLeader, scratch: Scratch, daemon: Daemon, name: str) -> Leader:
    script = scratch.file("named.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(NAMED)
    return start_leader(script, name, socket=daemon.socket)


# -- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "200x50"])
def test_a_session_is_seen_and_stops_once_somebody_has_agreed_and_not_before(
    daemon: Daemon, start_leader: StartLeader, size: tuple[int, int]
) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)

    async def look(screen: Watched) -> None:
        await screen.until(lambda: set(leader.family.workers) <= screen.pids(Kind.WORKER), "the workers")
        said = screen.text()
        assert "1 session, 2 workers, " in said
        for pid in (leader.pid, *leader.family.workers):
            assert re.search(rf"[├└]─ +{pid} (leader|worker) .* %  .*iB ", said), said
        assert "running" in said
        assert "registered" in said.partition("EVENTS")[2]
        assert max(map(len, said.splitlines())) <= size[0]

        await screen.choose(leader.family.workers[0], Kind.WORKER)
        await screen.press("x")
        asked = await screen.question()
        assert leader.session in asked
        assert f"pid {leader.pid}" in asked
        assert "2 processes" in asked.replace("\n", " ") or len(leader.family.everyone) != 2
        await screen.press("enter")  # on "No"
        await screen.until_seen("nothing was ended")
        assert leader.still_alive([leader.pid, *leader.family.workers]) == [
            leader.pid,
            *leader.family.workers,
        ]

        await screen.press("x")
        await screen.question()
        await screen.press("y")
        await screen.until_seen("stopped ", "stopped by uid", "reaped")
        assert wait_gone([leader.pid, *leader.family.workers], 0) == []
        await screen.until(lambda: not screen.rows(Kind.SESSION), "the rows to go")

    watch(daemon.socket, size, look)


def test_the_cursor_stays_on_what_it_is_about_and_filter_sort_and_folding_hold(
    daemon: Daemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    leaders = {name: start_named(start_leader, scratch, daemon, name) for name in ("beta", "delta")}

    async def look(screen: Watched) -> None:
        def names() -> list[str]:
            return [row.name for row in screen.rows(Kind.SESSION)]

        await screen.press("N")
        await screen.until(lambda: names() == ["beta", "delta"], "both, by name")
        await screen.choose(leaders["delta"].pid, Kind.LEADER)
        for name in ("alpha", "gamma"):
            leaders[name] = start_named(start_leader, scratch, daemon, name)
        await screen.until(lambda: names() == ["alpha", "beta", "delta", "gamma"], "all four, by name")
        assert screen.table.chosen.pid == leaders["delta"].pid
        leaders["beta"].kill9()
        await screen.until(lambda: "beta" not in names(), "one less")
        assert screen.table.chosen.pid == leaders["delta"].pid

        await screen.press("left")
        await screen.until(lambda: leaders["delta"].pid not in screen.pids(Kind.LEADER), "it to be folded")
        assert leaders["gamma"].pid in screen.pids(Kind.LEADER)
        await screen.press("A")
        await screen.until(lambda: names()[0] == "delta", "the oldest first")
        assert leaders["delta"].pid not in screen.pids(Kind.LEADER)
        await screen.press("slash", *"GAMMA", "enter")
        await screen.until(lambda: names() == ["gamma"], "what was looked for")
        await screen.until_seen("filter: GAMMA")
        assert "sort" not in screen.app.seen.text  # keys were typed, not obeyed
        await screen.press("slash", "q", "question_mark", "x")
        await screen.until_seen("nothing here is like that", "keep the filter", "show everything again")
        assert "help" not in screen.text().splitlines()[-1]
        await screen.press("escape")
        await screen.until(lambda: len(names()) == 3, "everybody")
        await screen.press("tab")
        await screen.until_seen("Tab goes back to the sessions")
        await screen.press("tab")
        await screen.until(lambda: screen.table.has_focus, "the rows to have the keys")
        await screen.until(lambda: "Tab goes back" not in screen.text(), "the events to have none")
        screen.app._uid = 1  # as if somebody else looked
        await screen.press("o")
        await screen.until(lambda: names() == [], "nobody of one's own")
        await screen.press("o", "question_mark")
        await screen.until(lambda: isinstance(screen.app.screen, Panel), "the help")
        await screen.until_seen("explain: how the process is judged")

    watch(daemon.socket, LARGE, look)


def test_what_has_not_changed_is_not_drawn_again_and_of_a_line_only_what_has(
    daemon: Daemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    start_named(start_leader, scratch, daemon, "steady")

    async def look(screen: Watched) -> None:
        await screen.until(lambda: screen.rows(Kind.LEADER), "the rows")
        news, drawn = screen.app.news, []
        assert news is not None
        screen.app.source.close()

        async def show(found: Any) -> None:
            screen.app.post_message(Top.Heard(news._replace(found=found)))
            await screen.pilot.pause()

        await show(news.found)
        for widget in (screen.table, *screen.app.base.query(Block)):
            refresh = widget.refresh

            def noted(*regions: Any, refresh: Any = refresh, id_: str = str(widget.id), **more: Any) -> Any:
                drawn.append((id_, *(region.width for region in regions), *more))
                return refresh(*regions, **more)

            widget.refresh = noted  # type: ignore[method-assign]
        await show(news.found)
        assert drawn == []
        await show(news.found._replace(at=news.found.at + timedelta(seconds=1)))
        assert drawn == [("head", len(" 12:00:00 UTC "))]
        drawn.clear()
        steady = news.found.sessions[0]
        busy = steady.aged(steady.head.age_s + 3600)
        busy.head = busy.head._replace(cpu_percent=55.5)
        await show(news.found._replace(sessions=(busy,)))
        await screen.until_seen("55.5 %")
        assert sum(width for id_, width, *_ in drawn if id_ == "table") <= 30, drawn

    watch(daemon.socket, SMALL, look)


def test_hostile_names_are_text_and_nothing_else(
    daemon: Daemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    leader = start_named(start_leader, scratch, daemon, HOSTILE)

    async def look(screen: Watched) -> None:
        await screen.until_seen("[bold red]x[/] [@click=app.quit]y[/]")
        await screen.choose(leader.pid, Kind.LEADER)
        await screen.press("x")
        assert "[bold red]x[/]" in await screen.question()
        await screen.press("n", "e")
        await screen.until(lambda: isinstance(screen.app.screen, Panel), "the explanation")
        assert f"pid {leader.pid}" in screen.dialog()
        said = screen.text()
        assert all(line.isprintable() for line in said.splitlines()), said

    watch(daemon.socket, LARGE, look)


def test_what_is_asked_for_is_of_the_process_that_was_seen_and_of_no_other_with_its_pid(
    daemon: Daemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    leader = start_named(start_leader, scratch, daemon, "reused")
    link = Link([daemon.socket], timeout_s=10.0)
    seen = picture(ask_all(link)).sessions[0].below[0]
    assert seen.pid == leader.pid
    earlier = seen._replace(start_ticks=seen.start_ticks - 1)
    assert actions.explain(link, earlier, Look()).lines[0].startswith(f"pid {leader.pid} is gone")
    for ask in (
        lambda row: actions.protect(link, row),
        lambda row: actions.release(link, row),
    ):
        with pytest.raises(
            CommandError, match=f"process {leader.pid} has ended, and another one has its pid"
        ):
            ask(earlier)
    with pytest.raises(CommandError, match="was not spared by hand"):
        actions.protect(link, seen, undo=True)
    actions.protect(link, seen)
    with pytest.raises(CommandError, match="has ended, and another one has its pid"):
        actions.protect(link, earlier, undo=True)
    actions.protect(link, seen, undo=True)
    assert actions.explain(link, seen, Look()).lines
    # Replies that are the same are read once, but not where somebody may change one.
    once = Source(link, 1.0, print)._link
    assert once.ask("ping") is once.ask("ping")
    assert link.ask("ping") is not link.ask("ping")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_looking_is_told_of_and_old_figures_do_not_pass_for_new_ones(daemon: Daemon) -> None:
    told: queue.Queue[News | Lost] = queue.Queue()
    Source(Link([daemon.socket], timeout_s=10.0), 0.2, told.put, gpu=lambda: {}["a mistake"]).start()
    assert told.get(timeout=WITHIN_S) == Lost("looking has failed: leave, and start it again")


# -- the daemon goes and comes back ---------------------------------------------------------------


def test_a_daemon_that_is_slow_or_away_is_told_of_and_waited_for(
    start_daemon: StartDaemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    daemon = start_daemon()
    leader = start_named(start_leader, scratch, daemon, "patient")

    async def look(screen: Watched) -> None:
        await screen.choose(leader.pid, Kind.LEADER)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            await screen.press("e")
            await screen.press("M")  # the keys go on, whoever keeps the daemon's answer
            await screen.until_seen("MEMORY▾")
            await screen.until_seen("no answer within 1 s; trying again", "patient")
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        await screen.until(lambda: not screen.app.lost, "an answer")

        daemon.kill9()
        await screen.until_seen("trying again. The rows are of", "patient")
        await screen.press("p")
        await screen.until_seen("no daemon answers")
        daemon.start()
        await screen.until(lambda: not screen.app.lost, "a daemon again")
        assert "trying again" not in screen.text()
        await screen.until(lambda: leader.pid in screen.pids(Kind.LEADER), "the session")
        await screen.choose(leader.pid, Kind.LEADER)

    watch(daemon.socket, SMALL, look, timeout_s=1.0)


def test_a_screen_that_is_too_small_says_so_and_one_that_grows_shows_everything(daemon: Daemon) -> None:
    async def look(screen: Watched) -> None:
        await screen.until_seen("needs 80 columns and 24 lines; this")
        assert "EVENTS" not in screen.text()
        await screen.pilot.resize_terminal(*SMALL)
        await screen.until_seen("EVENTS", "0 sessions", "quit")

    watch(daemon.socket, (60, 20), look)


# -- orphans --------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_an_orphan_is_explained_protected_and_ended_once_somebody_has_agreed(
    start_daemon: StartDaemon, start_leader: StartLeader
) -> None:
    daemon = start_daemon(config=ORPHANS, uid=LONER)
    pool = start_leader(
        "pools.py", "executor", "--method", "spawn",
        uid=LONER, parent="waits", env={"REAPER_DISABLE": "1", "REAPER_TEST_LIGHT": "1"},
    )  # fmt: skip
    workers = pool.family.workers
    pool.kill9()

    async def look(screen: Watched) -> None:
        await screen.until(lambda: set(workers) <= screen.pids(Kind.ORPHAN), "the orphans")
        said = screen.text()
        assert re.search(r" ([2-9]|\d\d+) orphans\b", said), said  # root is shown others' too
        assert re.search(rf"{workers[0]} multiprocess\S* .*wait (1:00:00|59:\d\d) ", said), said
        await screen.choose(workers[0], Kind.ORPHAN)
        await screen.press("e")
        await screen.until(lambda: isinstance(screen.app.screen, Panel), "the explanation")
        await screen.until_seen("is an orphan that no rule would have ended yet", "spawn_main")
        await screen.press("escape", "x")  # of two orphans the one under the cursor
        asked = await screen.question()
        assert "End this process?" in asked
        assert (str(workers[0]) in asked, str(workers[1]) in asked) == (True, False)
        await screen.press("n", "slash", *str(workers[1]), "enter", "c")  # of all those that are shown
        asked = await screen.question()
        assert "End this process?" in asked
        assert str(workers[1]) in asked
        await screen.press("n", "escape")
        await screen.choose(workers[0], Kind.ORPHAN)
        await screen.press("p")
        await screen.until_seen(f"pid {workers[0]}", "is left alone from now on")
        await screen.until(lambda: workers[0] not in screen.pids(Kind.ORPHAN), "it to be spared")

        screen.app._uid = LONER
        await screen.press("o", "c")
        asked = await screen.question()
        assert "End this process?" in asked
        assert str(workers[1]) in asked
        assert str(workers[0]) not in asked
        await screen.press("n")
        await screen.until_seen("nothing was ended")
        assert all(map(alive, workers))
        await screen.press("c")
        await screen.question()
        await screen.press("y")
        await screen.until_seen("ended by SIGTERM")
        assert wait_gone([workers[1]], 0) == []
        assert alive(workers[0])
        await screen.until(lambda: not screen.pids(Kind.ORPHAN), "no more orphans of its own")

    try:
        watch(daemon.socket, LARGE, look)
    finally:
        end_leftovers(pool.living())  # the tracker last: it frees what the workers shared


# -- on a real terminal ---------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with ``reaperctl top`` on it."""

    def __init__(self, run: str, *, uid: int | None = None, before: Sequence[str] = (), **more: str) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(
            [*before, *as_user(uid, [needed_interpreter(uid), "-m", "reaperd.ctl.main", "top"])],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=test_environment(run, TERM="xterm-256color", **more),
            start_new_session=True,
        )
        self.data = b""

    def until(self, *words: str) -> None:
        end_s = time.monotonic() + WITHIN_S
        poll = select.poll()
        poll.register(self.ours, select.POLLIN)
        while not all(word.encode() in self.data for word in words):
            assert poll.poll(max(0.0, end_s - time.monotonic()) * 1000), (
                f"no {words} in {self.data[-3000:]!r}"
            )
            self.data += os.read(self.ours, 65536)

    def hang_up(self) -> None:
        """Go away, as a terminal emulator that is closed."""
        os.close(self.theirs)
        os.close(self.ours)
        self.ours = -1

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def end(self) -> int:
        """Return its exit code, once it has ended; what it still writes is read."""
        pidfd = os.pidfd_open(self.process.pid)
        poll = select.poll()
        poll.register(self.ours, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        end_s = time.monotonic() + WITHIN_S
        try:
            while (left_s := end_s - time.monotonic()) > 0:
                ready = dict(poll.poll(left_s * 1000))
                if self.ours in ready:
                    self.data += os.read(self.ours, 65536)
                elif pidfd in ready:
                    break
        finally:
            os.close(pidfd)
        return self.process.wait(0)

    def restored(self) -> bool:
        return termios.tcgetattr(self.theirs) == self.before and all(
            self.data.rfind(off) > self.data.rfind(on) >= 0
            for on, off in ((b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h"))
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.ours >= 0:
            self.hang_up()


@pytest.fixture
def terminal(run: str) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(**more: Any) -> Terminal:
        started.append(Terminal(run, **more))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_on_a_terminal_it_is_seen_refused_and_left_and_the_terminal_is_as_before(
    daemon: Daemon, start_leader: StartLeader, scratch: Scratch, terminal: Callable[..., Terminal]
) -> None:
    leader = start_named(start_leader, scratch, daemon, HOSTILE)
    stranger = STRANGER if os.geteuid() == 0 else None
    shown = terminal(REAPER_SOCKET=daemon.socket, uid=stranger)
    shown.until("reaperd ", "1 session", f"{leader.pid} leader")
    if stranger is not None:
        shown.until("(command")  # line not shown
        shown.type("x")
        shown.until("Stop this session?")
        shown.type("y")
        shown.until("that session is another user's")
        assert b"named.py" not in shown.data
    shown.type("\x1a")
    shown.until("no shell started this")
    shown.type("q")
    assert shown.end() == 0
    assert shown.restored()
    assert alive(leader.pid)
    assert b"owned\x07" not in shown.data
    assert b"\xc2\x9b" not in shown.data


def test_no_color_is_heeded_and_a_signal_leaves_the_terminal_as_it_was(
    daemon: Daemon, terminal: Callable[..., Terminal]
) -> None:
    signals = (signal.SIGTERM, signal.SIGINT)
    terminals = [terminal(REAPER_SOCKET=daemon.socket, NO_COLOR="1") for _ in signals]
    for shown, number in zip(terminals, signals, strict=True):
        shown.until("0 sessions")
        shown.process.send_signal(number)
        assert shown.end() == 128 + number
        assert shown.restored()
        colours = re.findall(rb"\x1b\[[\d;]*m", shown.data)
        assert colours, "not even bold"
        told = {int(word) for words in colours for word in words[2:-1].split(b";") if word}
        assert not told & {*range(30, 39), *range(40, 49), *range(90, 108)}, told


def test_it_ends_with_its_terminal_even_where_sighup_is_ignored_and_comes_back_from_the_shell(
    start_daemon: StartDaemon, terminal: Callable[..., Terminal]
) -> None:
    daemon = start_daemon()  # whose last event is that it has started
    ignoring = terminal(REAPER_SOCKET=daemon.socket, before=["env", "--ignore-signal=HUP"])
    goes_on = '"$@"; [ $? -gt 128 ] && echo STOPPED && read -r _; fg; echo LEFT $?'
    shell = ["setsid", "--ctty", "--wait", "bash", "-mc", goes_on, "bash"]
    script = ["sh", "-c", '"$@"; exit $?', "sh"]
    beyond = terminal(REAPER_SOCKET=daemon.socket, before=[*shell, *script])
    stopped = terminal(REAPER_SOCKET=daemon.socket, before=shell)
    ignoring.until("0 sessions")
    ignoring.hang_up()
    assert ignoring.process.wait(WITHIN_S) == 128 + signal.SIGHUP

    beyond.until("0 sessions", "quit")
    beyond.type("\x1a")
    beyond.until("no shell started this")
    beyond.type("q")
    stopped.until("0 sessions", "quit")
    stopped.type("\x1a")
    stopped.until("STOPPED")
    assert stopped.restored()
    stopped.data = b""
    stopped.type("\n")
    stopped.until("\x1b[?1049h", "0 sessions", "EVENTS", "started", "quit")
    stopped.type("\x03")
    stopped.until("LEFT 0")
    assert beyond.end() == 0


def test_without_a_terminal_and_without_textual_a_sentence_says_what_to_do(daemon: Daemon, run: str) -> None:
    done = daemon.ctl("top")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("reaperctl: top needs a terminal: ")
    code = "import sys; sys.modules['textual'] = None\nfrom reaperd.ctl.main import main\nsys.exit(main(['top']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "reaperctl: top needs Textual, which is not installed: pip install 'reaperd[ui]'"
    )
    assert done.stderr.count("\n") == 1
