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
from typing import Any, NamedTuple

import pytest
from harness import Daemon, describe, marked, test_environment, wait_gone

import agent

ZOO = os.path.join(os.path.dirname(os.path.dirname(__file__)), "support", "zoo")
MOMENTS = int(os.environ.get("REAPER_TEST_MOMENTS", "1"))
FITS = 65  # 64, and the refit
WITHIN_S = 120.0
NOWHERE = "/nonexistent/reaper.sock"
SEED = int(os.environ.get("REAPER_TEST_SEED", random.SystemRandom().randrange(2**32)))


class Search:
    """A run of zoo/search.py."""

    def __init__(self, run: str, folder: Path, n_jobs: int, backend: str, socket: str = NOWHERE) -> None:
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
            env=test_environment(run, REAPER_SOCKET=socket, REAPER_TEST_SEARCH=run),
            start_new_session=True,
        )
        assert self.read()["begun"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")
        return told

    def end(self, number: int, *, group: bool, after_s: float, again_after_s: float | None = None) -> int:
        """Send a signal after so many seconds, unless it has ended by then, and return its exit code."""
        for wait_s in (after_s,) if again_after_s is None else (after_s, again_after_s):
            try:
                return self.process.wait(wait_s)
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


class Way(NamedTuple):
    """A way out of a search, and what is to be seen of it: exit codes and states of the status file."""

    name: str
    number: int
    group: bool
    ends: tuple[tuple[int, str], ...]
    twice: bool = False


_INTERRUPTED = ((-signal.SIGINT, "interrupted"),)
WAYS = (
    Way("ctrl-c", signal.SIGINT, True, _INTERRUPTED),
    Way("term", signal.SIGTERM, False, ((143, "interrupted"),)),
    Way("kill", signal.SIGKILL, False, ((-signal.SIGKILL, "killed"),)),
    Way("int", signal.SIGINT, False, _INTERRUPTED),
    # Either it had unwound by then, or it was ended at once.
    Way("ctrl-c twice", signal.SIGINT, True, _INTERRUPTED, twice=True),
    Way("term to all", signal.SIGTERM, True, ((143, "interrupted"),)),
    Way("hangup", signal.SIGHUP, True, ((129, "interrupted"),)),
    Way("exception", signal.SIGUSR1, False, ((1, "failed"),)),
    Way("sys.exit(3)", signal.SIGUSR2, False, ((3, "failed"),)),
)


@pytest.mark.parametrize("turn", range(MOMENTS))
@pytest.mark.parametrize("way", WAYS[: len(WAYS) if MOMENTS > 1 else 3], ids=lambda way: way.name)
def test_whatever_ends_a_search_at_any_moment_leaves_nothing(
    way: Way,
    turn: int,
    start: Start,
    whole: dict[str, Any],
    tmp_path: Path,
    run: str,
    request: pytest.FixtureRequest,
) -> None:
    after_s = random.Random(f"{SEED} {way.name} {turn}").uniform(0, 1.1 * whole["took_s"])
    watched = turn % 2 == 1
    search = start(tmp_path, 2, "reaper", request.getfixturevalue("daemon").socket if watched else NOWHERE)
    code = search.end(way.number, group=way.group, after_s=after_s, again_after_s=0.25 if way.twice else None)
    where = f"REAPER_TEST_SEED={SEED}, after {after_s:.3f} s of {whole['took_s']:.1f} s, exit code {code}"
    left = wait_gone(marked("REAPER_TEST_SEARCH", run), 5.0)
    assert not left, f"{where}: {describe(left)}"
    state = agent.read_status(tmp_path / "run.json").state
    # Once the session is over, the signal is Python's own business again, and its handlers are as they were.
    late = [(end, "completed") for end in (0, -way.number, *(end for end, _ in way.ends))]
    assert (code, state) in (*way.ends, *late), where
    assert search.read().get("restored", code == -way.number), where


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
