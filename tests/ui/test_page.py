"""`reaperctl ui` in a real browser: what it shows, what it does, and whom it lets in."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import harness
import pytest
from browsing import PHONE, Page, Ui
from harness import Daemon, Leader, wait_gone
from ui_users import OURS, THEIRS

StartDaemon = Callable[..., Daemon]
StartLeader = Callable[..., Leader]
StartUi = Callable[..., Ui]

pytestmark = pytest.mark.needs_root

GONE_WITHIN_S = 15.0
UNREGISTERED = {"REAPER_DISABLE": "1", "REAPER_TEST_LIGHT": "1"}
VIEWS = ("Overview", "Sessions", "Orphans", "History", "Settings")


def orphans_of(uid: int, start_leader: StartLeader) -> Leader:
    leader = start_leader("pools.py", "joblib-loky", "--busy", uid=uid, env=UNREGISTERED)
    leader.kill9()
    return leader


def test_without_the_secret_nothing_is_shown(
    page: Page, start_daemon: StartDaemon, start_ui: StartUi
) -> None:
    one = start_ui(start_daemon(uid=OURS).socket, OURS)
    bare, _, token = one.url.partition("/?token=")
    assert len(token) >= 32
    for url in (bare, f"{bare}/?token={token[:-1]}", f"{bare}/?token="):
        page.open(url).wait("This page is its owner's")
        assert "Sessions" not in page.text()
    page.open(one.url).wait("Sessions")
    for pid in harness.all_pids():  # nor in what everybody may read
        assert token not in " ".join(harness.cmdline(pid)) or "chrom" in " ".join(harness.cmdline(pid))
    assert one.stop() == 0


def test_where_there_is_nothing_each_view_says_so(
    page: Page, start_daemon: StartDaemon, start_ui: StartUi
) -> None:
    one = start_ui(start_daemon(uid=OURS).socket, OURS)
    page.open(one.url).wait(r"Nothing had to be ended")
    page.shoot("page-empty")
    for view, said in (
        ("Sessions", "No sessions"),
        ("Orphans", "every worker has its parent"),
        ("History", r"started\s+reaperd"),
        ("Settings", r"found nothing to mend[\s\S]*exit_grace"),
    ):
        page.click(view)
        page.wait(said)
        page.shoot(f"page-empty-{view.lower()}")
        assert "Traceback" not in page.text()
    page.browser.refresh()
    page.wait("exit_grace")  # the place is kept


def test_a_session_is_shown_and_stopped_without_a_mouse_too(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_ui: StartUi
) -> None:
    daemon = start_daemon(uid=OURS)
    leader = start_leader("gridsearch.py", uid=OURS, socket=daemon.socket, env={"REAPER_TEST_LIGHT": "1"})
    orphan = orphans_of(OURS, start_leader)
    one = start_ui(daemon.socket, OURS)
    page.open(one.url).wait(r"Sessions\n(\S+\n)?1\n")
    page.wait(r"Processes\n[\s\S]*Memory, MiB")
    page.wait_drawn("canvas, .vega-embed svg", 3)
    page.shoot("page-overview")
    assert not page.is_dark()
    page.open(one.url, dark=True).wait(r"Processes\n[\s\S]*Memory, MiB")
    page.wait_drawn("canvas, .vega-embed svg", 3)
    assert page.is_dark()
    page.shoot("page-overview-dark")
    page.look(size=PHONE)
    page.shoot("page-overview-phone")
    for view in VIEWS[1:]:
        page.click(view)
        page.wait("looks again by itself")
        assert not page.is_wider_than_screen(), view
    page.click("Orphans")
    page.wait("loky, pid")
    page.shoot("page-orphans-phone")
    page.look()

    page.click("Sessions")
    page.wait(r"grid search[\s\S]*of its own")
    page.tab_to("Stop")
    page.shoot("page-sessions")
    page.press_enter()
    page.wait(r"Stop grid search\?")
    page.click("No")
    page.wait_without(r"Stop grid search\?")
    page.click("Stop")
    page.click("Yes, stop it")
    page.wait(r"grid search was stopped", 60)
    assert not wait_gone([leader.pid, *leader.family.everyone], GONE_WITHIN_S)
    page.click("History")
    page.wait("reaped")
    page.shoot("page-history")
    harness.end_leftovers(orphan.family.everyone)


def test_the_one_orphan_that_was_clicked_is_ended_and_then_all(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_ui: StartUi
) -> None:
    orphan = orphans_of(OURS, start_leader)
    page.open(f"{start_ui(start_daemon(uid=OURS).socket, OURS).url}&view=Orphans")
    page.wait(r"loky, pid \d+")
    page.click("Why")
    page.shoot("page-orphans")
    first = int(page.wait(r"loky, pid (\d+)")[1])
    assert first in orphan.family.everyone
    page.click("End")
    page.wait(r"End loky, pid \d+\?")
    page.shoot("page-orphans-asked")
    page.click("Yes, end it")
    page.wait(r"1 process ended", 60)
    assert not wait_gone([first], 0)
    assert wait_gone(orphan.family.workers, 0)  # the others were not asked about
    page.click_beginning("End th")
    page.wait("This cannot be undone")
    page.click("Yes, do it")
    page.wait(r"process(es)? ended", 60)
    assert not wait_gone(orphan.family.everyone, GONE_WITHIN_S)
    page.wait("every worker has its parent")
    page.click("History")
    page.wait("killed")


def test_when_the_daemon_goes_the_open_page_says_so_and_it_comes_back(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_ui: StartUi
) -> None:
    daemon = start_daemon(uid=OURS)
    one = start_ui(daemon.socket, OURS)
    page.open(one.url).wait("Nothing had to be ended")
    page.click("Orphans")
    page.wait("every worker has its parent")
    daemon.kill9()
    page.wait(r"No daemon answers: .*reaper\.sock")
    page.shoot("page-no-daemon")
    orphan = orphans_of(OURS, start_leader)
    page.wait(r"loky, pid \d+", 60)
    page.click_beginning("End th")
    page.click("Yes, do it")
    page.wait(r"process(es)? ended", 60)
    assert not wait_gone(orphan.family.everyone, GONE_WITHIN_S)
    page.click("Overview")
    page.wait("No daemon answers")
    page.shoot("page-no-daemon-overview")
    daemon.start()
    page.wait_without("No daemon answers")
    assert one.lives()


def test_two_users_pages_show_only_what_is_theirs(
    page: Page, start_daemon: StartDaemon, start_leader: StartLeader, start_ui: StartUi
) -> None:
    socket = start_daemon().socket
    leader = start_leader("gridsearch.py", uid=THEIRS, socket=socket, env={"REAPER_TEST_LIGHT": "1"})
    orphan = orphans_of(THEIRS, start_leader)
    theirs, ours = start_ui(socket, THEIRS), start_ui(socket, OURS)
    page.open(f"{theirs.url}&view=Sessions").wait("grid search")
    page.click("Orphans")
    page.wait("loky, pid")
    page.open(f"{ours.url}&view=Sessions").wait("No sessions")
    page.click("Orphans")
    page.wait("every worker has its parent")
    page.click("History")
    page.wait("looks again by itself")
    assert "grid search" not in page.text()
    assert len(wait_gone([leader.pid, *orphan.family.workers], 0)) == 1 + len(orphan.family.workers)
    harness.end_leftovers(orphan.family.everyone)


def test_it_listens_on_this_machine_alone_and_says_why(daemon: Daemon) -> None:
    for address in ("0.0.0.0", "::"):
        done: subprocess.CompletedProcess[str] = daemon.ctl("ui", f"--address={address}")
        assert done.returncode == 2
        assert f"will not listen on {address}" in done.stderr
