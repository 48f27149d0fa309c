"""What a script is told of a clean-up; that one ends whom it should is shown on real orphans elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import agent
from agent import cleanup


def process(pid: int, result: str | None, verdict: str = "kill") -> dict[str, Any]:
    return {
        "pid": pid,
        "start_ticks": pid * 10,
        "framework": "loky",
        "role": "worker",
        "rss_bytes": 4096,
        "evidence": ["why", "and why"],
        "verdict": verdict,
        "result": result,
    }


def leftover(path: str, result: str | None) -> dict[str, Any]:
    return {"path": path, "kind": "loky semaphore", "bytes": 32, "evidence": ["why"], "result": result}


def test_each_that_was_to_go_is_told_of_once_by_what_became_of_it() -> None:
    report = cleanup._report(
        {
            "orphans": [
                process(1, "killed"),
                process(2, "denied"),
                process(3, "stuck"),
                process(4, None),
                process(5, "exited"),
                process(6, "kept", "spare"),
                process(7, None, "spare"),
            ],
            "leftovers": [leftover("/dev/shm/a", "removed"), leftover("/dev/shm/b", "kept")],
        }
    )
    assert report.killed == (
        cleanup.CleanedProcess(1, 10, "loky", "worker", 4096, ("why", "and why"), "killed"),
    )
    assert [one.pid for one in report.denied] == [2]
    assert report.reclaimed == (cleanup.CleanedFile("/dev/shm/a", "loky semaphore", 32, ("why",), "removed"),)
    stuck, late, kept = report.remaining
    assert isinstance(stuck, cleanup.CleanedProcess)
    assert isinstance(late, cleanup.CleanedProcess)
    assert isinstance(kept, cleanup.CleanedFile)
    assert (stuck.pid, late.pid, kept.path) == (3, 4, "/dev/shm/b")
    assert report
    assert not cleanup._report({"orphans": [process(7, None, "spare")], "leftovers": []})


@pytest.mark.parametrize(
    ("executable", "reason"),
    [
        ("", "sys.executable is no Python interpreter; run `reaperctl cleanup` instead"),
        ("/opt/app/train", "/opt/app/train is no Python interpreter"),
        ("/nonexistent/python", "/nonexistent/python: No such file"),
        ("FALSE", "reaperctl exited with 1"),
    ],
)
def test_a_script_is_told_why_nobody_could_clean_up(
    executable: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if executable == "FALSE":
        executable = str(tmp_path / "python3")
        os.symlink("/bin/false", executable)
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(agent.CleanupError, match=f"could not be cleaned up: {reason}"):
        agent.emergency_cleanup()


def test_a_frozen_program_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(agent.CleanupError, match="no Python interpreter"):
        agent.emergency_cleanup()


def test_a_socket_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(agent.CleanupError, match="null byte"):
        agent.emergency_cleanup(socket="a\0b")
