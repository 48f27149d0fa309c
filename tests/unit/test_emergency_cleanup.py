"""What a script is told of a clean-up; that one ends whom it should is shown on real orphans elsewhere."""

from __future__ import annotations

import sys
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


@pytest.mark.parametrize("executable", ["", "/nonexistent/python", "/bin/false"])
def test_a_script_is_told_why_nobody_could_clean_up(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(
        agent.CleanupError, match=r"could not be cleaned up: .*(executable|No such file|exited with 1)"
    ):
        agent.emergency_cleanup()
    with pytest.raises(agent.CleanupError, match="null byte" if executable == "/bin/false" else "cleaned up"):
        agent.emergency_cleanup(socket="a\0b")
