"""The status file: always whole, and a run that is over never reads as running."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import agent
from agent.session import read_start_ticks
from agent.status import REFRESH_S, Status, StatusFile

WHOLE = Status("running", "risk", "1-2-3-4", 1, 2, "boot", "2026-01-31T12:00:00.000Z")


def write(path: Path, **more: Any) -> Path:
    path.write_text(json.dumps({**WHOLE._asdict(), **more}))
    return path


def mine(**more: Any) -> dict[str, Any]:
    """Return the fields by which this process is found."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    ticks = read_start_ticks(os.getpid())
    return {"pid": os.getpid(), "start_ticks": ticks, "boot_id": boot_id, "host": os.uname().nodename, **more}


def test_a_run_is_followed_from_its_start_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(FileNotFoundError):
        agent.read_status(path)
    run = StatusFile(path, "risk", "id")
    begun = agent.read_status(path)
    assert (begun.state, begun.name, begun.pid, begun.ended_at) == ("running", "risk", os.getpid(), None)
    run.end("failed", error="ValueError: x", cause={"kind": "exit", "code": 1})
    ended = agent.read_status(path)
    assert (ended.state, ended.error, ended.started_at) == ("failed", "ValueError: x", begun.started_at)
    assert ended.ended_at is not None
    assert ended.ended_at >= begun.started_at
    assert os.listdir(tmp_path) == ["run.json"]


def test_progress_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with mock.patch.object(time, "monotonic", return_value=100.0) as clock:
        run = StatusFile(path, "risk", "id")
        run.note_progress(1, 10, "first")
        assert agent.read_status(path).progress is None
        clock.return_value += REFRESH_S
        run.note_progress(2, None, "second")
        running = agent.read_status(path)
        assert (running.state, running.progress) == (
            "running", {"done": 2, "total": None, "message": "second"},
        )  # fmt: skip
        run.note_progress(3, 10, "third")
        assert agent.read_status(path).progress == running.progress
        run.end("completed")
        clock.return_value += REFRESH_S
        run.note_progress(4, 10, "too late")
    assert agent.read_status(path).progress == {"done": 3, "total": 10, "message": "third"}
    assert agent.read_status(path).state == "completed"


def test_progress_that_is_no_number_of_json_is_left_out(tmp_path: Path) -> None:
    run = StatusFile(tmp_path / "run.json", "risk", "id")
    run.note_progress(1, float("inf"), "x")
    run.note_progress(float("nan"), 2, "y")
    run.end("completed")
    assert agent.read_status(tmp_path / "run.json").progress == {"done": 1, "total": None, "message": "x"}


@pytest.mark.parametrize("number", [Decimal(5), Fraction(5), True + 4, 5.0])
def test_progress_in_any_kind_of_number_is_written(number: Any, tmp_path: Path) -> None:
    run = StatusFile(tmp_path / "run.json", "risk", "id")
    run.note_progress(number, number * 2, "")
    run.end("completed")
    assert agent.read_status(tmp_path / "run.json").progress == {"done": 5, "total": 10, "message": ""}


def test_a_long_message_is_cut_so_that_the_file_can_be_read(tmp_path: Path) -> None:
    run = StatusFile(tmp_path / "run.json", "risk", "id")
    run.note_progress(1, 2, "\N{SNOWMAN}" * 100_000)
    run.end("completed")
    progress = agent.read_status(tmp_path / "run.json").progress
    assert progress is not None
    assert progress["message"] == "\N{SNOWMAN}" * 333


def test_progress_that_cannot_be_written_is_no_fault_of_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    run = StatusFile(folder / "run.json", "risk", "id")
    (folder / "run.json").unlink()
    folder.rmdir()
    with mock.patch.object(time, "monotonic", return_value=time.monotonic() + REFRESH_S):
        run.note_progress(1, 2, "")


def test_the_file_has_the_mode_that_any_file_would_have(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        StatusFile(tmp_path / "run.json", "risk", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "run.json").st_mode) == 0o640


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StatusFile(tmp_path / "nowhere" / "run.json", "risk", "")
    os.symlink("/etc/passwd", tmp_path / f".run.json.{os.getpid()}")
    with pytest.raises(OSError, match=r"symbolic links"):
        StatusFile(tmp_path / "run.json", "risk", "")
    assert not os.path.exists(tmp_path / "run.json")


def test_no_reader_ever_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run, over = StatusFile(path, "risk", ""), threading.Event()

    def write_on() -> None:
        while not over.is_set():
            run.end("failed", error="x" * 1500)
            run.end("completed", error=None)

    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        for _ in range(500):
            assert agent.read_status(path).state in ("running", "failed", "completed")
    finally:
        over.set()
        thread.join()


def test_who_says_that_it_runs_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert agent.read_status(write(path, **mine())).state == "running"
    assert (
        agent.read_status(write(path, **mine(start_ticks=1))).state == "killed"
    )  # the pid is another's by now
    assert agent.read_status(write(path, **mine(boot_id="another"))).state == "killed"
    assert agent.read_status(write(path, **mine(boot_id="another", host="elsewhere"))).state == "unknown"
    assert agent.read_status(write(path, **mine(pid_namespace=1))).state == "unknown"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ticks = read_start_ticks(ended.pid)
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert agent.read_status(write(path, **mine(pid=ended.pid, start_ticks=ticks))).state == "killed"
    assert agent.read_status(write(path, **mine(pid=ended.pid, start_ticks=ticks))).state == "killed"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "at most|not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"[]", "must hold one JSON object, got list"),
        (b"{}", "state: must be a text, got None"),
        (b" " * 70_000, "at most 65536 bytes"),
        # Python reads these, and a back end could not pass them on.
        (b'{"progress": {"done": NaN}}', "not JSON"),
        (b'{"progress": {"done": 1e999}}', "not JSON"),
        (b'{"error": "\\ud800"}', "not JSON"),
    ],
)
def test_what_is_no_status_file_is_refused_with_a_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    with pytest.raises(agent.StatusError, match=words):
        agent.read_status(path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("state", "odd", "state: must be one of running, completed"),
        ("state", "unknown", "state: must be one of"),  # only a reader says so
        ("pid", "1", "pid: must be a whole number"),
        ("pid", True, "pid: must be a whole number"),
        ("progress", [], "progress: must be an object or null"),
        ("ended_at", 5, "ended_at: must be a text or null"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path: Path, field: str, value: Any, words: str) -> None:
    with pytest.raises(agent.StatusError, match=words):
        agent.read_status(write(tmp_path / "run.json", **{field: value}))


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    assert agent.read_status(write(tmp_path / "run.json", **mine(), later={"a": 1})).name == "risk"
