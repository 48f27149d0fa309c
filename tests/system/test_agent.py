"""What ``agent.register()`` does to the process that calls it, and what it must not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from harness import Daemon, Leader, Scratch, has_ended, open_pidfd, test_environment

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# What is left in a process: its threads, its descriptors and what they are, its signal handlers.
TRACES = """
import gc, json, os, signal, threading, warnings

def traces():
    gc.collect()
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that lists them
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "tasks": len(os.listdir("/proc/self/task")),
        "descriptors": descriptors,
        "handlers": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "wakeup": signal.set_wakeup_fd(-1),
        "children": open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(),
        "filters": len(warnings.filters),
    }
"""


@pytest.fixture
def python(run: str, scratch: Scratch) -> Run:
    """Run a Python script or a text under ``python -c`` to its end."""

    def execute(text: str, *, as_command: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        text = textwrap.dedent(text)
        path = scratch.file("train.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return subprocess.run(
            [sys.executable, *(["-c", text] if as_command else [path])],
            env=test_environment(run, **env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return execute


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """Return the last line that a script printed, as JSON; fail with its stderr when it failed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_agent_loads_no_third_party_module(python: Run) -> None:
    script = """
        import sys
        before = set(sys.modules)
        import agent
        import json
        print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
    """
    loaded = answer(python(script))
    assert set(loaded) <= {"agent", *sys.stdlib_module_names}


def test_after_register_nothing_is_left_but_the_page(daemon: Daemon, python: Run) -> None:
    script = TRACES + textwrap.dedent("""
        import agent
        before = traces()
        session = agent.register("traces")
        after = traces()
        print(json.dumps([before, after, session.id]))
    """)
    before, after, session = answer(python(script, REAPER_SOCKET=daemon.socket))
    new = {fd: link for fd, link in after["descriptors"].items() if fd not in before["descriptors"]}
    assert set(new.values()) == {f"/memfd:reaper:{session} (deleted)"}  # Python's mmap keeps one of its own
    for what in ("threads", "tasks", "handlers", "wakeup", "children", "filters"):
        assert after[what] == before[what], what


def test_after_register_without_a_daemon_nothing_is_left_but_the_page(python: Run, scratch: Scratch) -> None:
    script = TRACES + textwrap.dedent("""
        import agent
        before = traces()
        session = agent.register("traces")
        after = traces()
        print(json.dumps([before, after, session.id]))
    """)
    before, after, session = answer(python(script, REAPER_SOCKET=scratch.file("none.sock")))
    new = {fd: link for fd, link in after["descriptors"].items() if fd not in before["descriptors"]}
    assert set(new.values()) == {f"/memfd:reaper:{session} (deleted)"}  # Python's mmap keeps one of its own
    for what in ("threads", "tasks", "handlers", "wakeup", "children"):
        assert after[what] == before[what], what


def test_after_unregister_nothing_at_all_is_left(daemon: Daemon, python: Run) -> None:
    script = TRACES + textwrap.dedent("""
        import agent
        environment = dict(os.environ)
        before = traces()
        agent.register("traces")
        agent.unregister()
        after = traces()
        print(json.dumps([before, after, dict(os.environ) == environment]))
    """)
    before, after, same_environment = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert same_environment
    for what in ("threads", "tasks", "descriptors", "handlers", "wakeup", "children"):
        assert after[what] == before[what], what


def test_register_is_idempotent(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, os
        one = agent.register("first")
        two = agent.register("second")
        other = agent.register()
        print(json.dumps([one is two is other or [one.id, two.id, other.id], two.name, os.environ["REAPER_LINEAGE"] == one.id]))
    """
    assert answer(python(script, REAPER_SOCKET=daemon.socket)) == [True, "first", True]
    assert len(daemon.events(kind="registered")) == 1


def test_many_threads_register_at_once_and_there_is_one_session(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, threading
        barrier, found = threading.Barrier(8), []
        def register():
            barrier.wait()
            found.append(agent.register("threads").id)
        threads = [threading.Thread(target=register) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(json.dumps([len(found), len(set(found))]))
    """
    assert answer(python(script, REAPER_SOCKET=daemon.socket)) == [8, 1]
    assert len(daemon.events(kind="registered")) == 1


def test_registering_from_another_thread_makes_the_process_the_leader(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, os, subprocess, sys, threading
        thread = threading.Thread(target=agent.register, args=("thread",))
        thread.start(); thread.join()
        child = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL)  # after the thread has gone
        ctl = subprocess.run([sys.executable, "-m", "reaperd.ctl.main", "ps", "--json"], capture_output=True, text=True)
        print(json.dumps([json.loads(ctl.stdout)[0]["leader"]["pid"] == os.getpid(), agent.register().id, child.pid]))
        sys.stdout.flush()
        os._exit(3)
    """
    done = python(script, REAPER_SOCKET=daemon.socket)
    leads, session, child = json.loads(done.stdout)
    assert done.returncode == 3
    assert leads
    event = daemon.wait_end(session)
    assert event["cause"] == {"kind": "exit", "code": 3}
    assert [one["pid"] for one in event["processes"]] == [child]


def test_python_c_can_register(daemon: Daemon, python: Run) -> None:
    done = python(
        'import agent; s = agent.register(); print(f\'["{s.id}", "{s.name}"]\')',
        as_command=True,
        REAPER_SOCKET=daemon.socket,
    )
    session, name = answer(done)
    assert name
    assert daemon.wait_end(session)["cause"] == {"kind": "exit", "code": 0}


def test_the_name_of_a_script_is_the_session_s_by_default(daemon: Daemon, python: Run) -> None:
    script = "import agent, json; print(json.dumps(agent.register().name))"
    assert answer(python(script, REAPER_SOCKET=daemon.socket)) == "train.py"


def test_an_interactive_interpreter_can_register(daemon: Daemon, python: Run) -> None:
    """As a notebook's kernel does: code that comes in pieces, in a module that is no file."""
    script = """
        import code
        console = code.InteractiveConsole()
        for line in (
            "import agent, concurrent.futures, json, os",
            "session = agent.register('notebook')",
            "pool = concurrent.futures.ProcessPoolExecutor(1)",
            "pid = pool.submit(os.getpid).result()",
            "print(json.dumps([session.id, pid]), flush=True)",
            "os._exit(4)",
        ):
            console.push(line)
    """
    done = python(script, REAPER_SOCKET=daemon.socket)
    assert done.returncode == 4, done.stderr
    session, pid = json.loads(done.stdout)
    event = daemon.wait_end(session)
    assert event["cause"] == {"kind": "exit", "code": 4}
    assert [one["pid"] for one in event["processes"]] == [pid]


@pytest.mark.parametrize("socket", ["here", "nowhere"])
def test_reaper_disable_switches_everything_off(
    socket: str, daemon: Daemon, python: Run, scratch: Scratch
) -> None:
    script = TRACES + textwrap.dedent("""
        import agent
        before = traces()
        session = agent.register("off", required=True)
        with agent.spared():
            inside = dict(os.environ)
        agent.progress(1, 2)
        after = traces()
        agent.unregister()
        print(json.dumps([before, after, session.id, sorted(name for name in inside if name.startswith("REAPER_"))]))
    """)
    path = daemon.socket if socket == "here" else scratch.file("none.sock")
    done = python(script, REAPER_SOCKET=path, REAPER_DISABLE="1")
    before, after, session, variables = answer(done)
    assert session == ""
    assert after == before
    assert variables == ["REAPER_DISABLE", "REAPER_SOCKET", "REAPER_TEST_RUN"]
    assert done.stderr == ""
    assert daemon.sessions() == []


def test_without_a_daemon_it_warns_once_and_training_goes_on(python: Run, scratch: Scratch) -> None:
    script = """
        import agent, json, warnings
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                session = agent.register("alone")
            agent.progress(1, 2, "half")
            with agent.spared():
                pass
        print(json.dumps([[w.category.__name__ for w in caught], str(caught[0].message), bool(session.id)]))
        agent.unregister()
    """
    path = scratch.file("none.sock")
    done = python(script, REAPER_SOCKET=path)
    categories, message, registered = answer(done)
    assert categories == ["RuntimeWarning"]
    assert path in message
    assert registered
    assert done.stderr == ""


def test_the_warning_points_at_the_line_that_registered(python: Run, scratch: Scratch) -> None:
    done = python("import agent\nagent.register('alone')\n", REAPER_SOCKET=scratch.file("none.sock"))
    assert done.returncode == 0
    assert "train.py:2: RuntimeWarning" in done.stderr


def test_required_raises_without_a_daemon(python: Run, scratch: Scratch) -> None:
    script = """
        import agent, json
        try:
            agent.register("must", required=True)
        except agent.RegistrationError as error:
            print(json.dumps(str(error)))
    """
    path = scratch.file("none.sock")
    assert path in answer(python(script, REAPER_SOCKET=path))


def test_required_succeeds_with_a_daemon(daemon: Daemon, python: Run) -> None:
    script = "import agent, json; print(json.dumps(agent.register('must', required=True).id))"
    session = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert daemon.wait_end(session)["kind"] == "ended"


def test_the_socket_argument_goes_before_the_environment(
    daemon: Daemon, python: Run, scratch: Scratch
) -> None:
    script = (
        f"import agent, json; print(json.dumps(agent.register(socket={daemon.socket!r}, required=True).id))"
    )
    assert answer(python(script, REAPER_SOCKET=scratch.file("none.sock")))


def test_a_daemon_that_does_not_answer_costs_the_timeout_and_no_more(
    daemon: Daemon, python: Run, start_leader: StartLeader
) -> None:
    """The core is stopped: the socket still accepts connections, and nobody answers."""
    script = """
        import agent, json, time, warnings
        warnings.simplefilter("ignore")
        import zmq
        began = time.monotonic()
        agent.register("slow", timeout=0.5)
        print(json.dumps(time.monotonic() - began))
    """
    os.kill(daemon.pid, 19)
    try:
        took_s = answer(python(script, REAPER_SOCKET=daemon.socket))
    finally:
        os.kill(daemon.pid, 18)
    assert 0.4 < took_s < 2


def test_a_forked_child_is_a_worker_and_never_a_leader(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, os, sys
        session = agent.register("parent")
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            mine = agent.register("child")
            agent.unregister()
            os.write(writing, json.dumps([mine.id, mine.name, os.environ["REAPER_LINEAGE"]]).encode())
            sys.exit(0)  # with all atexit hooks
        os.waitpid(pid, 0)
        child = json.loads(os.read(reading, 4096))
        print(json.dumps([session.id, child]))
        sys.stdout.flush()
        os._exit(5)
    """
    done = python(script, REAPER_SOCKET=daemon.socket)
    session, child = json.loads(done.stdout)
    assert child == [session, "parent", session]
    # The child's own unregister() and its end in good order were none of the session's.
    assert daemon.wait_end(session)["cause"] == {"kind": "exit", "code": 5}
    assert len(daemon.events(kind="registered")) == 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_imports_an_unguarded_main_module_does_not_become_a_leader(
    method: str, daemon: Daemon, python: Run
) -> None:
    script = f"""
        import agent, json, multiprocessing, os
        session = agent.register("main")
        def work(queue):
            queue.put([session.id, os.environ["REAPER_LINEAGE"]])
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            queue = context.SimpleQueue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            inner = queue.get()
            process.join()
            print(json.dumps([session.id, inner]))
    """
    session, (inner, lineage) = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert (inner, lineage) == (session, session)
    assert len(daemon.events(kind="registered")) == 1


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_register_in_a_worker_s_own_function_returns_the_leader_s_session(
    method: str, daemon: Daemon, python: Run
) -> None:
    script = f"""
        import agent, json, multiprocessing
        session = agent.register("main")
        def work(queue):
            queue.put(agent.register().id)
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            queue = context.SimpleQueue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            print(json.dumps([session.id, queue.get()]))
            process.join()
    """
    session, inner = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert inner == session
    assert len(daemon.events(kind="registered")) == 1


def test_a_loky_worker_that_imports_the_main_module_does_not_become_a_leader(
    daemon: Daemon, python: Run
) -> None:
    script = """
        import agent, json, os
        session = agent.register("main")
        def work():
            import __main__
            return [os.environ["REAPER_LINEAGE"], hasattr(__main__, "session") and __main__.session.id]
        if __name__ == "__main__":
            from joblib import Parallel, delayed
            print(json.dumps([session.id, Parallel(2)(delayed(work)() for _ in range(4))]))
    """
    session, found = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert {lineage for lineage, _ in found} == {session}
    assert len(daemon.events(kind="registered")) == 1


def test_a_script_started_by_a_leader_is_a_leader_of_its_own_below_it(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, os, subprocess, sys
        outer = agent.register("outer")
        text = "import agent, json, os; print(json.dumps([agent.register('inner').id, os.environ['REAPER_LINEAGE']]))"
        inner = json.loads(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout)
        print(json.dumps([outer.id, os.environ["REAPER_LINEAGE"], inner]))
    """
    outer, lineage, (inner, inner_lineage) = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert inner != outer
    assert lineage == outer
    assert inner_lineage == f"{outer}:{inner}"


@pytest.mark.parametrize("before", [None, "something:else"])
def test_unregister_gives_the_environment_back_and_ends_nothing(
    before: str | None, daemon: Daemon, python: Run
) -> None:
    script = """
        import agent, json, os, subprocess
        session = agent.register("short")
        child = subprocess.Popen(["sleep", "100"])
        agent.unregister()
        agent.unregister()
        lives = child.poll() is None
        again = agent.register("again")
        print(json.dumps([session.id, again.id, lives, child.pid, os.environ["REAPER_LINEAGE"]]))
        agent.unregister()
        print(json.dumps([session.id, again.id, lives, child.pid, os.environ.get("REAPER_LINEAGE")]))
        child.kill()
    """
    env = {} if before is None else {"REAPER_LINEAGE": before}
    session, again, lives, _, left = answer(python(script, REAPER_SOCKET=daemon.socket, **env))
    assert left == before
    assert lives
    assert session != again
    assert daemon.wait_end(session)["kind"] == "ended"
    assert daemon.wait_end(again)["kind"] == "ended"


def test_what_was_started_after_unregister_is_no_member(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, os, subprocess, sys
        session = agent.register("short")
        agent.unregister()
        child = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(json.dumps([session.id, child.pid]), flush=True)
        os._exit(0)
    """
    session, child = answer(python(script, REAPER_SOCKET=daemon.socket))
    pidfd = open_pidfd(child)
    assert pidfd is not None
    assert daemon.wait_end(session)["kind"] == "ended"
    assert not has_ended(pidfd)
    os.kill(child, 9)
    assert has_ended(pidfd, within_s=5)
    os.close(pidfd)


def test_registering_while_the_interpreter_exits_is_harmless(daemon: Daemon, python: Run) -> None:
    script = """
        import atexit, agent
        def late():
            session = agent.register("late")
            agent.progress(1, 1)
            with agent.spared():
                pass
            print(f'"{session.id}"', flush=True)
        atexit.register(late)
    """
    done = python(script, REAPER_SOCKET=daemon.socket)
    session = answer(done)
    assert done.stderr == ""
    assert daemon.wait_end(session)["kind"] == "ended"


def test_a_registered_script_ends_quietly_with_its_own_code(daemon: Daemon, python: Run) -> None:
    done = python("import agent, sys; agent.register('quiet'); sys.exit(7)", REAPER_SOCKET=daemon.socket)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_progress_is_shown_by_ps(daemon: Daemon, python: Run) -> None:
    script = """
        import agent, json, subprocess, sys
        agent.register("fits")
        def shown():
            ctl = subprocess.run([sys.executable, "-m", "reaperd.ctl.main", "ps", "--json"], capture_output=True, text=True)
            return json.loads(ctl.stdout)[0]["progress"]
        found = [shown()]
        def next_one():  # what was told a moment ago may be told once more
            while (now := shown()) == found[-1]:
                pass
            found.append(now)
        agent.progress(3, 64, "fold 3")
        next_one()
        agent.progress(4)
        next_one()
        print(json.dumps(found))
    """
    assert answer(python(script, REAPER_SOCKET=daemon.socket)) == [
        None,
        {"done": 3, "total": 64, "message": "fold 3"},
        {"done": 4, "total": None, "message": ""},
    ]


def test_a_closed_and_reused_page_descriptor_does_no_harm(daemon: Daemon, python: Run) -> None:
    """A script that closes all its descriptors, as a daemon does, still leads, and unregister() closes nobody's file."""
    script = """
        import agent, json, os
        session = agent.register("closes")
        os.closerange(3, 256)
        files = [open("/dev/null") for _ in range(40)]
        agent.progress(1, 2, "still here")
        agent.unregister()
        print(json.dumps([session.id, [os.fstat(file.fileno()).st_rdev == os.stat("/dev/null").st_rdev for file in files].count(True)]))
    """
    session, open_files = answer(python(script, REAPER_SOCKET=daemon.socket))
    assert open_files == 40
    assert daemon.wait_end(session)["kind"] == "ended"
