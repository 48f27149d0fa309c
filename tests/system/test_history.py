"""The history of a real daemon: asked for by user and kind, summed up, and dropped when it is too old."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from harness import SETTINGS, Daemon, Leader, needed_interpreter, repeat_until, test_environment

from reaperd.ctl.tally import GROUPINGS, MEMORY

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]

SOMEBODY = 54321  # no overflow uid (65534): a peer of that one is refused
DAY_S = 86_400.0


def add_events(daemon: Daemon, events: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Put events into the history of a daemon that has nothing to write meanwhile, as it would itself."""
    with contextlib.closing(sqlite3.connect(os.path.join(daemon.state, "reaper.db"))) as database, database:
        database.executemany(
            "INSERT INTO events (at_epoch_s, kind, session, uid, record) VALUES (?, ?, ?, ?, ?)",
            [
                (at_s, one["kind"], one.get("session"), one.get("uid"), json.dumps(one))
                for at_s, one in events
            ],
        )


def killed(uid: int, rss_bytes: int = 7) -> dict[str, Any]:
    process = {"pid": 3, "role": "worker", "framework": "loky", "signal": "SIGKILL", "result": "killed"}
    return {
        "at": "2030-01-01T00:00:00.000Z", "kind": "killed", "session": None, "uid": uid, "cause": None, "rule": "cpu_threshold",
        "processes": [process], "latency_s": 0.5, "freed": {"rss_bytes": rss_bytes, "shm_bytes": 0, "gpu_bytes": 1},
    }  # fmt: skip


def kinds_of(events: Sequence[dict[str, Any]]) -> list[str]:
    return [one["kind"] for one in events]


@pytest.mark.needs_root
def test_events_are_asked_for_by_user_and_kind_and_every_sum_is_that_of_the_events(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    leader = start_leader("pools.py", "executor", socket=daemon.socket)
    daemon.wait_listed(leader.pid, leader.family.workers)
    leader.kill9()
    reaped = daemon.wait_event(kind="reaped", session=leader.session)
    add_events(daemon, [(time.time(), killed(SOMEBODY, number)) for number in range(1, 701)])  # two replies
    everything = daemon.ask("events")
    assert len(everything) == 703

    assert daemon.ask("events", "--kind", "reaped") == [reaped]
    assert daemon.ask("events", "--user", "root") == everything[1:3]
    theirs = daemon.ask("events", "--owner", str(SOMEBODY), "--kind", "killed,started")
    assert theirs == everything[3:], "each of the filters counts"
    assert daemon.ask("events", "--user", str(SOMEBODY), "--kind", "reaped") == []
    said = daemon.ctl("events", "--user", str(SOMEBODY), "--kind", "reaped")
    assert (said.returncode, said.stdout) == (0, "no events of that kind of that user that you may see\n")
    wrong = daemon.ctl("events", "--kind", "reap")
    assert wrong.returncode == 2
    assert "there is no kind of event 'reap'; there are started, " in wrong.stderr

    # Others' events stay theirs, whatever is asked for.
    assert daemon.ask("events", "--user", "root", uid=SOMEBODY) == []
    assert daemon.ask("events", "--user", str(SOMEBODY), uid=SOMEBODY) == everything[3:]
    assert kinds_of(daemon.ask("events", "--kind", "started,reaped", uid=SOMEBODY)) == ["started"]

    check_report(daemon.ask("report"), everything)
    check_report(daemon.ask("report", "--user", "root"), everything[1:3])
    check_report(daemon.ask("report", uid=SOMEBODY), everything[3:])
    assert list(daemon.ask("report", "--by", "cause")["by"]) == ["cause"]
    total = daemon.ask("report", "--owner", "0")["total"]
    status = daemon.ask("status")
    assert (total["killed"], total["freed"]["rss_bytes"] + total["freed"]["shm_bytes"]) == (
        status["reaped_total"],
        status["freed_bytes_total"],
    )
    nothing = daemon.ctl("report", "--since", "2100-01-01")
    assert nothing.stdout == "nothing to report: no session ended and no orphan was killed in that time\n"
    lines = daemon.ctl("report").stdout.splitlines()
    assert lines[0] == "1 session over: 1 reaped, 0 with nothing left to end; 700 groups of orphans ended"
    assert sum(line.startswith("total ") for line in lines) == len(GROUPINGS)


def check_report(told: dict[str, Any], events: Sequence[dict[str, Any]]) -> None:
    """Add up the events by hand: the total says the same, and so do the rows of each table together."""
    over = [one for one in events if one["kind"] in ("reaped", "ended", "killed")]
    took_s = sorted(
        one["latency_s"] for one in over if one["kind"] != "ended" and one["latency_s"] is not None
    )
    ended = [one for event in over for one in event["processes"] if one["result"] == "killed"]
    for found in (told["total"], *({"sum": rows} for rows in told["by"].values())):
        rows = found.get("sum", [found])
        assert sum(row["sessions_reaped"] for row in rows) == kinds_of(over).count("reaped")
        assert sum(row["orphan_groups"] for row in rows) == kinds_of(over).count("killed")
        assert sum(row["killed"] for row in rows) == len(ended)
        for name in ("SIGTERM", "SIGKILL"):
            assert sum(row["signals"].get(name, 0) for row in rows) == sum(
                one["signal"] == name for one in ended
            )
        for key in MEMORY:
            assert sum(row["freed"][key] for row in rows) == sum(one["freed"][key] for one in over)
        assert sum(row["latency_s"]["count"] for row in rows) == len(took_s)
    assert told["total"]["latency_s"]["worst"] == max(took_s)
    assert {row["uid"] for row in told["by"]["user"]} == {one["uid"] for one in over}


def test_who_follows_is_told_of_what_was_asked_for_alone(
    daemon: Daemon, start_leader: StartLeader, run: str
) -> None:
    command = [
        needed_interpreter(None),
        "-m",
        "reaperd.ctl.main",
        "events",
        "--follow",
        "--json",
        "--since",
        "1h",
    ]
    with subprocess.Popen(
        [*command, "--kind", "registered,stopped", "--owner", str(os.getuid())],
        stdout=subprocess.PIPE,
        env=test_environment(run, REAPER_SOCKET=daemon.socket),
    ) as following:
        try:
            assert following.stdout is not None
            found = []
            for _ in range(2):
                leader = start_leader("pools.py", "executor", socket=daemon.socket)
                assert select.select([following.stdout], [], [], 30)[0], "nothing is told"
                found.append(json.loads(following.stdout.readline()))
                leader.kill9()
                daemon.wait_end(leader.session)
            assert kinds_of(found) == ["registered", "registered"], "in between somebody was reaped"
        finally:
            following.send_signal(signal.SIGINT)
            following.wait(30)


def test_what_is_older_than_the_settings_say_goes_at_start_and_when_they_change(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config=f'{SETTINGS}\n[history]\nkeep = "90d"\n')
    daemon.stop()
    now_s = time.time()
    ages = (400, 91, 89, 2)
    add_events(daemon, [(now_s - age * DAY_S, {**killed(os.getuid()), "age": age}) for age in ages])
    daemon.start()

    def left(*wanted: int) -> bool | None:
        found = [one["age"] for one in daemon.ask("events", "--kind", "killed")]
        return True if found == list(wanted) else None

    repeat_until(lambda: left(89, 2), 10, "the old events stay")
    with open(daemon.config, "w", encoding="utf-8") as file:
        file.write(f'{SETTINGS}\n[history]\nkeep = "1d"\n')
    daemon.reload()
    repeat_until(left, 10, "what is too old for the new settings stays")
    assert kinds_of(daemon.ask("events"))[0] == "started", "what is young stays"
