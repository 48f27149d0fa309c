"""What ``training_session()`` leaves alone, and who stays in charge of signals: scripts that say what they saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from harness import Cgroup, Daemon, Scratch, repeat_until, test_environment

import agent

HEAD = """
import json, multiprocessing, os, signal, subprocess, sys, threading, time
import agent

def say(**words):
    print(json.dumps(words), flush=True)

def lives(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return False

def pids(pool):
    return [one.pid for one in pool._pool]

def sleep(seconds):
    time.sleep(seconds)

def handlers(_=None):
    return [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

"""
Tell = Callable[..., dict[str, Any]]


@pytest.fixture
def tell(run: str, scratch: Scratch) -> Tell:
    """Run a script, and return what it said last."""

    def execute(text: str, *, code: int = 0, socket: str = "/nonexistent") -> dict[str, Any]:
        path = scratch.file("train.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(HEAD + 'if __name__ == "__main__":\n' + textwrap.indent(textwrap.dedent(text), "    "))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", path],
            env=test_environment(run, REAPER_SOCKET=socket),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    return execute


# -- what is not touched --------------------------------------------------------------------------


def test_a_pool_from_before_goes_on_with_the_workers_it_has_and_those_it_starts_later(tell: Tell) -> None:
    told = tell("""
        before = multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1)
        with agent.training_session():
            inside = multiprocessing.get_context("fork").Pool(2)
            before.map(sleep, [0.01] * 4)  # each task makes it start a worker
            ended = pids(inside)
        alive, gone = [lives(pid) for pid in pids(before)], [lives(pid) for pid in ended]
        say(alive=alive, gone=gone, works=before.map(abs, [-1, 2]))
        before.terminate()
    """)
    assert told == {"alive": [True, True], "gone": [False, False], "works": [1, 2]}


def test_what_was_spared_or_was_there_before_lives_on_and_what_that_starts_too(tell: Tell) -> None:
    told = tell("""
        def start(command):
            child = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
            return [child.pid, int(child.stdout.readline())]

        shell = "sleep 300 & echo $!; wait"
        before = start(shell)
        with agent.training_session():
            with agent.spared():
                spared = start(shell)
            inside = start(shell)
        say(before=[lives(pid) for pid in before], spared=[lives(pid) for pid in spared],
            inside=[lives(pid) for pid in inside])
        for pid in before + spared:
            os.kill(pid, signal.SIGKILL)
    """)
    assert told == {"before": [True, True], "spared": [True, True], "inside": [False, False]}


def test_a_job_that_a_queue_was_given_with_our_environment_lives_on(tell: Tell) -> None:
    """As with sbatch and at: it bears our mark, and its parent is somebody who adopts nobody."""
    told = tell("""
        queue = (
            "import os, subprocess, sys\\n"
            "with open(sys.argv[1]) as file: mark = file.read()\\n"
            "job = subprocess.Popen(['sleep', '300'], env={**os.environ, 'REAPER_LINEAGE': mark})\\n"
            "with open(sys.argv[2], 'w') as file: file.write(str(job.pid))\\n"
            "job.wait()\\n"
        )
        ask, answer = (os.path.join(os.path.dirname(__file__), name) for name in ("ask", "answer"))
        for path in (ask, answer):
            os.mkfifo(path)
        subprocess.run(["sh", "-c", '"$@" &', "sh", sys.executable, "-c", queue, ask, answer], check=True)
        with agent.training_session() as session:
            with open(ask, "w") as file:
                file.write(os.environ["REAPER_LINEAGE"])
            with open(answer) as file:
                job = int(file.read())
            listed = job in [one.pid for one in session.workers()]
        say(listed=listed, lives=lives(job))
        os.kill(job, signal.SIGKILL)
    """)
    assert told == {"listed": False, "lives": True}


@pytest.mark.needs_root
@pytest.mark.parametrize("below", [False, True], ids=["elsewhere", "below-ours"])
def test_what_was_put_into_another_cgroup_lives_on_unless_that_is_below_ours(
    tell: Tell, unified_cgroup: Callable[[str], Cgroup], below: bool
) -> None:
    ours = unified_cgroup("ours")
    other = ours.below("theirs") if below else unified_cgroup("theirs")
    told = tell(f"""
        def enter(path, pid):
            with open(path + "/cgroup.procs", "w") as file:
                file.write(str(pid))

        enter({ours.path!r}, os.getpid())
        with agent.training_session():
            child = subprocess.Popen(["sleep", "300"])
            enter({other.path!r}, child.pid)
        say(lives=lives(child.pid))
        child.kill()
        child.wait()
    """)
    assert told == {"lives": not below}


def test_a_session_inside_another_ends_what_is_its_own_and_leaves_the_session_registered(tell: Tell) -> None:
    told = tell("""
        with agent.training_session("outer") as outer:
            first = subprocess.Popen(["sleep", "300"])
            with agent.training_session("inner") as inner:
                second = subprocess.Popen(["sleep", "300"])
                same = inner.session is outer.session
            middle = [lives(first.pid), lives(second.pid)]
            stamped = "REAPER_LINEAGE" in os.environ
        say(same=same, middle=middle, stamped=stamped, after=[lives(first.pid), "REAPER_LINEAGE" in os.environ])
    """)
    assert told == {"same": True, "middle": [True, False], "stamped": True, "after": [False, False]}


def test_a_session_that_was_registered_before_stays_registered(tell: Tell) -> None:
    told = tell("""
        mine = agent.register("mine")
        with agent.training_session("other"):
            pass
        say(stamped=os.environ.get("REAPER_LINEAGE") == mine.id, same=agent.register() is mine)
    """)
    assert told == {"stamped": True, "same": True}


def test_a_clean_up_in_between_ends_the_workers_and_the_session_goes_on(tell: Tell) -> None:
    told = tell("""
        from concurrent.futures import ProcessPoolExecutor
        with agent.training_session() as session:
            pool = ProcessPoolExecutor(2)
            pool.submit(sleep, 300)
            while not session.workers():
                time.sleep(0.01)
            left = session.cleanup()
            pool = ProcessPoolExecutor(2)
            again = pool.submit(abs, -3).result()
            say(left=left, workers=len(session.workers()) > 0, again=again, running=session.running)
    """)
    assert told == {"left": [], "workers": True, "again": 3, "running": True}


def test_a_lock_that_a_killed_worker_held_keeps_no_thread(tell: Tell) -> None:
    told = tell("""
        with agent.training_session(grace=0.5):
            pool = multiprocessing.get_context("fork").Pool(1)
            pool.apply_async(sleep, (300,))
            held = pool._inqueue._rlock.acquire(timeout=20)  # as if by one that is dead
            ended = pids(pool)
        say(held=held, gone=not any(map(lives, ended)), threads=[one.name for one in threading.enumerate()])
    """)
    assert (told["held"], told["gone"]) == (True, True)
    assert "reaper-shutdown" not in told["threads"]


# -- whose signals --------------------------------------------------------------------------------


def test_a_handler_of_ones_own_stays_in_charge(tell: Tell) -> None:
    told = tell("""
        seen = []
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        with agent.training_session():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            going_on = True
        os.kill(os.getpid(), signal.SIGTERM)
        say(seen=seen, going_on=going_on)
    """)
    assert told == {"seen": [15] * 4, "going_on": True}


def test_what_is_ignored_stays_ignored_and_nohup_works(tell: Tell) -> None:
    told = tell("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with agent.training_session():
            os.kill(os.getpid(), signal.SIGHUP)
            inside = handlers()[2]
        say(inside=inside, after=handlers()[2])
    """)
    assert told["inside"] == told["after"]


def test_a_handler_that_somebody_installs_inside_is_theirs_afterwards(tell: Tell) -> None:
    told = tell("""
        def mine(number, frame):
            pass
        with agent.training_session():
            signal.signal(signal.SIGTERM, mine)
        say(kept=signal.getsignal(signal.SIGTERM) is mine, others=handlers()[0])
    """)
    assert told == {"kept": True, "others": "<built-in function default_int_handler>"}


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_have_the_handlers_that_were_there_before(tell: Tell, method: str) -> None:
    told = tell(f"""
        context = multiprocessing.get_context("{method}")
        with context.Pool(1) as pool:
            before = pool.map(handlers, [0])
        with agent.training_session(), context.Pool(1) as pool:
            inside = pool.map(handlers, [0])
            pool.terminate()
        say(before=before, inside=inside)
    """)
    assert told["inside"] == told["before"]


def test_asyncio_stays_in_charge_of_ctrl_c(tell: Tell) -> None:
    told = tell("""
        import asyncio
        seen = []

        async def train():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(300)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async def main():
            with agent.training_session():
                await train()

        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            seen.append("interrupted")
        say(seen=seen, after=handlers()[0])
    """)
    # asyncio.Runner cancels its task first; before Python 3.11 there was none, and KeyboardInterrupt came from where it was.
    assert told["seen"][-1] == "interrupted"
    assert told["seen"][0] == "cancelled" or sys.version_info < (3, 11)
    assert told["after"] == "<built-in function default_int_handler>"


def test_in_another_thread_there_are_no_handlers_and_all_else_is_the_same(tell: Tell) -> None:
    told = tell("""
        found = {}

        def train():
            with agent.training_session():
                child = subprocess.Popen(["sleep", "300"])
                found["inside"] = handlers()
            found["gone"] = not lives(child.pid)

        before = handlers()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        say(same=found["inside"] == before, gone=found["gone"])
    """)
    assert told == {"same": True, "gone": True}


def test_a_signal_in_the_middle_of_the_clean_up_waits_for_its_end(tell: Tell) -> None:
    told = tell("""
        stubborn = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
        try:
            with agent.training_session(grace=0.5):
                child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
                child.stdout.readline()
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            unwound = None
        except SystemExit as error:
            unwound = error.code
        say(unwound=unwound, gone=not lives(child.pid), after=handlers()[1])
    """)
    assert (told["unwound"], told["gone"]) == (143, True)


def test_a_session_that_is_begun_twice_or_not_ended_is_no_trap(tell: Tell) -> None:
    told = tell("""
        session = agent.ProcessManager()
        assert session.stop() == [] and session.workers() == [] and session.cleanup() == []
        session.start()
        try:
            session.start()
        except RuntimeError as error:
            twice = str(error)
        child = subprocess.Popen(["sleep", "300"])
        session.stop()
        assert not lives(child.pid)
        session.start()
        child = subprocess.Popen(["sleep", "300"])
        say(twice=twice, pid=child.pid)
    """)
    assert "has begun already" in told["twice"]
    # It was never ended: the interpreter's own end has done so, or the fixture that counts processes would fail this test.


def test_without_a_daemon_a_worker_that_has_lost_its_pool_is_told_of_once(tell: Tell) -> None:
    told = tell("""
        import logging
        seen = []

        told = threading.Event()

        class Note(logging.Handler):
            def emit(self, record):
                seen.append(record.getMessage())
                told.set()

        logging.getLogger("agent").addHandler(Note())
        spin = "while True: pass"
        orphaned = f"{sys.executable} -c '{spin}' & echo $!"
        with agent.ProcessManager(monitoring_interval=0.1, orphan_age_limit=0.3, cpu_threshold=10) as session:
            subprocess.run(["sh", "-c", "sleep 300 >&- &"], check=True)  # lost, and idle
            busy = subprocess.Popen(["sh", "-c", orphaned], stdout=subprocess.PIPE, text=True)
            pid = int(busy.stdout.readline())
            busy.wait()
            assert told.wait(20)
            strays = [one.pid for one in session.strays()]
            looks, look, enough = [], session.strays, threading.Event()

            def note():  # who is told of once is not told of at three looks more
                looks.append(look())
                if len(looks) > 3:
                    enough.set()
                return looks[-1]

            session.strays = note
            assert enough.wait(20)
        say(seen=seen, pid=pid, strays=strays, gone=not lives(pid))
    """)
    assert len(told["seen"]) == 1
    assert f"pid {told['pid']} has lost its pool" in told["seen"][0]
    assert told["strays"] == [told["pid"]]
    assert told["gone"]


def test_with_a_daemon_it_is_told_of_once_by_that_and_left_to_the_script(tell: Tell, daemon: Daemon) -> None:
    told = tell(
        """
        ctl = [sys.executable, "-m", "reaperd.ctl.main", "events", "--json", "--follow", "--since", "1h"]
        spin = "while True: pass"
        orphaned = f"{sys.executable} -c '{spin}' & echo $!"

        def orphan():
            shell = subprocess.Popen(["sh", "-c", orphaned], stdout=subprocess.PIPE, text=True)
            pid = int(shell.stdout.readline())
            shell.wait()
            while True:  # until it is told of
                event = json.loads(events.stdout.readline())
                if event["kind"] == "orphan" and event["processes"][0]["pid"] == pid:
                    return pid

        with agent.training_session("risk", orphan_age_limit=0.3, cpu_threshold=10):
            events = subprocess.Popen(ctl, stdout=subprocess.PIPE, text=True)
            subprocess.run(["sh", "-c", "sleep 300 >&- &"], check=True)  # lost, and idle
            subprocess.Popen([sys.executable, "-c", spin])  # busy, and not lost
            pids = [orphan(), orphan()]
            threads = [one.name for one in threading.enumerate()]
            alive = [lives(pid) for pid in pids]
        say(pids=pids, threads=threads, alive=alive, gone=[not lives(pid) for pid in pids])
        """,
        socket=daemon.socket,
    )
    found = daemon.events(kind="orphan")
    assert [[one["pid"] for one in event["processes"]] for event in found] == [[pid] for pid in told["pids"]]
    assert {(event["name"], event["rule"]) for event in found} == {("risk", "stray")}
    assert "lost its pool" in found[0]["processes"][0]["evidence"][0]
    assert (told["threads"], told["alive"], told["gone"]) == (["MainThread"], [True, True], [True, True])
    assert f"risk  pid {told['pids'][0]}" in daemon.ctl("events").stdout


@pytest.mark.parametrize("gone", [False, True], ids=["written", "cannot be written"])
def test_a_session_that_ends_within_another_leaves_it_its_status_file(
    gone: bool, tell: Tell, daemon: Daemon, scratch: Scratch
) -> None:
    folder = scratch.directory("inner")
    outer, inner = scratch.file("outer.json"), os.path.join(folder, "run.json")
    tell(
        f"""
        with agent.training_session(status_file={outer!r}):
            with agent.training_session(status_file={inner!r}):
                if {gone}:
                    os.unlink({inner!r})
                    os.rmdir({folder!r})
            say()
            os.kill(os.getpid(), 9)
        """,
        code=-9,
        socket=daemon.socket,
    )

    def state(path: str) -> str:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["state"])

    repeat_until(lambda: state(outer) == "killed" or None, 20.0, "the daemon never wrote the end of the run")
    assert gone or state(inner) == "completed"


def test_a_session_that_another_thread_stops_leaves_signals_as_they_were(tell: Tell) -> None:
    told = tell("""
        calls = []
        session = agent.ProcessManager()
        session.start()
        thread = threading.Thread(target=session.stop)
        thread.start()
        thread.join()
        del session
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        except KeyboardInterrupt:
            calls.append("interrupted")
        say(calls=calls, handlers=handlers())
    """)
    assert told["calls"] == ["interrupted"]
    assert "default_int_handler" in told["handlers"][0]


@pytest.mark.parametrize(("end", "state"), [("raise ValueError('x')", "failed"), ("pass", "completed")])
def test_a_session_that_nobody_stops_says_what_ended_the_program(
    end: str, state: str, tell: Tell, scratch: Scratch
) -> None:
    path = scratch.file("run.json")
    tell(
        f"""
        session = agent.ProcessManager(status_file={path!r})
        session.start()
        say()
        {end}
        """,
        code=int(state == "failed"),
    )
    assert agent.read_status(path).state == state


def test_the_same_signal_again_at_once_is_the_first_one_still(tell: Tell) -> None:
    told = tell(
        """
        with agent.training_session():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
            except SystemExit:
                os.kill(os.getpid(), signal.SIGTERM)
                say(goes_on=True)
                raise
        """,
        code=143,
    )
    assert told == {"goes_on": True}


def test_a_second_signal_while_progress_is_told_all_the_time_still_ends_everything(
    tell: Tell, scratch: Scratch
) -> None:
    tell(
        f"""
        with agent.training_session(status_file={scratch.file("run.json")!r}):
            going = threading.Event()

            def signals():
                going.wait()
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.25)

            threading.Thread(target=signals, daemon=True).start()
            say()
            while True:
                try:
                    while True:
                        agent.progress(1, 2, "x")
                        going.set()
                except SystemExit:
                    pass
        """,
        code=-15,
    )
