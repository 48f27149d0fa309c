"""A training that a server starts is a leader of its own, whatever becomes of the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import Daemon, repeat_until, test_environment

import agent
from agent import launch, stopping

SERVER = """
import json, sys
import agent
from agent import launch

session = agent.register(required=True)
training = launch.start_training([sys.executable, "-c", TRAINING], name="risk", status_file=sys.argv[1])
print(json.dumps([session.id, training.pid]), flush=True)
sys.stdin.read()
"""
TRAINING = "import time; time.sleep(60)"


def test_it_is_no_worker_of_a_server_that_is_a_session_itself_and_outlives_its_kill(
    run: str, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"TRAINING = {TRAINING!r}\n{SERVER}", str(path)],
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        session, supervisor = json.loads(server.stdout.readline())
        training = launch.find_training(status_file=path)
        assert training is not None
        assert training.pid == supervisor
        told = launch.wait_begun(training, 30)
        assert told is not None
        repeat_until(lambda: daemon.session_of(told.pid), 10, "the training is no session")
        server.kill()
    assert daemon.wait_end(session)["kind"] == "ended"  # it had no workers
    assert agent.read_status(path).state == "running"
    assert training.supervised
    above = training.pid, training.start_ticks
    assert stopping.stop(told, above, socket=daemon.socket).left == ()
    assert agent.read_status(path).state == "interrupted"
