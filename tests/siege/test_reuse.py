"""A pid that is given to somebody else is never signalled, and whoever gets it leads nobody's session.

Each case runs in a pid namespace of its own, where it chooses who gets which pid (zoo/reuse.py); some run at a time.
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest
from harness import ZOO, Scratch, test_environment

pytestmark = pytest.mark.needs_root

CASES = (  # those that take long first
    "held-while-reaping",
    "held-while-scanning",
    "held-while-cleaning-up",
    "held-at-the-leaders-end",
    "held-while-stopping",
    "held-while-registering",
    "held-while-starting",
    "worker-while-reaping",
    "worker-again-and-again",
    "leader-while-reaping",
    "leader-registers-afresh",
    "leaders-pid-goes-to-its-own-worker",
    "folder-of-who-came-later",
    "worker-in-the-same-tick",
    "kept-in-the-same-tick",
    "leader-in-the-same-tick",
    "while-the-daemon-is-down",
    "while-the-daemon-forgets",
    "afresh-while-the-daemon-is-down",
    "own-worker-while-the-daemon-forgets",
    "kept-while-the-leader-lives",
    "parent-of-orphans",
    "spared-pid-goes-to-a-worker",
    "subreapers-pid-goes-to-a-scheduler",
)
SCRIPT = os.path.join(ZOO, "reuse.py")
ABREAST = 4
OVER_WITHIN_S = 150.0
CANNOT_BE_SHOWN = 3  # as in zoo/reuse.py
NAMESPACES = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--cgroup", "--kill-child"]

Results = dict[str, "concurrent.futures.Future[subprocess.CompletedProcess[str]]"]


class Runner:
    """Runs cases, ``ABREAST`` at a time; all that it started is gone when it is closed."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._executor = concurrent.futures.ThreadPoolExecutor(ABREAST)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._closed = False

    def start(self, case: str) -> concurrent.futures.Future[subprocess.CompletedProcess[str]]:
        return self._executor.submit(self._run, case)

    def _run(self, case: str) -> subprocess.CompletedProcess[str]:
        mark = uuid.uuid4().hex[:12]
        command = [*NAMESPACES, sys.executable, SCRIPT, case]
        with self._lock:
            if self._closed:
                raise RuntimeError("nobody waits for this case any longer")
            process = subprocess.Popen(
                [*command, self._scratch.directory("c")],
                env=test_environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._running.add(process)
        try:
            log, _ = process.communicate(timeout=OVER_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it the init of the namespace, and all that is in there
            log, _ = process.communicate()
            log += f"\nnot over within {OVER_WITHIN_S:g} s"
        finally:
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(process.args, process.returncode, log)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()
        self._executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Start every case that was chosen, whichever test asks first."""
    refused = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if refused.returncode:
        pytest.skip(f"pid namespaces are refused here: {refused.stderr.strip()}")
    try:
        with open("/proc/sys/kernel/ns_last_pid", "rb"):
            pass
    except OSError as error:
        pytest.skip(f"this kernel does not let one choose a pid (CONFIG_CHECKPOINT_RESTORE): {error}")
    chosen = [case for item in request.session.items if (case := _case_of(item))]
    scratch = Scratch()
    runner = Runner(scratch)
    try:
        yield {case: runner.start(case) for case in chosen}
    finally:
        runner.close()
        scratch.remove()


def _case_of(item: pytest.Item) -> str | None:
    if not isinstance(item, pytest.Function) or "results" not in item.fixturenames:
        return None
    return str(item.callspec.params["case"])


@pytest.mark.parametrize("case", CASES)
def test_a_reused_pid_is_nobody_s_but_its_owner_s(case: str, results: Results) -> None:
    done = results[case].result()
    if done.returncode == CANNOT_BE_SHOWN:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, f"{case} left with {done.returncode}:\n{done.stdout}"


def test_no_case_is_forgotten() -> None:
    listed = subprocess.run(
        [sys.executable, SCRIPT, "--list"],
        capture_output=True,
        text=True,
        check=True,
        env=test_environment(""),
    )
    assert listed.stdout.split() == list(CASES)
