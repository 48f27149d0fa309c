"""A real grid search, ended at random moments: nothing is left, and run again it does only what was not finished.

REAPER_TEST_MOMENTS is how many moments there are for each; the seed is printed where one fails.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, describe, marked, test_environment, wait_gone

import agent

ZOO = os.path.join(os.path.dirname(os.path.dirname(__file__)), "support", "zoo")
MOMENTS = int(os.environ.get("REAPER_TEST_MOMENTS", "1"))
FITS = 65  # 64, and the refit
WITHIN_S = 120.0
SEED = int(os.environ.get("REAPER_TEST_SEED", random.SystemRandom().randrange(2**32)))


class Search:
    """A run of zoo/search.py."""

    def __init__(
        self, run: str, folder: Path, n_jobs: int, backend: str, socket: str = "/nonexistent"
    ) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                os.path.join(ZOO, "search.py"),
                str(folder),
                str(n_jobs),
                backend,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=test_environment(run, REAPER_SOCKET=socket),
            start_new_session=True,
        )
        assert self.read()["begun"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")
        return told

    def end(self, number: int, *, group: bool, after_s: float) -> int:
        """Send a signal after so many seconds, unless it has ended by then, and return its exit code."""
        try:
            return self.process.wait(after_s)
        except subprocess.TimeoutExpired:
            if group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        return self.process.wait(WITHIN_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def begun(self) -> int:
        path = self.folder / "begun"
        return path.stat().st_size if path.exists() else 0

    @property
    def kept(self) -> int:
        folder = self.folder / "kept"
        return len([name for name in os.listdir(folder) if name.endswith(".fit")]) if folder.exists() else 0


Start = Callable[..., Search]


@pytest.fixture
def start(run: str) -> Iterator[Start]:
    running: list[Search] = []

    def begin(*arguments: Any) -> Search:
        running.append(Search(run, *arguments))
        return running[-1]

    yield begin
    for one in running:
        one.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a search tells that nobody interrupts, and how many seconds it takes."""
    import time

    folder = tmp_path_factory.mktemp("whole")
    search = Search("", folder, 2, "reaper")
    began_s = time.monotonic()
    assert search.read()["restored"]
    told = search.read()
    took_s = time.monotonic() - began_s
    search.close()
    assert (search.begun, search.kept) == (FITS, FITS)
    return {**told, "took_s": took_s}


@pytest.mark.parametrize("turn", range(MOMENTS))
@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        (signal.SIGKILL, False),
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
    ][: 6 if MOMENTS > 1 else 3],
)
def test_a_signal_at_any_moment_of_a_search_leaves_nothing(
    number: int, group: bool, turn: int, start: Start, whole: dict[str, Any], tmp_path: Path, run: str
) -> None:
    after_s = random.Random(f"{SEED} {number} {group} {turn}").uniform(0, 1.1 * whole["took_s"])
    search = start(tmp_path, 2, "reaper")
    code = search.end(number, group=group, after_s=after_s)
    where = f"REAPER_TEST_SEED={SEED}, after {after_s:.3f} s of {whole['took_s']:.1f} s, exit code {code}"
    left = wait_gone(marked("REAPER_TEST_RUN", run), 5.0)
    assert not left, f"{where}: {describe(left)}"
    state = agent.read_status(tmp_path / "run.json").state
    unwound = {signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}.get(number, 128 + number)
    if number == signal.SIGKILL:
        assert (code, state) in ((unwound, "killed"), (unwound, "completed"), (0, "completed")), where
        return
    assert search.read().get("restored", code == -number and state == "completed"), where
    # Once the session is over, the signal is Python's own business again.
    assert (code, state) in ((unwound, "interrupted"), *((end, "completed") for end in (0, -number))), where


@pytest.mark.parametrize("turn", range(MOMENTS))
@pytest.mark.parametrize(
    ("n_jobs", "backend"), [(4, "loky"), (1, "loky"), (2, "reaper")][: 3 if MOMENTS > 1 else 1]
)
def test_a_search_that_was_killed_is_resumed_and_no_finished_fit_is_done_again(
    n_jobs: int, backend: str, turn: int, start: Start, whole: dict[str, Any], tmp_path: Path, daemon: Daemon
) -> None:
    after_s = random.Random(f"{SEED} {n_jobs} {backend} {turn}").uniform(0, whole["took_s"])
    killed = start(tmp_path, n_jobs, backend, daemon.socket)
    killed.end(signal.SIGKILL, group=False, after_s=after_s)
    daemon.wait_end(agent.read_status(tmp_path / "run.json").session)
    kept, begun = killed.kept, killed.begun
    resumed = start(tmp_path, n_jobs, backend, daemon.socket)
    assert resumed.read()["restored"]
    told = resumed.read()
    where = f"REAPER_TEST_SEED={SEED}, after {after_s:.3f} s: {kept} kept, {begun} begun, {resumed.begun - begun} done after that"
    assert (told["results"], told["best"]) == (whole["results"], whole["best"]), where
    assert resumed.begun - begun == FITS - kept, where
    assert resumed.kept == FITS
    assert agent.read_status(tmp_path / "run.json").state == "completed"
