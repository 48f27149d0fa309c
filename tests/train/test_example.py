"""examples/risk_model.py: killed in the middle and run again, it ends with every model, and nobody is left."""

from __future__ import annotations

import os
import subprocess
import sys

from harness import Daemon, Scratch, marked, repeat_until, test_environment

import agent

EXAMPLE = os.path.join(
    os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "examples", "risk_model.py"
)
WITHIN_S = 120.0


def test_the_example_can_be_killed_and_goes_on(run: str, scratch: Scratch, daemon: Daemon) -> None:
    folder = scratch.directory("models")
    command = [sys.executable, EXAMPLE, "--model-dir", folder, "--max-workers", "2"]
    environment = test_environment(run, REAPER_SOCKET=daemon.socket)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:

        def kept() -> int | None:
            daemon.sessions()  # waits for a reply
            return _kept(folder) or None

        repeat_until(kept, WITHIN_S, "a fit is kept")
        process.kill()
    ended = daemon.wait_end(agent.read_status(os.path.join(folder, "run.json")).session)
    assert ended["cause"] == {"kind": "signal", "code": 9}
    assert agent.read_status(os.path.join(folder, "run.json")).state == "killed"
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()[:-1]) == [
        "boosting",
        "forest",
        "logistic",
    ]
    assert all(float(line.split()[3].rstrip(",")) > 0.95 for line in done.stdout.splitlines()[:-1])
    assert {"MODEL_CARD.md", "logistic.joblib", "forest.joblib", "boosting.joblib"} <= set(os.listdir(folder))
    assert agent.read_status(os.path.join(folder, "run.json")).state == "completed"
    assert set(marked("REAPER_TEST_RUN", run)) <= {daemon.pid, *daemon.children()}


def _kept(folder: str) -> int:
    return sum(name.endswith(".fit") for _, _, names in os.walk(folder) for name in names)
