"""What cleanup asks for and what it makes of the answers: exactly what it showed, each told of once."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from agent import wire
from reaperd.ctl import USAGE, CommandError, arguments, cleanup, local, orphans


def record(pid: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "start_ticks": pid * 10,
        "verdict": "kill",
        "result": None,
        "evidence": ["why"],
        **more,
    }


def leftover(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "bytes": 1, "result": None, **more}


def event(seq: int, *processes: dict[str, Any], kind: str = "killed") -> dict[str, Any]:
    return {"seq": seq, "kind": kind, "processes": list(processes)}


def ended(pid: int, result: str = "killed", **more: Any) -> dict[str, Any]:
    return {"pid": pid, "start_ticks": pid * 10, "result": result, "signals": ["SIGTERM"], **more}


class Daemon:
    """Answers as one would; keeps what it was asked."""

    def __init__(self, replies: dict[int, dict[str, Any]] | None = None, *happened: dict[str, Any]) -> None:
        self.replies = replies or {}  # by pid: what the record of it says otherwise; None: there is none
        self.happened = happened
        self.asked: list[dict[str, Any]] = []
        self.followed: list[int] = []
        self.told = 0

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        assert op == "cleanup"
        self.asked.append(fields)
        found = [record(pid, **self.replies.get(pid, {})) for pid, _ in fields["processes"]]
        return {
            "orphans": [one for one in found if not one.get("unknown")],
            "leftovers": [leftover(path, result="removed") for path in fields["leftovers"]],
            "after": 100 + len(self.asked),
        }

    def follow(self, after: int) -> Iterable[dict[str, Any]]:
        self.followed.append(after)
        for one in self.happened:
            self.told += 1
            yield one


def carry_out(daemon: Daemon, *pids: int, paths: Iterable[str] = ()) -> cleanup.Target:
    shown = {"orphans": [record(pid) for pid in pids], "leftovers": [leftover(path) for path in paths]}
    return cleanup.carry_out(cleanup.target_of(shown), daemon.ask, daemon.follow)


def results(done: cleanup.Target) -> dict[int, Any]:
    return {pid: one["result"] for (pid, _), one in done.processes.items()}


def test_only_what_a_dry_run_would_have_ended_is_meant() -> None:
    shown = {
        "orphans": [record(1), record(2, verdict="spare"), record(3, start_ticks=None), "odd"],
        "leftovers": [leftover("/a"), leftover("/b", result="kept"), leftover(""), None],
    }
    target = cleanup.target_of(shown)
    assert list(target.processes) == [(1, 10)]
    assert list(target.leftovers) == ["/a"]
    assert not cleanup.target_of({"orphans": [record(2, verdict="spare")]})
    assert not cleanup.target_of(None)


def test_who_was_started_with_sigchld_ignored_looks_with_a_helper_all_the_same() -> None:
    code = "import signal, runpy, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    code += "sys.argv[1:] = ['orphans', '--local', '--json']; runpy.run_module('reaperd.ctl.main', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(json.loads(done.stdout), list)


def test_of_one_owner_s_alone_is_told_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(op: str, **fields: Any) -> dict[str, Any]:
        return {"orphans": [record(1, uid=0), record(2, uid=7), record(3)], "after": 5}

    monkeypatch.setattr(
        local,
        "leftovers",
        lambda _: {"leftovers": [leftover("/a", uid=7), leftover("/b", uid=0)], "withheld": []},
    )
    told = orphans.complete(ask, 7)("cleanup", leftovers=True)
    assert [one["pid"] for one in told["orphans"]] == [2]
    assert [one["path"] for one in told["leftovers"]] == ["/a"]
    assert told["after"] == 5
    everything = orphans.complete(ask, None)("cleanup", leftovers=True)
    assert (len(everything["orphans"]), len(everything["leftovers"])) == (3, 2)


def test_whoever_is_named_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "ask", lambda op, **fields: {"orphans": [record(1), record(2)]})
    words = ["cleanup", "--local", "--dry-run", "--except", "2", "--except", "3"]
    assert cleanup.cleanup(arguments.parse([*words, "--json"])) == 0
    told = {one["pid"]: (one["verdict"], one["evidence"][-1]) for one in json.loads(capsys.readouterr().out)}
    assert told == {1: ("kill", "why"), 2: ("spare", "you said to leave it alone")}
    assert cleanup.cleanup(arguments.parse(words)) == 0
    shown = capsys.readouterr().out
    assert "dry run: would end this process" in shown
    assert "left alone:" in shown
    assert cleanup.cleanup(arguments.parse([*words, "--except", "1"])) == 0
    assert "nothing to clean up\n" in capsys.readouterr().out


def test_exactly_what_was_shown_is_asked_for_by_pid_and_start_time() -> None:
    daemon = Daemon(None, event(1, ended(1), ended(2)))
    carry_out(daemon, 1, 2, paths=["/a"])
    assert daemon.asked == [{"processes": [[1, 10], [2, 20]], "leftovers": ["/a"]}]
    assert daemon.followed == [101]


def test_events_are_followed_until_each_has_been_told_of_and_no_further() -> None:
    daemon = Daemon(None, event(1, ended(1)), event(2, ended(2, "stuck"), kind="stuck"), event(3, ended(3)))
    assert results(carry_out(daemon, 1, 2)) == {1: "killed", 2: "stuck"}
    assert daemon.told == 2


def test_of_what_no_event_told_nothing_is_claimed() -> None:
    assert results(carry_out(Daemon(None, event(1, ended(1))), 1, 2)) == {1: "killed", 2: None}


def test_an_event_of_the_next_owner_of_a_pid_is_not_mistaken_for_this_ones() -> None:
    daemon = Daemon(None, event(1, ended(1, start_ticks=999)), event(2, ended(1), kind="orphan"))
    assert results(carry_out(daemon, 1)) == {1: None}


def test_what_the_reply_says_already_is_not_waited_for() -> None:
    daemon = Daemon({1: {"result": "denied"}, 2: {"verdict": "spare"}, 3: {"unknown": True}})
    done = carry_out(daemon, 1, 2, 3)
    assert results(done) == {1: "denied", 2: "kept", 3: "exited"}
    assert daemon.followed == []


def test_a_leftover_that_the_reply_does_not_name_is_kept() -> None:
    class Silent(Daemon):
        def ask(self, op: str, **fields: Any) -> dict[str, Any]:
            return {**super().ask(op, **fields), "leftovers": []}

    assert carry_out(Silent(), paths=["/a"]).leftovers["/a"]["result"] == "kept"
    assert carry_out(Daemon(), paths=["/a"]).leftovers["/a"]["result"] == "removed"


def test_thousands_are_asked_for_in_requests_that_the_daemon_takes() -> None:
    pids = range(4_000_000, 4_003_000)
    paths = [f"/dev/shm/{number}-é" + "x" * 3000 for number in range(9)]
    daemon = Daemon({pid: {"result": "killed"} for pid in pids})
    done = carry_out(daemon, *pids, paths=paths)
    assert len(daemon.asked) > 2
    assert max(len(wire.encode({"op": "cleanup", **one})) for one in daemon.asked) <= wire.MAX_REQUEST_BYTES
    assert [pid for one in daemon.asked for pid, _ in one["processes"]] == list(pids)
    assert [path for one in daemon.asked for path in one["leftovers"]] == paths
    assert set(results(done).values()) == {"killed"}


def test_the_events_are_followed_from_the_first_of_several_requests_on() -> None:
    pids = range(4_000_000, 4_002_000)
    daemon = Daemon(None, *(event(pid, ended(pid)) for pid in pids))
    assert set(results(carry_out(daemon, *pids)).values()) == {"killed"}
    assert daemon.followed == [101]


def test_a_path_too_long_for_any_request_is_kept() -> None:
    daemon = Daemon()
    done = carry_out(daemon, paths=["/" + "\x01" * 4000])
    assert daemon.asked == []
    assert [one["result"] for one in done.leftovers.values()] == ["kept"]


@pytest.mark.parametrize(
    ("pids", "paths", "words"),
    [
        ([1], [], "End this process"),
        ([1, 2], [], "End these 2 processes"),
        ([], ["/a"], "Remove 1 leftover"),
        ([1, 2], ["/a", "/b"], "End these 2 processes and remove 2 leftovers"),
    ],
)
def test_what_is_asked_says_how_many_of_what(pids: list[int], paths: list[str], words: str) -> None:
    shown = {"orphans": [record(pid) for pid in pids], "leftovers": [leftover(path) for path in paths]}
    assert cleanup.target_of(shown).in_words() == words


@pytest.mark.parametrize("words", [[], ["--json"], ["--local"]])
def test_without_a_terminal_or_yes_nobody_is_even_looked_for(words: list[str], tmp_path: Any) -> None:
    options: argparse.Namespace = arguments.parse(["cleanup", *words, "--socket", str(tmp_path / "none")])
    with pytest.raises(CommandError, match="--yes") as refused:  # pytest's stdin is no terminal
        cleanup.cleanup(options)
    assert refused.value.code == USAGE
