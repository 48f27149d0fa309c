"""Alerts from real daemons to a real web server on the loopback: few, complete, never in a kill's way, and without secrets."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import SETTINGS, STRANGER, Scratch, repeat_until

from agent import client
from agent.wire import WireError
from reaperd import report
from reaperd.alert_delivery import NOT_UNDERSTOOD
from reaperd.alerts import Alerts
from reaperd.config import AlertsConfig
from reaperd.policy import Policy
from reaperd.poller import Poller
from reaperd.sessions import Sessions
from reaperd.store import Store

StartDaemon = Callable[..., harness.Daemon]
StartLeader = Callable[..., harness.Leader]

SOON_S = 30.0
SECRET = "hunter2hunter2"
UNKNOWN = f"nosuchservice://{SECRET}"


class Web:
    """Takes what is posted; while it ``hangs`` it never answers, save to a test."""

    def __init__(self, port: int = 0, *, hangs: bool = False) -> None:
        self.posts: list[dict[str, Any]] = []
        self.asked = threading.Semaphore(0)
        self._go_on = threading.Event()
        if not hangs:
            self._go_on.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.posts.append(body)
                outer.asked.release()
                if "test" not in body["title"]:
                    outer._go_on.wait(SOON_S)
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"json://ann:{SECRET}@127.0.0.1:{self.port}/{SECRET}?+Token={SECRET}"

    def wait_post(self, words: str) -> dict[str, Any]:
        """Return the first post whose message has ``words`` in it, once there is one."""
        end_s = time.monotonic() + SOON_S
        while True:
            for post in list(self.posts):
                if words in f"{post['title']}\n{post['message']}":
                    return post
            assert self.asked.acquire(timeout=max(0.0, end_s - time.monotonic())), (words, self.posts)

    def let_go(self) -> None:
        """Hang no longer."""
        self._go_on.set()

    def close(self) -> None:
        self.let_go()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


@pytest.fixture
def hanging() -> Iterator[Web]:
    server = Web(hangs=True)
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(urls: list[str], **more: Any) -> str:
    lines = {"urls": urls, "group_within": 1, **more}
    return f"{SETTINGS}[alerts]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())


def descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += harness.children_of(one)
    return found


def words_of(pid: int) -> bytes:
    return harness.read_proc(pid, "cmdline") + harness.read_proc(pid, "environ")


def test_a_reaped_session_is_told_of_while_other_targets_hang_or_are_down(
    start_daemon: StartDaemon,
    start_leader: StartLeader,
    scratch: Scratch,
    stack: contextlib.ExitStack,
    web: Web,
    hanging: Web,
) -> None:
    os.chmod(scratch.path, 0o777)  # the command is run as nobody
    out, hook, port = scratch.file("out"), scratch.file("hook"), free_port()
    with open(hook, "w", encoding="ascii") as file:
        file.write(f"#!/bin/sh\nid -u >> {out}; cat >> {out}\n")
    os.chmod(hook, 0o755)
    down = f"json://127.0.0.1:{port}/{SECRET}"
    text = settings([web.url, hanging.url, down, UNKNOWN], command=[hook], on=["started", "reaped"])
    daemon = start_daemon(config=text)
    _check_that_each_can_be_tried(daemon, hook)
    _check_that_who_sends_has_no_rights(daemon)
    leader = start_leader("pools.py", "executor", "--idle", "--method", "fork", socket=daemon.socket)
    hanging.wait_post("1 started")
    started = web.wait_post("1 started")
    assert (started["title"], started["type"]) == (f"Reaper on {os.uname().nodename}: 1 started", "info")
    wait_logged(daemon, "json://*** (entry 3 of urls): connection refused; trying again")
    assert (
        f"nothing can be sent to nosuchservice://*** (entry 4 of urls): {NOT_UNDERSTOOD}" in daemon.read_log()
    )
    late = Web(port)
    stack.callback(late.close)
    leader.kill9()
    assert harness.broken_promise(leader) == ""
    told = web.wait_post("1 reaped")
    (event,) = ask(daemon, "events", session=leader.session, kinds=["reaped"])["events"]
    assert told["type"] == "warning"
    for words in (f"uid {os.geteuid()}", "SIGKILL", f"{len(event['processes'])} process"):
        assert words in told["message"]
    late.wait_post("1 started")
    late.wait_post("1 reaped")
    reaped = heard_of(daemon, out, "test", "started", "reaped")
    assert (reaped["session"], reaped["processes"]) == (leader.session, event["processes"])
    _check_secrets(daemon, scratch)
    hanging.let_go()
    _check_that_nobody_is_left_once_nobody_is_to_be_told(daemon)
    wait_logged(daemon, "json://*** (entry 3 of urls) works again")
    assert daemon.stop() == 0
    assert SECRET not in daemon.read_log()


def ask(daemon: harness.Daemon, operation: str, **more: Any) -> dict[str, Any]:
    return client.request(daemon.socket, {"op": operation, **more}, timeout_s=SOON_S)


def wait_logged(daemon: harness.Daemon, words: str) -> None:
    def told_of() -> bool | None:
        ask(daemon, "ping")
        return words in daemon.read_log() or None

    repeat_until(told_of, SOON_S, f"the log says {words!r}")


def heard_of(daemon: harness.Daemon, out: str, *kinds: str) -> dict[str, Any]:
    """Return the last of ``kinds`` of events once the command, which ran as somebody else, has put all of them into ``out``."""

    def heard() -> dict[str, Any] | None:
        ask(daemon, "ping")
        with open(out, encoding="utf-8") as file:
            lines = file.read().splitlines()
        found = {
            event["kind"]: event for line in lines if line.startswith("{") for event in [json.loads(line)]
        }
        assert os.geteuid() or "0" not in lines
        return found[kinds[-1]] if found.keys() == set(kinds) and lines[-1].startswith("{") else None

    return repeat_until(heard, SOON_S, "the command is run for each")


def _check_that_each_can_be_tried(daemon: harness.Daemon, hook: str) -> None:
    done = daemon.ctl("alerts", "test")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "json://*** (entry 1 of urls): sent",
        "json://*** (entry 2 of urls): sent",
        "json://*** (entry 3 of urls): not sent: connection refused",
        f"nosuchservice://*** (entry 4 of urls): not sent: {NOT_UNDERSTOOD}",
        f"{hook}: sent",
    ]
    assert f"every user can read the passwords of [alerts] urls in {daemon.config}" in daemon.read_log()
    if os.geteuid() == 0 and harness.interpreter_for(STRANGER) is not None:
        refused = daemon.ctl("alerts", "test", "--json", uid=STRANGER)
        assert (refused.returncode, "only root and the admins" in refused.stderr) == (4, True)


def sender_of(daemon: harness.Daemon) -> int:
    (pid,) = (pid for pid in daemon.children() if "reaperd.alert_sender" in harness.cmdline(pid))
    return pid


def _check_that_who_sends_has_no_rights(daemon: harness.Daemon) -> None:
    sender = sender_of(daemon)
    status = harness.read_proc(sender, "status").decode()
    assert "NoNewPrivs:\t1\n" in status
    if os.geteuid() == 0:
        assert "CapEff:\t0000000000000000\n" in status
        assert "Uid:\t0" not in status


def _check_secrets(daemon: harness.Daemon, scratch: Scratch) -> None:
    """Nobody is shown a URL: not by the log, ps, the control command, or a file other than the settings."""
    shown = daemon.ctl("config", "show").stdout
    assert 'urls = ["json://***", "json://***", "json://***", "nosuchservice://***"]' in shown
    replies = [ask(daemon, operation) for operation in ("config", "events", "status")]
    assert SECRET not in daemon.read_log() + shown + json.dumps(replies)
    family = descendants(daemon.pid)
    assert len(family) >= 4, "the core, its gate, who sends, and a helper at the target that hangs"
    assert SECRET.encode() not in b"".join(map(words_of, family))
    for folder, _, names in os.walk(scratch.path):
        for name in names:
            path = os.path.join(folder, name)
            if path != daemon.config and os.path.isfile(path):
                assert SECRET.encode() not in Path(path).read_bytes(), path


def _check_that_nobody_is_left_once_nobody_is_to_be_told(daemon: harness.Daemon) -> None:
    sender = sender_of(daemon)
    with open(daemon.config, "w", encoding="utf-8") as file:
        file.write(SETTINGS)
    daemon.reload()
    daemon.wait_notified("READY=1", SOON_S)
    assert harness.wait_gone([sender], SOON_S) == []
    with pytest.raises(WireError, match="nobody is to be alerted"):
        ask(daemon, "alerts", action="test")


def test_a_thousand_events_that_the_core_records_at_once_make_few_messages_that_count_them_all(
    web: Web, scratch: Scratch
) -> None:
    """More than the pipe holds: what does not fit is counted by the core, and told of with the rest."""
    poller = Poller()
    with contextlib.closing(Store(scratch.directory("state"), "boot")) as store:
        sessions = Sessions(store, Policy())
        on = ("killed", "stuck")
        alerts = Alerts(poller, AlertsConfig(urls=(web.url,), on=on, group_within_s=1.0))
        sessions.listeners.append(alerts.note)
        try:
            for number in range(1000):
                kind = "stuck" if number % 100 == 0 else "killed"
                sessions.record(report.event(kind, uid=number, name="n" * 900, rule="memory"))
            sessions.record(report.event("ended"))
            assert sum(alerts._lost.values()) > 100
            assert len(store.events(limit=2000)) == 1001

            def counted() -> bool | None:
                poller.wait(0.02)
                alerts.exchange(time.monotonic())
                alerts.step(time.monotonic())
                return sum(map(events_in, list(web.posts))) >= 1000 or None

            repeat_until(counted, SOON_S, "all are told of")
        finally:
            alerts.close(time.monotonic())
            poller._epoll.close()
    assert sum(map(events_in, web.posts)) == 1000
    assert len(web.posts) <= 4
    assert web.posts[0]["type"] == "failure"
    assert web.posts[0]["message"].count("\n- ") <= 12


def events_in(post: dict[str, Any]) -> int:
    """Return how many events a message says that there were."""
    return sum(int(part.split()[0]) for part in post["title"].partition(": ")[2].split(", "))


# -- before there is a daemon ----------------------------------------------------------------------------


def check(run: str, path: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reaperd", "--check-config", "--config", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON_S,
        env=harness.test_environment(run, **more),
    )


def test_what_cannot_be_sent_is_said_when_the_settings_are_checked(run: str, scratch: Scratch) -> None:
    path = scratch.file("reaper.toml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(settings(["json://localhost/x", f"nosuch://{SECRET}/x"]))
    os.chmod(path, 0o600)
    done = check(run, path)
    assert done.returncode == 2
    assert f"{path}: [alerts] urls: entry 2: must be a URL that Apprise can use" in done.stderr
    assert done.stderr.rstrip().endswith("got nosuch://***")
    assert SECRET not in done.stderr

    with open(path, "w", encoding="utf-8") as file:
        file.write(settings([f"json://{SECRET}/x"]))
    os.chmod(path, 0o644)
    missing = scratch.directory("path")
    with open(os.path.join(missing, "apprise.py"), "w", encoding="ascii") as file:
        file.write("raise ModuleNotFoundError(name='apprise')\n")
    found = check(run, path, PYTHONPATH=os.pathsep.join([missing, harness.IMPORT_PATH]))
    assert (found.returncode, "the configuration is good" in found.stdout) == (0, True)
    open_to_all, not_installed = found.stderr.splitlines()
    assert open_to_all.startswith("reaperd: warning: every user can read the passwords of [alerts] urls in ")
    assert not_installed.endswith(
        "no alert can be sent: Apprise is not installed: pip install 'reaperd[alerts]'"
    )
