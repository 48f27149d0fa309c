"""Processes that look like orphans to a careless eye, and are none: how each is started, and what proves that it is what it claims."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
from enclosure import Enclosure
from harness import FAMILY_MARK, ZOO

TRAINER = os.path.join(ZOO, "trainer.py")
UP_WITHIN_S = 120.0
LOKY = "joblib.externals.loky.backend.popen_loky_posix"
SPAWN = "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5, pipe_handle=7)"


@dataclass
class Seen:
    """An animal that is up. ``pid`` and ``workers`` are pids of the enclosure's namespace."""

    enclosure: Enclosure
    pid: int
    workers: list[int]
    held: dict[int, int]  # a pidfd for each of them

    @property
    def everyone(self) -> list[int]:
        return [self.pid, *self.workers]

    def gone(self) -> list[int]:
        return [pid for pid, pidfd in self.held.items() if harness.has_ended(pidfd)]

    def stopped(self) -> list[int]:
        return [pid for pid in self.everyone if self.enclosure.state_of(pid) in "Tt"]

    def close(self) -> None:
        for pidfd in self.held.values():
            os.close(pidfd)


Claim = Callable[[Seen], bool]


def adopted_by_init(seen: Seen) -> bool:
    return seen.enclosure.parent_of(seen.pid) == 1


def below(name: str) -> Claim:
    """Claim that the parent's command name begins with ``name``."""
    return lambda seen: seen.enclosure.comm(seen.enclosure.parent_of(seen.pid)).startswith(name)


def adopted_below(name: str) -> Claim:
    """Claim that init has adopted the parent, whose command name is ``name``."""

    def claim(seen: Seen) -> bool:
        parent = seen.enclosure.parent_of(seen.pid)
        return seen.enclosure.comm(parent) == name and seen.enclosure.parent_of(parent) == 1

    return claim


def traced(seen: Seen) -> bool:
    found = re.search(rb"TracerPid:\t(\d+)", seen.enclosure.read(seen.pid, "status"))
    return found is not None and int(found[1]) > 0


def ignores_hangups(seen: Seen) -> bool:
    found = re.search(rb"SigIgn:\t(\w+)", seen.enclosure.read(seen.pid, "status"))
    return found is not None and bool(int(found[1], 16) & 1) and adopted_by_init(seen)


def leads_a_session(seen: Seen) -> bool:
    return int(seen.enclosure.stat(seen.pid)[3]) == seen.pid and adopted_by_init(seen)


def is_stopped(seen: Seen) -> bool:
    return seen.enclosure.state_of(seen.pid) == "T" and adopted_by_init(seen)


def is_a_zombie_with_threads(seen: Seen) -> bool:
    threads = re.search(rb"Threads:\t(\d+)", seen.enclosure.read(seen.pid, "status"))
    return seen.enclosure.state_of(seen.pid) == "Z" and threads is not None and int(threads[1]) > 1


def is_init_of_another_namespace(seen: Seen) -> bool:
    outer = seen.enclosure.outer(seen.pid)
    return outer is not None and harness.pids_within(outer)[1:] == [seen.pid, 1]


def says(word: str) -> Claim:
    """Claim that a word of the command line contains ``word``, and that init has adopted the process."""
    return lambda seen: adopted_by_init(seen) and word in " ".join(seen.enclosure.argv(seen.pid))


def has_workers_below(name: str) -> Claim:
    """Claim that the parents of all workers are processes of that name, children of the trainer."""

    def claim(seen: Seen) -> bool:
        parents = [seen.enclosure.parent_of(pid) for pid in seen.workers]
        return all(
            seen.enclosure.comm(parent) == name and seen.enclosure.parent_of(parent) == seen.pid
            for parent in parents
        )

    return claim


def has_adopted(seen: Seen) -> bool:
    """Claim that of the workers two are children of another one, which is ours by adoption."""
    parents = [seen.enclosure.parent_of(pid) for pid in seen.workers]
    return len(parents) == 5 and sorted(parents.count(pid) for pid in set(parents)) == [2, 3]


def program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


def module(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"the module {name} is not installed"


@dataclass(frozen=True)
class Animal:
    """One case. ``script`` is run by a shell whose $1 is a Python, $2 the trainer, $3 a directory of the animal's own."""

    name: str
    script: str
    claim: Claim
    workers: int = 0
    why_not: Callable[[], str] = lambda: ""
    shell: str = "sh"
    environment: dict[str, str] = field(default_factory=dict)


def detached(name: str, arguments: str, claim: Claim = adopted_by_init, workers: int = 0) -> Animal:
    return Animal(name, f'setsid -f "$1" "$2" {arguments} </dev/null >/dev/null', claim, workers)


def nohup(kind: str, workers: int = 2) -> Animal:
    script = f'nohup "$1" "$2" {kind} </dev/null >/dev/null 2>&1 &'
    return Animal(f"nohup-{kind}", script, ignores_hangups, workers)


WRAPPER = 'printf \'#!/bin/sh\\n%s\\n\' "$WRAPPED" >"$3/wrapper"; chmod +x "$3/wrapper"; '


def wrapped(name: str, wrapper: str, claim: Claim, why_not: Callable[[], str] = lambda: "") -> Animal:
    """A live pool whose workers are children of ``wrapper``, not of their pool's parent."""
    return Animal(
        f"workers-below-{name}",
        WRAPPER + 'REAPER_TEST_WRAPPER="$3/wrapper" setsid -f "$1" "$2" wrapped </dev/null >/dev/null',
        claim,
        2,
        why_not,
        environment={"WRAPPED": wrapper.format(python=sys.executable)},
    )


ANIMALS = [
    nohup("alone", 0),
    *map(nohup, ("fork", "spawn", "forkserver", "loky")),
    nohup("nested", 3),
    nohup("preforks", 6),
    detached("setsid", "alone", leads_a_session),
    Animal(
        "disown",
        'set -m; "$1" "$2" alone </dev/null >/dev/null & disown; exit 0',
        adopted_by_init,
        why_not=program("bash"),
        shell="bash",
    ),
    Animal(
        "tmux",
        "tmux -S \"$3/socket\" -f /dev/null new-session -d \"exec '$1' '$2' spawn\"",
        below("tmux: server"),
        2,
        program("tmux"),
    ),
    Animal(
        "screen",
        'mkdir -m 700 "$3/screens" && SCREENDIR="$3/screens" screen -c /dev/null -dmS training "$1" "$2" loky',
        below("screen"),
        2,
        program("screen"),
    ),
    Animal("double-fork", '"$1" "$2" alone --become double-fork >/dev/null', adopted_by_init),
    Animal("double-fork-loky", '"$1" "$2" loky --become double-fork >/dev/null', adopted_by_init, 2),
    Animal("python-daemon", '"$1" "$2" alone --become python-daemon', adopted_by_init),
    Animal("python-daemon-spawn", '"$1" "$2" spawn --become python-daemon', adopted_by_init, 2),
    Animal("forked-child-whose-parent-left", '"$1" "$2" leaves-a-fork >/dev/null', adopted_by_init),
    detached("stopped-leader", "spawn --become stopped", is_stopped, 2),
    detached("stopped-leader-loky", "loky --become stopped", is_stopped, 2),
    detached("zombie-leader", "spawn --become headless", is_a_zombie_with_threads, 2),
    detached("zombie-leader-loky", "loky --become headless", is_a_zombie_with_threads, 2),
    detached("subreaper", "adopts", has_adopted, 5),
    Animal(
        "container",
        'setsid -f unshare --pid --fork --mount-proc "$1" "$2" spawn </dev/null >/dev/null',
        is_init_of_another_namespace,
        2,
    ),
    Animal(
        "cron", 'sh -c \'"$1" "$2" spawn; true\' sh "$1" "$2" </dev/null >/dev/null &', adopted_below("sh"), 2
    ),
    Animal("at", "echo \"'$1' '$2' loky; true\" | setsid -f sh >/dev/null", adopted_below("sh"), 2),
    Animal(
        "strace",
        'setsid -f strace -f -qq -e trace=none -o /dev/null "$1" "$2" spawn </dev/null >/dev/null',
        lambda seen: traced(seen) and below("strace")(seen),
        2,
        program("strace"),
    ),
    Animal(
        "gdb",
        'setsid -f gdb -nx -q -batch -ex "set startup-with-shell off" -ex run --args "$1" "$2" alone </dev/null >/dev/null 2>&1',
        lambda seen: traced(seen) and below("gdb")(seen),
        0,
        program("gdb"),
    ),
    wrapped("a-shell", '"{python}" "$@"; exit $?', has_workers_below("wrapper")),
    wrapped(
        "strace",
        'exec strace -qq -e trace=none -o /dev/null "{python}" "$@"',
        has_workers_below("strace"),
        program("strace"),
    ),
    detached("pattern-in-arguments", f"alone -- -m {LOKY} -c '{SPAWN}' --multiprocessing-fork", says(LOKY)),
    Animal(
        "pattern-in-the-path",
        f'mkdir "$3/{LOKY}" && ln -s "$2" "$3/{LOKY}/multiprocessing.spawn.py" &&'
        f' setsid -f "$1" "$3/{LOKY}/multiprocessing.spawn.py" loky </dev/null >/dev/null',
        says(LOKY),
        2,
    ),
    Animal(
        "pattern-that-grep-looks-for",
        f'exec 3<&-; {{ "$1" "$2" alone --loud | grep -c "{SPAWN}" >/dev/null; }} &',
        lambda seen: "grep" in [seen.enclosure.comm(pid) for pid in seen.enclosure.pids()],
    ),
    Animal(
        "gunicorn",
        'cd "$3" && "$1" -m gunicorn --daemon --workers 1 --bind "unix:$3/socket" --chdir "${2%/*}" served:application',
        says("gunicorn"),
        3,
        module("gunicorn"),
    ),
    Animal(
        "celery",
        'cd "${2%/*}" && setsid -f "$1" -m celery --app served.tasks worker --pool prefork --concurrency 1 --loglevel ERROR'
        " </dev/null >/dev/null",
        says("celery"),
        3,
        module("celery"),
    ),
    Animal(
        "jupyter-kernel",
        'cd "${2%/*}" && setsid -f "$1" -m ipykernel_launcher -f "$3/kernel.json"'
        " --IPKernelApp.exec_lines='import trainer; trainer.train_within(\"loky\")' </dev/null >/dev/null",
        says("ipykernel_launcher"),
        2,
        module("ipykernel"),
    ),
    Animal(
        "looks-like-a-jupyter-kernel",
        'ln -s "$2" "$3/ipykernel_launcher.py" && ln -s "${2%/*}/stage.py" "$3/stage.py" && cd "$3" &&'
        ' setsid -f "$1" -m ipykernel_launcher loky -- -f "$3/kernel.json" </dev/null >/dev/null',
        says("ipykernel_launcher"),
        2,
    ),
]


class Zoo:
    """All of them in one enclosure, with a daemon that would like to end them."""

    def __init__(self, enclosure: Enclosure, animals: Sequence[Animal] = tuple(ANIMALS)) -> None:
        self.enclosure = enclosure
        self.seen: dict[str, Seen] = {}
        self.why_not: dict[str, str] = {}
        self._pipe = enclosure.scratch.file("up")
        os.mkfifo(self._pipe)
        self._descriptor = os.open(self._pipe, os.O_RDWR | os.O_CLOEXEC)  # read and write: never at its end
        self._animals = {animal.name: animal for animal in animals}
        for animal in animals:
            if reason := animal.why_not():
                self.why_not[animal.name] = reason
            else:
                self._start(animal)
        self._wait_up()

    def _mark(self, name: str) -> str:
        return f"{self.enclosure.run}.{name}"

    def _start(self, animal: Animal) -> None:
        directory = self.enclosure.scratch.directory("a")
        self.enclosure.start(
            [animal.shell, "-c", animal.script, animal.shell, sys.executable, TRAINER, directory],
            TERM="xterm",
            REAPER_TEST_ANIMAL=animal.name,
            REAPER_TEST_UP=self._pipe,
            REAPER_TEST_DIR=directory,
            **{FAMILY_MARK: self._mark(animal.name)},
            **animal.environment,
        )

    def _wait_up(self) -> None:
        """Wait until every animal has said that it is up; one that has not is no reason to judge the others."""
        end_s, unread = time.monotonic() + UP_WITHIN_S, b""
        missing = self._animals.keys() - self.why_not.keys()
        while missing and (left_s := end_s - time.monotonic()) > 0:
            ready, _, _ = select.select([self._descriptor], [], [], left_s)
            if not ready:
                break
            *lines, unread = (unread + os.read(self._descriptor, 65536)).split(b"\n")
            for line in lines:
                told = json.loads(line)
                missing.discard(told["animal"])
                self.seen[told["animal"]] = self._see(told)

    def _see(self, told: dict[str, Any]) -> Seen:
        """Hold every process that an animal named, by what its pid is in the namespace that it names it for."""
        family = harness.marked(FAMILY_MARK, self._mark(told["animal"]))
        names = {harness.pids_within(pid)[-1]: pid for pid in family}
        outer = [names[pid] for pid in (told["pid"], *told["workers"])]
        pids = [harness.pids_within(pid)[1] for pid in outer]
        held = {pid: os.pidfd_open(ours) for pid, ours in zip(pids, outer, strict=True)}
        return Seen(self.enclosure, pids[0], pids[1:], held)

    def close(self) -> None:
        for seen in self.seen.values():
            seen.close()
        os.close(self._descriptor)
