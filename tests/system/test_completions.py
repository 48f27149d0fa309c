"""Completions as somebody at a bash, a zsh or a fish has them, the names and pids from a real daemon."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shells
from harness import ROOT, Daemon, Leader, Scratch, test_environment
from shells import Completer

from reaperd import __main__ as reaperd
from reaperd.ctl import arguments as reaperctl

StartLeader = Callable[..., Leader]

NAMED = """\
import json, os, sys, agent
agent.register(sys.argv[1])
print(json.dumps({"pids": {}, "leader": os.getpid(), "lineage": os.environ["REAPER_LINEAGE"]}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completions, in share/ below it, and in bin/ the programs."""
    folder = tmp_path_factory.mktemp("prefix")
    subprocess.run([sys.executable, f"{ROOT}/packaging/pages/generate.py", folder], check=True)
    (folder / "bin").mkdir()
    for program, module in (("reaperctl", "reaperd.ctl.main"), ("reaperd", "reaperd")):
        script = folder / "bin" / program
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture(params=["bash", "zsh", "fish"])
def start(
    request: pytest.FixtureRequest, folder: Path, run: str, scratch: Scratch
) -> Iterator[Callable[..., Completer]]:
    """Start a shell that has the completions, its environment with ``more`` in it."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    started: list[Completer] = []

    def start(**more: str) -> Completer:
        environment = test_environment(run, HOME=scratch.path, **more)
        environment["PATH"] = f"{folder}/bin:{environment['PATH']}"
        started.append(shells.start(shell, folder, environment))
        return started[-1]

    yield start
    for one in started:
        one.close()


def offered(shell: Completer, line: str) -> set[str]:
    """Return what the last word may become, without what a shell puts behind a word that goes on."""
    return {word.rstrip("=/:") for word in shell.complete(line)}


def actions_of(parser: argparse.ArgumentParser, *words: str) -> list[argparse.Action]:
    for word in words:
        (inner,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
        parser = inner.choices[word]
    return parser._actions


def flags_of(parser: argparse.ArgumentParser, *words: str) -> set[str]:
    """Return the long options that are known behind ``words``."""
    flags = {flag for action in actions_of(parser, *words) for flag in action.option_strings}
    return {flag for flag in flags if flag.startswith("--")}


def commands_of(parser: argparse.ArgumentParser, *words: str) -> set[str]:
    (inner,) = (one for one in actions_of(parser, *words) if isinstance(one, argparse._SubParsersAction))
    return set(inner.choices)


def test_every_command_and_option_is_offered_where_it_may_stand(start: Callable[..., Completer]) -> None:
    shell = start(REAPER_SOCKET="/nonexistent")
    control = reaperctl.build_parser()
    assert offered(shell, "reaperd --") == flags_of(reaperd.parser())
    assert offered(shell, "reaperctl --") == flags_of(control)
    assert offered(shell, "reaperctl ") == commands_of(control)
    assert offered(shell, "reaperctl config ") == commands_of(control, "config")
    for command in sorted(commands_of(control) - {"config"}):
        assert offered(shell, f"reaperctl {command} --") == flags_of(control, command), command
    for command in sorted(commands_of(control, "config")):
        assert offered(shell, f"reaperctl config {command} --") == flags_of(control, "config", command), (
            command
        )


def test_what_stands_before_is_understood(start: Callable[..., Completer], scratch: Scratch) -> None:
    shell = start(REAPER_SOCKET="/nonexistent")
    for name in ("reaper.toml", "reaper.sock", "train.sh"):
        Path(scratch.file(name)).touch(0o755)
    for line, wanted in {
        "reaperctl ev": {"events"},
        "reaperctl --timeout 3 st": {"status", "stop"},
        "reaperctl --socket /x --timeout=3 st": {"status", "stop"},
        "reaperctl --user config sh": {"show"},
        "reaperctl config --system d": {"default"},
        "reaperctl cleanup --yes --ow": {"--owner"},
        "reaperctl cleanup --owner roo": {"root"},
        "reaperctl events --owner roo": {"root"},
        "reaperctl events --kind rea": {"reaped"},
        "reaperctl events --user --fol": {"--follow"},
        "reaperctl report --by f": {"framework"},
        "reaperctl run --restart on-f": {"on-failure"},
        "reaperctl run --restart on-failure:3 --ba": {"--backoff"},
        f"reaperctl --socket {scratch.path}/reaper.s": {scratch.file("reaper.sock")},
        f"reaperctl config check {scratch.path}/reaper.t": {scratch.file("reaper.toml")},
        f"reaperctl run --name x -- {scratch.path}/tra": {scratch.file("train.sh")},
        f"reaperctl run sh {scratch.path}/tra": {scratch.file("train.sh")},
        f"reaperd --dry-run --config {scratch.path}/reaper.t": {scratch.file("reaper.toml")},
        f"reaperd --state-dir {scratch.path[:-1]}": {scratch.path},
        # Nothing can be guessed, and nothing is.
        "reaperctl --timeout ": set(),
        "reaperctl ping st": set(),
        "reaperctl stop ": set(),
        "reaperctl explain ": set(),
    }.items():
        assert offered(shell, line) == wanted, line


def test_sessions_and_processes_are_those_that_the_daemon_has(
    start: Callable[..., Completer], daemon: Daemon, start_leader: StartLeader, scratch: Scratch
) -> None:
    script = scratch.file("named.py")
    Path(script).write_text(NAMED)
    leaders = [
        start_leader(script, name, socket=daemon.socket) for name in ("grid-search", "$(reboot)", "-a b")
    ]
    ids = {str(one.session) for one in leaders}
    pids = {str(one.pid) for one in leaders}
    shell = start(REAPER_SOCKET=daemon.socket)
    # A name that would be more than a word in a shell, or an option, is not offered: its id is.
    assert offered(shell, "reaperctl stop ") == ids | {"grid-search"}
    assert offered(shell, "reaperctl events --follow --session gr") == {"grid-search"}
    for line in ("explain ", "protect --undo ", "release ", "cleanup --yes --except "):
        found = offered(shell, f"reaperctl {line}")
        assert pids <= found, line  # the daemon sees the orphans of others, too
        assert all(word.isdigit() for word in found), line
    assert offered(shell, "reaperctl stop --wait 3 gr") == {"grid-search"}
    assert not offered(shell, "reaperctl stop grid-search ") & (ids | {"grid-search"})
    # The daemon that is named on the line is the one that is asked.
    elsewhere = start(REAPER_SOCKET="/nonexistent")
    assert offered(elsewhere, f"reaperctl --socket {daemon.socket} stop gr") == {"grid-search"}
    assert offered(elsewhere, f"reaperctl stop --socket={daemon.socket} gr") == {"grid-search"}
    assert offered(elsewhere, "reaperctl stop ") == set()
