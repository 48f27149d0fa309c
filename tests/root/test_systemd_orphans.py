"""Orphans and their look-alikes under a real systemd: trainings in services, scopes, user services, cron and at jobs live on,
and what a killed training leaves in a unit is found there.

All of them share one booted system with the installed daemon, whose thresholds are the most aggressive. cron and at are Debian's own,
fetched from its archive where they are not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import bootedsystem
import pytest
from bootedsystem import BootError
from enclosure import AGGRESSIVE
from unitanimals import ANIMALS, GUARDED, ORPHANS, USER, Animal, Zoo, explain, lay

pytestmark = pytest.mark.needs_root

CONFIG = "/etc/reaper/reaper.toml"
SETTINGS = AGGRESSIVE.format(action="kill", quarantine_for="1s")
RECOGNISED = {
    "spawn": "argv has -c 'from multiprocessing.spawn import spawn_main': worker of multiprocessing spawn",
    "loky": "argv has -m 'joblib.externals.loky.backend.popen_loky_posix': worker of loky",
}


def named(animal: Animal) -> str:
    return animal.name


@pytest.fixture(scope="module")
def zoo(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    if importlib.util.find_spec("joblib") is None:
        pytest.skip("the module joblib is not installed")
    stage, scratch = tmp_path_factory.mktemp("stage"), tmp_path_factory.mktemp("debs")
    shutil.copytree(installation, stage, symlinks=True, dirs_exist_ok=True)
    missing = lay(stage, scratch)
    (stage / CONFIG[1:]).write_text(f'{SETTINGS}[protect]\nunits = ["{GUARDED.name}"]\n')
    with contextlib.ExitStack() as stack:
        try:
            system = stack.enter_context(bootedsystem.boot(stage))
        except BootError as reason:
            pytest.skip(str(reason))
        system.run("systemd-sysusers")
        system.run("install", "-d", "-o", USER, "-g", USER, "-m", "0700", f"/srv/{USER}")
        system.run("systemctl", "start", "reaperd.service")
        system.run("loginctl", "enable-linger", USER)
        runtime = f"/run/user/{system.run('id', '-u', USER).stdout.strip()}"
        system.until(system.path(f"{runtime}/systemd/private").exists, "the user's manager starts")
        zoo = Zoo(system, missing)
        stack.callback(zoo.close)
        yield zoo


@pytest.mark.parametrize("animal", ANIMALS, ids=named)
def test_a_training_that_systemd_or_a_job_daemon_started_lives_on(animal: Animal, zoo: Zoo) -> None:
    seen = zoo.of(animal)
    explained = explain(zoo.system, *seen.held)
    assert seen.gone() == [], explained
    assert len(seen.workers) == 2
    assert {seen.stat(pid)[1] for pid in seen.workers} == {seen.pid}
    assert all(seen.cgroup(pid).endswith(animal.cgroup) for pid in seen.held), seen.cgroup(seen.pid)
    assert seen.above() == animal.above
    assert all(map(seen.is_busy, seen.held))
    assert [pid for pid in seen.held if seen.stat(pid)[0] in "Tt"] == []
    for pid, told in explained.items():
        # Forked and never exec'ed, by a parent that has left: it may be told of.
        may_be_told_of = pid == seen.pid and bool(animal.become)
        assert told["verdict"] in (("spare", "report") if may_be_told_of else ("spare",)), told
        assert {event["kind"] for event in told["events"]} <= ({"orphan"} if may_be_told_of else set())
        if pid != seen.pid:
            assert told["rule"] == "parent", told


@pytest.mark.parametrize("animal", ORPHANS, ids=named)
def test_workers_that_a_killed_training_left_in_its_unit_are_ended_on_evidence(
    animal: Animal, zoo: Zoo
) -> None:
    seen = zoo.of(animal)
    assert seen.gone() == [], "nobody is ended while its parent lives"
    assert seen.above() == animal.above
    assert all(seen.cgroup(pid).endswith(animal.cgroup) for pid in seen.held)
    adopter = seen.stat(seen.pid)[1]
    seen.kill_leader()
    name = "systemd" if adopter == 1 else "systemd --user"
    for pid in seen.workers:
        seen.wait_gone(pid)
    for pid, told in explain(zoo.system, *seen.workers).items():
        assert (told["alive"], told["verdict"]) == (False, "kill")
        assert told["rule"] in ("cpu_threshold", "memory_threshold")
        (event,) = told["events"]
        (process,) = [one for one in event["processes"] if one["pid"] == pid]
        assert (event["kind"], process["result"], process["signals"][0]) == ("killed", "killed", "SIGTERM")
        recognised, lineage, *_ = told["evidence"]
        assert recognised == RECOGNISED[animal.kind]
        adopted = (
            f"its parent was pid {seen.pid}, which has ended; its parent is {name} (pid {adopter}) by now, "
        )
        assert lineage.startswith(adopted)
    shown = zoo.system.run("reaperctl", "explain", str(seen.workers[0])).stdout
    assert f"its parent was pid {seen.pid}, which has ended" in " ".join(shown.split())


def test_a_protected_unit_keeps_what_its_training_left_until_it_is_protected_no_more(zoo: Zoo) -> None:
    seen, system = zoo.of(GUARDED), zoo.system
    reason = f"runs in {GUARDED.name}.service, which [protect] units names"
    seen.kill_leader()
    zoo.wait_scanned()
    assert seen.gone() == [seen.pid]
    for pid, told in explain(system, *seen.workers).items():
        assert seen.stat(pid)[1] == 1
        assert seen.cgroup(pid).endswith(GUARDED.cgroup)
        assert (told["verdict"], told["rule"], told["events"]) == ("spare", "protected", [])
        assert told["evidence"][-1] == f"it {reason}"
    shown = system.run("reaperctl", "explain", str(seen.workers[0])).stdout
    assert reason in " ".join(shown.split())
    system.path(CONFIG).write_text(SETTINGS)
    system.run("systemctl", "reload", "reaperd.service")
    for pid in seen.workers:
        seen.wait_gone(pid)
    assert {told["verdict"] for told in explain(system, *seen.workers).values()} == {"kill"}


def test_nobody_is_on_record_as_ended_but_the_orphans_that_were_to_be(zoo: Zoo) -> None:
    lines = zoo.system.run("reaperctl", "events", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    ended = {
        part["pid"]
        for event in events
        if event["kind"] in ("killed", "stuck", "quarantined")
        for part in event["processes"]
    }
    meant = {pid for animal in (*ORPHANS, GUARDED) for pid in zoo.of(animal).workers}
    assert zoo.canaries <= ended
    assert ended <= zoo.canaries | meant
