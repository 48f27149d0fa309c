"""The panel in a real browser, with a real daemon, real trainings and real orphans.

All of it acts for a user that no other process runs as: a clean-up ends all orphans of its user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import harness
import pytest
from browsing import PHONE, Page, Server
from harness import Daemon, Leader, Scratch, end_process, wait_gone
from ui_users import APPS, OURS, THEIRS

import agent
from agent.status import Status

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]
StartServer = Callable[..., Server]

pytestmark = pytest.mark.needs_root

GONE_WITHIN_S = 15.0
# Nobody registered it: it is found as any stranger's is.
UNREGISTERED = {"REAPER_DISABLE": "1", "REAPER_TEST_LIGHT": "1"}


class App(NamedTuple):
    """One user's app, with a status file of its own."""

    server: Server
    status_file: str

    def told(self) -> Status:
        return agent.read_status(self.status_file)

    def members(self) -> list[int]:
        """Return the training and all it has started."""
        return harness.marked("UI_TRAINING", self.status_file)


@pytest.fixture
def start_app(start_server: StartServer, scratch: Scratch) -> Callable[..., App]:
    def start(uid: int, socket: str) -> App:
        folder = scratch.directory("run", 0o777)
        os.chown(folder, uid, uid)
        path = os.path.join(folder, "run.json")
        command = [harness.needed_interpreter(uid), os.path.join(APPS, "train.py"), "2"]
        settings = {"UI_STATUS_FILE": path, "UI_COMMAND": json.dumps(command), "UI_TRAINING": path}
        return App(start_server("panel_app.py", uid, **settings, REAPER_SOCKET=socket), path)

    return start


def orphans_of(uid: int, start_leader: StartLeader) -> list[int]:
    """Have a pool of joblib's whose parent was killed, and return its workers and trackers."""
    leader = start_leader("pools.py", "joblib-loky", "--busy", uid=uid, env=UNREGISTERED)
    leader.kill9()
    return leader.family.everyone


def test_stop_ends_the_training_and_neither_the_server_nor_the_wrong_state_stays(
    page: Page, start_daemon: StartDaemon, start_app: Callable[..., App]
) -> None:
    app = start_app(OURS, start_daemon(uid=OURS).socket)
    page.open(app.server.url).wait("No training yet")
    assert not page.is_on("Stop Training")
    page.shoot("panel-none")
    page.click("Start")
    page.wait(r"Running[\s\S]*37 %, 3 of 8, fold \*2\*[\s\S]*Workers\n2")
    page.shoot("panel-running")
    page.look(dark=True)
    page.shoot("panel-running-dark")
    page.look(size=PHONE)
    assert not page.is_wider_than_screen()
    page.shoot("panel-running-phone")
    page.look()
    members = [pid for pid in app.members() if pid != app.server.pid]
    assert len(members) >= 3
    page.click("Count")
    page.wait("clicks=1")
    page.click("Stop Training")
    page.wait(r"The training was stopped[\s\S]*clicks=0 resets=\['stop'\] state=interrupted")
    page.shoot("panel-stopped")
    assert not wait_gone(members, GONE_WITHIN_S)
    assert app.server.lives()
    assert app.told().state == "interrupted"
    assert page.is_on("Start")


def test_a_training_outlives_its_server_and_is_found_again(
    page: Page, start_daemon: StartDaemon, start_app: Callable[..., App]
) -> None:
    app = start_app(OURS, start_daemon(uid=OURS).socket)
    page.open(app.server.url).click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    before, members = app.told(), app.members()
    page.open("about:blank")
    app.server.kill()
    assert app.told().state == "running"
    assert len(wait_gone(members, 0)) == len(members) - 1  # the server
    app.server.start()
    page.open(app.server.url).wait(r"Running[\s\S]*Workers\n2")
    assert app.told()[:5] == before[:5]
    page.click("Stop Training")
    page.wait("The training was stopped")


def test_without_a_daemon_it_says_so_and_stops_by_itself(page: Page, start_app: Callable[..., App]) -> None:
    app = start_app(OURS, "/nonexistent/reaper.sock")
    page.open(app.server.url).wait(r"No Reaper daemon answers \(/nonexistent/reaper.sock: No such file")
    page.click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    page.shoot("panel-no-daemon")
    members = [pid for pid in app.members() if pid != app.server.pid]
    page.click("Stop Training")
    page.wait(r"The training was stopped.*No daemon answered, so this app did it[\s\S]*state=interrupted")
    assert not wait_gone(members, GONE_WITHIN_S)
    assert app.server.lives()


def test_a_run_killed_while_the_daemon_is_away_is_never_shown_as_running(
    page: Page, start_daemon: StartDaemon, start_app: Callable[..., App]
) -> None:
    daemon = start_daemon(uid=OURS)
    app = start_app(OURS, daemon.socket)
    page.open(app.server.url).click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    daemon.kill9()
    page.wait("No Reaper daemon answers")
    leader = app.told().pid
    supervisor = harness.parent_of(leader)
    for pid in (supervisor, leader):  # nobody is left who could write how it ended
        assert end_process(pid)
    page.wait(r"Killed[\s\S]*ended without a word[\s\S]*state=killed")
    assert '"running"' in open(app.status_file, encoding="utf-8").read()  # noqa: SIM115
    page.shoot("panel-killed")
    page.click("Cleanup Processes")
    page.wait(r"2 processes ended|processes ended[\s\S]*resets=\['cleanup'\]")
    assert not wait_gone([pid for pid in app.members() if pid != app.server.pid], GONE_WITHIN_S)
    assert app.server.lives()
    daemon.start()
    page.wait_without("No Reaper daemon answers")
    page.wait("state=killed")


def test_one_that_is_killed_while_it_is_looked_at_reads_so_and_the_next_one_completes(
    page: Page, start_daemon: StartDaemon, start_app: Callable[..., App]
) -> None:
    app = start_app(OURS, start_daemon(uid=OURS).socket)
    page.open(app.server.url).click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    members = [pid for pid in app.members() if pid != app.server.pid]
    assert end_process(app.told().pid)
    page.wait(r"Killed[\s\S]*It was killed by SIGKILL \(signal 9\)[\s\S]*state=killed")
    assert not page.is_on("Stop Training")
    page.shoot("panel-killed-by-signal")
    assert not wait_gone(members, GONE_WITHIN_S)
    page.click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    with open(f"{app.status_file}.done", "wb"):
        pass
    page.wait(r"Completed[\s\S]*100 %, 8 of 8, done[\s\S]*state=completed")
    page.click("Log")
    page.wait("the search begins")
    page.shoot("panel-completed")


def test_two_tabs_start_one_training_and_stop_it_once(
    page: Page, start_daemon: StartDaemon, start_app: Callable[..., App]
) -> None:
    app = start_app(OURS, start_daemon(uid=OURS).socket)
    page.open(app.server.url).wait("No training yet")
    with page.second_tab() as change:
        page.open(app.server.url).wait("No training yet")
        for _ in range(2):
            page.click_if_on("Start")
            change()
        for _ in range(2):
            page.wait(r"Running[\s\S]*Workers\n2")
            change()
        leaders = harness.children_of(harness.parent_of(app.told().pid))
        assert leaders == [app.told().pid]
        members = [pid for pid in app.members() if pid != app.server.pid]
        for _ in range(2):
            page.click_if_on("Stop Training")
            change()
        page.wait(r"was stopped[\s\S]*state=interrupted")
        change()
        page.wait("state=interrupted")
        assert "Traceback" not in page.text()
        change()
    assert not wait_gone(members, GONE_WITHIN_S)
    assert app.told().state == "interrupted"


def test_the_button_leaves_no_orphan_and_begins_the_app_anew(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_app: Callable[..., App]
) -> None:
    app = start_app(OURS, start_daemon(uid=OURS).socket)
    page.open(app.server.url).click("Count")
    page.wait("clicks=1")
    orphans = orphans_of(OURS, start_leader)
    page.wait("There are [234] workers of yours without a parent")
    page.shoot("panel-orphans")
    page.click("Cleanup Processes")
    page.wait(r"[234] processes ended.*given back[\s\S]*clicks=0 resets=\['cleanup'\] state=none")
    page.wait_without("without a parent")
    assert not wait_gone(orphans, GONE_WITHIN_S)
    page.click("Cleanup Processes")
    page.wait("There was nothing to clean up")


def test_two_users_see_and_end_only_what_is_theirs(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_app: Callable[..., App]
) -> None:
    socket = start_daemon().socket
    ours, theirs = (start_app(uid, socket) for uid in (OURS, THEIRS))
    page.open(theirs.server.url).click("Start")
    page.wait(r"Running[\s\S]*Workers\n2")
    orphans = orphans_of(THEIRS, start_leader)
    page.wait("without a parent")
    page.open(ours.server.url).wait("No training yet")
    page.click("Cleanup Processes")
    page.wait("There was nothing to clean up")
    assert "without a parent" not in page.text()
    assert len(wait_gone(orphans, 0)) == len(orphans)
    assert theirs.told().state == "running"
    page.open(theirs.server.url).click("Cleanup Processes")
    page.wait("processes ended")
    assert not wait_gone(orphans, GONE_WITHIN_S)
    page.click("Stop Training")
    page.wait("The training was stopped")
