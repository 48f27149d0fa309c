"""The joblib backend "reaper": loky's, with a limit at each call, a guard in each worker, and a label."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from harness import Scratch, end_leftovers, has_ended, open_pidfd, test_environment

WITHIN_S = 30.0
Python = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def python(run: str, scratch: Scratch) -> Python:
    """Start a script."""

    def start(text: str, **env: str) -> subprocess.Popen[str]:
        path = scratch.file("train.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(textwrap.dedent(text))
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", path],
            env=test_environment(run, REAPER_SOCKET="/nonexistent", **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def answer(process: subprocess.Popen[str]) -> Any:
    """Return what a script printed last, once it has ended."""
    out, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


LOOK = """
    import json, os, threading, time
    import agent, agent.joblib, joblib, joblib._parallel_backends
    from joblib import Parallel, delayed

    def look():
        time.sleep(0.2)
        with open("/proc/self/comm") as file:
            return os.getpid(), file.read().strip(), [one.name for one in threading.enumerate()], os.environ["OMP_NUM_THREADS"]

    def note(path, text):
        with open(path, "a") as file:
            file.write(text)
"""


def test_each_call_keeps_to_the_limit_of_the_session_around_it(python: Python) -> None:
    script = """
    if __name__ == "__main__":
        agent.joblib.register(make_default=True)
        agent.limits.usable_cpus = joblib._parallel_backends.cpu_count = lambda: 8
        found = {}
        for limit in (None, 2, 3, 1):
            with agent.training_session(max_workers=limit):
                found[str(limit)] = joblib.effective_n_jobs(-1), joblib.effective_n_jobs(100), joblib.effective_n_jobs(2)
        os.environ["REAPER_MAX_WORKERS"] = "2"
        found["told"] = joblib.effective_n_jobs(8)
        print(json.dumps(found))
    """
    found = answer(python(LOOK + script))
    assert found == {"None": [4, 4, 2], "2": [2, 2, 2], "3": [3, 3, 2], "1": [1, 1, 1], "told": 2}


def test_workers_have_a_guard_and_the_name_of_the_session_and_share_the_cpus(python: Python) -> None:
    script = """
    if __name__ == "__main__":
        agent.joblib.register()
        joblib._parallel_backends.cpu_count = lambda: 8
        agent.limits.usable_cpus = lambda: 6
        agent.register("risk model")
        with joblib.parallel_config(backend="reaper"):
            first = Parallel(n_jobs=2)(delayed(look)() for _ in range(4))
            again = Parallel(n_jobs=2)(delayed(look)() for _ in range(4))
        print(json.dumps([first, again]))
    """
    first, again = answer(python(LOOK + script))
    pids = {pid for pid, *_ in first}
    assert len(pids) == 2
    assert {pid for pid, *_ in again} == pids  # the pool is used again
    for _, comm, threads, inner in first:
        assert (comm, inner) == ("rp risk model", "3")
        assert "reaper-guard" in threads


@pytest.mark.parametrize("how", ["kept", "given"])
def test_an_initializer_of_ones_own_runs_in_each_worker_after_the_guard(
    python: Python, scratch: Scratch, how: str
) -> None:
    path = scratch.file("notes")
    script = f"""
    if __name__ == "__main__":
        agent.joblib.register()
        more = {{"initializer": note, "initargs": ({path!r}, "x")}}
        with joblib.parallel_config(backend="reaper", **more):
            Parallel(n_jobs=2)(delayed(look)() for _ in range(4))
            Parallel(n_jobs=2)(delayed(look)() for _ in range(4))
        print(1)
    """
    answer(python(LOOK + script))
    with open(path) as file:
        assert file.read() == "xx"


def test_each_task_that_is_done_is_told_of(python: Python) -> None:
    script = """
    if __name__ == "__main__":
        agent.joblib.register(make_default=True)
        agent.register()
        told = []
        agent.session.listen(lambda *words: told.append(words))
        with agent.joblib.progress(total=60, message="tasks"):
            Parallel(n_jobs=2)(delayed(abs)(i) for i in range(40))
            Parallel(n_jobs=2)(delayed(abs)(i) for i in range(20))
        Parallel(n_jobs=2)(delayed(abs)(i) for i in range(20))
        print(json.dumps(told[-1]))
    """
    assert answer(python(LOOK + script)) == [60, 60, "tasks"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_without_a_daemon_busy_and_idle_workers_end_with_their_parent(
    python: Python, run: str, number: int
) -> None:
    script = """
    def spin(seconds):
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            pass

    if __name__ == "__main__":
        agent.joblib.register(make_default=True)
        pids = {pid for pid, *_ in Parallel(n_jobs=2)(delayed(look)() for _ in range(4))}
        threading.Timer(0.3, lambda: print(json.dumps(sorted(pids)), flush=True)).start()
        Parallel(n_jobs=2)(delayed(spin)(300) for _ in range(1))
    """
    process = python(LOOK + script)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    handles = [open_pidfd(pid) for pid in pids]
    try:
        assert len(pids) == 2
        assert not any(handle is None or has_ended(handle) for handle in handles)
        process.send_signal(number)
        assert process.wait(WITHIN_S) == -number
        assert all(handle is not None and has_ended(handle, within_s=5.0) for handle in handles)
    finally:
        process.stdout.close()
        for handle in filter(None, handles):
            os.close(handle)
        end_leftovers(pids, run)
