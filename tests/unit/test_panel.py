"""What a page shows of a training, how one is started for a server, and whom the panel refuses to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import repeat_until

from agent import launch, panel, session, status, stopping, wire
from agent.family import Process
from agent.jobs import Job
from agent.launch import LaunchError, Training
from agent.panel import Watch, as_markdown, look, progress_in_words, share_of, size, span
from agent.status import Status, StatusFile

NOWHERE = "/nonexistent/reaper.sock"


def process(pid: int, cpu_ticks: int, start_ticks: int = 1) -> Process:
    return Process(pid, 1, start_ticks, "R", cpu_ticks, False)


def training(path: Path, **more: Any) -> Training:
    """Return a training that was started in a boot that is over."""
    facts: dict[str, Any] = {"pid": 1, "start_ticks": 1, "boot_id": "another", **more}
    return Training("risk", str(path), f"{path}.log", ("true",), **facts)


def mine() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "start_ticks": session.read_start_ticks(),
        "boot_id": status.read_boot_id(),
    }


# -- what it shows --------------------------------------------------------------------------------


def test_without_a_training_there_is_nothing_to_stop() -> None:
    view = look(None, None, NOWHERE, Watch())
    assert (view.state, view.active) == ("none", False)
    assert NOWHERE in view.no_daemon


def test_a_training_starts_while_its_supervisor_lives_and_has_failed_once_that_is_gone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.json"
    assert look(training(path, **mine()), None, NOWHERE, Watch()).state == "starting"
    gone = look(training(path), None, NOWHERE, Watch())
    assert (gone.state, gone.active) == ("failed", False)
    assert "log" in gone.error


def test_a_running_one_is_shown_with_its_processes(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    StatusFile(path, "risk", "")
    view = look(None, str(path), NOWHERE, Watch())
    assert (view.state, view.pid, view.name) == ("running", os.getpid(), "risk")
    assert view.rss_bytes
    assert view.cpu_percent is not None
    assert view.elapsed_s is not None
    assert view.workers is not None
    assert view.owner == os.geteuid()
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        assert look(None, str(path), NOWHERE, Watch()).owner == 12345


def test_one_whose_process_is_dead_is_killed_whatever_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    StatusFile(path, "risk", "")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "start_ticks": told["start_ticks"] - 1}))
    view = look(None, str(path), NOWHERE, Watch())
    assert (view.state, view.active, view.workers) == ("killed", False, None)


@pytest.mark.parametrize(
    ("state", "restarts", "shown"),
    [
        ("failed", 2, "restarting"),
        ("killed", 2, "restarting"),
        ("failed", 0, "finishing"),
        ("completed", 2, "finishing"),
        ("interrupted", 2, "finishing"),
    ],
)
def test_a_training_is_over_only_once_its_supervisor_is_gone(
    tmp_path: Path, state: str, restarts: int, shown: str
) -> None:
    path = tmp_path / "run.json"
    status.write_status(str(path), told(os.getpid(), state=state))
    view = look(training(path, **mine(), restarts=restarts), None, NOWHERE, Watch())
    assert (view.state, view.active) == (shown, True)
    view = look(training(path, restarts=restarts), None, NOWHERE, Watch())
    assert (view.state, view.active) == (state, False)


def test_a_file_that_is_none_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    view = look(None, str(path), NOWHERE, Watch())
    assert view.state == "unknown"
    assert "not JSON" in view.error


def test_cpu_is_what_was_used_since_the_last_look() -> None:
    watch = Watch()
    assert watch.cpu_percent([]) is None
    watch.cpu_percent([process(1, 100), process(2, 100)])
    watch._at_s -= 10
    # Ten seconds of ten ticks each are 100 %: one process used half of that, the other none.
    found = watch.cpu_percent([process(1, 100 + 5 * panel._TICKS_PER_S), process(2, 100)])
    assert found is not None
    assert 40 < found <= 50


def test_nothing_moves_until_cpu_is_used_or_progress_told() -> None:
    watch = Watch()
    watch.idle_s(0.0, {"done": 1})
    watch._moved_at_s -= 400
    assert watch.idle_s(0.0, {"done": 1}) >= 400
    assert watch.idle_s(0.0, {"done": 2}) < 1
    watch._moved_at_s -= 400
    assert watch.idle_s(50.0, {"done": 2}) < 1


def test_who_runs_and_does_not_move_looks_stuck() -> None:
    assert panel.View("running", idle_s=panel.STUCK_AFTER_S).stuck
    assert not panel.View("running", idle_s=1).stuck
    assert not panel.View("completed", idle_s=panel.STUCK_AFTER_S).stuck


def test_only_ones_own_orphans_count_and_none_that_a_rule_spares() -> None:
    found = [
        {"uid": 1000, "verdict": "kill"},
        {"uid": 1000, "verdict": "wait"},
        {"uid": 1000, "verdict": "spare"},
        {"uid": 1000, "verdict": "report"},
        {"uid": 1001, "verdict": "kill"},
        "no record",
    ]
    assert panel.count_orphans(found, 1000) == 2
    assert panel.count_orphans(None, 1000) is None


# -- in words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "share", "words"),
    [
        ({"done": 3, "total": 8, "message": "fold 2"}, 0.375, "3 of 8, fold 2"),
        ({"done": 9, "total": 8, "message": ""}, 1.0, "9 of 8"),
        ({"done": -1, "total": 8, "message": ""}, 0.0, "-1 of 8"),
        ({"done": 3, "total": None, "message": "fold 2"}, None, "3, fold 2"),
        ({"done": 3, "total": 0, "message": ""}, None, "3"),
        ({"done": True, "total": "8", "message": 5}, None, ""),
        (None, None, ""),
    ],
)
def test_progress_is_told_as_far_as_it_is_known(progress: Any, share: float | None, words: str) -> None:
    assert share_of(progress) == share
    assert progress_in_words(progress) == words


def test_a_file_of_absurd_size_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    absurd = {"done": 10**4000, "total": 3, "message": "m" * 10_000}
    ended = Status("failed", "n" * 10_000, "", 1, 1, "", "", progress=absurd, error="e" * 10_000)
    status.write_status(str(path), ended)
    view = look(None, str(path), NOWHERE, Watch())
    assert (len(view.name), len(view.error), view.name[-1]) == (200, 2000, "…")
    assert share_of(view.progress) is None
    assert len(progress_in_words(view.progress)) <= wire.MAX_MESSAGE_BYTES


def test_spans_and_sizes_are_for_people() -> None:
    assert [span(one) for one in (None, 4.2, 200, 7500)] == ["-", "4 s", "3 min 20 s", "2 h 5 min"]
    assert [size(one) for one in (None, 0, 2048, 3 << 30, 5 << 40)] == [
        "-", "0 B", "2.0 KiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["*a* [b](http://c) ![d](http://e) <b> `f` $g$ :red[h]", "a\nb", "\u202e"])
def test_what_a_process_calls_itself_is_shown_and_not_obeyed(text: str) -> None:
    shown = as_markdown(text)
    bare = shown.replace("\\\\", "")
    for place, character in enumerate(bare):
        assert character.isalnum() or character in " \\" or bare[place - 1] == "\\" or not character.isascii()
    assert shown.replace("\u2060", "").isprintable()


@pytest.mark.parametrize("text", ["--", "a -> b", "http://a.b/c", "WWW.a.b", "a@b.c", ":smile:"])
def test_what_becomes_an_arrow_or_a_link_however_it_is_escaped_is_broken_up(text: str) -> None:
    assert as_markdown(text).replace("\\", "").replace("\u2060", "", 1) == text
    assert "\u2060" in as_markdown(text)


def test_bold_is_bold_with_blanks_around_it_too() -> None:
    assert panel.bold(" *a ") == r"**\*a**"
    assert panel.bold("  ") == ""


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ({"kind": "oom", "code": 9}, "out of memory: the kernel"),
        ({"kind": "signal", "code": 9}, "by SIGKILL (signal 9)"),
        ({"kind": "signal", "code": 99}, "by signal 99"),
        ({"kind": "unknown", "code": None}, "without a word"),
        (None, "without a word"),
    ],
)
def test_of_a_killed_one_it_is_told_how_as_far_as_that_is_known(cause: Any, words: str) -> None:
    assert words in panel.killed_in_words(told(os.getpid(), state="killed", cause=cause))


# -- starting -------------------------------------------------------------------------------------


def test_a_command_is_a_list_of_words(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of words"):
        launch.start_training("python train.py", status_file=tmp_path / "run.json")
    for words in ([], ["a\0b"]):
        with pytest.raises(ValueError, match="at least one word"):
            launch.start_training(words, status_file=tmp_path / "run.json")
    with pytest.raises(ValueError, match="name"):
        launch.start_training(["true"], name="x" * 201, status_file=tmp_path / "run.json")


@pytest.mark.parametrize("limits", [{"restarts": -1}, {"restarts": 1001}, {"max_workers": 0}])
def test_a_limit_that_is_none_is_refused_before_anything_is_started(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}: must be . to "):
        launch.start_training(["true"], status_file=tmp_path / "run.json", **limits)
    with pytest.raises(TypeError, match="restarts: must be a whole number"):
        launch.start_training(["true"], status_file=tmp_path / "run.json", restarts=True)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_found_again_is_ended_before_that_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Path(launch._launch_file(str(path))).mkdir()  # as on a full disk, nothing can be put there
    with pytest.raises(LaunchError, match="cannot be started"):
        launch.start_training(["sleep", "60"], name="risk", status_file=path, socket=NOWHERE)
    running = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            running += [one] if str(path).encode() in one.read_bytes() else []
    assert not running
    assert {one.name for one in tmp_path.iterdir()} <= {"run.json.launch", "run.json.log", "run.json"}


def test_one_that_runs_is_not_started_a_second_time(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    StatusFile(path, "risk", "")
    with pytest.raises(LaunchError, match=f"runs already, as pid {os.getpid()}"):
        launch.start_training(["true"], name="risk", status_file=path)
    path.unlink()
    launch._save(training(path, **mine()))
    with pytest.raises(LaunchError, match=f"runs already, under pid {os.getpid()}"):
        launch.start_training(["true"], name="risk", status_file=path)


def test_of_two_who_start_it_at_once_one_does_and_it_is_nobody_s_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REAPER_LINEAGE", "1-1-00000001-00000002")  # this is a worker itself
    path, begin = tmp_path / "run.json", threading.Barrier(2)

    def start() -> Training:
        begin.wait(30)
        return launch.start_training(["sleep", "60"], name="risk", status_file=path, socket=NOWHERE)

    jobs = [Job("Starting", start) for _ in range(2)]
    started, refused = [], []
    for one in jobs:
        try:
            started.append(one.result())
        except LaunchError as error:
            refused.append(str(error))
    assert (len(started), len(refused)) == (1, 1)
    assert "runs already" in refused[0]
    begun = launch.wait_begun(started[0], 30)
    assert begun is not None
    # A signal to the server's terminal or group is none of the training's.
    assert os.getsid(started[0].pid) == os.getpgid(started[0].pid) == started[0].pid
    assert "REAPER_LINEAGE=1-1-" not in status.read_text(f"/proc/{started[0].pid}/environ")
    assert not started[0]._replace(boot_id="another").supervised
    above = started[0].pid, started[0].start_ticks
    assert stopping.stop(begun, above, owner=os.geteuid(), socket=NOWHERE).left == ()
    assert not started[0].supervised


def test_where_it_cannot_be_started_the_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"file.*directory|file.*exists"):
        launch.start_training(["true"], status_file=tmp_path / "file" / "run.json")


def test_a_training_is_found_by_its_status_file_until_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert launch.find_training(status_file=path) is None
    launch._save(training(path))
    assert launch.find_training(status_file=path) == training(path)
    long = training(path)._replace(command=("echo", "x" * 500_000))
    launch._save(long)
    assert launch.find_training(status_file=path) == long
    Path(launch._launch_file(str(path))).write_text('{"name": 1}')
    assert launch.find_training(status_file=path) is None
    with pytest.raises(ValueError, match="either"):
        launch.find_training()


def test_two_names_never_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    names = ["risk", "risk model", "risk/model", "risk-model", "../x", ".x", "ü" * 190, "u" * 190, "ü" * 189]
    paths = [launch.default_status_file(name) for name in names]
    assert len(set(paths)) == len(names)
    assert {os.path.dirname(path) for path in paths} == {"/state/reaper/trainings"}
    assert all(len(os.path.basename(path).encode()) < 200 for path in paths)


def test_the_end_of_a_log_is_what_a_terminal_would_show(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n10 %\r20 %\r\x1b[2Jthree\xff\nfour\r\n\n")
    assert launch.tail(str(path), 2) == "[2Jthree\ufffd\nfour"
    assert launch.tail(str(path), 20).startswith("one")
    assert launch.tail(str(tmp_path / "none"), 5) == ""
    os.mkfifo(tmp_path / "fifo")
    assert launch.tail(str(tmp_path / "fifo"), 5) == ""


# -- stopping -------------------------------------------------------------------------------------


def told(pid: int, **more: Any) -> Status:
    ticks = session.read_start_ticks(pid)
    return Status("running", "risk", "", pid, ticks, status.read_boot_id(), "")._replace(**more)


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()])
def test_neither_this_process_nor_one_above_it_is_stopped(pid: int) -> None:
    with pytest.raises(stopping.StopError, match="inside of this very server"):
        stopping.stop(told(pid), socket=NOWHERE)


def test_what_this_process_is_a_worker_of_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    id_ = f"{os.getppid()}-1-00000001-00000002"
    monkeypatch.setenv("REAPER_LINEAGE", id_)
    with pytest.raises(stopping.StopError, match="inside of this very server"):
        stopping.stop(told(1, session=id_), socket=NOWHERE)


def test_between_two_attempts_the_supervisor_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    fails = ["sh", "-c", "exit $(($$ % 100 + 1))"]  # each time otherwise: it is started again and again
    started = launch.start_training(fails, name="risk", status_file=path, restarts=1000, socket=NOWHERE)

    def restarts() -> bool | None:
        launch.wait_begun(started, 30)
        return look(started, None, NOWHERE, Watch()).state == "restarting" or None

    repeat_until(restarts, 30, "it does not fail")
    found = launch.find_training(status_file=path)
    assert found == started
    above = started.pid, started.start_ticks
    assert stopping.stop_supervisor(status.read_status(path), above, str(path)).left == ()
    assert not started.supervised
    assert not look(started, None, NOWHERE, Watch()).active


def test_who_supervises_another_training_or_none_is_not_stopped(tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    with sleeper() as child:
        ended = told(child.pid, state="failed")
        with pytest.raises(stopping.StopError, match="not believed"):
            stopping.stop_supervisor(ended, (child.pid, ended.start_ticks), path)
        with pytest.raises(stopping.StopError, match="ended by itself"):
            stopping.stop_supervisor(ended, (child.pid, ended.start_ticks - 1), path)
        assert child.poll() is None
    claims = ["reaperd.ctl.main", "--status-file=/other", "--", f"--status-file={path}"]
    code = "print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *claims], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(stopping.StopError, match="not believed"):
            stopping.stop_supervisor(ended, (other.pid, session.read_start_ticks(other.pid)), path)
        assert other.poll() is None
    above = os.getppid(), session.read_start_ticks(os.getppid())
    with pytest.raises(stopping.StopError, match="inside of this very server"):
        stopping.stop_supervisor(ended, above, path)


def test_what_has_ended_is_not_stopped() -> None:
    with pytest.raises(stopping.StopError, match="it is killed"):
        stopping.stop(told(1, state="killed"), socket=NOWHERE)


@pytest.mark.parametrize("stubborn", [False, True])
def test_without_a_daemon_it_is_asked_and_then_made_to_end(stubborn: bool) -> None:
    handle = "signal.signal(15, signal.SIG_IGN); " if stubborn else ""
    code = f"import signal, time; {handle}print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        done = stopping.stop(told(child.pid), socket=NOWHERE, grace_s=0.2 if stubborn else 30)
        assert (done.ended, done.left) == (1, ())
        assert done.without_daemon
        assert child.wait() == -(signal.SIGKILL if stubborn else signal.SIGTERM)


def test_whoever_has_the_pid_by_now_is_not_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        other = told(child.pid)
        with pytest.raises(stopping.StopError, match="ended by itself"):
            stopping.stop(other._replace(start_ticks=other.start_ticks - 1), socket=NOWHERE)
        with contextlib.ExitStack() as stack:  # who takes over the pid between a look and the next
            assert stopping._open((child.pid, other.start_ticks - 1), stack) == -1
            assert stopping._open((child.pid, other.start_ticks), stack) >= 0
        assert child.poll() is None
        child.kill()


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_file_of_somebody_who_does_not_run_the_process_is_not_believed() -> None:
    with sleeper() as child:
        with pytest.raises(stopping.StopError, match="not believed"):
            stopping.stop(told(child.pid), owner=os.geteuid() + 1, socket=NOWHERE)
        assert child.poll() is None
        assert stopping.stop(told(child.pid), owner=os.geteuid(), socket=NOWHERE).ended == 1


def test_a_file_that_names_another_s_session_is_not_believed() -> None:
    with sleeper() as child, pytest.raises(stopping.StopError, match="not that process's"):
        stopping.stop(told(child.pid, session="1-1-00000001-00000002"), socket=NOWHERE)


def test_what_is_not_above_the_training_is_no_supervisor_of_it() -> None:
    with sleeper() as child, sleeper() as other:
        claimed = other.pid, session.read_start_ticks(other.pid)
        assert stopping.stop(told(child.pid), claimed, socket=NOWHERE).ended == 1
        assert other.poll() is None


def test_who_presses_stop_twice_is_told_so_the_second_time() -> None:
    with sleeper() as child:
        found = told(child.pid)
        assert stopping.stop(found, socket=NOWHERE).ended == 1
        with pytest.raises(stopping.StopError, match="ended by itself"):
            stopping.stop(found, socket=NOWHERE)


# -- jobs -----------------------------------------------------------------------------------------


def test_a_job_goes_on_by_itself_and_gives_its_result_or_its_error() -> None:
    go = threading.Event()
    job = Job("Working", lambda: go.wait(30))
    assert not job.over
    go.set()
    assert job.wait(30)
    assert job.over
    assert job.result() is True

    def fail() -> None:
        raise OSError("no")

    failed = Job("Failing", fail)
    with pytest.raises(OSError, match="no"):
        failed.result()
    assert failed.failed_in_words(OSError) == "No"
    assert failed.failed_in_words(ValueError) == "Failing has failed: OSError('no')"
    assert not job.failed_in_words()


def test_the_end_of_a_run_is_written_for_that_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    StatusFile(path, "risk", "")
    me = os.getpid(), session.read_start_ticks()
    status.end_for(str(path), (me[0], me[1] - 1), {"kind": "exit", "code": 3}, None)
    assert status.read_status(path).state == "running"
    status.end_for(str(path), me, {"kind": "signal", "code": 15}, {"done": 1, "total": 2, "message": ""})
    found = status.read_status(path)
    assert (found.state, found.progress) == ("interrupted", {"done": 1, "total": 2, "message": ""})
    status.end_for(str(path), me, {"kind": "exit", "code": 3}, None)
    assert status.read_status(path).state == "interrupted"


def test_streamlit_that_is_missing_is_named() -> None:
    code = "import sys; sys.modules['streamlit'] = None\nimport agent.streamlit"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'reaperd[ui]'" in done.stderr
    with contextlib.suppress(ImportError):
        import agent.streamlit

        assert agent.streamlit.st.__name__ == "streamlit"
